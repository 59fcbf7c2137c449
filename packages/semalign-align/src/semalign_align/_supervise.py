"""Run the source once and write what the target will be trained to match.

Shape suffixes: B sequences, N tokens, P supervised positions of all sequences, D width.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, Trace, supervised, undisturbed, view_of
from semalign_geometry import (
    MANIFEST,
    SemalignError,
    Transport,
    new_folder,
    save_tensors,
    sha256_of,
    top_entries,
)
from torch import Tensor
from transformers import PreTrainedModel

from ._settings import Shard, SupervisionManifest, SupervisionSettings, TopK
from ._store import VOCABULARY, Supervision, residual_key

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def supervise(
    source: PreTrainedModel | DecoderView,
    batches: Iterable[Batch],
    pairing: LayerPairing,
    transport: Transport,
    folder: str | Path,
    *,
    settings: SupervisionSettings | None = None,
    entries: Int[Tensor, " v"] | None = None,
) -> Supervision:
    """Write, for each supervised token, y_k = M r of every paired source layer, and the source's output distribution.

    The store holds the tokens too, so that training needs nothing else; target layers that share a source layer
    share its bytes. It appears whole or not at all. The source is left as found.

    Args:
        source: the source model or its view.
        batches: right-padded batches with supervised answers.
        pairing: the source layer of each target layer.
        transport: from the source's width to the target's.
        folder: where the store goes; replaced if it exists.
        settings: what is kept, and how.
        entries: vocabulary ids that both models share with equal ids; None for the source's whole head.

    Returns:
        The store, opened.

    Raises:
        SemalignError: no examples, a pairing for another depth, a transport for another width, or values that are
        not finite. OSError: the disk is full.

    Source: method 2.3 and 2.5.
    """
    view = view_of(source)
    settings = settings or SupervisionSettings()
    if pairing.source_depth != view.depth:
        raise SemalignError(f"the pairing is for {pairing.source_depth} source layers, the source has {view.depth}")
    if transport.manifest.source_width != view.width:
        raise SemalignError(
            f"the transport takes width {transport.manifest.source_width}, the source's is {view.width}"
        )
    rows = len(view.head.weight)
    if entries is not None and (not len(entries) or int(entries.min()) < 0 or int(entries.max()) >= rows):
        raise SemalignError(f"entries must name some of the head's rows 0 to {rows - 1}, got {entries.tolist()[:8]}")
    head = view.head if entries is None else view.head.select(entries)
    spans = source_spans(pairing, settings.residual)
    kept = sorted({layer for span in spans for layer in (span[0] + 1, span[1])})
    matrix = Transport(transport.matrix.to(view.device, torch.float32), transport.manifest)

    with new_folder(Path(folder)) as temporary, undisturbed(view.model), torch.no_grad():
        shards: list[Shard] = []
        files: dict[str, str] = {}
        pending: list[dict[str, Tensor]] = []
        tokens = supervised_tokens = 0

        def write(name: str, tensors: dict[str, Tensor]) -> None:
            save_tensors(temporary / name, tensors)
            files[name] = sha256_of(temporary / name)

        def close_shard() -> None:
            name = f"shard-{len(shards):05}.safetensors"
            tensors = {key: torch.cat([part[key] for part in pending]) for key in pending[0]}
            write(name, tensors)
            shards.append(Shard(file=name, examples=len(tensors["lengths"])))
            pending.clear()

        for batch in batches:
            if not len(next(iter(batch.values()), ())):
                continue
            positions = supervised(batch)
            trace = view.trace(batch, keep=kept)
            part = _tokens(batch, positions)
            mask_BN = positions.mask.to(view.device)
            for span in spans:
                vectors_PD = matrix(_contribution(trace, span)[mask_BN])
                part[residual_key(span)] = vectors_PD.to(_DTYPES[settings.dtype])
            assert trace.final is not None
            final_PD = trace.final[mask_BN]
            if isinstance(settings.output, TopK):
                top = top_entries(final_PD, head, settings.output.k, temperature=settings.temperature)
                part |= {
                    "top_ids": top.ids.to(torch.int32),
                    "top_log_probs": top.log_probs.float(),
                    "tail": top.tail.float(),
                }
            else:
                part["final"] = final_PD.to(_DTYPES[settings.dtype])
            broken = [key for key, value in part.items() if key != "tail" and not torch.isfinite(value).all()]
            if broken:
                raise SemalignError(
                    f"the source computed {broken[0]} values that are not finite: check its weights and dtype"
                )
            pending.append({key: value.cpu() for key, value in part.items()})
            tokens += len(part["input_ids"])
            supervised_tokens += len(positions.labels)
            if sum(value.nbytes for held in pending for value in held.values()) >= settings.shard_bytes:
                close_shard()
        if pending:
            close_shard()
        if not shards:
            raise SemalignError("there are no examples to supervise: the batches are empty")
        vocabulary = {"entries": torch.arange(len(head.weight)) if entries is None else entries.cpu()}
        if not isinstance(settings.output, TopK):
            vocabulary["head_weight"] = head.weight.cpu()
            if head.bias is not None:
                vocabulary["head_bias"] = head.bias.cpu()
        write(VOCABULARY, vocabulary)
        manifest = SupervisionManifest(
            files=files,
            settings=settings,
            pairing=pairing,
            transport=transport.manifest,
            examples=sum(shard.examples for shard in shards),
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            entries=len(head.weight),
            head_scale=head.scale,
            head_softcap=head.softcap,
            shards=tuple(shards),
        )
        manifest.write(temporary / MANIFEST)
    return Supervision.open(folder)


def source_spans(pairing: LayerPairing, residual: str) -> list[tuple[int, int]]:
    """The (a, b) whose h_b − h_a are stored, one for each paired source layer, without repeats.

    `layer`: (π(k) − 1, π(k)). `span`: (the next shallower paired layer, or 0, π(k)).
    """
    paired = sorted(set(pairing.source_layers))
    below = [layer - 1 for layer in paired] if residual == "layer" else [0, *paired[:-1]]
    return list(zip(below, paired, strict=True))


def _contribution(trace: Trace, span: tuple[int, int]) -> Tensor:
    below, layer = span
    return trace.outputs[layer].float() - trace.inputs[below + 1].float()


def _tokens(batch: Batch, positions: Supervised) -> dict[str, Tensor]:
    """The real tokens of a batch, end to end, with the lengths of the examples and their supervised positions."""
    real_BN = batch["attention_mask"] != 0
    return {
        "input_ids": batch["input_ids"][real_BN].to(torch.int32),
        "labels": batch["labels"][real_BN].to(torch.int32),
        "lengths": real_BN.sum(1).to(torch.int32),
        "counts": positions.counts.to(torch.int32),
    }
