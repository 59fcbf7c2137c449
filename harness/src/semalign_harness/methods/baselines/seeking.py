"""SEEKING: adapters that start at the most sensitive windows of the source's weights."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from semalign_attribution import Batch, DecoderView, supervised, undisturbed
from semalign_geometry import accumulation_dtype, answer_nll
from semalign_geometry.base import SemalignError
from semalign_train import trained
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from ...data.sides import batches_of
from .._method import MethodContext
from .seeking_settings import SoughtLora

# Matrices are outputs × inputs throughout, as in nn.Linear; those of a Conv1D are read transposed.


class Window(NamedTuple):
    """Corner of a window."""

    top: int
    """Its first row."""
    left: int
    """Its first column."""


class LowRank(NamedTuple):
    """A matrix as the product b a."""

    b: Tensor
    """(outputs, rank)."""
    a: Tensor
    """(rank, inputs)."""


def sought(context: MethodContext, target: DecoderView, trainable: SoughtLora) -> dict[str, LowRank]:
    """Cut the adapters out of the source's matrices, by their sensitivity on the attribution rows."""
    rows = batches_of(context.attribution_rows, 1, "source")
    source = DecoderView(context.load_source())
    check_fit(source, target, trainable.modules)
    scores = sensitivities(source, context.progress.progress("seek in the source", rows))
    kept = most_sensitive([math.fsum(map(_total, layer.values())) for layer in scores], target.depth)
    context.progress.note(f"layers {', '.join(map(str, kept))} of the source's {source.depth} are kept")
    return extracted(source, target, scores, kept, trainable)


def sensitivities(view: DecoderView, examples: Iterable[Batch]) -> list[dict[str, Tensor]]:
    """S = Σ over examples of |θ ⊙ ∂L/∂θ|, elementwise, of the linear weights of each layer, by their modules' names.

    L is the mean NLL of the example's answer tokens. Each gradient is dropped at once: only S has the weights' size.

    Args:
        view: the model, which is left as it was.
        examples: batches of one example each.

    Returns:
        One mapping for each layer, of matrices in float32 (float64 for float64 models).
    """
    modules = [linear_modules(layer) for layer in view.layers]
    scores = [{name: _zeros_for(module) for name, module in layer.items()} for layer in modules]
    with undisturbed(view.model), contextlib.ExitStack() as stack:
        for layer, of_layer in zip(modules, scores, strict=True):
            for name, module in layer.items():
                module.weight.requires_grad_(True)
                handle = module.weight.register_post_accumulate_grad_hook(_adding_to(of_layer[name]))
                stack.callback(handle.remove)
        for batch in examples:
            positions = supervised(batch)
            with torch.enable_grad():
                final = view.trace(batch).final
                assert final is not None
                hidden = final[positions.mask.to(view.device)]
                answer_nll(hidden, view.head, positions.labels.to(view.device)).mean().backward()
    return [
        {name: outputs_first(module, of_layer[name]) for name, module in layer.items()}
        for layer, of_layer in zip(modules, scores, strict=True)
    ]


def most_sensitive(totals: Sequence[float], count: int) -> list[int]:
    """The `count` layers of the highest totals, counted from 1, shallow to deep; of equal ones the shallower.

    Raises:
        SemalignError: a total is not finite.
    """
    if not all(map(math.isfinite, totals)):
        raise SemalignError("gradients of the source's weights are not finite: set source.dtype=float32")
    best = sorted(range(1, len(totals) + 1), key=lambda layer: -totals[layer - 1])[:count]
    return sorted(best)


def best_window(scores: Float[Tensor, "outputs inputs"], rows: int, columns: int) -> Window:
    """Find the contiguous window of rows × columns with the largest sum; of equal ones the first by rows.

    Sums come from two-dimensional prefix sums in float64.
    """
    assert 1 <= rows <= scores.shape[0] and 1 <= columns <= scores.shape[1]
    prefix = pad(scores.double().cumsum(0).cumsum(1), (1, 0, 1, 0))
    strips = prefix[rows:] - prefix[:-rows]
    sums = strips[:, columns:] - strips[:, :-columns]
    return Window(*divmod(int(sums.argmax()), sums.shape[1]))


def low_rank(window: Float[Tensor, "outputs inputs"], rank: int) -> LowRank:
    """The nearest matrix of a rank: B = U_r Σ_r, A = V_rᵀ; of the window's own rank where that is lower."""
    u, sigma, v = torch.linalg.svd(window.to(accumulation_dtype(window)), full_matrices=False)
    return LowRank(u[:, :rank] * sigma[:rank], v[:rank].clone())  # a slice would keep all of V


def extracted(
    source: DecoderView,
    target: DecoderView,
    scores: Sequence[Mapping[str, Tensor]],
    kept: Sequence[int],
    trainable: SoughtLora,
) -> dict[str, LowRank]:
    """The best windows of the source's matrices in low rank, on the CPU.

    Args:
        source: model that they are cut from.
        target: model with the shapes of the windows.
        scores: sensitivities of each source layer.
        kept: the source layer of each target layer, counted from 1.
        trainable: which modules, and the rank.

    Returns:
        One for each matched module of the target, by its name in the stack of layers.

    Raises:
        SemalignError: the layers do not match.
    """
    nuggets = {}
    for place, number in enumerate(kept):
        pairs = matched(source.layer(number), target.layers[place], trainable.modules)
        for name, (theirs, ours) in pairs.items():
            rows, columns = outputs_first(ours, ours.weight).shape
            top, left = best_window(scores[number - 1][name].cpu(), rows, columns)
            weight = outputs_first(theirs, theirs.weight.detach())
            nugget = low_rank(weight[top : top + rows, left : left + columns], trainable.rank)
            nuggets[f"{place}.{name}"] = LowRank(nugget.b.cpu(), nugget.a.cpu())
    return nuggets


@contextlib.contextmanager
def injected(
    view: DecoderView, nuggets: Mapping[str, LowRank], trainable: SoughtLora, *, seed: int
) -> Iterator[list[nn.Parameter]]:
    """Adapters (B, A) over W − B A; the parameters that train. They are merged when the block ends, on every path."""
    modules = tuple(sorted({_last(name) for name in nuggets}))
    adapters = trainable.model_copy(update={"modules": modules})
    lora = {"lora_dropout": trainable.dropout}
    with undisturbed(view.model), trained(view.layers, adapters, seed=seed, lora=lora) as found:
        view.layers.eval()
        for name, nugget in nuggets.items():
            adapted = view.layers.get_submodule(name)
            [b], [a] = (adapted.get_submodule(f"lora_{side}").parameters() for side in "BA")
            base = adapted.get_submodule("base_layer")
            weight = outputs_first(base, base.weight.detach())  # type: ignore[operator]
            b.data, a.data = nugget.b.to(b), nugget.a.to(a)
            weight.copy_(weight.to(b.dtype) - b.data @ a.data)
        yield found


@contextlib.contextmanager
def dropping(layers: nn.Module, device: torch.device, *, seed: int) -> Iterator[None]:
    """The adapters' dropout is on, drawn from a seed; the random state comes back."""
    dropouts = [module for name, module in layers.named_modules() if _last(name) == "lora_dropout"]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # torch.manual_seed would reset every other device as well.
        torch.default_generator.manual_seed(seed)
        if device.type != "cpu":
            torch.get_device_module(device).manual_seed(seed)
        try:
            for module in dropouts:
                module.train()
            yield
        finally:
            for module in dropouts:
                module.eval()


def check_fit(source: DecoderView, target: DecoderView, modules: Sequence[str]) -> None:
    """Refuse a source that is too small, before anything is computed.

    Raises:
        SemalignError: it has fewer layers than the target, a smaller matrix, no module to match, or quantised weights.
    """
    if source.depth < target.depth:
        raise SemalignError(
            f"the source has {source.depth} layers and the target {target.depth}: seeking needs "
            "a source layer of its own for every target layer, choose a source that is as deep"
        )
    for module in linear_modules(source.layer(1)).values():
        if not module.weight.is_floating_point():
            raise SemalignError(
                f"the source's weights are {module.weight.dtype}, which have no gradient to seek by: set "
                "source.load_in_4bit=false"
            )
    matched(source.layer(1), target.layer(1), modules)


def matched(
    source: nn.Module, target: nn.Module, modules: Sequence[str]
) -> "dict[str, tuple[nn.Linear | Conv1D, nn.Linear | Conv1D]]":
    """Linear modules that a source layer and a target layer both have, by their name in the layer.

    Args:
        source: its layer.
        target: its layer.
        modules: last parts of the wanted names; empty for all.

    Raises:
        SemalignError: a wanted name, or every name, is not in both; or the source's matrix is the smaller.
    """
    theirs, ours = linear_modules(source), linear_modules(target)
    pairs = {name: (theirs[name], ours[name]) for name in ours if name in theirs}
    unmatched = sorted(set(modules) - {_last(name) for name in pairs})
    if unmatched or not pairs:
        known = ", ".join(sorted({_last(name) for name in pairs})) or "nothing"
        raise SemalignError(
            f"the layers of source and target do not both have linear modules named {', '.join(unmatched) or 'alike'}: "
            f"method.trainable.modules can name {known}"
        )
    pairs = {name: pair for name, pair in pairs.items() if not modules or _last(name) in modules}
    for name, pair in pairs.items():
        large, small = (tuple(outputs_first(module, module.weight).shape) for module in pair)
        if large[0] < small[0] or large[1] < small[1]:
            raise SemalignError(
                f"{name} is {large[0]} × {large[1]} in the source and {small[0]} × {small[1]} in the target: seeking "
                "cuts windows out of matrices that are at least as large, choose a larger source or leave it out of "
                "method.trainable.modules"
            )
    return pairs


def linear_modules(layer: nn.Module) -> "dict[str, nn.Linear | Conv1D]":
    """The linear modules of a layer, by their name in it."""
    return {name: part for name, part in layer.named_modules() if isinstance(part, (nn.Linear, Conv1D))}


def outputs_first(module: nn.Module, values: Tensor) -> Tensor:
    """Values that lie as the weight of a linear module does, as outputs × inputs; a view."""
    return values.T if isinstance(module, Conv1D) else values


def _zeros_for(module: nn.Linear | Conv1D) -> Tensor:
    return torch.zeros_like(module.weight, dtype=accumulation_dtype(module.weight))


def _adding_to(score: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        score.add_((weight.detach().to(score.dtype) * weight.grad.to(score.dtype)).abs_())
        weight.grad = None

    return add


def _total(scores: Tensor) -> float:
    return float(scores.cpu().double().sum())


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]
