"""A supervision store, memory-mapped: any examples as a padded batch with the supervision of one target layer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from semalign_attribution import Batch
from semalign_geometry import ClassHead, Head, OutputHead
from semalign_geometry.base import read_manifest
from torch import Tensor

from ._classes import classes_of
from ._codec import decode
from ._examples import Examples
from ._settings import SupervisionManifest
from ._supervision import SupervisedBatch, output_head, target_entries

VOCABULARY = "vocabulary.safetensors"
"""File of the shared entries or the classes, and of the source's head where final hidden states are kept."""


class Supervision:
    """A finished supervision store."""

    def __init__(self, folder: Path, manifest: SupervisionManifest) -> None:
        """Use `Supervision.open`, which checks the files first."""
        self.folder = folder
        """Folder of the store."""
        self.manifest = manifest
        """Settings, pairing and sizes."""
        self._shards: list[Any] = [safe_open(folder / shard.file, framework="pt") for shard in manifest.shards]
        self._examples = Examples([shard.get_slice for shard in self._shards], paired=manifest.spans is not None)
        self.lengths: Int[Tensor, " e"] = self._examples.lengths
        """Tokens of each example as the target reads it."""
        self.counts: Int[Tensor, " e"] = self._examples.counts
        """Spans of each example; its answer tokens with one tokenizer."""
        self.answer_counts: Int[Tensor, " e"] = self._examples.answer_counts
        """Answer tokens of each example as the target reads it."""
        with safe_open(folder / VOCABULARY, framework="pt") as file:
            vocabulary = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        self.classes = classes_of(vocabulary) if self._examples.paired else None
        """Classes of the two vocabularies that the output distribution is over; None with one tokenizer."""
        self.entries: Int[Tensor, " v"] = (
            vocabulary["entries"] if self.classes is None else target_entries(self.classes)
        )
        """Ids of the target's vocabulary that the output distribution is over."""
        self._head = self._source_head(vocabulary)

    @classmethod
    def open(cls, folder: str | Path) -> "Supervision":
        """Open a store after checking the hash of every file.

        Raises:
            SemalignError: the folder, its manifest or a file is missing or damaged.
        """
        return cls(Path(folder), read_manifest(folder, SupervisionManifest))

    def __len__(self) -> int:
        return self.manifest.examples

    @property
    def largest_id(self) -> int:
        """The largest token id of all examples as the target reads them."""
        return self._examples.largest_id

    def output_head(self, head: Head) -> OutputHead:
        """The target's head over what `output` is over; see `SupervisionSource.output_head`."""
        return output_head(head, self.entries, self.classes)

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples as the target reads them; see `SupervisionSource.tokens`."""
        return {key: value.to(device) for key, value in self._examples.tokens(indices).items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision; see `SupervisionSource.collate`."""
        device = torch.device(device)
        self._head = None if self._head is None else self._head.to(device)

        def read(name: str) -> Tensor:
            return self._examples.read(name, indices).to(device)

        return decode(read, self._examples, indices, manifest=self.manifest, layer=layer, head=self._head)

    def _source_head(self, vocabulary: Mapping[str, Tensor]) -> OutputHead | None:
        """The source's head over the shared entries or the classes, where final hidden states are kept."""
        if "head_weight" not in vocabulary:
            return None
        scale, softcap = self.manifest.head_scale, self.manifest.head_softcap
        head = Head(vocabulary["head_weight"], vocabulary.get("head_bias"), scale, softcap)
        return head if self.classes is None else ClassHead.of(head, self.classes.source, self.classes.count)
