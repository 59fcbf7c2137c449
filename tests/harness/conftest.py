"""A random source and target on disk that share the tiny tokenizer, and rows for them."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from semalign_harness import arithmetic_rows, build_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model

VOCABULARY = 320
"""Rows of the heads: more than the tokenizer has entries, as padded checkpoints do."""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / "cache"))


def save_pair(folder: Path) -> tuple[Path, Path]:
    tokenizer = build_tokenizer()
    for name, depth, width in (("source", 4, 40), ("target", 3, 24)):
        model = tiny_model("llama", seed=depth, depth=depth, width=width, vocabulary=VOCABULARY)
        model.config.max_position_embeddings = 128
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "source", folder / "target"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return save_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = arithmetic_rows(60, seed=3, split="train")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def starting() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, but it puts <bos> before every text, as Llama's does."""
    tokenizer = build_tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return tokenizer


@pytest.fixture
def overrides(pair: tuple[Path, Path], rows_file: Path) -> list[str]:
    """Settings that turn the tiny preset into a run of seconds."""
    return [
        f"source.path={pair[0]}",
        f"target.path={pair[1]}",
        f"data.train.path={rows_file}",
        "data.held_out=null",
        "data.train_rows=16",
        "data.held_out_rows=8",
        "data.attribution_rows=4",
        "train.steps=2",
        "train.batch_size=8",
        "train.micro_batch_size=8",
        "measure.answer_rows=4",
        "measure.max_new_tokens=4",
        "batch_size=8",
    ]


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Builds a tiny model of any family; a module of `harness/families`, which is no package."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "harness/families"))
    return importlib.import_module("tiny_families")
