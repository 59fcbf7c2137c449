"""A view of a transformers causal LM: its layers, final norm and head; capture of contributions and replay.

No modelling code is copied. The model's own forward always runs, so masks, positions, sliding windows and
embedding scales stay its business; layers are only made to return a stored input, and hooks read what passes.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from semalign_geometry import Head, accumulation_dtype, decoder_of, final_norm
from semalign_geometry.base import SemalignError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ._batch import Batch
from ._verify import verify

if TYPE_CHECKING:
    from transformers import PreTrainedModel  # with much of transformers behind it


@dataclass(frozen=True, eq=False)
class Trace:
    """Residual streams of a forward run; layers are counted from 1."""

    inputs: dict[int, Float[Tensor, "b n d"] | Float[Tensor, "s d"]] = field(default_factory=dict)
    """h_{ℓ−1}, the residual stream before each kept layer, at the kept positions."""
    outputs: dict[int, Float[Tensor, "b n d"] | Float[Tensor, "s d"]] = field(default_factory=dict)
    """h_ℓ, the residual stream after each kept layer, likewise."""
    final: Float[Tensor, "b n d"] | None = None
    """Input of the head, after the final norm; None when the run stopped earlier."""

    def residual(self, layer: int) -> Float[Tensor, "b n d"] | Float[Tensor, "s d"]:
        """Residual contribution r_ℓ = h_ℓ − h_{ℓ−1} of a kept layer, in float32 (float64 for float64 models)."""
        after, before = self.outputs[layer], self.inputs[layer]
        dtype = accumulation_dtype(after)
        return after.to(dtype) - before.to(dtype)


class DecoderView:
    """Layers, final norm and head of a transformers causal LM, found through its own interface; layers count from 1."""

    def __init__(self, model: "PreTrainedModel") -> None:
        """Find the parts; the model is left untouched.

        Raises:
            SemalignError: no head, no final norm, or no stack of layers.
        """
        self.model = model
        """The whole model."""
        self.head = Head.from_model(model)
        """Its head."""
        self.final_norm = final_norm(model)
        """The norm between the last layer and the head."""
        self.decoder: nn.Module = decoder_of(model)
        """The model without its head."""
        depth = model.config.get_text_config().num_hidden_layers
        stacks = [m for m in self.decoder.children() if isinstance(m, nn.ModuleList) and len(m) == depth]
        if not stacks:
            raise SemalignError(
                f"{type(model).__name__} holds no stack of its {depth} layers: it is not a plain decoder"
            )
        self.layers = stacks[0]
        """The layers, shallow to deep, counted from 0."""

    @property
    def depth(self) -> int:
        """L, the number of layers."""
        return len(self.layers)

    @property
    def width(self) -> int:
        """d, the width of the residual stream."""
        return self.head.weight.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the head lies, and inputs are sent."""
        return self.head.weight.device

    def layer(self, number: int) -> nn.Module:
        """Layer `number`, counted from 1.

        Raises:
            SemalignError: the model has no such layer.
        """
        if not 1 <= number <= self.depth:
            raise SemalignError(f"layer {number} does not exist: the model has layers 1 to {self.depth}")
        return self.layers[number - 1]

    def trace(
        self,
        batch: Batch,
        *,
        keep: Collection[int] = (),
        positions: Bool[Tensor, "b n"] | None = None,
        start: int = 1,
        hidden: Float[Tensor, "b n d"] | None = None,
        stop: int | None = None,
        recompute_from: int | None = None,
        input_gradient: bool = False,
    ) -> Trace:
        """Run the model's own forward, or a part of it, and keep the streams around some layers.

        Args:
            batch: input_ids and attention_mask, (b, n), and position_ids where they do not count from the first column.
            keep: layers whose input and output are kept.
            positions: where they are kept, s positions in all; the rest is dropped layer by layer. None keeps all.
            start: first layer that runs; the layers before it return `hidden`. depth + 1 runs the final norm alone.
            hidden: h_{start−1}, (b, n, d), the replayed input of layer `start`; needed exactly when start > 1.
            stop: last layer that runs; nothing after it is computed, and `final` is None.
            recompute_from: first layer whose inner activations are dropped, and computed again in the backward run:
                less memory for more time, the same gradients. None and depth + 1 keep all.
            input_gradient: make the input of layer 1 require a gradient, so that a graph exists under frozen weights.

        Raises:
            SemalignError: a layer number out of range, a kept layer that does not run, or a replayed input missing.
        """
        if not 1 <= start <= self.depth + 1:
            raise SemalignError(f"start is {start}, expected 1 to {self.depth + 1}")
        if stop is not None and not start <= stop <= self.depth:
            raise SemalignError(f"stop is {stop}, expected {start} to {self.depth}, or None")
        last = self.depth if stop is None else stop
        if outside := [number for number in keep if not start <= number <= last]:
            raise SemalignError(f"layer {outside[0]} cannot be kept: layers {start} to {last} of {self.depth} run")
        if (start > 1) != (hidden is not None):
            raise SemalignError(f"a run from layer {start} " + ("needs hidden" if start > 1 else "takes no hidden"))
        if recompute_from is not None and not 1 <= recompute_from <= self.depth + 1:
            raise SemalignError(f"recompute_from is {recompute_from}, expected 1 to {self.depth + 1}, or None")
        trace, places = Trace(), None if positions is None else positions.nonzero(as_tuple=True)
        final: Tensor | None = None
        with ExitStack() as stack:
            if hidden is not None:
                for layer in self.layers[: start - 1]:
                    stack.enter_context(_handing_on(layer, hidden))
            if input_gradient:
                stack.enter_context(_input_hook(self.layer(1), lambda x: x.detach().requires_grad_(True)))
            for layer in [] if recompute_from is None else self.layers[recompute_from - 1 :]:
                stack.enter_context(_recomputed(layer))
            for number in keep:
                stack.enter_context(_input_hook(self.layer(number), _keeper(trace.inputs, number, places)))
                stack.enter_context(_output_hook(self.layer(number), _keeper(trace.outputs, number, places)))
            if stop is not None:
                stack.enter_context(_output_hook(self.layer(stop), _stop))
            given = [key for key in ("input_ids", "attention_mask", "position_ids") if key in batch]
            try:
                result = self.decoder(**{key: batch[key].to(self.device) for key in given}, use_cache=False)
                final = result.last_hidden_state
            except _Stopped:
                pass
        return Trace(trace.inputs, trace.outputs, final)

    @contextmanager
    def compiled(self) -> Iterator[None]:
        """Each layer's forward goes through `torch.compile`, layer by layer, so that all share their kernels."""
        with ExitStack() as stack:
            # A backward run that frees its buffers could not be followed by one for another term.
            stack.enter_context(torch._functorch.config.patch(donated_buffer=False))
            for layer in self.layers:
                stack.enter_context(_instead(layer, torch.compile(layer.forward, dynamic=True)))
            yield

    def verify(self) -> str | None:
        """Check that the view reads the model right, and that a row does not depend on other rows.

        The whole model runs on six tokens. Then some of its layers, one of each kind at least, run on rows that reach
        64 tokens past the widest window, chunk or choice of positions that the configuration names: alone, in a batch
        padded on the right as in training, and in one padded on the left as in generation. Not checked, and logged, are
        windows of more than 4,096 tokens; and those that take more memory than there is, or more than 5·10¹¹ products
        on a CPU (a quarter of them in 16-bit dtypes; 10¹⁴ elsewhere), as the 4,096 tokens of Gemma 2 2B do there. Not
        checked are differences below the rounding of the dtype.

        Returns:
            A sentence on the windows that were not checked; None where all were.

        Raises:
            SemalignError: the model cannot run in its dtype; weights are not finite; earlier positions see later ones;
                the stream between layers is not passed on as it is; the last layer needs more of those before it than
                the stream (keys and values that layers share); logits from the view's head differ from the model's own;
                or padding changes a row.
        """
        return verify(self)


def view_of(model: "PreTrainedModel | DecoderView") -> DecoderView:
    """A view of the model; a view passes through."""
    return model if isinstance(model, DecoderView) else DecoderView(model)


class _Stopped(Exception):
    """Ends a forward run after the last layer that is wanted."""


def _stop(_: Tensor) -> None:
    raise _Stopped


def _keeper(store: dict[int, Tensor], number: int, places: tuple[Tensor, ...] | None) -> Callable[[Tensor], None]:
    def keep(value: Tensor) -> None:
        store[number] = value if places is None else value[tuple(place.to(value.device) for place in places)]

    return keep


@contextmanager
def _handing_on(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """The layer returns `hidden`, whatever its input; its attributes and place in the model stay.

    Its hooks are off: those of a sharded layer would gather weights that nobody uses.
    """
    hooks = layer._forward_pre_hooks, layer._forward_hooks
    layer._forward_pre_hooks, layer._forward_hooks = OrderedDict(), OrderedDict()
    try:
        with _instead(layer, lambda *args, **kwargs: hidden):
            yield
    finally:
        layer._forward_pre_hooks, layer._forward_hooks = hooks


@contextmanager
def _recomputed(layer: nn.Module) -> Iterator[None]:
    """The layer keeps nothing but its input for the backward run."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        draws = any(part.training for part in layer.modules())  # then the same numbers have to be drawn again
        return checkpoint(own, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs)

    with _instead(layer, forward):
        yield


@contextmanager
def _instead(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The layer computes another function; its attributes, hooks and place in the model stay."""
    own = layer.__dict__.get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        del layer.forward
        if own is not None:
            layer.forward = own


@contextmanager
def _input_hook(layer: nn.Module, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """`see` gets the residual stream before the layer, and may replace it."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        stream = args[0] if args else kwargs["hidden_states"]
        replacement = see(stream)
        if replacement is None:
            return None
        return ((replacement, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": replacement})

    handle = layer.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _output_hook(layer: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """`see` gets the residual stream after the layer."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            raise SemalignError(
                f"{type(module).__name__} returns a {type(output).__name__} and not the stream alone: such models "
                "(Falcon, Bloom, GPT-J) are not supported"
            )
        see(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
