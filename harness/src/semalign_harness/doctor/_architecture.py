"""Do both architectures go together: sizes, heads, attention, depth, width and dtype."""

import torch
from semalign_attribution import DecoderView

from ..models.shape import heads_of
from ..util.text import gb
from ._findings import Finding, error, ok, warning
from ._pair import Candidate, Pair


def check_architecture(pair: Pair) -> list[Finding]:
    """All of them."""
    return [
        *(_model(each) for each in pair.both),
        _embeddings(pair),
        _logits(pair),
        _attention(pair),
        *_depth(pair),
        _width(pair),
        _dtype(pair),
    ]


def _model(candidate: Candidate) -> Finding:
    shape = candidate.shape
    size = gb(shape.parameters * candidate.dtype.itemsize)
    message = (
        f"{type(candidate.view.model).__name__}, {shape.parameters:,} parameters, {shape.layers} layers of width "
        f"{shape.width}, a head of {shape.vocabulary} rows; {size} in {_name(candidate.dtype)}"
    )
    return ok(candidate.role, message)


def _embeddings(pair: Pair) -> Finding:
    words = [f"{'tied to' if each.shape.tied else 'apart from'} the {each.role}'s head" for each in pair.both]
    return ok("embeddings", f"{words[0]}, {words[1]}; they are not trained")


def _logits(pair: Pair) -> Finding:
    source, target = (_post(each.view) for each in pair.both)
    shown = source if source == target else f"source {source}, target {target}"
    return ok("logits", f"{shown}; taken into account by the output objective")


def _post(view: DecoderView) -> str:
    cap = "no soft-cap" if view.head.softcap is None else f"soft-cap {view.head.softcap:g}"
    return f"{cap}, scale {view.head.scale:g}"


def _attention(pair: Pair) -> Finding:
    words = []
    for each in pair.both:
        heads = heads_of(each.opened.config)
        grouped = f" grouped on {heads.keys} of keys and values" if heads.keys < heads.queries else ""
        words.append(f"{each.role} {heads.queries or 'no'} heads{grouped}")
    return ok("attention", f"{', '.join(words)}; contributions are compared after it, whatever its heads are")


def _depth(pair: Pair) -> list[Finding]:
    source, target = (each.shape for each in pair.both)
    found = []
    if target.parameters > source.parameters:
        message = f"the target has {target.parameters / source.parameters:.2g} times the source's parameters"
        found.append(warning("sizes", message, f"semalign doctor {pair.target.path} {pair.source.path}"))
    if target.layers > source.layers:
        message = (
            f"{source.layers} → {target.layers} layers: target layers that follow one another share a source layer"
        )
        some = ",".join(str(-(-target.layers * k // source.layers)) for k in range(1, source.layers + 1))
        return [*found, warning("depth", message, f"'train.layers=[{some}]', to train as many as the source has")]
    return [*found, ok("depth", f"{source.layers} → {target.layers} layers: each target layer has a source layer")]


def _width(pair: Pair) -> Finding:
    source, target = (each.shape.width for each in pair.both)
    frame = pair.experiment.transport.frame
    if frame == "none":
        return ok("width", f"{source} → {target}: nothing is transported, geometry is matched in the source's space")
    also = "; widths are equal, and transport.frame=none works too" if source == target else ""
    return ok("width", f"{source} → {target}: contributions are transported by the {frame} frame{also}")


def _dtype(pair: Pair) -> Finding:
    source, target = (_name(each.dtype) for each in pair.both)
    shown = f"source {source}, target {target} on {pair.device}"
    own = pair.target.opened.config.dtype
    if pair.target.dtype == torch.float16:
        message = f"{shown}: training refuses a float16 target, whose small gradients vanish"
        return error("dtype", message, "target.dtype=bfloat16")
    if own == torch.float16 and pair.experiment.target.dtype == "auto":
        message = f"{shown}; but the target's checkpoint is float16, which training refuses on an accelerator"
        return warning("dtype", message, "target.dtype=bfloat16")
    emulated = [each.role for each in pair.both if each.dtype != (each.opened.config.dtype or torch.float32)]
    why = f" ({' and '.join(emulated)} as the settings or this processor ask for)" if emulated else ""
    return ok("dtype", f"{shown}{why}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
