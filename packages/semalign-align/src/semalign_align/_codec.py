"""Codec of supervision: names, dtypes and rounding of the stored tensors of a batch, and the way back.

Shape suffixes: S spans of all sequences (answer tokens, with one tokenizer), D width.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from semalign_attribution import Supervised
from semalign_geometry import OutputHead, TopEntries, top_entries
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._examples import Examples
from ._settings import SupervisionManifest, SupervisionSettings, TopK
from ._spans import BatchSpans
from ._supervision import FinalStates, OutputTarget, SupervisedBatch

Read = Callable[[str], Tensor]
"""Returns a stored tensor of some examples by its name, all their spans end to end."""


def encode_residual(vectors_SD: Float[Tensor, "s d"], layer: int, dtype: str) -> dict[str, Tensor]:
    """Round the contributions of a source layer for the store.

    `int8`: x ≈ scale · q with q from −127 to 127 and scale = max|x| / 127 for each token, so that no component is off
    by more than half a scale.
    """
    name, scale_name = _residual_names(layer)
    if dtype != "int8":
        return {name: vectors_SD.to(getattr(torch, dtype))}
    scale_S1 = vectors_SD.float().abs().amax(1, keepdim=True) / 127
    quantised_SD = (vectors_SD.float() / scale_S1.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return {name: quantised_SD.to(torch.int8), scale_name: scale_S1}


def decode_residual(read: Read, layer: int, dtype: str) -> Float[Tensor, "s d"]:
    """Undo `encode_residual`: int8 becomes float32, other dtypes stay."""
    name, scale_name = _residual_names(layer)
    return read(name).float() * read(scale_name) if dtype == "int8" else read(name)


def encode_output(final_SD: Float[Tensor, "s d"], head: OutputHead, settings: SupervisionSettings) -> dict[str, Tensor]:
    """Reduce final hidden states to the output distribution that the store keeps.

    Args:
        final_SD: inputs of the source's head.
        head: the source's head over the shared entries or the classes.
        settings: top entries or hidden states, temperature and dtype.
    """
    if isinstance(settings.output, TopK):
        top = top_entries(final_SD, head, settings.output.k, temperature=settings.temperature)
        return {"top_ids": top.ids.to(torch.int32), "top_log_probs": top.log_probs.float(), TAIL: top.tail.float()}
    return {"final": final_SD.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)}


TAIL = "tail"
"""Name of the log-probabilities of the entries that are not kept, −∞ where there are none."""
LIKELIHOOD = "span_log_likelihood"
"""Name of the source's log-likelihoods of spans, −∞ for an impossible one."""


def decode(
    read: Read,
    examples: Examples,
    indices: Sequence[int],
    *,
    manifest: SupervisionManifest,
    layer: int | None,
    head: OutputHead | None,
) -> SupervisedBatch:
    """Supervision of some examples from their stored tensors, on the device of these.

    Positions and spans are found on the CPU, so that no device waits for them.

    Args:
        read: the stored tensors of these examples.
        examples: all examples.
        indices: examples, counted from 0.
        manifest: settings and pairing.
        layer: target layer of the residual supervision, counted from 1; None for none.
        head: the source's head on that device, for final hidden states.
    """
    tokens, source = examples.tokens(indices), examples.source_tokens(indices)
    positions, reference = Supervised.of(tokens), None
    if layer is not None:
        vectors_SD = decode_residual(read, manifest.pairing.source_of(layer), manifest.settings.dtype)
        counts = examples.counts[list(indices)].tolist()
        reference = pad_sequence(list(vectors_SD.split(counts)), batch_first=True)
    output = _decode_output(read, manifest.settings, head)
    device = output.log_probs.device if isinstance(output, TopEntries) else output.hidden.device
    return SupervisedBatch(
        batch={key: value.to(device) for key, value in tokens.items()},
        positions=positions.to(device),
        reference=reference,
        output=output,
        spans=_decode_spans(read(LIKELIHOOD), examples, indices) if examples.paired else None,
        source=None if source is None else {key: value.to(device) for key, value in source.items()},
    )


def _decode_spans(log_likelihood: Tensor, examples: Examples, indices: Sequence[int]) -> BatchSpans:
    source, target = (examples.read(name, indices).long() for name in ("span_source", "span_target"))
    device = log_likelihood.device
    return BatchSpans(
        counts=examples.counts[list(indices)].to(device),
        starts=(target.cumsum(0) - target).to(device),
        lengths=target.to(device),
        source_starts=(source.cumsum(0) - source).to(device),
        several=((source > 1) | (target > 1)).to(device),
        log_likelihood=log_likelihood,
    )


def _decode_output(read: Read, settings: SupervisionSettings, head: OutputHead | None) -> OutputTarget:
    if isinstance(settings.output, TopK):
        return TopEntries(read("top_ids"), read("top_log_probs"), read(TAIL))
    assert head is not None
    return FinalStates(read("final"), head)


def _residual_names(layer: int) -> tuple[str, str]:
    return f"residual.{layer}", f"residual.{layer}.scale"
