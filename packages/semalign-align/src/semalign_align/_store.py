"""A supervision store, memory-mapped: any examples as a padded batch with the supervision of one target layer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from semalign_attribution import Batch
from semalign_geometry import Head
from semalign_geometry.base import read_manifest
from torch import Tensor

from ._codec import decode
from ._settings import SupervisionManifest
from ._supervision import SupervisedBatch, check_examples, padded

VOCABULARY = "vocabulary.safetensors"
"""File of the shared entries, and of the source's head where final hidden states are kept."""


class Supervision:
    """A finished supervision store."""

    def __init__(self, folder: Path, manifest: SupervisionManifest) -> None:
        """Use `Supervision.open`, which checks the files first."""
        self.folder = folder
        """Folder of the store."""
        self.manifest = manifest
        """Settings, pairing and sizes."""
        self._shards: list[Any] = [safe_open(folder / shard.file, framework="pt") for shard in manifest.shards]
        self.lengths: Int[Tensor, " e"] = self._all("lengths")
        """Tokens of each example."""
        self.counts: Int[Tensor, " e"] = self._all("counts")
        """Supervised tokens of each example."""
        # Where each example starts in its shard: (shard, first token, first supervised token).
        self._places: list[tuple[int, int, int]] = []
        example = 0
        for number, shard in enumerate(manifest.shards):
            token = position = 0
            for _ in range(shard.examples):
                self._places.append((number, token, position))
                token += int(self.lengths[example])
                position += int(self.counts[example])
                example += 1
        with safe_open(folder / VOCABULARY, framework="pt") as file:
            vocabulary = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        self.entries: Int[Tensor, " v"] = vocabulary["entries"]
        """Vocabulary ids that the output distribution is over."""
        self._head = (
            Head(vocabulary["head_weight"], vocabulary.get("head_bias"), manifest.head_scale, manifest.head_softcap)
            if "head_weight" in vocabulary
            else None
        )

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
        """The largest token id of all examples."""
        return max(int(shard.get_tensor("input_ids").max()) for shard in self._shards)

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples, padded on the right; see `SupervisionSource.tokens`."""
        check_examples(indices, len(self))
        ids, labels = ([self._slice(key, index) for index in indices] for key in ("input_ids", "labels"))
        return {key: value.to(device) for key, value in padded(ids, labels).items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision; see `SupervisionSource.collate`."""
        device = torch.device(device)
        tokens = self.tokens(indices)
        self._head = None if self._head is None else self._head.to(device)

        def read(key: str) -> Tensor:
            return torch.cat([self._slice(key, index) for index in indices]).to(device)

        return decode(read, tokens, manifest=self.manifest, layer=layer, head=self._head)

    def _all(self, key: str) -> Tensor:
        return torch.cat([shard.get_tensor(key) for shard in self._shards]).long()

    def _slice(self, key: str, index: int) -> Tensor:
        """One example's part of a tensor."""
        shard, token, position = self._places[index]
        per_token = key in ("input_ids", "labels")
        start = token if per_token else position
        count = int((self.lengths if per_token else self.counts)[index])
        part: Tensor = self._shards[shard].get_slice(key)[start : start + count]
        return part
