"""Neurons of a Llama-like decoder: which of them make an answer token likelier, and where their weights lie.

A feed-forward neuron i is row i of up_proj and column i of down_proj. An attention neuron is one channel of one query
head: a column of o_proj, and the row of v_proj that the head reads the channel from.

Source: Yu and Ananiadou (EMNLP 2024), the static attribution that LaTen (Tan et al., ACL 2025) locates neurons with.

Shape suffixes: R rows of the data, N neurons, C neurons of a chunk, D width, V vocabulary; 1 an axis of length 1.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float, Int
from semalign_attribution import Batch, DecoderView
from semalign_geometry import Head, accumulation_dtype, norm_gain
from semalign_geometry.base import SemalignError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...data.encoding import Example
from .laten_settings import MOVED

CHUNK = 64
"""Neurons whose logits over the whole vocabulary are in memory at a time."""
CLOSING = ' ."),]\n'
"""Characters that close an answer and say nothing of it."""


@dataclass(frozen=True, eq=False)
class Parts:
    """The modules of a layer that its neurons belong to."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear


@dataclass(frozen=True, eq=False)
class LayerStreams:
    """Streams of a layer at the position of each row that predicts the row's token."""

    before: Float[Tensor, "r d"]
    """x, the layer's input."""
    attention: Float[Tensor, "r d"]
    """a, the output of o_proj."""
    feed_forward: Float[Tensor, "r d"]
    """m, the output of down_proj."""
    values: Float[Tensor, "r k"]
    """The factor on each column of o_proj."""
    activations: Float[Tensor, "r f"]
    """c = act(gate) · up, the factor on each column of down_proj."""


@dataclass(frozen=True, eq=False)
class Streams:
    """Streams of a model at the position of each row that predicts the row's token."""

    layers: tuple[LayerStreams, ...]
    last: Float[Tensor, "r d"]
    """The output of the last layer."""
    final: Float[Tensor, "r d"]
    """The input of the head."""
    labels: Int[Tensor, " r"]
    """p, the tokens."""


@dataclass(frozen=True, eq=False)
class Located:
    """The best neurons of the best layers, by layer (counted from 1) in depth order; the best neuron comes first."""

    feed_forward: dict[int, Int[Tensor, " n"]]
    """Rows of up_proj, which are columns of down_proj."""
    attention: dict[int, Int[Tensor, " n"]]
    """Columns of o_proj."""


@dataclass(frozen=True, eq=False)
class Place:
    """Place of one half of some neurons: rows of a weight matrix (axis 0) or columns of it (axis 1)."""

    module: nn.Linear
    axis: Literal[0, 1]
    index: Int[Tensor, " n"]
    """The best neuron comes first; a row of v_proj comes as often as query heads in the list share it."""

    def read(self) -> Float[Tensor, "n d"]:
        """The neurons, one a row."""
        found = self.module.weight.detach().index_select(self.axis, self.index)
        return (found if self.axis == 0 else found.T).to(accumulation_dtype(found))

    @contextmanager
    def added(self, neurons_ND: Float[Tensor, "n d"]) -> Iterator[None]:
        """The module computes as if these were added onto its neurons, differentiably; its weights stay."""

        def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.axis == 0:
                more = args[0].to(neurons_ND.dtype) @ neurons_ND.T
                return output.index_add(-1, self.index, more.to(output.dtype))
            more = args[0][..., self.index].to(neurons_ND.dtype) @ neurons_ND
            return output + more.to(output.dtype)

        with self.module.register_forward_hook(add):
            yield

    @torch.no_grad()
    def fuse(self, neurons_ND: Float[Tensor, "n d"]) -> int:
        """Add these onto the neurons' weights, rounded once; returns how many numbers of the matrix changed."""
        weight, more = self.module.weight, neurons_ND if self.axis == 0 else neurons_ND.T
        fused = weight.to(neurons_ND.dtype).index_add(self.axis, self.index, more).to(weight.dtype)
        changed = int((fused != weight).sum())
        weight.copy_(fused)
        return changed


@dataclass(frozen=True, eq=False)
class Lens:
    """f(v) = log softmax(head(norm(v)))[p]: how likely a stream makes the token of its row, if no layer followed.

    The norm is g ⊙ v / rms(v).
    """

    head: Head
    gain: Float[Tensor, " d"]
    """g."""
    epsilon: float
    """Added to the mean square under the root."""
    labels: Int[Tensor, " r"]

    @classmethod
    def of(cls, view: DecoderView, streams: Streams) -> "Lens":
        """The lens of a model on some rows.

        Raises:
            SemalignError: the model's final norm is not an RMSNorm.
        """
        gain = norm_gain(view.final_norm, view.width).to(streams.last.dtype)
        epsilon = getattr(view.model.config.get_text_config(), "rms_norm_eps", None)
        own = None if epsilon is None else cls(view.head, gain, epsilon, streams.labels)
        rounding = max(torch.finfo(dtype).eps for dtype in (view.model.dtype, torch.float32))  # norms run in float32
        tolerance = float(streams.final.abs().max()) * 16 * rounding
        if own is None or not torch.allclose(own._normed(streams.last), streams.final, rtol=0, atol=tolerance):
            raise SemalignError(
                f"the final norm of {type(view.model).__name__} is not an RMSNorm: LaTen needs a model of the Llama "
                "family"
            )
        return own

    def __call__(self, streams_RD: Float[Tensor, "r d"]) -> Float[Tensor, " r"]:
        """f of one stream of each row."""
        rows_R = torch.arange(len(streams_RD), device=streams_RD.device)
        return self._log_probability(self._product(streams_RD), self._scale(streams_RD), rows_R)

    def increases(
        self,
        streams_RD: Float[Tensor, "r d"],
        factors_RN: Float[Tensor, "r n"],
        directions_ND: Float[Tensor, "n d"],
    ) -> Float[Tensor, " n"]:
        """Mean over the rows of f(v + factor · direction) − f(v), of each neuron.

        The share of a neuron in the logits is computed once for all rows, as the head's product is linear; so a neuron
        that adds little is not drowned by the rounding of that product, which half precision would do.
        """
        before_R, product_RV = self(streams_RD), self._product(streams_RD)
        scores = []
        for factors_RC, directions_CD in zip(factors_RN.split(CHUNK, 1), directions_ND.split(CHUNK), strict=True):
            added_CV = self._product(directions_CD)
            score_C = torch.zeros_like(factors_RC[0])
            for row, factors_C in enumerate(factors_RC):
                rows_C = torch.full_like(factors_C, row, dtype=torch.long)
                scale_C = self._scale(streams_RD[row] + factors_C[:, None] * directions_CD)
                moved_CV = product_RV[row] + factors_C[:, None] * added_CV
                score_C += self._log_probability(moved_CV, scale_C, rows_C) - before_R[row]
            scores.append(score_C / len(streams_RD))
        return torch.cat(scores)

    def _scale(self, streams: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """1 / rms(v)."""
        return (streams.square().mean(1) + self.epsilon).rsqrt()

    def _normed(self, streams: Float[Tensor, "r d"]) -> Float[Tensor, "r d"]:
        return self._scale(streams)[:, None] * self.gain * streams

    def _product(self, streams: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """The head's product with g ⊙ v, its part that is linear in v."""
        return replace(self.head, bias=None, softcap=None).logits(self.gain * streams)

    def _log_probability(
        self, product: Float[Tensor, "n v"], scale: Float[Tensor, " n"], rows: Int[Tensor, " n"]
    ) -> Float[Tensor, " n"]:
        logits, cap = product * scale[:, None], self.head.softcap
        if self.head.bias is not None:
            logits = logits + self.head.scale * self.head.bias
        if cap is not None:
            logits = cap * torch.tanh(logits / cap)
        return logits.gather(1, self.labels[rows][:, None])[:, 0] - logits.logsumexp(1)


def until_last_word(example: Example, tokenizer: PreTrainedTokenizerBase) -> Example:
    """The example without what follows the last token of its answer that says something: end-of-sequence tokens and
    closing punctuation.

    An answer of nothing else stays as it is.
    """
    ids = example.answer_ids
    for length in range(len(ids), 0, -1):
        token = ids[length - 1]
        if token not in tokenizer.all_special_ids and str(tokenizer.decode([token])).strip(CLOSING):
            return replace(example, answer_ids=ids[:length])
    return example


def parts_of(view: DecoderView) -> list[Parts]:
    """The modules of each layer that neurons belong to.

    Raises:
        SemalignError: a layer lacks one of them, has several, or holds its weights in 4 bits.
    """
    found = []
    for number, layer in enumerate(view.layers, 1):
        modules = {name: module for name, module in layer.named_modules() if name.rpartition(".")[2] in MOVED}
        linear = {name.rpartition(".")[2]: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        if sorted(linear) != sorted(MOVED) or len(modules) > len(MOVED):
            raise SemalignError(
                f"layer {number} of {type(view.model).__name__} does not have one linear module each of "
                f"{', '.join(MOVED)}: LaTen needs a model of the Llama family"
            )
        if any(module.weight.shape != (module.out_features, module.in_features) for module in linear.values()):
            raise SemalignError("LaTen moves weights, which cannot be read in 4 bits: set source.load_in_4bit=false")
        found.append(Parts(**linear))
    return found


@torch.no_grad()
def observe(view: DecoderView, parts: Sequence[Parts], batches: Sequence[Batch]) -> Streams:
    """Record the streams of a model where it predicts the last token of each row.

    The factor on a column of o_proj is its input: the value summed over all positions with their attention weights.

    Args:
        view: of the model.
        parts: of its layers.
        batches: rows, padded on the right.

    Raises:
        SemalignError: the model changes what o_proj and down_proj give before it adds it to the stream.
    """
    found = [_observe(view, parts, batch) for batch in batches]
    layers = tuple(
        LayerStreams(*(torch.cat([getattr(each, field.name) for each in same]) for field in fields(LayerStreams)))
        for same in zip(*(each.layers for each in found), strict=True)
    )
    last, final, labels = (torch.cat([getattr(each, name) for each in found]) for name in ("last", "final", "labels"))
    return Streams(layers, last, final, labels)


def _observe(view: DecoderView, parts: Sequence[Parts], batch: Batch) -> Streams:
    ends = batch["attention_mask"].sum(1).to(view.device) - 1
    rows = torch.arange(len(ends), device=view.device)

    def at(stream: Tensor) -> Tensor:
        return stream[rows, ends - 1].to(accumulation_dtype(stream))

    with ExitStack() as stack:
        output_runs = [stack.enter_context(_tapped(part.o_proj, at)) for part in parts]
        down_runs = [stack.enter_context(_tapped(part.down_proj, at)) for part in parts]
        trace = view.trace(batch, keep=range(1, view.depth + 1))
    layers = []
    for number, (outputs, downs) in enumerate(zip(output_runs, down_runs, strict=True), 1):
        before, after = at(trace.inputs[number]), at(trace.outputs[number])
        layer = LayerStreams(before, outputs[0][1], downs[0][1], outputs[0][0], downs[0][0])
        tolerance = float(after.abs().max()) * 16 * torch.finfo(trace.outputs[number].dtype).eps
        if not torch.allclose(before + layer.attention + layer.feed_forward, after, rtol=0, atol=tolerance):
            raise SemalignError(
                f"layer {number} of {type(view.model).__name__} does not add what o_proj and down_proj give to its "
                "stream as it is: LaTen needs a model of the Llama family"
            )
        layers.append(layer)
    assert trace.final is not None
    labels = batch["input_ids"].to(view.device)[rows, ends]
    return Streams(tuple(layers), at(trace.outputs[view.depth]), at(trace.final), labels)


@contextmanager
def _tapped(module: nn.Linear, at: Callable[[Tensor], Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of each run of a module, as far as they are wanted."""
    runs: list[tuple[Tensor, Tensor]] = []

    def see(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        runs.append((at(args[0]), at(output)))

    with module.register_forward_hook(see):
        yield runs


def locate(
    view: DecoderView,
    batches: Sequence[Batch],
    *,
    layers: int,
    feed_forward: int,
    attention: int,
    progress: Callable[[Sequence[int]], Iterable[int]] = iter,
) -> Located:
    """The neurons that make the last token of the rows likelier, in the layers that do.

    With x a layer's input, a its attention's output, r = x + a and m its feed-forward output, attention scores
    f(x + a) − f(x) and the feed-forward network f(r + m) − f(r); these choose layers for each of the two on its own, as
    the released code does. A feed-forward neuron scores f(r + c_i W_down[:, i]) − f(r), an attention neuron
    f(x + z_i W_o[:, i]) − f(x) with z_i its factor (`observe`). All are means over the rows.

    Args:
        view: of the model.
        batches: rows, padded on the right.
        layers: to choose.
        feed_forward: neurons to choose in each.
        attention: neurons to choose in each.
        progress: passes the numbers of the layers on, and may show progress.

    Raises:
        SemalignError: the model is not of the Llama family, or has fewer layers or neurons than are to be chosen.
    """
    parts = parts_of(view)
    for wanted, name, has in (
        (layers, "layers", view.depth),
        (feed_forward, "feed-forward neurons in a layer", min(part.down_proj.in_features for part in parts)),
        (attention, "attention neurons in a layer", min(part.o_proj.in_features for part in parts)),
    ):
        if has < wanted:
            raise SemalignError(
                f"LaTen needs {wanted} {name} of {type(view.model).__name__}, which has {has}: choose a source that is "
                "at least as deep and as wide as the target"
            )
    streams = observe(view, parts, batches)
    lens = Lens.of(view, streams)

    def best(scores: Sequence[Tensor]) -> set[int]:
        return {int(place) + 1 for place in _descending(torch.stack(list(scores)))[:layers]}

    heads = best([(lens(each.before + each.attention) - lens(each.before)).mean() for each in streams.layers])
    middles = [each.before + each.attention for each in streams.layers]
    networks = best(
        [(lens(r + each.feed_forward) - lens(r)).mean() for r, each in zip(middles, streams.layers, strict=True)]
    )
    located = Located({}, {})
    for number in progress(range(1, view.depth + 1)):
        part, stream = parts[number - 1], streams.layers[number - 1]
        if number in networks:
            found = lens.increases(middles[number - 1], stream.activations, _columns(part.down_proj))
            located.feed_forward[number] = _descending(found)[:feed_forward].cpu()
        if number in heads:
            found = lens.increases(stream.before, stream.values, _columns(part.o_proj))
            located.attention[number] = _descending(found)[:attention].cpu()
    return located


def _columns(module: nn.Linear) -> Float[Tensor, "n d"]:
    weight = module.weight.detach()
    return weight.T.to(accumulation_dtype(weight))


def _descending(scores: Float[Tensor, " n"]) -> Int[Tensor, " n"]:
    return scores.sort(descending=True, stable=True).indices


def places(view: DecoderView, located: Located) -> dict[str, list[Place]]:
    """Return the places of the located neurons: of each kind of module one a layer, in depth order."""
    parts = parts_of(view)
    heads = view.model.config.get_text_config().num_attention_heads
    found: dict[str, list[Place]] = {"up_proj": [], "down_proj": [], "v_proj": [], "o_proj": []}
    for number, index in located.feed_forward.items():
        index = index.to(view.device)
        found["up_proj"].append(Place(parts[number - 1].up_proj, 0, index))
        found["down_proj"].append(Place(parts[number - 1].down_proj, 1, index))
    for number, index in located.attention.items():
        part, index = parts[number - 1], index.to(view.device)
        rows = value_rows(index, columns=part.o_proj.in_features, rows=part.v_proj.out_features, heads=heads)
        found["v_proj"].append(Place(part.v_proj, 0, rows))
        found["o_proj"].append(Place(part.o_proj, 1, index))
    return found


def value_rows(neurons: Int[Tensor, " n"], *, columns: int, rows: int, heads: int) -> Int[Tensor, " n"]:
    """Rows of v_proj whose values some columns of o_proj weigh: consecutive query heads share a key-value head.

    Args:
        neurons: columns of o_proj.
        columns: of o_proj, in all.
        rows: of v_proj, in all.
        heads: query heads.
    """
    size, shared = columns // heads, columns // rows
    return neurons // size // shared * size + neurons % size
