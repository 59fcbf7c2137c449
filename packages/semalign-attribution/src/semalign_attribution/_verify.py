"""Checks of a model by running it: the view reads it right, and a row is the same alone and beside other rows."""

import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from semalign_geometry import accumulation_dtype
from semalign_geometry.base import SemalignError
from torch import Tensor, nn

from ._batch import Batch
from ._undisturbed import undisturbed

if TYPE_CHECKING:
    from ._decoder import DecoderView

LOGGER = logging.getLogger(__name__)
WINDOW = re.compile(r"window(_size|_len)?$|chunk_size$|topk$|block_size$|^local_attention$")
"""Names of a configuration for numbers of tokens beyond which a layer reads a row otherwise."""
LONGEST = 4096
"""Tokens of the widest window that rows reach past."""
WORK, ACCELERATED = 5e11, 1e14
"""Products of a weight and a token that rows past a window may take, on a CPU and on an accelerator: some twenty
seconds of one core in float32. A CPU takes a quarter of them in 16-bit dtypes, whose products take four times as
long."""
MARGIN = 64
"""Tokens of the longest row past the widest window."""
PADDING, END, BLOCK = 16, 24, 16
"""Columns of padding beside the longest row, tokens at its end that are changed, and positions that are judged
together: a router of experts, or a choice of positions, may fall otherwise for a few of them by rounding alone."""


@torch.no_grad()
def verify(view: "DecoderView") -> str | None:
    """Check that a view reads its model right; see `DecoderView.verify`."""
    with undisturbed(view.model):
        _check_reading(view)
        first, last = _stretch(view)
        columns, passed, left_out = _columns(view, last - first + 1)
        try:
            _check_rows(view, first, last, columns, f", past its {passed}" if passed else "")
        except RuntimeError as error:
            if not passed or not _is_out_of_memory(error):
                raise
            columns, left_out = min(columns, MARGIN), [passed, *left_out]
            _check_rows(view, first, last, columns, "")
    if not left_out:
        return None
    unchecked = (
        f"{type(view.model).__name__} was checked on rows of {columns} tokens, and not past its "
        f"{' and '.join(left_out)}: longer rows take too much time or memory"
    )
    LOGGER.info(unchecked)
    return unchecked


def _check_reading(view: "DecoderView") -> None:
    """Causality, the stream, replay and the head, in the whole model on six tokens."""
    ids = (torch.arange(6, device=view.device) % len(view.head.weight))[None]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    changed = {**batch, "input_ids": torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % len(view.head.weight)], 1)}
    name = type(view.model).__name__
    try:
        trace = view.trace(batch, keep=range(1, view.depth + 1))
        other = view.trace(changed).final
        logits = view.model(**batch, use_cache=False).logits
        last = view.final_norm(trace.outputs[view.depth])
    except SemalignError:
        raise
    except Exception as error:  # of the model's own code
        raise SemalignError(f"{name} cannot run in {_dtype(view)}: {_reason(error)}") from error
    assert trace.final is not None and other is not None
    own = view.head.logits(trace.final)
    if not torch.isfinite(trace.final).all() or not torch.isfinite(own).all():
        raise SemalignError(f"{name} computes values that are not finite: its weights are damaged, fetch them again")
    scale = trace.final.float().abs().max()
    tolerance = float(scale) * 16 * torch.finfo(trace.final.dtype).eps
    if not torch.allclose(trace.final[:, :-1].float(), other[:, :-1].float(), rtol=0, atol=tolerance):
        raise SemalignError(
            f"{name} lets earlier tokens see later ones: it is an encoder, and a decoder-only model is needed"
        )
    linked = all(torch.equal(trace.outputs[n], trace.inputs[n + 1]) for n in range(1, view.depth))
    linked = linked and last.shape == trace.final.shape  # otherwise layers hand on several streams
    if not linked or not torch.allclose(trace.final.float(), last.float(), rtol=0, atol=tolerance):
        raise SemalignError(f"{name} changes the residual stream between its layers: such models are not supported")
    more = f"{name} hands more than the stream between its layers: such models are not supported"
    start = max(2, view.depth)  # the last layer; of a single one, what follows it
    try:
        replayed = view.trace(batch, start=start, hidden=trace.outputs[start - 1]).final
    except Exception as error:  # of the model's own code, for want of what was handed on
        raise SemalignError(more) from error
    assert replayed is not None
    if not torch.allclose(trace.final.float(), replayed.float(), rtol=0, atol=tolerance):
        raise SemalignError(more)
    near = float(logits.float().abs().max()) * 16 * torch.finfo(logits.dtype).eps
    if not torch.allclose(own, logits.to(own.dtype), rtol=0, atol=near):
        raise SemalignError(f"{name} post-processes its logits in a way that semalign does not know: not supported")


def _check_rows(view: "DecoderView", first: int, last: int, columns: int, window: str) -> None:
    """Causality and padding on rows of so many tokens, in a stretch of layers."""
    long, short = columns - min(PADDING, columns // 4), min(END, columns // 2)
    kept = long - min(END, columns // 4)  # tokens of the long row before those that are changed
    generator = torch.Generator().manual_seed(0)
    ids, others = torch.randint(len(view.head.weight), (2, columns), generator=generator)
    changed = torch.cat([ids[:kept], others[kept:long]])
    name, dtype = type(view.model).__name__, _dtype(view)

    def run(*rows: Int[Tensor, " _"], left: bool = False) -> _Rows:
        batch = _padded(rows, columns if len(rows) > 1 else len(rows[0]), left=left)
        hidden = view.trace(batch, keep=[1], stop=1).inputs[1] if first > 1 else None
        trace = view.trace(batch, keep=[first, last], start=first, hidden=hidden, stop=last)
        dtype = accumulation_dtype(trace.outputs[last])
        return _Rows(trace.outputs[last], trace.outputs[last].to(dtype) - trace.inputs[first].to(dtype))

    try:
        alone = run(ids[:long])
        right = run(changed, ids[:short])
        left = run(ids[:long], ids[:short], left=True)
        if not torch.isfinite(alone.stream).all():
            raise SemalignError(f"{name} in {dtype} computes values that are not finite on rows of {long} tokens")
        start = alone.part(0, 0, kept)
        if start.differs(right.part(0, 0, kept)) and start.differs(run(changed).part(0, 0, kept)):
            raise SemalignError(
                f"{name} lets earlier tokens see later ones in rows of {long} tokens{window}: such models are not "
                "supported"
            )
    except SemalignError:
        raise
    except Exception as error:  # of the model's own code
        if _is_out_of_memory(error):
            raise
        raise SemalignError(f"{name} in {dtype} cannot run on rows of {columns} tokens: {_reason(error)}") from error
    for side, row, padded in (
        ("right", alone.part(0, 0, kept), right.part(0, 0, kept)),
        ("right", alone.part(0, 0, short), right.part(1, 0, short)),
        ("left", alone.part(0, 0, long), left.part(0, columns - long, columns)),
        ("left", alone.part(0, 0, short), left.part(1, columns - short, columns)),
    ):
        if row.differs(padded):
            found = "other values" if torch.isfinite(padded.stream).all() else "values that are not finite"
            raise SemalignError(
                f"{name} in {dtype} computes {found} for a row that is padded on the {side} to {columns} "
                f"tokens{window}: load it in another dtype, or choose another model"
            )


@dataclass(frozen=True, eq=False)
class _Rows:
    """The stream after a stretch of layers, and what these have added to it."""

    stream: Float[Tensor, "*b n d"]
    added: Float[Tensor, "*b n d"]

    def part(self, row: int, start: int, end: int) -> "_Rows":
        """Some positions of one row."""
        return _Rows(self.stream[row, start:end], self.added[row, start:end])

    def differs(self, other: "_Rows") -> bool:
        """Whether something else was added at most positions of some part, or values are not finite.

        Rounding differs with the shape of a batch. Allowed are 16 units of the dtype in what is added and 2 in the
        stream, and no less than 10⁻⁴ and 10⁻⁵ of them: layers of experts and states compute little better in float32.
        """
        unit = torch.finfo(self.stream.dtype).eps
        norms = [tensor.to(self.added.dtype).norm(dim=-1) for tensor in (self.added, self.stream)]
        allowed = max(1e-4, 16 * unit) * norms[0] + max(1e-5, 2 * unit) * norms[1]
        error = (self.added - other.added).norm(dim=-1) / allowed
        parts = error.unfold(0, min(BLOCK, len(error)), BLOCK // 2).median(-1).values
        return not bool((parts <= 1).all())


def _padded(rows: Sequence[Int[Tensor, " _"]], width: int, *, left: bool) -> Batch:
    """A batch as training pads it, or with positions as generation does."""
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for row, tokens in enumerate(rows):
        place = slice(width - len(tokens), None) if left else slice(len(tokens))
        ids[row, place], mask[row, place] = tokens, 1
    batch = {"input_ids": ids, "attention_mask": mask}
    return batch | {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if left else batch


def _stretch(view: "DecoderView") -> tuple[int, int]:
    """First and last of the fewest layers in a row that hold one of every kind, and of one more where there is one,
    which reads what padding became in them."""
    kinds = _kinds(view.layers)
    places = [kinds.index(kind) for kind in kinds]
    wanted = len({*places})
    most = view.depth
    first, last = min(
        ((a, b) for a in range(most) for b in range(a, most) if len({*places[a : b + 1]}) == wanted),
        key=lambda ends: ends[1] - ends[0],
    )
    return first + 1, min(last + 2, most)


def _kinds(layers: nn.ModuleList) -> list[object]:
    """Everything plain that each layer's modules hold, but for whole numbers that count the layers."""
    held = [
        {
            (name, key): value
            for name, module in layer.named_modules()
            for key, value in [("", type(module)), *vars(module).items()]
            if not key or _is_plain(value)
        }
        for layer in layers
    ]
    starts: dict[tuple[str, str], set[object]] = {}
    for place, found in enumerate(held):
        for key, value in found.items():
            starts.setdefault(key, set()).add(value - place if type(value) is int else None)
    counts = {key for key, values in starts.items() if len(values) == 1 and None not in values}
    return [{key: None if key in counts else value for key, value in found.items()} for found in held]


def _columns(view: "DecoderView", layers: int) -> tuple[int, str, list[str]]:
    """Columns of a batch that reaches past the widest window that can be afforded; this window, and those left out."""
    config = view.model.config.get_text_config(decoder=True)
    limit = getattr(config, "max_position_embeddings", None) or sys.maxsize
    named = {key: n for key, n in config.to_dict().items() if WINDOW.search(key) and type(n) is int and n < limit}
    layer = max(sum(parameter.numel() for parameter in layer.parameters()) for layer in view.layers)
    work = 5 * layers * layer  # of one column: five rows run
    most = ACCELERATED
    if view.device.type == "cpu":
        most = WORK if view.head.weight.dtype.itemsize > 2 else WORK / 4
    fitting = [n for n in named.values() if n <= LONGEST and min(n + MARGIN, limit) * work <= most]
    widest = max(fitting, default=0)
    names = " and ".join(key for key, n in named.items() if n == widest)
    left_out = [f"{key} of {n}" for key, n in named.items() if n > widest]
    return min(widest + MARGIN, limit), f"{names} of {widest}" if widest else "", left_out


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float | bool | None)


def _dtype(view: "DecoderView") -> str:
    return str(view.head.weight.dtype).removeprefix("torch.")


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
