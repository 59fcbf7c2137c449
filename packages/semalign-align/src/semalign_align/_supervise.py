"""Run the source once and store its supervision."""

import hashlib
import itertools
import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from semalign_attribution import DecoderView, LayerPairing
from semalign_geometry import Transport, VocabularyClasses
from semalign_geometry.base import (
    MANIFEST,
    SemalignError,
    check_replaceable,
    checked,
    new_folder,
    read_manifest,
    save_tensors,
    sha256_of,
)
from torch import Tensor
from transformers import PreTrainedModel

from ._classes import class_tensors
from ._examples import Rows
from ._ranks import Ranks
from ._settings import Progress, Shard, SupervisionManifest, SupervisionSettings, TopK
from ._source import SupervisingSource
from ._spans import AnyBatch, PairedBatch
from ._store import VOCABULARY, Supervision

LOGGER = logging.getLogger(__name__)
PARTIAL = ".partial"
"""Suffix of the folder of an unfinished store that can be resumed, or that several processes write."""
COUNTS = ("batches", "tokens", "supervised_tokens", "spans")
"""Fields of `Progress` that add up over batches."""


@checked
def supervise(
    source: PreTrainedModel | DecoderView,
    batches: Iterable[AnyBatch],
    pairing: LayerPairing,
    transport: Transport,
    folder: str | Path,
    *,
    settings: SupervisionSettings | None = None,
    entries: Int[Tensor, " v"] | None = None,
    classes: VocabularyClasses | None = None,
    resume_key: str | None = None,
) -> Supervision:
    """Write, for each supervised token, y_k = M r of every paired source layer, and the source's output distribution.

    Where the tokenizers differ, both are written at the start of each span, with the log-likelihood of each span under
    the source; there both models have read the same text.

    The store holds the tokens too, so that training needs nothing else; target layers that share a source layer
    share its bytes. It appears whole or not at all. The source is left as found. Where torch.distributed has several
    processes, each runs the source on its share of the batches and writes the shards of it; all pass the same
    arguments, and get the same store.

    Args:
        source: the source model or its view.
        batches: right-padded batches with supervised answers; `PairedBatch` where the tokenizers differ.
        pairing: the source layer of each target layer.
        transport: from the source's width to the target's.
        folder: folder of the store; another artifact there is replaced.
        settings: what is kept, and in which form.
        entries: vocabulary ids that both models share with equal ids; None for the source's whole head.
        classes: classes of the two vocabularies, with `PairedBatch` alone.
        resume_key: cache key of the source and the batches, such as a hash of both. With it, an interrupted call that
            is repeated resumes after its last whole shard, in a folder beside `folder`, and a finished one returns
            the store that exists.

    Returns:
        The store, opened.

    Raises:
        SemalignError: no examples, a pairing for another depth, a transport for another width, rows of two tokenizers
            without classes or the other way round, values that are not finite, or a folder that holds other files.
        OSError: the disk is full.

    Source: method 2.3 and 2.5.
    """
    reader = SupervisingSource(source, pairing, transport, settings or SupervisionSettings(), entries, classes)
    ranks, place = Ranks.current(), Path(folder)
    key = "" if resume_key is None else _cache_key(resume_key, reader, entries)
    ranks.broadcast_from_first(lambda: check_replaceable(place))
    finished = ranks.broadcast_from_first(lambda: _finished(place, key)) if key else None
    if finished is not None:
        LOGGER.info("%s holds this supervision already", place)
        return Supervision(place, finished)
    with _workplace(place, key, ranks) as temporary:
        shares = ranks.all_gather(_write_share(reader, batches, _Writer(temporary, key, ranks), ranks))
        if not any(share.shards for share in shares):
            raise SemalignError("there are no examples to supervise: the batches are empty")
        if ranks.is_first:
            _write_manifest(temporary, key, reader, shares)
    return Supervision(place, SupervisionManifest.read(place / MANIFEST))


def _write_share(reader: SupervisingSource, batches: Iterable[AnyBatch], writer: "_Writer", ranks: Ranks) -> Progress:
    """Run the source on this process's batches that are in no whole shard yet, and write their shards."""
    mine = batches if ranks.size == 1 else _share(list(batches), ranks)
    for batch in itertools.islice(mine, writer.progress.batches, None):
        rows = Rows.of(batch, paired=reader.classes is not None)
        if rows is None:
            writer.add_nothing()
            continue
        layers = reader.pairing.paired_layers
        part, squares = reader.read(rows.source, rows.positions, layers, span_tokens=rows.span_tokens)
        writer.add(rows, {name: value.cpu() for name, value in part.items()}, squares)
        if writer.pending_bytes >= reader.settings.shard_bytes:
            writer.close_shard()
    writer.close_shard()
    return writer.progress


class _Writer:
    """Collects the supervision of each batch, and writes it in shards."""

    def __init__(self, folder: Path, key: str, ranks: Ranks) -> None:
        self._folder, self._key, self._ranks = folder, key, ranks
        self._file = folder / f"progress-{ranks.rank:03}.json"
        self._prefix = f"shard-{ranks.rank:03}-"
        found = self._found() if key else None
        if found is None:
            for file in folder.glob(f"{self._prefix}*"):
                file.unlink()
        self.progress = found or Progress(key=key, ranks=ranks.size)
        """Content of the finished shards."""
        if self.progress.shards:
            LOGGER.info("resuming after %d whole shards of %s", len(self.progress.shards), folder)
        self._pending: list[dict[str, Tensor]] = []
        self._counts = Counter({name: getattr(self.progress, name) for name in COUNTS})
        self._squares = torch.tensor(self.progress.squares, dtype=torch.float64)

    @property
    def pending_bytes(self) -> int:
        """Size of the supervision that is in no shard yet."""
        return sum(value.nbytes for part in self._pending for value in part.values())

    def add(self, rows: Rows, part: dict[str, Tensor], squares: Tensor) -> None:
        """Take the supervision of a batch."""
        self._pending.append({**rows.kept, **part})
        tokens, spans = len(rows.kept["input_ids"]), int(rows.kept["counts"].sum())
        self._counts.update(batches=1, tokens=tokens, supervised_tokens=rows.answer_tokens, spans=spans)
        self._squares += squares

    def add_nothing(self) -> None:
        """Take a batch without rows."""
        self._counts.update(batches=1)

    def close_shard(self) -> None:
        """Write the pending supervision as a shard."""
        if not self._pending:
            return
        name = f"{self._prefix}{len(self.progress.shards):05}.safetensors"
        tensors = {each: torch.cat([part[each] for part in self._pending]) for each in self._pending[0]}
        save_tensors(self._folder / name, tensors)
        lost, whole = self._squares.tolist()
        self.progress = Progress(
            key=self._key,
            ranks=self._ranks.size,
            shards=(*self.progress.shards, Shard(file=name, examples=len(tensors["lengths"]))),
            files={**self.progress.files, name: sha256_of(self._folder / name)},
            **self._counts,
            squares=(lost, whole),
        )
        if self._key:
            self.progress.write(self._file)
        LOGGER.info("wrote %s: %d examples", name, len(tensors["lengths"]))
        self._pending.clear()

    def _found(self) -> Progress | None:
        """Progress of an interrupted call; None without one for this supervision, or where a file is damaged."""
        try:
            progress = Progress.read(self._file)
        except SemalignError:
            return None
        places = {self._folder / name: sha256 for name, sha256 in progress.files.items()}
        whole = all(place.is_file() and sha256_of(place) == sha256 for place, sha256 in places.items())
        return progress if whole and (progress.key, progress.ranks) == (self._key, self._ranks.size) else None


def _write_manifest(folder: Path, key: str, reader: SupervisingSource, shares: list[Progress]) -> None:
    vocabulary = {"entries": reader.entries} if reader.classes is None else class_tensors(reader.classes)
    if not isinstance(reader.settings.output, TopK):
        head = reader.stored_head
        vocabulary["head_weight"] = head.weight.cpu()
        if head.bias is not None:
            vocabulary["head_bias"] = head.bias.cpu()
    save_tensors(folder / VOCABULARY, vocabulary)
    files = {name: sha256 for share in shares for name, sha256 in share.files.items()}
    shards = [shard for share in shares for shard in share.shards]
    lost, whole = (sum(share.squares[place] for share in shares) for place in (0, 1))
    manifest = reader.manifest(
        key=key,
        examples=sum(shard.examples for shard in shards),
        tokens=sum(share.tokens for share in shares),
        supervised_tokens=sum(share.supervised_tokens for share in shares),
        spans=sum(share.spans for share in shares),
        files={**files, VOCABULARY: sha256_of(folder / VOCABULARY)},
        shards=shards,
        residual_error=(lost / whole) ** 0.5 if whole else 0.0,
    )
    manifest.write(folder / MANIFEST)


def _share(batches: list[AnyBatch], ranks: Ranks) -> list[AnyBatch]:
    """The batches of this process: a run of neighbours, so that the store has the order of one process, with about as
    many tokens as any other process's."""
    read = [batch.source if isinstance(batch, PairedBatch) else batch for batch in batches]
    sizes = torch.tensor([batch["input_ids"].numel() if batch else 0 for batch in read], dtype=torch.float64)
    middles = (sizes.cumsum(0) - sizes / 2) / sizes.sum()  # of 1
    owners = (middles * ranks.size).long().clamp(0, ranks.size - 1)
    return [batch for batch, owner in zip(batches, owners.tolist(), strict=True) if owner == ranks.rank]


def _cache_key(resume_key: str, reader: SupervisingSource, entries: Tensor | None) -> str:
    """Cache key of a supervision."""
    parts = [resume_key, reader.pairing.model_dump_json(), reader.settings.model_dump_json()]
    digest = hashlib.sha256("\n".join(parts).encode())
    classes = reader.classes
    of_classes = () if classes is None else (classes.source, classes.target)
    for tensor in (reader.transport.matrix, entries, *of_classes):
        if tensor is not None:
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _finished(folder: Path, key: str) -> SupervisionManifest | None:
    """Manifest of a whole store that an earlier call with this key wrote; None without one."""
    try:
        same = SupervisionManifest.read(folder / MANIFEST).key == key
        return read_manifest(folder, SupervisionManifest) if same else None
    except SemalignError:
        return None


@contextmanager
def _workplace(folder: Path, key: str, ranks: Ranks) -> Iterator[Path]:
    """Folder in which the store grows until it gets its name."""
    folder = folder.resolve()
    if not key and ranks.size == 1:
        with new_folder(folder) as temporary:
            yield temporary
        return
    partial = folder.with_name(folder.name + PARTIAL)
    ranks.broadcast_from_first(lambda: partial.mkdir(parents=True, exist_ok=True))
    yield partial
    ranks.barrier()
    if ranks.is_first:
        gone = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(gone, ignore_errors=True)  # of a call that was killed right here
        if folder.exists():
            folder.rename(gone)  # at once: a folder without its manifest would count as one of other files
        partial.rename(folder)
        shutil.rmtree(gone, ignore_errors=True)
        named = {MANIFEST, *SupervisionManifest.read(folder / MANIFEST).files}
        for file in folder.iterdir():  # last: progress, without which a killed call could not resume
            if file.name not in named:
                file.unlink()
    ranks.barrier()
