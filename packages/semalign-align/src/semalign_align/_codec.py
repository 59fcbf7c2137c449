"""Codec of supervision: names, dtypes and rounding of the stored tensors of a batch, and the way back.

Shape suffixes: P supervised positions of all sequences, D width.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from semalign_attribution import Batch, Supervised
from semalign_geometry import Head, TopEntries, top_entries
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._settings import SupervisionManifest, SupervisionSettings, TopK
from ._supervision import FinalStates, OutputTarget, SupervisedBatch

Read = Callable[[str], Tensor]
"""Returns a stored tensor of some examples by its name, all their supervised positions end to end."""


def encode_residual(vectors_PD: Float[Tensor, "p d"], layer: int, dtype: str) -> dict[str, Tensor]:
    """Round the contributions of a source layer for the store.

    `int8`: x ≈ scale · q with q from −127 to 127 and scale = max|x| / 127 for each token, so that no component is off
    by more than half a scale.
    """
    name, scale_name = _residual_names(layer)
    if dtype != "int8":
        return {name: vectors_PD.to(getattr(torch, dtype))}
    scale_P1 = vectors_PD.float().abs().amax(1, keepdim=True) / 127
    quantised_PD = (vectors_PD.float() / scale_P1.clamp_min(torch.finfo(torch.float32).tiny)).round()
    return {name: quantised_PD.to(torch.int8), scale_name: scale_P1}


def decode_residual(read: Read, layer: int, dtype: str) -> Float[Tensor, "p d"]:
    """Undo `encode_residual`: int8 becomes float32, other dtypes stay."""
    name, scale_name = _residual_names(layer)
    return read(name).float() * read(scale_name) if dtype == "int8" else read(name)


def encode_output(final_PD: Float[Tensor, "p d"], head: Head, settings: SupervisionSettings) -> dict[str, Tensor]:
    """Reduce final hidden states to the output distribution that the store keeps.

    Args:
        final_PD: inputs of the source's head.
        head: the source's head over the shared entries.
        settings: top entries or hidden states, temperature and dtype.
    """
    if isinstance(settings.output, TopK):
        top = top_entries(final_PD, head, settings.output.k, temperature=settings.temperature)
        return {"top_ids": top.ids.to(torch.int32), "top_log_probs": top.log_probs.float(), TAIL: top.tail.float()}
    return {"final": final_PD.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)}


TAIL = "tail"
"""Name of the one tensor that may hold −∞."""


def decode(
    read: Read, tokens: Batch, *, manifest: SupervisionManifest, layer: int | None, head: Head | None
) -> SupervisedBatch:
    """Supervision of a batch from its stored tensors, on the device of these.

    Args:
        read: the stored tensors.
        tokens: the tokens of the batch on the CPU, so that finding its positions makes no device wait.
        manifest: settings and pairing.
        layer: target layer of the residual supervision, counted from 1; None for none.
        head: the source's head on that device, for final hidden states.
    """
    positions, reference = Supervised.of(tokens), None
    if layer is not None:
        vectors_PD = decode_residual(read, manifest.pairing.source_of(layer), manifest.settings.dtype)
        reference = pad_sequence(list(vectors_PD.split(positions.counts.tolist())), batch_first=True)
    output = _decode_output(read, manifest.settings, head)
    device = output.log_probs.device if isinstance(output, TopEntries) else output.hidden.device
    batch = {key: value.to(device) for key, value in tokens.items()}
    return SupervisedBatch(batch, positions.to(device), reference, output)


def _decode_output(read: Read, settings: SupervisionSettings, head: Head | None) -> OutputTarget:
    if isinstance(settings.output, TopK):
        return TopEntries(read("top_ids"), read("top_log_probs"), read(TAIL))
    assert head is not None
    return FinalStates(read("final"), head)


def _residual_names(layer: int) -> tuple[str, str]:
    return f"residual.{layer}", f"residual.{layer}.scale"
