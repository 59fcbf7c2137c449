"""Settings and contracts of training: JSON and back, closed, versioned, within their ranges."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import semalign_train
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import Cosine, Fisher, Relation
from semalign_geometry.base import Contract, SemalignError, Settings
from semalign_train import (
    FrontierConfig,
    FrontierSettings,
    FullLayer,
    Guards,
    JointConfig,
    JointReport,
    JointSettings,
    LoraLayer,
    LossWeights,
    StageRecord,
    StepRecord,
    TrainSettings,
    TransferReport,
)

from ..contracts import assert_keeps_the_laws, settings_of

_positive = st.floats(0, 1e6, exclude_min=True)
_weight = st.floats(0, 1e6)
_count = st.integers(1, 10**6)
_terms = st.dictionaries(st.sampled_from(["relation", "output", "answer"]), st.floats(allow_nan=False))
_loras = st.builds(LoraLayer, rank=_count, alpha=_count, modules=st.lists(st.text(max_size=5), max_size=3).map(tuple))
_weights = st.builds(LossWeights, geometry=_weight, output=_weight, answer=_weight)
_guards = st.builds(Guards, max_skipped=_count, drowned=st.floats(1, 1e9, exclude_min=True))
_shared: dict[str, st.SearchStrategy[Any]] = {
    "passes": _positive,
    "steps": st.none() | _count,
    "batch_size": _count,
    "micro_batch_size": _count,
    "learning_rate": st.none() | _positive,
    "weight_decay": _weight,
    "betas": st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    "warmup": st.floats(0, 1),
    "schedule": st.sampled_from(["linear", "cosine", "constant"]),
    "clip": st.none() | _positive,
    "recompute": st.booleans(),
    "autocast": st.sampled_from(["model", "bfloat16"]),
    "guards": _guards,
    "seed": st.integers(0, 2**31),
    "checkpoint_steps": st.none() | _count,
    "checkpoint_minutes": st.none() | st.floats(0.1, 1e3),
}
_staged: dict[str, st.SearchStrategy[Any]] = {
    "objective": st.sampled_from([Relation(), Cosine(), Fisher()]),
    "weights": _weights,
    "trainable": st.one_of(st.just(FullLayer()), _loras),
    "train_final_norm": st.booleans(),
    "layers": st.none() | st.lists(_count, min_size=1, max_size=4).map(tuple),
    "rollback": st.none() | _weight,
}
_joint: dict[str, st.SearchStrategy[Any]] = {"trainable": st.one_of(st.just(FullLayer()), _loras)}
_configs = st.builds(FrontierConfig, **_shared, **_staged)
_joint_configs = st.builds(JointConfig, **_shared, **_joint)
_steps = st.builds(
    StepRecord, losses=_terms, gradient_norms=_terms, gradient_norm=_weight, learning_rate=_weight, seconds=_weight,
    tokens_per_second=_weight,
)  # fmt: skip
_stages = st.builds(StageRecord, first_losses=_terms, last_losses=_terms, seconds=_weight)
_reports = st.builds(TransferReport, config=_configs, stages=st.lists(_stages, max_size=3).map(tuple), seconds=_weight)
_joint_reports = st.builds(JointReport, config=_joint_configs, first_losses=_terms, last_losses=_terms, seconds=_weight)
GROUPS: dict[type[Settings], st.SearchStrategy[Any]] = {
    FullLayer: st.just(FullLayer()),
    Guards: _guards,
    LoraLayer: _loras,
    LossWeights: _weights,
    StageRecord: _stages,
    StepRecord: _steps,
    FrontierConfig: _configs,
    FrontierSettings: st.builds(FrontierSettings, **_staged),
    JointConfig: _joint_configs,
    JointReport: _joint_reports,
    JointSettings: st.builds(JointSettings, **_joint),
    TrainSettings: st.builds(TrainSettings, **_shared),
    TransferReport: _reports,
}


def test_every_group_of_settings_is_covered() -> None:
    assert settings_of(semalign_train) == set(GROUPS)
    assert [group for group in GROUPS if issubclass(group, Contract)] == [JointReport, TransferReport]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@given(data=st.data())
def test_settings_keep_the_laws(group: type[Settings], data: st.DataObject) -> None:
    assert_keeps_the_laws(data.draw(GROUPS[group]))


def test_unknown_keys_inside_name_their_place() -> None:
    with pytest.raises(SemalignError, match=r"unknown key 'trainable\.rnk': did you mean 'rank'"):
        FrontierConfig.parse({"trainable": {"kind": "lora", "rnk": 3}})
    with pytest.raises(SemalignError, match=r"unknown key 'weights\.answers': did you mean 'answer'"):
        FrontierConfig.parse({"weights": {"answers": 1.0}})


def test_reports_of_version_1_are_read(tmp_path: Path) -> None:
    config = FrontierConfig(steps=20, learning_rate=3e-3, rollback=0.1, recompute=True, trainable=LoraLayer(rank=2))
    report = TransferReport(config=config, stages=(), supervised_tokens=7, seconds=1.5)
    plain = report.model_dump(mode="json")
    old = {key: value for key, value in plain["config"].items() if key not in ("rollback", "recompute")}
    old |= {"version": 1, "recompute_suffix": True, "guards": {**old["guards"], "rollback": 0.1}, "steps": [10, 20]}
    old["objective"] |= {"scope": "batch", "unit_tokens": True}
    path = tmp_path / "transfer.json"
    path.write_text(json.dumps({**plain, "version": 1, "config": old}), encoding="utf-8")
    assert TransferReport.read(path).model_copy(update={"version": 2}) == report
    path.write_text(json.dumps({**plain, "version": 1, "config": {**old, "guards": {"rollbck": 1}}}), encoding="utf-8")
    with pytest.raises(SemalignError, match=r"unknown key 'config\.guards\.rollbck'"):
        TransferReport.read(path)


def test_settings_of_two_homes_make_one_configuration() -> None:
    shared, own = TrainSettings(passes=2, seed=3), FrontierSettings(layers=(2,), rollback=0.1)
    config = FrontierConfig(**dict(shared), **dict(own))
    assert (config.passes, config.seed, config.layers, config.rollback) == (2, 3, (2,), 0.1)
    assert {*TrainSettings.model_fields, *FrontierSettings.model_fields} == set(FrontierConfig.model_fields)
    assert {*TrainSettings.model_fields, *JointSettings.model_fields} == set(JointConfig.model_fields)


def test_each_configuration_has_its_own_rate_where_none_is_set() -> None:
    class Slow(JointConfig):
        default_rate = 1e-6

    assert (FrontierConfig().rate, JointConfig().rate, Slow().rate) == (3e-5, 1e-4, 1e-6)
    assert Slow(learning_rate=0.5).rate == 0.5
    assert JointConfig().decisive() == JointConfig(learning_rate=1e-4).decisive()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("passes", 0),
        ("steps", 0),
        ("steps", (1, 2)),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("learning_rate", 0),
        ("learning_rate", -1e-4),
        ("learning_rate", math.inf),
        ("passes", math.inf),
        ("passes", math.nan),
        ("clip", math.nan),
        ("weights", {"output": math.inf}),
        ("betas", (0.9, 1.0)),
        ("betas", (-0.1, 0.9)),
        ("weight_decay", -1),
        ("warmup", 1.5),
        ("warmup", -0.1),
        ("schedule", "step"),
        ("clip", 0),
        ("autocast", "float16"),
        ("checkpoint_steps", 0),
        ("checkpoint_minutes", 0),
        ("guards", {"max_skipped": -1}),
        ("trainable", {"kind": "bias"}),
    ],
)
def test_values_out_of_range_are_named(key: str, value: Any) -> None:
    with pytest.raises(SemalignError, match=rf"'{key}[a-z_.0-9]*' is "):
        FrontierConfig.parse({key: value})


def test_the_result_does_not_depend_on_when_states_are_kept() -> None:
    config = FrontierConfig(seed=3, checkpoint_steps=2, checkpoint_minutes=1, guards=Guards(drowned=7.0))
    assert config.without_checkpoints() == FrontierConfig(seed=3, guards=Guards(drowned=7.0))
    assert config.decisive() == FrontierConfig(seed=3).decisive() != FrontierConfig().decisive()


def test_an_unknown_objective_is_told_the_known_ones() -> None:
    with pytest.raises(
        SemalignError, match="^input: unknown objective 'mse': choose one of relation, cosine, fisher, or "
    ):
        FrontierConfig.parse({"objective": {"kind": "mse"}})


@pytest.mark.parametrize("name", ["geometry", "output", "answer"])
def test_weights_are_not_negative(name: str) -> None:
    with pytest.raises(SemalignError, match=rf"'weights\.{name}' is -1"):
        FrontierConfig.parse({"weights": {name: -1}})
