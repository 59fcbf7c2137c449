"""Pairs whose models read rows by tokenizers of their own: inputs, written answers, cache keys, findings."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from semalign_align import Ranks
from semalign_geometry.base import SemalignError
from semalign_harness import load_experiment
from semalign_harness.cli.main import main
from semalign_harness.data.encoding import Example, Role
from semalign_harness.doctor import Diagnosis
from semalign_harness.models.opening import OpenedModel, open_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.models.tiny import build_other_tokenizer
from semalign_harness.run import written_answers
from semalign_harness.run.checks import Finding, Pair
from semalign_harness.run.inputs import Inputs, read_inputs
from semalign_harness.run.job import Job
from semalign_harness.run.phase_cache import phase_key
from semalign_harness.run.written_answers import with_written_answers
from semalign_harness.util.console import Console
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import PreTrainedTokenizerFast

from tests.models import tiny_model

from . import families_of_tokenizers as families

CPU = torch.device("cpu")
ROLES: list[Role] = ["source", "target"]


def save(folder: Path, tokenizer: PreTrainedTokenizerFast, *, depth: int = 3, width: int = 24) -> Path:
    """Save a random model whose head has some rows more than the tokenizer has entries."""
    model = tiny_model("llama", seed=depth, depth=depth, width=width, vocabulary=len(tokenizer) + 4)
    model.config.max_position_embeddings = 128
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target with a tokenizer of its own."""
    return save(tmp_path_factory.mktemp("apart"), build_other_tokenizer())


@pytest.fixture
def settings(overrides: list[str], apart: Path) -> list[str]:
    return [*overrides, f"target.path={apart}"]


class Noting(Console):
    """Keeps the notes."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def inputs_of(settings: list[str], console: Console | None = None) -> Inputs:
    return read_inputs(load_experiment("tiny", overrides=settings), console or Noting())


def test_each_model_reads_the_rows_by_its_own_tokenizer(settings: list[str]) -> None:
    console = Noting()
    inputs = inputs_of(settings, console)
    assert inputs.classes is not None and inputs.paired is not None
    assert (len(inputs.classes.source), len(inputs.classes.target)) == (320, 900), "rows of the heads"
    assert torch.equal(inputs.shared.source_ids, inputs.classes.shared.source_ids)
    for row in (*inputs.split.train, *inputs.split.held_out):
        assert row.source is not None
        read = [inputs.source.tokenizer.decode(row.source.answer_ids[:-1])]
        read += [inputs.target.tokenizer.decode(row.answer_ids[:-1])]
        assert [text.strip() for text in read] == [row.answer] * 2
    notes = "\n".join(console.notes)
    assert "the tokenizers differ, and each model reads rows by its own" in notes
    assert "spans" in notes and "of one token on both sides" in notes


def test_with_one_tokenizer_rows_have_one_side(overrides: list[str]) -> None:
    inputs = inputs_of(overrides)
    assert inputs.classes is None and inputs.paired is None
    assert all(row.source is None for row in inputs.split.train)


def test_the_cache_key_holds_the_sides_of_both_models(settings: list[str]) -> None:
    experiment = load_experiment("tiny", overrides=settings)
    inputs = inputs_of(settings)
    first, *others = inputs.split.train
    assert first.source is not None
    keys = {phase_key(experiment, inputs, CPU)}
    for change in ({"prompt_ids": (1,)}, {"answer_ids": (1, 2)}, {"framed": (True, False)}):
        changed = dataclasses.replace(first, source=dataclasses.replace(first.source, **change))
        split = dataclasses.replace(inputs.split, train=[changed, *others])
        keys.add(phase_key(experiment, dataclasses.replace(inputs, split=split), CPU))
    assert len(keys) == 4


@pytest.mark.parametrize("writer", ROLES)
def test_written_answers_are_carried_over(writer: Role, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gold = inputs_of(settings)
    tokenizer = getattr(gold, writer).tokenizer
    prompts: list[tuple[int, ...]] = []

    def written(job: Job, role: Role, asked: list[tuple[int, ...]], *_: object) -> dict[tuple[int, ...], list[int]]:
        prompts.extend(asked)
        answer = tokenizer(" The answer is 12", add_special_tokens=False)["input_ids"]
        found = {prompt: [*answer, tokenizer.eos_token_id] for prompt in asked}
        found[asked[0]] = [tokenizer.pad_token_id, *answer]  # no text
        found[asked[1]] = answer  # cut off
        return found

    monkeypatch.setattr(written_answers, "_written", written)
    console = Noting()
    experiment = load_experiment("tiny", overrides=[*settings, f"data.answers={writer}"])
    job = Job(experiment, Path("nowhere"), console, CPU, Ranks.current(), gold)
    rows = with_written_answers(job).inputs.split.train
    assert prompts == [row.on(writer).prompt_ids for row in gold.split.train], "each model writes to its own prompts"
    assert len(rows) == len(gold.split.train) - 1
    assert "(0 wrong, 0 longer than data.max_length=128, 1 that are no text to both models)" in console.notes[0]

    def reads(row: Example) -> list[str]:
        return [getattr(gold, role).tokenizer.decode(row.on(role).answer_ids).strip() for role in ROLES]

    assert reads(rows[0]) == ["The answer is 12"] * 2
    assert [reads(row) for row in rows[1:]] == [["The answer is 12<eos>", "The answer is 12<|end|>"]] * (len(rows) - 1)
    assert [row.answer for row in rows] == [row.answer for row in gold.split.train[1:]], "references stay"


def opened(folder: Path) -> OpenedModel:
    return open_model(ModelConfig(path=str(folder)))


def test_equal_entries_that_rows_split_differently_are_read_apart(tmp_path: Path, rows_file: Path) -> None:
    whole, digits = families.byte_level(), families.byte_level()
    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    digits.backend_tokenizer.pre_tokenizer = Sequence(steps)
    models = [opened(save(tmp_path / name, each)) for name, each in (("whole", whole), ("digits", digits))]
    rows = [{"prompt": f"What is {i} + 1?", "completion": "She sold 72 clips"} for i in range(40)]
    experiment = load_experiment("tiny", overrides=["data.train_rows=16", "data.held_out_rows=8"])
    pair = Pair.of(experiment, *models)
    assert not pair.apart, "every entry has one id"
    read, failure = pair.reading([rows])
    assert failure is None and read.apart and read.split is not None and read.split.train[0].source is not None
    same, failure = pair.reading([[{**row, "completion": "clips", "prompt": "a" * i} for i, row in enumerate(rows, 1)]])
    assert failure is None and not same.apart, "one tokenizer serves both models on these rows"


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> Diagnosis:
    main(["doctor", "--json", *map(str, arguments)])
    return Diagnosis.parse(json.loads(capsys.readouterr().out))


def of(diagnosis: Diagnosis, check: str) -> Finding:
    (found,) = (finding for finding in diagnosis.findings if finding.check == check)
    return found


def test_the_doctor_describes_both_tokenizers_and_the_spans(
    pair: tuple[Path, Path], apart: Path, rows_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = ["--data", rows_file, "data.train_rows=16", "data.held_out_rows=8", "data.max_length=64"]
    diagnosis = doctor(capsys, pair[0], apart, *rows, 'chat_template={"unused": true}')
    assert diagnosis.is_usable
    assert "256 entries have equal bytes, all fall into 258 classes" in of(diagnosis, "tokenizers").message
    assert "EOS '<eos>' and '<|end|>'" in of(diagnosis, "special tokens").message
    assert " of one token on both sides" in of(diagnosis, "spans").message
    assert "tokens of the target, " in of(diagnosis, "rows").message
    templates = [finding for finding in diagnosis.findings if finding.check == "chat template"]
    assert [finding.level for finding in templates] == ["ok", "warning"]
    assert "neither template reads unused" in templates[1].message


def test_the_doctor_compares_layers_where_spans_start(
    pair: tuple[Path, Path], apart: Path, rows_file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = ["--data", rows_file, "data.train_rows=16", "data.held_out_rows=8", "data.max_length=64"]
    diagnosis = doctor(capsys, "--deep", "--out", tmp_path / "layers.svg", pair[0], apart, *rows)
    assert diagnosis.is_usable
    assert (len(diagnosis.similarity), len(diagnosis.similarity[0])) == (3, 4)


def test_templates_that_frame_answers_differently_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama 2 has space around answers; a template that writes thoughts before them cannot be used."""
    source = save(tmp_path / "source", families.sentencepiece(), depth=4, width=40)
    target = save(tmp_path / "target", families.byte_level())
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {i} + 1?", "completion": f"It is {i + 1}"} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = ["--data", file, "data.train_rows=16", "data.held_out_rows=8", "data.max_length=64"]
    spans = [each for each in doctor(capsys, source, target, *settings).findings if each.check == "spans"]
    assert [each.level for each in spans] == ["ok", "warning", "warning"]
    assert spans[1].message.startswith("24 answers begin with space on one side alone")
    assert spans[2].message.startswith("24 answers have space before their end on one side alone")

    thinking = save(tmp_path / "thinking", families.byte_level(digits=True, template=families.THINKING))
    found = doctor(capsys, thinking, target, *settings)
    assert "render the answer of a question differently" in of(found, "chat template").message
    assert "different text in every answer" in of(found, "rows").message and not found.is_usable


def test_a_tokenizer_that_loses_text_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lossy = build_other_tokenizer()
    lossy.backend_tokenizer.normalizer = Lowercase()
    target = save(tmp_path / "lossy", lossy)
    found = of(doctor(capsys, pair[0], target), "tokenizers")
    assert found.level == "error" and "its Lowercase changes the text" in found.message
    with pytest.raises(SemalignError, match="its Lowercase changes the text"):
        inputs_of([*settings, f"target.path={target}"])
