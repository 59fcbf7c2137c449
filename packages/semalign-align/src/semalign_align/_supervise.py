"""Run the source once and write what the target will be trained to match.

Shape suffixes: B sequences, N tokens, P supervised positions of all sequences, D width.
"""

import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, Trace, supervised, undisturbed, view_of
from semalign_geometry import (
    MANIFEST,
    Head,
    SemalignError,
    Transport,
    new_folder,
    save_tensors,
    sha256_of,
    top_entries,
)
from torch import Tensor
from transformers import PreTrainedModel

from ._residuals import restored_residual, stored_residual
from ._settings import Progress, Shard, SupervisionManifest, SupervisionSettings, TopK
from ._store import VOCABULARY, Supervision, residual_key

PARTIAL = ".partial"
"""Ends the name of the folder in which a store grows that can be resumed."""
PROGRESS = "progress.json"


def supervise(
    source: PreTrainedModel | DecoderView,
    batches: Iterable[Batch],
    pairing: LayerPairing,
    transport: Transport,
    folder: str | Path,
    *,
    settings: SupervisionSettings | None = None,
    entries: Int[Tensor, " v"] | None = None,
    resume_key: str | None = None,
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
        resume_key: what tells the source and the batches from any other, such as a hash of both. With it, an
            interrupted call that is repeated goes on after its last whole shard, in a folder beside `folder`, and a
            finished one returns the store that is there.

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

    key = "" if resume_key is None else _key(resume_key, pairing, settings, matrix, entries)
    finished = _finished(Path(folder), key) if key else None
    if finished is not None:
        return finished

    with _workplace(Path(folder), key) as (temporary, progress):
        skipped = progress.batches
        pending: list[dict[str, Tensor]] = []
        errors = torch.tensor(progress.squares, dtype=torch.float64)  # ‖stored − computed‖², ‖computed‖²
        counts = torch.tensor((progress.batches, progress.tokens, progress.supervised_tokens))

        def close_shard() -> None:
            nonlocal progress
            name = f"shard-{len(progress.shards):05}.safetensors"
            tensors = {each: torch.cat([part[each] for part in pending]) for each in pending[0]}
            save_tensors(temporary / name, tensors)
            batches, tokens, supervised_tokens = counts.tolist()
            progress = Progress(
                key=key,
                shards=(*progress.shards, Shard(file=name, examples=len(tensors["lengths"]))),
                files={**progress.files, name: sha256_of(temporary / name)},
                batches=batches,
                tokens=tokens,
                supervised_tokens=supervised_tokens,
                squares=tuple(errors.tolist()),
            )
            if key:
                progress.write(temporary / PROGRESS)
            pending.clear()

        with undisturbed(view.model), torch.no_grad():
            for batch in itertools.islice(batches, skipped, None):
                counts[0] += 1
                if not len(next(iter(batch.values()), ())):
                    continue
                positions = supervised(batch)
                trace = view.trace(batch, keep=kept)
                part = _tokens(batch, positions)
                mask_BN = positions.mask.to(view.device)
                for span in spans:
                    vectors_PD = matrix(_contribution(trace, span)[mask_BN])
                    rounded = stored_residual(vectors_PD, settings.dtype)
                    part |= {residual_key(span) + suffix: value for suffix, value in rounded.items()}
                    loss_PD = restored_residual(rounded) - vectors_PD
                    errors += torch.stack([loss_PD.square().sum(), vectors_PD.square().sum()]).cpu().double()
                assert trace.final is not None
                part |= _output(trace.final[mask_BN], head, settings)
                broken = [name for name, value in part.items() if name != "tail" and not torch.isfinite(value).all()]
                if broken:
                    raise SemalignError(
                        f"the source computed {broken[0]} values that are not finite: check its weights and dtype"
                    )
                pending.append({name: value.cpu() for name, value in part.items()})
                counts += torch.tensor((0, len(part["input_ids"]), len(positions.labels)))
                if sum(value.nbytes for held in pending for value in held.values()) >= settings.shard_bytes:
                    close_shard()
            if pending:
                close_shard()
        if not progress.shards:
            raise SemalignError("there are no examples to supervise: the batches are empty")
        vocabulary = {"entries": torch.arange(len(head.weight)) if entries is None else entries.cpu()}
        if not isinstance(settings.output, TopK):
            vocabulary["head_weight"] = head.weight.cpu()
            if head.bias is not None:
                vocabulary["head_bias"] = head.bias.cpu()
        save_tensors(temporary / VOCABULARY, vocabulary)
        lost, whole = progress.squares
        manifest = SupervisionManifest(
            files={**progress.files, VOCABULARY: sha256_of(temporary / VOCABULARY)},
            key=key,
            settings=settings,
            pairing=pairing,
            transport=transport.manifest,
            examples=sum(shard.examples for shard in progress.shards),
            tokens=progress.tokens,
            supervised_tokens=progress.supervised_tokens,
            residual_error=(lost / whole) ** 0.5 if whole else 0.0,
            entries=len(head.weight),
            head_scale=head.scale,
            head_softcap=head.softcap,
            shards=progress.shards,
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


def _key(
    resume_key: str, pairing: LayerPairing, settings: SupervisionSettings, transport: Transport, entries: Tensor | None
) -> str:
    """What tells a supervision from any other."""
    digest = hashlib.sha256("\n".join([resume_key, pairing.model_dump_json(), settings.model_dump_json()]).encode())
    for tensor in (transport.matrix, entries):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _finished(folder: Path, key: str) -> Supervision | None:
    """The store of an earlier call for the same; None when there is none, or it is damaged."""
    try:
        store = Supervision.open(folder)
    except SemalignError:
        return None
    return store if store.manifest.key == key else None


@contextmanager
def _workplace(folder: Path, key: str) -> Iterator[tuple[Path, Progress]]:
    """Where the store grows until it gets its name, and how far it has come."""
    if not key:
        with new_folder(folder) as temporary:
            yield temporary, Progress(key="")
        return
    partial = folder.with_name(folder.name + PARTIAL)
    progress = _progress(partial, key)
    if progress is None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        progress = Progress(key=key)
    yield partial, progress
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    for file in (folder / PROGRESS, *folder.glob(".*")):  # a hidden one was being written when a call was killed
        file.unlink()


def _progress(partial: Path, key: str) -> Progress | None:
    """What an interrupted call left; None when there is nothing of this supervision, or it is damaged."""
    try:
        progress = Progress.read(partial / PROGRESS)
    except SemalignError:
        return None
    whole = all(
        (partial / name).is_file() and sha256_of(partial / name) == sha256 for name, sha256 in progress.files.items()
    )
    return progress if whole and progress.key == key else None


def _output(final_PD: Tensor, head: Head, settings: SupervisionSettings) -> dict[str, Tensor]:
    """The source's output distribution at the supervised positions, as it is stored."""
    if isinstance(settings.output, TopK):
        top = top_entries(final_PD, head, settings.output.k, temperature=settings.temperature)
        return {
            "top_ids": top.ids.to(torch.int32),
            "top_log_probs": top.log_probs.float(),
            "tail": top.tail.float(),
        }
    return {"final": final_PD.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)}


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
