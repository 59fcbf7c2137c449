"""Settings and contracts of training: JSON and back, closed, versioned, within their ranges."""

import math
from typing import Any

import pytest
import semalign_train
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import Cosine, Fisher, Relation
from semalign_geometry import Contract, SemalignError, Settings
from semalign_train import (
    FullLayer,
    Guards,
    LoraLayer,
    LossWeights,
    StageRecord,
    StepRecord,
    TransferConfig,
    TransferReport,
)

from ..contracts import assert_keeps_the_laws, settings_of

_positive = st.floats(0, 1e6, exclude_min=True)
_weight = st.floats(0, 1e6)
_count = st.integers(1, 10**6)
_terms = st.dictionaries(st.sampled_from(["relation", "output", "answer"]), st.floats(allow_nan=False))
_loras = st.builds(LoraLayer, rank=_count, alpha=_count, modules=st.lists(st.text(max_size=5), max_size=3).map(tuple))
_weights = st.builds(LossWeights, geometry=_weight, output=_weight, answer=_weight)
_relations = st.builds(Relation, scope=st.sampled_from(["sequence", "batch"]), unit_tokens=st.booleans())
_guards = st.builds(
    Guards, max_skipped=_count, rollback=st.none() | _weight, drowned=st.floats(1, 1e9, exclude_min=True)
)
_configs = st.builds(
    TransferConfig,
    objective=st.one_of(_relations, st.just(Cosine()), st.just(Fisher())),
    weights=_weights,
    trainable=st.one_of(st.just(FullLayer()), _loras),
    train_final_norm=st.booleans(),
    layers=st.none() | st.lists(_count, min_size=1, max_size=4).map(tuple),
    passes=_positive,
    steps=st.none() | _count,
    batch_size=_count,
    micro_batch_size=_count,
    learning_rate=_positive,
    weight_decay=_weight,
    betas=st.tuples(st.floats(0, 1, exclude_max=True), st.floats(0, 1, exclude_max=True)),
    warmup=st.floats(0, 1),
    schedule=st.sampled_from(["linear", "cosine", "constant"]),
    clip=st.none() | _positive,
    recompute_suffix=st.booleans(),
    autocast=st.sampled_from(["model", "bfloat16"]),
    guards=_guards,
    seed=st.integers(0, 2**31),
    checkpoint_steps=st.none() | _count,
    checkpoint_minutes=st.none() | st.floats(0.1, 1e3),
)
_steps = st.builds(
    StepRecord, losses=_terms, gradient_norms=_terms, gradient_norm=_weight, learning_rate=_weight, seconds=_weight,
    tokens_per_second=_weight,
)  # fmt: skip
_stages = st.builds(StageRecord, first_losses=_terms, last_losses=_terms, seconds=_weight)
_reports = st.builds(TransferReport, config=_configs, stages=st.lists(_stages, max_size=3).map(tuple), seconds=_weight)
GROUPS: dict[type[Settings], st.SearchStrategy[Any]] = {
    FullLayer: st.just(FullLayer()),
    Guards: _guards,
    LoraLayer: _loras,
    LossWeights: _weights,
    StageRecord: _stages,
    StepRecord: _steps,
    TransferConfig: _configs,
    TransferReport: _reports,
}


def test_every_group_of_settings_is_covered() -> None:
    assert settings_of(semalign_train) == set(GROUPS)
    assert [group for group in GROUPS if issubclass(group, Contract)] == [TransferConfig, TransferReport]


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group.__name__)
@given(data=st.data())
def test_settings_keep_the_laws(group: type[Settings], data: st.DataObject) -> None:
    assert_keeps_the_laws(data.draw(GROUPS[group]))


def test_unknown_keys_inside_name_their_place() -> None:
    with pytest.raises(SemalignError, match=r"unknown key 'trainable\.rnk': did you mean 'rank'"):
        TransferConfig.parse({"trainable": {"kind": "lora", "rnk": 3}})
    with pytest.raises(SemalignError, match=r"unknown key 'weights\.answers': did you mean 'answer'"):
        TransferConfig.parse({"weights": {"answers": 1.0}})


def test_a_newer_configuration_inside_a_report_is_refused() -> None:
    plain = TransferReport(config=TransferConfig(), stages=(), supervised_tokens=0, seconds=0.0).model_dump(mode="json")
    plain["config"]["version"] = 7
    with pytest.raises(SemalignError, match="TransferConfig has format version 7"):
        TransferReport.parse(plain)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("passes", 0),
        ("steps", 0),
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
        TransferConfig.parse({key: value})


def test_the_result_does_not_depend_on_when_states_are_kept() -> None:
    config = TransferConfig(seed=3, checkpoint_steps=2, checkpoint_minutes=1)
    assert config.without_checkpoints() == TransferConfig(seed=3)
    told = config.decisive()
    assert told == TransferConfig(seed=3).decisive() != TransferConfig().decisive()
    assert told.endswith('"seed":3,"checkpoint_steps":null}'), "as before there was checkpoint_minutes"


def test_an_unknown_objective_is_told_the_known_ones() -> None:
    with pytest.raises(
        SemalignError, match="^input: unknown objective 'mse': choose one of relation, cosine, fisher, or "
    ):
        TransferConfig.parse({"objective": {"kind": "mse"}})


@pytest.mark.parametrize("name", ["geometry", "output", "answer"])
def test_weights_are_not_negative(name: str) -> None:
    with pytest.raises(SemalignError, match=rf"'weights\.{name}' is -1"):
        TransferConfig.parse({"weights": {name: -1}})
