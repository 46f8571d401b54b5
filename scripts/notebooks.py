"""Executes the notebooks of recipes/notebooks anew, each in a fresh kernel, and stores what they show.

    python scripts/notebooks.py [recipes/notebooks/01_quick_start.ipynb ...]

What would differ from one run to the next without meaning anything (times of execution, how output was cut
into pieces, the version of Python) is not stored.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).parents[1] / "recipes" / "notebooks"
TIMEOUT = 600  # seconds, of one cell
# Progress is no result, and the warning is about bars that it would be drawn with.
ENVIRONMENT = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def execute(path: Path, folder: Path) -> NotebookNode:
    """Return a notebook with what its cells show in a fresh kernel.

    Args:
        path: The notebook; it is only read.
        folder: Where the kernel works.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | ENVIRONMENT)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
    }
    return notebook


def processor_seconds() -> float:
    """Return what the processes that this one started, and that have ended, took of the processors."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Execute notebooks and store them with their outputs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="all unless given")
    for path in parser.parse_args().notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        start, used = time.perf_counter(), processor_seconds()
        with TemporaryDirectory() as folder:
            notebook = execute(path, Path(folder))
        nbformat.write(notebook, path)
        seconds = time.perf_counter() - start
        print(f"{path.name}: {seconds:.0f} s, {processor_seconds() - used:.0f} s of processor time")


if __name__ == "__main__":
    main()
