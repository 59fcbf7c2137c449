"""A supervision store, memory-mapped: any examples as a padded batch with the supervision of one target layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from semalign_attribution import IGNORE, Batch, Supervised, supervised
from semalign_geometry import Head, TopEntries
from semalign_geometry.base import SemalignError, read_manifest
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ._residuals import SCALE, restored_residual
from ._settings import SupervisionManifest, TopK

VOCABULARY = "vocabulary.safetensors"


@dataclass(frozen=True, eq=False)
class FinalStates:
    """The source's output distribution as its final hidden states and its head."""

    hidden: Float[Tensor, "p s"]
    """What the source feeds its head at the supervised positions."""
    head: Head
    """The source's head over the shared entries."""


OutputTarget = TopEntries | FinalStates
"""The source's output distribution at the supervised positions."""


@dataclass(frozen=True, eq=False)
class SupervisedBatch:
    """Some examples with the supervision of one target layer."""

    batch: Batch
    """input_ids, attention_mask and labels, (b, n)."""
    positions: Supervised
    """The supervised positions of `batch`."""
    reference: Float[Tensor, "b m t"] | None
    """y_k at the supervised positions of each sequence, padded to the longest; None when no layer was asked for."""
    output: OutputTarget
    """The source's output distribution at the p supervised positions, in the order of `positions.mask`."""


class Supervision:
    """A finished supervision store."""

    def __init__(self, folder: Path, manifest: SupervisionManifest) -> None:
        """Use `Supervision.open`, which checks the files first."""
        self.folder = folder
        """Where the store lies."""
        self.manifest = manifest
        """What it holds."""
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
        names = [key for key in self._shards[0].keys() if key.startswith("residual.") and not key.endswith(SCALE)]  # noqa: SIM118 (not a mapping)
        self._residuals = {int(name.rsplit("-", 1)[1]): name for name in names}  # by paired source layer
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

    def head_on(self, device: torch.device) -> Head | None:
        """The source's head on a device; None when the store keeps top entries instead."""
        self._head = None if self._head is None else self._head.to(device)
        return self._head

    def tokens(self, indices: Sequence[int], *, device: torch.device | str = "cpu") -> Batch:
        """The tokens of some examples, padded on the right."""
        ids, labels = ([self._slice(key, index) for index in indices] for key in ("input_ids", "labels"))
        batch = padded(ids, labels)
        return {key: value.to(device) for key, value in batch.items()}

    def collate(
        self, indices: Sequence[int], *, layer: int | None = None, device: torch.device | str = "cpu"
    ) -> SupervisedBatch:
        """Some examples with their supervision.

        Args:
            indices: examples, counted from 0.
            layer: target layer whose residual supervision is wanted, counted from 1; None for none.
            device: where the tensors go.

        Raises:
            SemalignError: an example or a layer does not exist.
        """
        device = torch.device(device)
        batch = self.tokens(indices, device=device)
        reference = None
        if layer is not None:
            key = self._residuals[self.manifest.pairing.source_of(layer)]
            suffixes = ("", SCALE) if self.manifest.settings.dtype == "int8" else ("",)
            vectors = [
                restored_residual({suffix: self._slice(key + suffix, index) for suffix in suffixes})
                for index in indices
            ]
            reference = pad_sequence(vectors, batch_first=True).to(device)
        return SupervisedBatch(batch, supervised(batch), reference, self._output(indices, device))

    def _output(self, indices: Sequence[int], device: torch.device) -> OutputTarget:
        def joined(key: str) -> Tensor:
            return torch.cat([self._slice(key, index) for index in indices]).to(device)

        if isinstance(self.manifest.settings.output, TopK):
            return TopEntries(joined("top_ids"), joined("top_log_probs"), joined("tail"))
        head = self.head_on(device)
        assert head is not None
        return FinalStates(joined("final"), head)

    def _all(self, key: str) -> Tensor:
        return torch.cat([shard.get_tensor(key) for shard in self._shards]).long()

    def _slice(self, key: str, index: int) -> Tensor:
        """One example's part of a tensor."""
        if not 0 <= index < len(self):
            raise SemalignError(f"example {index} does not exist: the store has examples 0 to {len(self) - 1}")
        shard, token, position = self._places[index]
        per_token = key in ("input_ids", "labels")
        start = token if per_token else position
        count = int((self.lengths if per_token else self.counts)[index])
        part: Tensor = self._shards[shard].get_slice(key)[start : start + count]
        return part


def position_mask(counts: Int[Tensor, " b"]) -> Bool[Tensor, "b m"]:
    """Which places of a padded (b, m, …) tensor of supervised positions are real."""
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def padded(ids: Sequence[Tensor], labels: Sequence[Tensor]) -> Batch:
    """A batch of examples, padded on the right."""
    lengths = torch.tensor([len(part) for part in ids])
    return {
        "input_ids": pad_sequence([part.long() for part in ids], batch_first=True),
        "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
        "labels": pad_sequence([part.long() for part in labels], batch_first=True, padding_value=IGNORE),
    }
