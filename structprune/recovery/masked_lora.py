"""LoRA whose change is masked while it trains: W + (W != 0) * scaling * B @ A.

Plain LoRA adds B @ A to every weight: merging it revives the removed ones, and masking after the merge moves
the logits that were trained. Here the layer computes with the masked sum, and merging changes nothing.

Linear layers and GPT-2's Conv1D go through PEFT, with a layer class of our own, for PEFT has no masked one.
Fused experts, which are parameters and no modules, get the same change by parametrisation.

Source: LoRA, Hu et al. 2021, https://arxiv.org/abs/2106.09685
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from structprune.checkpoint.adapter import LowRankChange, add_masked, round_kept
from structprune.errors import EnvironmentFailure, InputError, UsageError
from structprune.models.walk import replaced_forward
from structprune.recovery.masked_experts import MaskedExperts, built_once, in_full_precision

ADAPTER = "default"

N = TypeVar("N", int, float)


class MaskedProduct(torch.autograd.Function):
    """Multiply with W + (W != 0) * scaling * B @ A, and keep none of that sum for the backward pass.

    The sum is made in float32 and multiplied in the dtype of the inputs.

    Autograd would save the summed weight of every layer, a second model in memory; to rebuild it costs only
    rank / tokens of one product.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
        """Return the product, shape [..., out].

        Args:
            ctx: What the backward pass needs.
            inputs: Shape [..., in].
            weight: Frozen, shape [out, in]; its zeros are the removed weights.
            a: Shape [rank, in].
            b: Shape [out, rank].
            scaling: What B @ A is multiplied with.
        """
        ctx.save_for_backward(inputs, weight, a, b)
        ctx.scaling = scaling
        return nn.functional.linear(inputs, _changed(weight, a, b, scaling).to(inputs.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        """Return the gradients of the inputs and of both factors.

        Args:
            ctx: What the forward pass left.
            gradients: One, shape [..., out].
        """
        inputs, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        of_inputs = None
        if ctx.needs_input_grad[0]:
            of_inputs = gradient @ _changed(weight, a, b, ctx.scaling).to(gradient.dtype)
        of_sum = (gradient.flatten(0, -2).T @ inputs.flatten(0, -2)).to(weight.dtype)
        of_sum = of_sum.masked_fill_(weight == 0, 0.0).mul_(ctx.scaling)
        return of_inputs, None, b.T @ of_sum, of_sum @ a.T, None


def _changed(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    with in_full_precision(weight):
        return add_masked(weight, (b @ a) * scaling)


def _multiply(inputs: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    kind = inputs.device.type
    if torch.is_autocast_enabled(kind):
        inputs = inputs.to(torch.get_autocast_dtype(kind))
    # Some versions of torch give it types.
    multiply: Callable[..., Tensor] = MaskedProduct.apply
    return multiply(inputs, weight, a, b, scaling)


def _masked_layer() -> type[nn.Module]:
    """Return PEFT's LoRA layer with the change masked; made on demand, for PEFT takes seconds to import."""
    from peft.tuners.lora import Linear

    class MaskedLora(Linear):  # type: ignore[misc]  # PEFT is optional, so its types are not read
        """A LoRA layer that never reaches a weight which is zero."""

        rounding: torch.dtype | None = (
            None  # the dtype that the result will be stored in; None while training
        )

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Return the layer's output, shape [..., out], for inputs of shape [..., in]."""
            base = self.get_base_layer()
            weight = base.weight.T if isinstance(base, Conv1D) else base.weight
            a, b, scaling = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
            if self.rounding is None:
                product = _multiply(x, weight, a, b, scaling)
            else:
                merged = round_kept(_changed(weight, a, b, scaling), weight, self.rounding)
                product = nn.functional.linear(x, merged.to(weight.dtype))
            return product if base.bias is None else product + base.bias

        def factors(self) -> LowRankChange:
            """Return the two factors in the layout of the parameter."""
            a, b, scaling = self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight, self.scaling[ADAPTER]
            if isinstance(self.get_base_layer(), Conv1D):
                return LowRankChange(a.T, b.T, scaling)
            return LowRankChange(b, a, scaling)

    return MaskedLora


class MaskedLayers:
    """The trainable layers put into a model for a while; `remove` takes them out again.

    Args:
        model: A model in float32; changed in place, all its own parameters are frozen.
        names: The parameters to change: weights of linear layers or of Conv1D, and fused experts.
        rank: Directions of each change.
        alpha: The scaling of each change is alpha / rank.
        ranks: Another rank for the modules whose name ends in a match of this regular expression.
        alphas: Another alpha, in the same way.

    Raises:
        InputError: A tensor is of a kind that cannot be trained this way; it is named. Or there is none.
        UsageError: A pattern of `ranks` or `alphas` matches none of the tensors.
        EnvironmentFailure: PEFT is not installed, or this version has no place for a layer of our own.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        *,
        rank: int,
        alpha: int,
        ranks: Mapping[str, int],
        alphas: Mapping[str, float] | None = None,
    ) -> None:
        _require_peft()
        self._model = model
        self._trainable_before = {name: p.requires_grad for name, p in model.named_parameters()}
        self._tuner: Any = None
        self._layers: dict[str, Any] = {}
        self._forwards = ExitStack()
        if not names:
            raise InputError(
                f"{type(model).__name__} has no linear layer in its blocks: nothing can be recovered",
                hint="give a language model whose decoder blocks hold linear layers",
            )
        layers, experts = _sort(model, names)
        targets = [name.rpartition(".")[0] for name in layers]
        alphas = alphas or {}
        _check_patterns("ranks", ranks, [*targets, *experts])
        _check_patterns("alphas", alphas, [*targets, *experts])
        model.requires_grad_(False)
        if layers:
            # PEFT warns about patterns that reach none of its layers; those of fused experts would be such.
            config = {
                "r": rank,
                "lora_alpha": alpha,
                "rank_pattern": {key: own for key, own in ranks.items() if _reaches(key, targets)},
                "alpha_pattern": {key: own for key, own in alphas.items() if _reaches(key, targets)},
            }
            self._tuner = _inject(model, targets, config)
            self._layers |= {name: model.get_submodule(t) for name, t in zip(layers, targets, strict=True)}
        for name in experts:
            owner, _, attribute = name.rpartition(".")
            weight = model.get_parameter(name)
            change = MaskedExperts(weight, _own(ranks, name, rank), _own(alphas, name, alpha))
            parametrize.register_parametrization(model.get_submodule(owner), attribute, change, unsafe=True)
            self._layers[name] = change
        for owner in {name.rpartition(".")[0]: None for name in experts}:
            module = model.get_submodule(owner)
            self._forwards.enter_context(replaced_forward(module, built_once(module.forward)))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in the changed model."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def factors(self) -> dict[str, LowRankChange]:
        """Return copies of all factors as they are now, by parameter name."""
        found = {name: layer.factors() for name, layer in self._layers.items()}
        return {
            name: LowRankChange(f.left.detach().clone(), f.right.detach().clone(), f.scaling)
            for name, f in found.items()
        }

    @contextmanager
    def rounded(self, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
        """Compute with weights rounded to the dtypes they will be stored in; for measuring, not for training.

        Args:
            dtypes: By parameter name.
        """
        for name, layer in self._layers.items():
            layer.rounding = dtypes[name]
        try:
            yield
        finally:
            for layer in self._layers.values():
                layer.rounding = None

    def remove(self) -> None:
        """Put the model's own modules back, with their weights as they were; nothing is merged."""
        self._forwards.close()
        for name, layer in self._layers.items():
            if isinstance(layer, MaskedExperts):
                owner, _, attribute = name.rpartition(".")
                parametrize.remove_parametrizations(
                    self._model.get_submodule(owner), attribute, leave_parametrized=False
                )
        if self._tuner is not None:
            self._tuner.unload()
        for name, parameter in self._model.named_parameters():
            parameter.requires_grad_(self._trainable_before[name])


def _sort(model: nn.Module, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the names into those that PEFT handles and fused experts; refuse all else by name."""
    layers, experts = [], []
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        # A subclass with a forward of its own does more with its weight than multiply.
        plain = type(owner).forward in (nn.Linear.forward, Conv1D.forward)
        if plain and attribute == "weight":
            layers.append(name)
        elif not isinstance(owner, nn.Linear) and model.get_parameter(name).ndim == 3:
            experts.append(name)
        else:
            raise InputError(
                f"{name} belongs to a {type(owner).__name__}, which cannot be recovered",
                hint="linear layers, Conv1D and fused experts can; leave this tensor out of the masks",
            )
    return layers, experts


def _require_peft() -> None:
    """Refuse to begin without a PEFT that can be used, before anything is changed."""
    try:
        import peft
    except ModuleNotFoundError:
        raise EnvironmentFailure("recovery needs PEFT", hint="pip install 'structprune[recover]'") from None
    # The one private name of PEFT in use: there is no public place for a layer class of one's own.
    if not hasattr(peft.LoraConfig, "_register_custom_module"):
        raise EnvironmentFailure(
            f"peft {peft.__version__} has no place for a layer of our own", hint="pip install 'peft==0.21.*'"
        )


def _inject(model: nn.Module, targets: list[str], ranks: Mapping[str, Any]) -> Any:
    """Replace the target modules by masked LoRA layers; return PEFT's tuner, which can undo it."""
    import peft

    # PEFT matches a text with `fullmatch`, a list also by suffix; only the text means these and no others.
    exact = "|".join(target.replace(".", r"\.") for target in targets)
    config = peft.LoraConfig(target_modules=exact, **ranks)
    layer = _masked_layer()
    config._register_custom_module({nn.Linear: layer, Conv1D: layer})
    return peft.LoraModel(model, config, ADAPTER)


def _own(patterns: Mapping[str, N], name: str, default: N) -> N:
    """Return the value of the first pattern that matches a tensor's name."""
    return next((value for pattern, value in patterns.items() if _reaches(pattern, [name])), default)


def _reaches(pattern: str, names: Sequence[str]) -> bool:
    """Tell whether a pattern matches any of the modules, by PEFT's own matching."""
    from peft.utils.other import get_pattern_key

    try:
        # It returns the name itself when nothing matches.
        return any(get_pattern_key([pattern], name) == pattern for name in names)
    except re.error as error:
        raise UsageError(
            f"{pattern!r} is not a regular expression: {error}",
            hint="keys of `ranks` and `alphas` match the end of a module's name; \\. is a dot",
        ) from None


def _check_patterns(option: str, patterns: Mapping[str, float], names: Sequence[str]) -> None:
    """Refuse a pattern that reaches nothing: it would be a misspelt one."""
    for pattern in patterns:
        if not _reaches(pattern, names):
            raise UsageError(
                f"{option}: {pattern!r} matches no recovered module",
                hint=f"modules are named like {names[0]}",
            )
