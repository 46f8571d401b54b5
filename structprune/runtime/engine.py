"""Runs a model with fewer tokens: hooks that gather what each block computes, and put it back at the end.

The model makes masks and rotary tables for all tokens, once; every block gets those of the tokens that it
computes. Between forwards the cache alone knows what was dropped; what belongs to one forward is kept per
thread. No class is changed and nothing is registered.

    prompt -> blocks before: all tokens -> drop: choose, gather -> blocks after: kept tokens -> scatter
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from structprune.errors import UsageError
from structprune.models.arch import arch_of, blocks
from structprune.models.shapes import cache_of
from structprune.runtime.attention import PROJECTIONS, AttentionInput
from structprune.runtime.cache import check_cache
from structprune.runtime.drop import Chooser, Drop
from structprune.runtime.forward import Forward
from structprune.runtime.images import Features, ImageFeatures, find_images, with_newlines
from structprune.runtime.refusals import Guarded, check_computed_once, check_runs
from structprune.runtime.tower import FewerFeatures, TowerCall
from structprune.runtime.tower_attention import TowerAttention
from structprune.runtime.tower_merge import LayerHooks, mergeable_layers
from structprune.runtime.tower_seen import TowerRun, layer_number, tower_attentions


class _Local(threading.local):
    """What belongs to one forward of one thread; a copy has nothing of it."""

    run: Forward | None = None
    features: Sequence[Features] = ()
    tower: TowerRun | None = None
    ids: Tensor | None = None
    labels: Tensor | None = None
    paused: int = 0
    watched: dict[int, tuple[Tensor, Tensor]] | None = None

    def __reduce__(self) -> tuple[type["_Local"], tuple[()]]:
        return type(self), ()


class Engine:
    """The hooks of one model, and what its forwards have in common.

    Args:
        model: A vision-language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        check_runs(model)
        arch = arch_of(model)
        self.drops: dict[str, list[Drop]] = {}
        self._local = _Local()
        self._handles: list[Any] = []
        self._replaced: list[tuple[nn.Module, str, object]] = []
        self._root = model
        self._base: Any = model.base_model
        self._language: Any = model.get_submodule(arch.blocks.rpartition(".")[0])
        self._blocks = [block for _, block in blocks(model, arch)]
        self._attention, self._mlp = arch.attention, arch.mlp
        self._tower = tower_attentions(self._base)

    # What is put on the model, and taken off it again.

    def install(self) -> None:
        """Put the hooks on the model."""
        hook = self._hook
        hook(self._root, before=self._begin_loss)
        hook(self._base, before=self._begin, after=self._end)
        hook(self._language, before=self._begin_language, after=self._end_language)
        for index, block in enumerate(self._blocks):
            hook(block, before=partial(self._enter_block, index))
            attention = block.get_submodule(self._attention)
            hook(attention, before=partial(self._note_attention, index), after=self._leave_attention)
            for name in PROJECTIONS & {*attention._modules}:
                hook(attention.get_submodule(name), after=partial(self._note_projected, name))
            mlp = block.get_submodule(self._mlp)
            hook(mlp, before=partial(self._enter_mlp, index), after=partial(self._leave_mlp, index))
        for index, attention in enumerate(self._tower):
            hook(attention, before=partial(self._note_tower, index))
        for index, layer in enumerate(mergeable_layers(self._base)):
            for module, before, after in LayerHooks(index, self._tower_call).on(layer):
                hook(module, before, after)
        if hasattr(self._base, "multi_modal_projector"):
            hook(self._base.multi_modal_projector, after=self._leave_projector)
        features = ImageFeatures(self._base, self._note_features, self.fewer, self._looking)
        self._replace(self._base, "get_image_features", features)
        self._replace(self._root, "generate", Guarded(self._root, self._is_paused))
        if hasattr(self._language, "_deepstack_process"):
            self._replace(self._language, "_deepstack_process", self._deepstack)

    def remove(self) -> None:
        """Take everything off the model again."""
        for handle in self._handles:
            handle.remove()
        for module, name, before in self._replaced:
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
        self._handles, self._replaced = [], []

    def _hook(self, module: nn.Module, before: Any = None, after: Any = None) -> None:
        if before is not None:
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if after is not None:
            # Also after an exception: nothing of a forward that failed may meet the next one. Before others,
            # such as those with which transformers notes what layers return.
            made = module.register_forward_hook(after, prepend=True, with_kwargs=True, always_call=True)
            self._handles.append(made)

    def _replace(self, module: nn.Module, name: str, by: object) -> None:
        self._replaced.append((module, name, vars(module).get(name)))
        setattr(module, name, by)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Drop nothing in this thread, for the length of a `with`."""
        self._local.paused += 1
        try:
            yield
        finally:
            self._local.paused -= 1

    def _is_paused(self) -> bool:
        return self._local.paused > 0

    @contextmanager
    def watching(self) -> Iterator[dict[int, tuple[Tensor, Tensor]]]:
        """Note which visual tokens the last forward with an image computes, in this thread, inside a `with`.

        Yields:
            Number of the block -> those of its attention and of its feed-forward, bool [batch, tokens].
        """
        self._local.watched = {}
        try:
            yield self._local.watched
        finally:
            self._local.watched = None

    # One forward, from outside to inside.

    def _begin_loss(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._local.labels = None
        if kwargs.get("labels") is None:
            return None
        # Which labels nobody predicts is known only after the blocks: the loss gets a copy, changed then.
        self._local.labels = kwargs["labels"].clone()
        return args, {**kwargs, "labels": self._local.labels}

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        local = self._local
        local.ids = kwargs.get("input_ids", args[0] if args else None)
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        local.features = [] if encoded is None else Features.of(encoded)
        if local.ids is None and not local.paused and kwargs["inputs_embeds"].shape[1] > 1:
            raise UsageError(
                "inputs_embeds without input_ids: which of the tokens are visual is not known",
                hint="pass input_ids, or run the model under structprune.paused(model)",
            )

    def _end(self, *_: object) -> None:
        self._local.ids, self._local.features, self._local.labels = None, (), None

    def _note_features(self, features: Sequence[Features]) -> None:
        # Outside a forward they are for a later one, which brings them with it.
        if self._local.ids is not None:
            self._local.features = features

    @contextmanager
    def _looking(self, run: TowerRun) -> Iterator[None]:
        self._local.tower = None if self._local.paused else run
        try:
            yield
        finally:
            self._local.tower = None
            if not any(getattr(one, "reads_pixels", False) for one in self._choosers()):
                run.pixels = None

    def _note_tower(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        run = self._local.tower
        layers = (layer for one in self._choosers() for layer in one.tower_layers)
        wanted = (layer_number(layer, len(self._tower)) for layer in layers)
        # What is left of merged patches is none of the image's any more.
        if run is not None and run.call is None and index in wanted:
            states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            run.note(index, TowerAttention(module, states.detach(), kwargs))

    def _choosers(self) -> Iterator[Chooser]:
        return (drop.chooser for drops in self.drops.values() for drop in drops)

    def _tower_call(self) -> TowerCall | None:
        return None if self._local.tower is None else self._local.tower.call

    def _leave_projector(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run = self._local.tower
        return None if run is None or run.call is None or output is None else run.among_all(output)

    # No property: the bound method goes along when the model is copied, a closure would stay behind.
    def fewer(self) -> FewerFeatures | None:
        """Return what lets the vision tower compute fewer features; None where nothing does now."""
        every = (drop.images for drops in self.drops.values() for drop in drops)
        return None if self._local.paused else next((one for one in every if one is not None), None)

    def _begin_language(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        local = self._local
        states, cache = kwargs["inputs_embeds"], cache_of(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        local.run = Forward(states.shape[0], states.shape[1], past, states.device)
        if local.paused or local.ids is None or states.shape[1] == 1:
            return
        mask, real = kwargs.get("attention_mask"), None
        if isinstance(mask, Tensor) and mask.ndim == 2:
            real = mask[:, -states.shape[1] :].bool()
        found = find_images(local.ids, self._root.config, local.features, real)
        if found is not None and isinstance(mask, Tensor | dict) and real is None:
            raise UsageError(
                "an attention mask that is not [batch, tokens]: which tokens are padding is not known",
                hint="pass the processor's attention_mask",
            )
        if found is not None:
            check_computed_once(self._blocks)
            if cache is not None:
                check_cache(cache)
        newline = getattr(self._base, "image_newline", None)
        local.run.images = None if found is None else with_newlines(found, states, newline)

    def _enter_block(
        self, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        run = self._local.run
        if run is None:
            return None
        states, cache = args[0], cache_of(kwargs)
        for drop in self._drops(index, within=False):
            states = run.choose(drop, states)
        if run.pending is not None:
            states = run.move_to(run.pending, states)
        if self._local.watched is not None and run.images is not None:
            self._local.watched[index] = (run.visual_tokens(run.images),) * 2
        run.entered.append(run.kept)
        changed = run.narrowed(index, len(self._blocks), cache, kwargs, self._language)
        return None if changed is None else ((states, *args[1:]), changed)

    def _note_attention(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        run = self._local.run
        if run is None or run.images is None:
            return
        run.passed, run.watched = [], any(drop.watches for drop in self._drops(index + 1, within=False))
        if not self._drops(index, within=True) and not self._drops(index + 1, within=False):
            run.read = None
            return
        cache = cache_of(kwargs)
        states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        # A cache that was not told how many blocks there are grows with them.
        layer = cache.layers[index] if cache is not None and index < len(cache.layers) else None
        run.read = AttentionInput(
            module, states, kwargs["position_embeddings"], kwargs.get("attention_mask"), layer
        )

    def _leave_attention(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        run = self._local.run
        if run is not None and run.watched and run.read is not None and output is not None:
            run.passed = [(run.read.states, output[0])]

    def _note_projected(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read = None if self._local.run is None else self._local.run.read
        # What was wrapped since then, such as by an adapter, is only a part of the projection.
        if read is not None and output is not None and read.module._modules[name] is module:
            read.projected[name] = output

    def _enter_mlp(self, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._local.run
        if run is None:
            return None
        for drop in self._drops(index, within=True):
            run.choose(drop, args[0])
        if self._local.watched is not None and run.images is not None:
            self._local.watched[index] = self._local.watched[index][0], run.visual_tokens(run.images)
        return None if run.pending is None else ((run.part_of(run.pending, args[0]), *args[1:]), kwargs)

    def _leave_mlp(self, index: int, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run = self._local.run
        if run is None or output is None:
            return None
        read = args[0]
        if run.pending is not None:
            read, output = run.back(run.pending, read), run.back(run.pending, output)
        if run.watched:
            run.passed.append((read, output))
        return None if run.pending is None else output

    def _deepstack(self, states: Tensor, visual: Tensor, features: Tensor) -> Any:
        """Add features of the vision tower to the states of those tokens that are still there."""
        run = self._local.run
        if run is None or run.kept is None:
            return type(self._language)._deepstack_process(self._language, states, visual, features)
        whole = states.new_zeros(*visual.shape, states.shape[-1])
        whole[visual.to(states.device)] = features.to(states)
        return states + run.kept.gather(run.merged(whole))

    def _end_language(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        run, self._local.run = self._local.run, None
        if run is None or output is None or (run.kept is None and run.pending is None):
            return None
        if self._local.labels is not None:
            run.forget_labels(self._local.labels)
        return run.filled(output)

    def _drops(self, index: int, *, within: bool) -> list[Drop]:
        every = (drop for drops in self.drops.values() for drop in drops)
        return [drop for drop in every if drop.block == index and drop.within == within]
