"""Processes that die in the middle: killed at one of their calls to the system; or many of them at once."""

import os
import signal
from collections.abc import Callable
from typing import Any

CHANGING = ("open", "write", "fsync", "link", "replace", "unlink", "rmdir", "mkdir", "close")


def is_killed_at(number: int, action: Callable[[], object]) -> bool:
    """Run an action in a fork that kills itself before its call `number` that may change the disk.

    A write that it dies in has written half. Returns False where the action ended before that call.
    """
    child = os.fork()
    if child == 0:
        code = 3
        try:
            _count_calls(number)
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the action failed in the fork"
    return False


def crowd(size: int, action: Callable[[], bool]) -> list[bool]:
    """Run an action in so many forks that begin at the same moment; return what each of them told."""
    gate, go = os.pipe()
    children = []
    for _ in range(size):
        child = os.fork()
        if child == 0:
            code = 3
            try:
                os.close(go)
                os.read(gate, 1)
                code = 0 if action() else 1
            finally:
                os._exit(code)
        children.append(child)
    os.close(gate)
    os.close(go)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert set(codes) <= {0, 1}, codes
    return [code == 0 for code in codes]


def _count_calls(number: int) -> None:
    calls = 0

    def wrap(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            # Only what opens a file to write it changes anything.
            if name != "open" or args[1] & (os.O_CREAT | os.O_TRUNC):
                calls += 1
                if calls == number:
                    if name == "write":
                        real(args[0], bytes(args[1])[: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in CHANGING:
        setattr(os, name, wrap(name, getattr(os, name)))
