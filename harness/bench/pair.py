"""Pairs of models with rows, in a folder: random ones from a description, or real ones by their paths."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from meter import Meter
from semalign_align import Supervision, supervise
from semalign_attribution import Batch, GradientActivation, LayerPairing, attribute_layers, pair_layers
from semalign_geometry import SemanticBasis, Transport, fit_transport
from semalign_harness.data.encoding import Example, TextEncoder
from semalign_harness.data.rows import batches, load_rows, split_rows
from semalign_harness.data.settings import DataConfig, RowsConfig
from semalign_harness.models.loading import LoadedModel, load_model
from semalign_harness.models.opening import check_tokenizers, open_model
from semalign_harness.models.saving import save_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.models.tiny import build_tokenizer
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

HEAD_WIDTH = 32
ATTRIBUTION_SHARE = 8
"""One in so many rows is attributed on, as by default in the harness."""
BATCH_SIZE = 4


@dataclass(frozen=True)
class Pair:
    """What `prepare` left in a folder."""

    folder: Path
    source: str
    target: str
    depth: int
    """Layers of the target."""
    entries: int
    """Vocabulary entries that both models share: the first ones."""
    rows: list[Example]

    @classmethod
    def read(cls, folder: str) -> "Pair":
        """Read the description; weights are read by `load`."""
        known = json.loads((Path(folder) / "pair.json").read_text(encoding="utf-8"))
        rows = [Example(tuple(prompt), tuple(answer), "") for prompt, answer in known.pop("rows")]
        return cls(folder=Path(folder), rows=rows, **known)

    @property
    def shared(self) -> Tensor:
        """Ids of the shared entries."""
        return torch.arange(self.entries)

    def batches(self) -> list[Batch]:
        """All rows in padded batches."""
        return batches(self.rows, BATCH_SIZE)

    def attribution_batches(self) -> list[Batch]:
        """The rows that are attributed on, one at a time, as in the harness."""
        return batches(self.rows[: max(1, len(self.rows) // ATTRIBUTION_SHARE)], 1)

    def load(self, which: str, meter: Meter) -> LoadedModel:
        """The source or the target."""
        dtype: Any = str(meter.dtype).removeprefix("torch.")
        path = self.source if which == "source" else self.target
        return load_model(ModelConfig(path=path, dtype=dtype), device=meter.device)

    def plan(self) -> tuple[LayerPairing, Transport]:
        """The pairing and the transport that `prepare` found."""
        return LayerPairing.read(self.folder / "pairing.json"), Transport.load(self.folder / "transport")

    def store(self) -> Supervision:
        """The supervision that `prepare` wrote."""
        return Supervision.open(self.folder / "store")


def prepare(meter: Meter, *, folder: str, supervised: bool, rows: int | None = None, **description: Any) -> None:
    """Write a pair to a folder: random models where `description` holds sizes, else those that it names.

    Args:
        meter: names device and dtype.
        folder: a new folder.
        supervised: whether pairing, transport and a supervision store are wanted, too.
        rows: number of rows; None for as many as it takes for two steps of each layer of the target in three passes.
        description: the arguments of `_random` or `_real`.
    """
    place = Path(folder)
    place.mkdir()
    known = _random(place, rows, **description) if "vocabulary" in description else _real(rows, **description)
    (place / "pair.json").write_text(json.dumps(known), encoding="utf-8")
    if not supervised:
        return
    pair = Pair.read(folder)
    basis = SemanticBasis.from_model(pair.load("target", meter).model, entries=pair.shared)
    source = pair.load("source", meter).model
    pairing, transport = plan(pair, source, basis)
    pairing.write(place / "pairing.json")
    transport.save(place / "transport")
    supervise(source, pair.batches(), pairing, transport, place / "store", entries=pair.shared)


def plan(pair: Pair, source: PreTrainedModel, target: SemanticBasis) -> tuple[LayerPairing, Transport]:
    """Attribute and pair the layers, and fit the transport."""
    scores = attribute_layers(source, pair.attribution_batches(), scorer=GradientActivation())
    transport = fit_transport(SemanticBasis.from_model(source, entries=pair.shared), target, fold_gain=True)
    return pair_layers(scores, pair.depth), transport


def default_rows(depth: int) -> int:
    """Rows that give each layer two steps in three passes."""
    return -(-2 * depth * BATCH_SIZE // 3)


def _random(
    place: Path,
    rows: int | None,
    *,
    vocabulary: int,
    length: int,
    source_layers: int,
    source_width: int,
    target_layers: int,
    target_width: int,
) -> dict[str, Any]:
    """Qwen2-shaped models with random weights, and random rows of one length, half prompt and half answer."""
    tokenizer = build_tokenizer()
    for name, layers, width in (
        ("source", source_layers, source_width),
        ("target", target_layers, target_width),
    ):
        config = Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=width * 11 // 2,
            num_hidden_layers=layers,
            num_attention_heads=width // HEAD_WIDTH,
            num_key_value_heads=max(1, width // HEAD_WIDTH // 4),
            max_position_embeddings=2 * length,
            tie_word_embeddings=True,
            initializer_range=width**-0.5,
        )
        torch.manual_seed(len(name) + width)
        save_model(Qwen2ForCausalLM(config), tokenizer, place / name)
    rows = rows or default_rows(target_layers)
    ids = torch.randint(8, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0)).tolist()
    return {
        "source": str(place / "source"),
        "target": str(place / "target"),
        "depth": target_layers,
        "entries": vocabulary,
        "rows": [(row[: length // 2], row[length // 2 :]) for row in ids],
    }


def _real(rows: int | None, *, source: str, target: str, data: str, length: int) -> dict[str, Any]:
    """Models and rows from files, as the harness reads them."""
    opened = [open_model(ModelConfig(path=path)) for path in (source, target)]
    depth = opened[1].config.num_hidden_layers
    config = DataConfig(
        train=RowsConfig(path=data), train_rows=rows or default_rows(depth), held_out_rows=1, max_length=length
    )
    split = split_rows(config, [load_rows(config.train)], TextEncoder(opened[1].tokenizer))
    shared = check_tokenizers(opened[0], opened[1], _texts(split.train, opened[1].tokenizer))
    entries = len(shared)
    assert torch.equal(shared.source_ids, torch.arange(entries)), "shared entries with a gap"
    return {
        "source": opened[0].place,
        "target": opened[1].place,
        "depth": depth,
        "entries": entries,
        "rows": [(row.prompt_ids, row.answer_ids) for row in split.train],
    }


def _texts(rows: Sequence[Example], tokenizer: Any) -> list[str]:
    return [str(tokenizer.decode(list(row.prompt_ids + row.answer_ids))) for row in rows[:8]]
