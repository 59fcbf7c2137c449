"""Experiments from pairs and tasks, files and overrides; every mistake is one sentence with its remedy."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, load_experiment
from semalign_harness.experiment import GONE, GONE_OF_METHODS, upgraded
from semalign_harness.grid.matrix import Matrix
from semalign_harness.loading import pair_names, task_names
from semalign_harness.results.comparison import Comparison
from semalign_harness.run.run_folder import leaves
from semalign_harness.util.settings import merged


@pytest.mark.parametrize("task", [None, *task_names()])
@pytest.mark.parametrize("name", pair_names())
def test_tasks_of_pairs_parse_and_round_trip(name: str, task: str | None, tmp_path: Path) -> None:
    experiment = load_experiment(name, task)
    assert experiment.name == (name if task is None else f"{name}-{task}")
    assert Experiment.read(experiment.write(tmp_path / "experiment.json")) == experiment
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment.model_dump(mode="json")), encoding="utf-8")
    assert load_experiment(file) == experiment


def test_the_task_overrides_the_pair_and_the_pairs_own_words_the_task() -> None:
    paper, own = load_experiment("llama-2-13b-7b", "humaneval"), load_experiment("qwen2.5-coder", "gsm8k")
    assert (paper.train.passes, paper.train.batch_size) == (3, 64)
    assert (own.data.train_rows, load_experiment("qwen2.5-coder", "mbpp").data.train_rows) == (256, 300)
    assert load_experiment("qwen2.5-coder").data == own.data, "gsm8k where no task is named"
    assert load_experiment("tiny").data == load_experiment("tiny", "arithmetic").data, "or the first of the pair"


def test_a_file_can_be_a_pair(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("source: {path: a}\ntarget: {path: b}\ntasks: {mbpp: {data: {seed: 7}}}\n", encoding="utf-8")
    experiment = load_experiment(file, "mbpp", overrides=["train.passes=2"])
    assert (experiment.name, experiment.source.path, experiment.data.seed) == ("mine-mbpp", "a", 7)
    with pytest.raises(SemalignError, match="is missing"):
        load_experiment(file)
    file.write_text(yaml.safe_dump(load_experiment("tiny").model_dump(mode="json")), encoding="utf-8")
    assert load_experiment(file) == load_experiment("tiny"), "a whole experiment needs no task"


def test_the_experiments_that_the_results_name_are_there() -> None:
    root = Path(__file__).parents[2]
    named = set(
        re.findall(r"harness/results/[\w-]+\.yaml", (root / "harness/docs/results.md").read_text(encoding="utf-8"))
    )
    assert named
    for name in named:
        assert load_experiment(root / name).name.startswith("qwen2.5-coder-")


def test_later_settings_win(tmp_path: Path) -> None:
    file = tmp_path / "more.yaml"
    file.write_text("train: {batch_size: 7, passes: 2}\n", encoding="utf-8")
    experiment = load_experiment("tiny", configs=[file], overrides=["train.passes=5", "data.max_length=99"])
    assert (experiment.train.batch_size, experiment.train.passes, experiment.data.max_length) == (7, 5, 99)
    assert experiment.train.learning_rate == load_experiment("tiny").train.learning_rate
    file.write_text("train: {lerning_rate: 1}\n", encoding="utf-8")
    with pytest.raises(SemalignError, match=f"^tiny, {file}: unknown key 'train.lerning_rate'"):
        load_experiment("tiny", configs=[file])


@pytest.mark.parametrize(
    "override",
    [
        "supervision.output.k=32",
        "pairing.depth_weight=3.0",
        "scorer.aggregate=signed",
        "method.weights.geometry=0.5",
    ],
)
def test_every_setting_of_a_default_kind_can_be_overridden(override: str) -> None:
    place, _, value = override.partition("=")
    found: Any = load_experiment("tiny", overrides=[override]).model_dump(mode="json")
    for key in place.split("."):
        found = found[key]
    assert found == yaml.safe_load(value)


def test_a_changed_kind_replaces_its_section() -> None:
    for overrides in (["pairing.kind=random", "pairing.seed=4"], ["pairing.seed=4", "pairing.kind=random"]):
        experiment = load_experiment("tiny", overrides=overrides)
        assert experiment.pairing.model_dump() == {"kind": "random", "seed": 4}, "whatever their order"


@given(st.floats(1e-6, 1.0), st.integers(1, 512))
def test_overrides_are_read_as_yaml(rate: float, size: int) -> None:
    experiment = load_experiment("tiny", overrides=[f"train.learning_rate={rate!r}", f"train.batch_size={size}"])
    assert experiment.train.learning_rate == rate and experiment.train.batch_size == size


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.lerning_rate=1"], ["train.lerning_rate", "learning_rate"]),
        (["method.trainable.rnk=1", "method.trainable.kind=lora"], ["rnk"]),
        (["sorce.path=x"], ["sorce", "source"]),
        (["train.batch_size=0"], ["train.batch_size", "0"]),
        (["transport.frame=cosin"], ["cosin", "cosine"]),
        (["pairing.kind=similarity"], ["scorer.kind=similarity"]),
        (["pairing.kind=nearest"], ["nearest"]),
        (["train"], ["train", "key.key=value"]),
        (["train.passes=[1"], ["train.passes"]),
        (["version=99"], ["99", "upgrade"]),
    ],
)
def test_wrong_settings_say_what_is_known(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(SemalignError) as error:
        load_experiment("tiny", overrides=overrides)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_places_that_hold_no_experiment_are_named(tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="'tine' is neither a pair .*tiny.* nor the path") as error:
        load_experiment("tine")
    assert sum(name in str(error.value).replace(",", ";").split("; ") for name in pair_names()) <= 3
    with pytest.raises(SemalignError, match="'gsm9k' is no task .*gsm8k.*, and no setting"):
        load_experiment("tiny", "gsm9k")
    with pytest.raises(SemalignError, match="does not exist"):
        load_experiment(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [", encoding="utf-8")
    with pytest.raises(SemalignError, match="not valid YAML"):
        load_experiment(broken)
    broken.write_text("- a", encoding="utf-8")
    with pytest.raises(SemalignError, match="no YAML mapping"):
        load_experiment(broken)
    with pytest.raises(SemalignError, match="the value is not valid YAML: put a text with braces or colons in quotes"):
        load_experiment("tiny", overrides=["data.train.prompt={{question}}"])


OLD = {
    "train": {
        "version": 1,
        "objective": {"kind": "relation", "scope": "all", "unit_tokens": False},
        "weights": {"geometry": 0.5, "output": 1.0, "answer": 0.0, "label": 0.0},
        "trainable": {"kind": "full"},
        "layers": [2],
        "steps": [3],
        "guards": {"max_skipped": 3, "rollback": 0.1, "drowned": 100.0},
        "recompute_suffix": True,
    },
    "supervision": {"residual": "layer"},
}
"""Settings as run folders of earlier versions hold them."""


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (
            {"kind": "semalign", "critical_layer_only": False},
            {"method.layers": [2], "method.rollback": 0.1, "method.weights.geometry": 0.5, "train.learning_rate": 3e-3},
        ),
        (
            {"kind": "kd", "trainable": {"kind": "lora"}, "learning_rate": 1e-4, "seconds": None, "answer": 0.5},
            {"method.trainable.kind": "lora", "method.answer": 0.5, "train.learning_rate": 1e-4},
        ),
        ({"kind": "sft", "trainable": {"kind": "lora"}, "start": "pissa"}, {"method.trainable.start": "pissa"}),
        ({"kind": "sft", "trainable": {"kind": "full"}, "start": "zero"}, {"method.trainable.kind": "full"}),
        ({"kind": "laten", "variant": "paper", "learning_rate": 1e-5}, {"method.learning_rate": 1e-5}),
        ({"kind": "seeking", "trainable": {"kind": "lora"}, "warmup": 0.03}, {"train.warmup": 0.03}),
    ],
)
def test_run_folders_of_earlier_versions_are_read(
    method: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tree = merged(load_experiment("tiny").model_dump(mode="json", exclude={"method"}), {**OLD, "method": method})
    del tree["train"]["recompute"]
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    found = dict(leaves(Experiment.read(file).model_dump(mode="json")))
    assert found["train.recompute"] and found["train.steps"] == 3
    assert {key: found[key] for key in expected} == expected
    with pytest.raises(SemalignError, match=r"train\.\w+ is now method\.\w+"):
        Experiment.parse(tree)


def test_comparisons_and_matrices_of_earlier_versions_are_read(tmp_path: Path) -> None:
    tree = merged(load_experiment("tiny").model_dump(mode="json", exclude={"method"}), OLD)
    del tree["train"]["recompute"]
    config = {"equal": "tokens", "experiment": tree, "methods": {"semalign": []}}
    (tmp_path / "comparison.json").write_text(json.dumps({"config": config, "metrics": {}, "methods": {}}))
    cell = {"name": "cell", "values": {}, "experiment": tree}
    (tmp_path / "matrix.json").write_text(json.dumps({"name": "tiny", "over": {}, "cells": [cell]}))
    compared = Comparison.read(tmp_path / "comparison.json").config.experiment
    (varied,) = Matrix.read(tmp_path / "matrix.json").cells
    assert compared == varied.experiment == Experiment.parse(upgraded(tree))


@pytest.mark.parametrize("name", ["a", "Größe 2", "хорошо", "परीक्षण", "試験", "a.b_c-d", ".hidden"])
def test_names_hold_letters_of_every_script_and_blanks(name: str) -> None:
    assert load_experiment("tiny", overrides=[f"name={json.dumps(name)}"]).name == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a  b", " a", "a ", "a\tb", "a\nb", "a:b", "$a", "a\\b"])
def test_names_of_no_folder_are_refused(name: str) -> None:
    with pytest.raises(SemalignError, match="expected the name of a folder: letters"):
        load_experiment("tiny", overrides=[f"name={json.dumps(name)}"])


@pytest.mark.parametrize("key", [*GONE, *GONE_OF_METHODS])
def test_settings_that_are_gone_are_named(key: str) -> None:
    with pytest.raises(SemalignError, match=f"tiny: {re.escape(key)} no longer exists: leave it out$"):
        load_experiment("tiny", overrides=[f"{key}=1"])
