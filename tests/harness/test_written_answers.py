"""Answers that a model writes: they replace those of the rows that ask for them, once, whatever the batch."""

import dataclasses
import json
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from semalign_align import Ranks
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment
from semalign_harness.cli.main import main
from semalign_harness.data.encoding import Example
from semalign_harness.generation import generate
from semalign_harness.loading import load_experiment
from semalign_harness.models.loading import load_model
from semalign_harness.models.settings import ModelConfig
from semalign_harness.results.run import Environment
from semalign_harness.run import job, written_answers
from semalign_harness.run.inputs import Inputs, read_inputs
from semalign_harness.run.job import Job
from semalign_harness.run.pipeline import _begin
from semalign_harness.run.written_answers import with_written_answers
from semalign_harness.util.console import Console
from semalign_harness.util.locking import lock_of

QUIET = Console(quiet=True)
SHORT = "data.writing.max_new_tokens=6"


def inputs_of(overrides: list[str], *more: str) -> tuple[Inputs, Inputs]:
    """The inputs as the rows are, and with written answers."""
    experiment = load_experiment("tiny", overrides=[*overrides, SHORT, *more])
    gold = read_inputs(experiment, QUIET)
    return gold, written_of(experiment, gold)


def written_of(experiment: Experiment, gold: Inputs, console: Console = QUIET) -> Inputs:
    """The inputs with written answers."""
    run = Job(experiment, Path("nowhere"), console, torch.device("cpu"), Ranks.current(), gold)
    return with_written_answers(run).inputs


def test_gold_answers_are_left_alone(overrides: list[str]) -> None:
    gold, same = inputs_of(overrides)
    assert same.split == gold.split


def written_by_hand(inputs: Inputs, writer: str, rows: list[Example]) -> list[Example]:
    """The rows with what a model writes to each alone."""
    model, known = load_model(getattr(inputs, writer)).model, set(inputs.shared.target_ids.tolist())
    ends, found = frozenset({inputs.target.tokenizer.eos_token_id}), []
    for row in rows:
        (alone,) = generate(model, [row.prompt_ids], max_new_tokens=6, ends=ends)
        if known.issuperset(alone):  # a random model may write rows of its head that are no entries
            found.append(dataclasses.replace(row, answer_ids=tuple(alone)))
    assert len(found) > len(rows) / 2
    return found


@pytest.mark.parametrize("writer", ["source", "target"])
def test_training_rows_get_what_the_model_writes(writer: str, overrides: list[str]) -> None:
    gold, written = inputs_of(overrides, f"data.answers={writer}")
    assert written.split.held_out == gold.split.held_out
    assert written.split.train == written_by_hand(gold, writer, gold.split.train)


@pytest.mark.parametrize("writer", ["source", "target"])
def test_rows_to_measure_on_get_what_the_model_writes(writer: str, overrides: list[str]) -> None:
    gold, written = inputs_of(overrides, f"data.held_out_answers={writer}", "data.writing.keep=correct")
    assert written.split.train == gold.split.train
    expected = written_by_hand(gold, writer, gold.split.held_out)
    assert written.split.held_out == expected, "wrong ones are measured on, too"


@pytest.mark.parametrize("measured", ["source", "target"])
def test_each_part_of_the_rows_has_a_writer_of_its_own(
    measured: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    real = job.load

    def counted(console: Console, label: str, opened: Any, device: torch.device, *, generates: bool) -> Any:
        assert generates
        loaded.append(opened)
        return real(console, label, opened, device, generates=generates)

    monkeypatch.setattr(job, "load", counted)
    gold, both = inputs_of(overrides, "data.answers=source", f"data.held_out_answers={measured}")
    expected = [gold.target, gold.source, *([gold.target] if measured == "target" else [])]
    assert [*map(id, loaded)] == [*map(id, expected)], "a target that cannot generate fails before the source writes"
    assert both.split.train == written_by_hand(gold, "source", gold.split.train)
    assert both.split.held_out == written_by_hand(gold, measured, gold.split.held_out)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_answers_do_not_depend_on_the_batch_and_are_written_once(
    temperature: float, overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for size in (1, 3):
        monkeypatch.setenv("SEMALIGN_CACHE", str(tmp_path / str(size)))
        settings = ("data.answers=source", f"data.writing.temperature={temperature}", f"batch_size={size}")
        found.append(inputs_of(overrides, *settings)[1].split.train)
    assert found[0] == found[1]
    monkeypatch.setattr(job, "load", None)
    assert inputs_of(overrides, *settings)[1].split.train == found[0]


def test_another_seed_draws_other_answers(overrides: list[str]) -> None:
    drawn = [
        inputs_of(overrides, "data.answers=source", "data.writing.temperature=1", f"data.writing.seed={seed}")[1]
        for seed in (0, 1)
    ]
    assert drawn[0].split.train != drawn[1].split.train


def test_tokens_are_drawn_from_the_softmax() -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log()
    prompts = [(number,) for number in range(4000)]
    for temperature in (1.0, 0.5):
        tokens = written_answers._Sampler(prompts, temperature, 0)(logits.expand(4000, 3), list(range(4000)))
        shares = torch.bincount(tokens, minlength=3) / 4000
        torch.testing.assert_close(shares, (logits / temperature).softmax(0), rtol=0, atol=0.03)


@pytest.mark.parametrize(("writer", "other"), [("source", "target"), ("target", "source")])
def test_the_other_model_is_checked_before_one_writes(
    writer: str, other: str, overrides: list[str], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any
) -> None:
    loaded: list[str] = []
    own = job.load

    def noted(console: Console, label: str, *more: Any, **options: Any) -> Any:
        loaded.append(label)
        return own(console, label, *more, **options)

    monkeypatch.setattr(job, "load", noted)
    checked, writes = f"{other}, to check it", f"{writer} that writes answers"
    inputs_of(overrides, f"data.answers={writer}")
    assert loaded == [checked, writes]
    inputs_of(overrides, f"data.answers={writer}")
    assert loaded == [checked, writes], "all answers are kept: nothing long follows"

    damaged = tmp_path / "damaged"
    model = load_model(ModelConfig(path=str(pair[other == "target"])))
    model.model.model.norm.weight.data[0] = torch.nan
    model.model.save_pretrained(damaged)
    model.tokenizer.save_pretrained(damaged)
    with pytest.raises(SemalignError, match="not finite in model.norm.weight"):
        inputs_of(overrides, f"data.answers={writer}", f"{other}.path={damaged}", "data.writing.seed=5")
    assert loaded[2:] == [checked]


def test_an_interrupted_writing_goes_on(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = inputs_of(overrides, "data.answers=source", "batch_size=1")[1].split.train
    (journal,) = written_answers.cache_folder().glob("answers/*/answers-0.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # killed while it wrote
    asked: list[int] = []

    def counted(model: Any, prompts: Any, **more: Any) -> Any:
        asked.append(len(prompts))
        return generate(model, prompts, **more)

    monkeypatch.setattr(written_answers, "generate", counted)
    assert inputs_of(overrides, "data.answers=source", "batch_size=1")[1].split.train == whole
    assert sum(asked) == len({line for line in lines}) - 7


def test_one_process_writes_at_a_time(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs_of(overrides, "data.answers=source")
    (folder,) = (written_answers.cache_folder() / "answers").glob("[!.]*")
    experiment = load_experiment("tiny", overrides=[*overrides, SHORT, "data.answers=source"])
    gold, release = read_inputs(experiment, QUIET), Event()

    def hold() -> None:
        with lock_of(folder):
            held.set()
            release.wait(60)

    held, notes = Event(), []
    holder = Thread(target=hold)
    holder.start()
    held.wait(60)

    class Telling(Console):
        def note(self, text: str) -> None:
            notes.append(text)
            release.set()

    written_of(experiment, gold, Telling(quiet=True))
    holder.join()
    assert notes[0] == "waiting for another process that writes answers of the same model"


def test_answers_are_those_of_the_dtype_that_a_run_began_with(
    overrides: list[str], pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = []
    for role, folder in zip(("source", "target"), pair, strict=True):
        loaded = load_model(ModelConfig(path=str(folder)))
        for part in (loaded.model.to(torch.bfloat16), loaded.tokenizer):
            part.save_pretrained(tmp_path / role)
        places.append(f"{role}.path={tmp_path / role}")
    experiment = load_experiment("tiny", overrides=[*overrides, SHORT, *places, "data.answers=target"])
    (tmp_path / "run").mkdir()
    begun = []
    for fast, resumed in ((True, False), (False, True)):
        monkeypatch.setattr("semalign_harness.models.opening.bfloat16_is_fast", lambda fast=fast: fast)
        begun.append(_begin(experiment, tmp_path / "run", QUIET, torch.device("cpu"), Ranks.current(), resumed=resumed))
    (first, key), (again, known) = begun
    assert key == known and first.inputs.split == again.inputs.split
    assert Environment.read(tmp_path / "run" / "environment.json").dtypes == ["bfloat16", "bfloat16"]
    assert len(list((written_answers.cache_folder() / "answers").glob("[!.]*"))) == 1, "written once"


@pytest.mark.parametrize("rows", ["answers", "held_out_answers"])
def test_answers_that_cannot_be_written_are_refused_before(rows: str, overrides: list[str]) -> None:
    experiment = load_experiment(
        "tiny", overrides=[*overrides, f"data.{rows}=target", "data.writing.max_new_tokens=999"]
    )
    with pytest.raises(
        SemalignError, match="data.writing.max_new_tokens=999 may reach .*: data.writing.max_new_tokens="
    ):
        read_inputs(experiment, QUIET)
    read_inputs(experiment.model_copy(update={"data": experiment.data.model_copy(update={rows: "gold"})}), QUIET)


def test_answers_with_tokens_of_one_model_alone_are_left_out(
    overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gold, written = inputs_of(overrides, "data.answers=source")
    lost = written.split.train[0].answer_ids[0]
    ids = gold.shared.target_ids
    shared = dataclasses.replace(gold.shared, source_ids=ids[ids != lost], target_ids=ids[ids != lost])
    experiment = load_experiment("tiny", overrides=[*overrides, SHORT, "data.answers=source"])
    known = written_of(experiment, dataclasses.replace(gold, shared=shared))
    assert known.split.train == [row for row in written.split.train if lost not in row.answer_ids]
    assert len(known.split.train) < len(written.split.train)


def test_only_correct_answers_are_kept(overrides: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    gold, _ = inputs_of(overrides)
    right = {row.prompt_ids: row.answer_ids for row in gold.split.train[::2]}

    def oracle(model: Any, prompts: Any, *, ended: Any, **more: Any) -> None:
        for place, prompt in enumerate(prompts):
            ended(place, list(right.get(prompt, gold.split.held_out[0].answer_ids[-1:])))

    monkeypatch.setattr(written_answers, "generate", oracle)
    kept = inputs_of(overrides, "data.answers=source", "data.writing.keep=correct")[1].split.train
    assert kept == gold.split.train[::2]


@pytest.mark.parametrize("longest", [1, 50])
def test_answers_that_were_cut_off_are_counted(longest: int, overrides: list[str]) -> None:
    notes = []

    class Telling(Console):
        def note(self, text: str) -> None:
            notes.append(text)

    wanted = ["data.answers=source", f"data.writing.max_new_tokens={longest}"]
    experiment = load_experiment("tiny", overrides=[*overrides, *wanted])
    gold = read_inputs(experiment, QUIET)
    written = written_of(experiment, gold, Telling(quiet=True))
    end = gold.target.tokenizer.eos_token_id
    cut = [row for row in written.split.train if len(row.answer_ids) == longest and row.answer_ids[-1] != end]
    told = f", {len(cut)} of them cut off at data.writing.max_new_tokens={longest} (" if cut else " stay ("
    assert told in notes[-1] and (cut or longest > 1)


def test_without_a_row_left_the_remedy_is_told(
    overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*overrides, "data.answers=target", "data.writing.max_new_tokens=100", "--out", str(tmp_path / "run")]
    assert main(["run", "tiny", *given, "data.max_length=60"]) == 2
    said = capsys.readouterr().err
    assert "raise data.max_length, or set data.writing.keep=all" in said and not (tmp_path / "run").exists()


def test_a_run_trains_on_written_answers(overrides: list[str], tmp_path: Path) -> None:
    assert main(["run", "tiny", *overrides, "data.answers=target", SHORT, "--out", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["train_rows"] == 16
    assert 0 < result["training"]["supervised_tokens"] <= 6 * 8 * 6, "six steps of eight answers of six tokens"
