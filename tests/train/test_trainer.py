"""The laws of frontier training."""

import copy
import itertools
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import (
    AnswerNLL,
    Cosine,
    Fisher,
    LiveSupervision,
    OutputKL,
    Relation,
    Step,
    Supervision,
    SupervisionSource,
    supervise,
)
from semalign_attribution import DecoderView, view_of
from semalign_geometry import Divergence, Head, Transport
from semalign_geometry.base import SemalignError
from semalign_train import (
    FrontierConfig,
    FrontierTrainer,
    FullLayer,
    JointConfig,
    LoraLayer,
    LossWeights,
    PrefixCache,
    StageRecord,
    StepRecord,
    TransferReport,
    optimisation_batches,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ..align.chain import (
    EXACT,
    EXAMPLES,
    PAIRED,
    SOURCE_WIDTH,
    TARGET_DEPTH,
    TOP,
    examples_of,
    make_store,
    pair,
    run_plainly,
    source_model,
    target_model,
    transport_between,
)
from ..attribution.snapshot import snapshot, unsettle
from ..models import ARCHITECTURES, collate

COUNT = len(EXAMPLES)
LAYERS = range(1, TARGET_DEPTH + 1)
LORA = LoraLayer(rank=4)
GEOMETRY = LossWeights(geometry=1.0, output=0.0)

each_trainable = pytest.mark.parametrize("trainable", [FullLayer(), LORA], ids=["full", "lora"])


def quick(**more: Any) -> FrontierConfig:
    """Few steps with a rate that moves the weights."""
    return FrontierConfig(**({"steps": 2, "batch_size": 4, "micro_batch_size": 3, "learning_rate": 3e-3} | more))


def fit(
    target: Any, store: Supervision, config: FrontierConfig, **more: Any
) -> tuple[TransferReport, list[StepRecord]]:
    records: list[Any] = []
    report = FrontierTrainer(target, store, config, callback=records.append, **more).fit()
    return report, [record for record in records if isinstance(record, StepRecord)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def names_of(model: Any, layer: int) -> set[str]:
    """Names of the tensors of a layer in the state of the model."""
    module = view_of(model).layer(layer)
    prefix = next(name for name, part in model.named_modules() if part is module)
    return {name for name in model.state_dict() if name.startswith(f"{prefix}.")}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


# Which tensors change


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_trainable
@pytest.mark.parametrize("final_norm", [False, True], ids=["", "norm"])
def test_only_the_frontier_layer_changes(
    final_norm: bool, trainable: Any, dtype: torch.dtype, top: Supervision
) -> None:
    target = target_model(dtype=dtype)
    states = [weights(target)]

    def look(record: Any) -> None:
        if isinstance(record, StageRecord):
            states.append(weights(target))

    config = quick(trainable=trainable, train_final_norm=final_norm)
    FrontierTrainer(target, top, config, callback=look).fit()
    assert len(states) == 1 + TARGET_DEPTH
    for layer in LAYERS:
        moved = changed(states[layer - 1], states[layer])
        inside = names_of(target, layer)
        if trainable is LORA:
            inside = {name for name in inside if name.split(".")[-2] in LORA.modules}
        norm = {"model.norm.weight"} if final_norm and layer == TARGET_DEPTH else set()
        assert moved == inside | norm
    everything = {name for name in states[0] if ".layers." in name}
    if trainable is not LORA:
        assert changed(states[0], states[-1]) - {"model.norm.weight"} == everything
    assert {value.dtype for value in states[-1].values()} == {dtype}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_can_be_a_target(architecture: str, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        source, target = source_model(architecture, dtype=dtype), target_model(architecture, dtype=dtype)
        store = make_store(source, target, tmp_path / str(dtype))
        before = weights(target)
        report, _ = fit(target, store, quick(layers=(2, 4)))
        moved = changed(before, weights(target))
        # A bias of the keys has no effect on attention, so that its gradient is rounding; some of it may stay.
        allowed = names_of(target, 2) | names_of(target, 4)
        assert moved <= allowed and all(name in moved for name in allowed if "weight" in name)
        assert [stage.layer for stage in report.stages] == [2, 4]
        assert target.dtype == dtype and all(torch.isfinite(value).all() for value in target.state_dict().values())


def test_only_the_wanted_layers_get_a_stage(top: Supervision) -> None:
    target = target_model()
    before = weights(target)
    report, _ = fit(target, top, quick(layers=(2, 3)))
    assert changed(before, weights(target)) == names_of(target, 2) | names_of(target, 3)
    assert [(stage.layer, stage.source_layer) for stage in report.stages] == [(2, 3), (3, 3)]


def test_the_final_norm_trains_in_the_last_stage_only(top: Supervision) -> None:
    target = target_model()
    before = weights(target)
    with pytest.raises(SemalignError, match="needs a stage of layer 4"):
        FrontierTrainer(target, top, quick(layers=(1, 3), train_final_norm=True))
    fit(target, top, quick(layers=(1, 4), train_final_norm=True))
    expected = names_of(target, 1) | names_of(target, 4) | {"model.norm.weight"}
    assert changed(before, weights(target)) == expected


@each_trainable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_what_trains_is_in_single_precision(dtype: torch.dtype, trainable: Any, top: Supervision) -> None:
    target = target_model(dtype=dtype)
    seen: list[set[torch.dtype]] = []
    frozen: list[bool] = []

    def look(record: Any) -> None:
        if isinstance(record, StepRecord):
            training = [p for p in target.parameters() if p.requires_grad]
            inside = {id(p) for p in view_of(target).layer(record.layer).parameters()}
            seen.append({p.dtype for p in training})
            frozen.append({id(p) for p in training} <= inside)

    before = snapshot(target)["modules"]
    FrontierTrainer(target, top, quick(trainable=trainable), callback=look).fit()
    assert seen == [{torch.float32}] * 8 and all(frozen)
    assert target.dtype == dtype and snapshot(target)["modules"] == before


# The target is left as found


def state(model: nn.Module) -> dict[str, Any]:
    found = snapshot(model)
    flags = {name: (value[0], value[1]) for name, value in found["parameters"].items()}
    classes = {name: type(part) for name, part in model.named_modules()}
    return {"modules": found["modules"], "flags": flags, "classes": classes, "gradients": found["gradients"]}


@each_trainable
@pytest.mark.parametrize("fails_at", [None, (StepRecord, 2), (StageRecord, 2)], ids=["", "step", "stage"])
def test_the_target_is_left_in_its_modes(fails_at: Any, trainable: Any, top: Supervision) -> None:
    target = target_model("gpt2" if trainable is not LORA else "llama", dtype=torch.bfloat16)
    unsettle(target)
    before, random, modules = state(target), torch.get_rng_state(), list(target.modules())

    def look(record: Any) -> None:
        assert not any(module.training for module in modules)
        if fails_at and isinstance(record, fails_at[0]) and record.layer == fails_at[1]:
            raise RuntimeError("the callback failed")

    trainer = FrontierTrainer(target, top, quick(trainable=trainable), callback=look)
    if fails_at:
        with pytest.raises(RuntimeError, match="the callback failed"):
            trainer.fit()
    else:
        trainer.fit()
    assert state(target) == before
    assert torch.equal(torch.get_rng_state(), random)
    assert target.dtype == torch.bfloat16


def test_making_a_trainer_changes_nothing(top: Supervision) -> None:
    target = target_model()
    unsettle(target)
    before = snapshot(target)
    FrontierTrainer(target, top)
    assert snapshot(target) == before


# The numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("layer", [1, 2, TARGET_DEPTH])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_step_equals_plain_autograd_on_the_whole_model(
    clip: float | None, layer: int, dtype: torch.dtype, exact: Supervision
) -> None:
    """Losses, gradients and weights of one step without replay, early stop, streaming, or micro-batches."""
    target, source = target_model(dtype=dtype), source_model()
    plain = copy.deepcopy(target)
    factors = {"relation": 0.7, "output": 1.3, "answer": 0.4}
    config = quick(
        steps=1,
        batch_size=COUNT,
        layers=(layer,),
        weights=LossWeights(geometry=0.7, output=1.3, answer=0.4),
        train_final_norm=layer == 4,
        weight_decay=0.1,
        warmup=0.0,
        clip=clip,
    )
    _, (record,) = fit(target, exact, config)

    view = view_of(plain)
    parameters = list(view.layer(layer).parameters())
    if layer == TARGET_DEPTH:
        parameters += list(view.final_norm.parameters())
    batch = collate(EXAMPLES)
    run = run_plainly(plain, batch)
    with torch.no_grad():
        of_source = run_plainly(source, batch)
        matrix = transport_between(source, target_model()).matrix
        y = (of_source.hidden[PAIRED[layer - 1]] - of_source.hidden[PAIRED[layer - 1] - 1]) @ matrix.T
    x = run.hidden[layer] - run.hidden[layer - 1]
    relations, divergences, answers = [], [], []
    for row, (ids, prompt) in enumerate(EXAMPLES):
        where = slice(prompt - 1, len(ids) - 1)
        p = (of_source.logits[row, where]).log_softmax(1).to(dtype)
        q = run.logits[row, where].log_softmax(1)
        divergences.append((p.exp() * (p - q)).sum(1))
        answers.append(F.cross_entropy(run.logits[row, where], ids[prompt:], reduction="none"))
        if len(ids) - prompt >= 3:
            k, l = (  # noqa: E741
                (v - v.mean(0)) @ (v - v.mean(0)).T for v in (x[row, where], y[row, where].to(dtype))
            )
            relations.append((k / k.norm() - l / l.norm()).square().sum()[None] / 2)
    terms = {
        name: torch.cat(values).mean()
        for name, values in {"relation": relations, "output": divergences, "answer": answers}.items()
    }
    close = {"rel": 1e-3, "abs": 1e-5}
    assert record.losses == {name: pytest.approx(value.item(), **close) for name, value in terms.items()}
    gradients: dict[str, list[Tensor]] = {}
    for name, value in terms.items():
        parts = torch.autograd.grad(factors[name] * value, parameters, retain_graph=True, allow_unused=True)
        zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, parameters, strict=True)]
        gradients[name] = zeros

    def norm(parts: list[Tensor]) -> float:
        return math.sqrt(sum(float(part.double().square().sum()) for part in parts))

    assert record.gradient_norms == {name: pytest.approx(norm(parts), **close) for name, parts in gradients.items()}
    whole = [sum(parts[1:], parts[0]) for parts in zip(*gradients.values(), strict=True)]
    assert record.gradient_norm == pytest.approx(norm(whole), **close)
    assert record.gradient_norm > 0.06, "the clipped case must clip"

    optimiser = torch.optim.AdamW(parameters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    factor = 1.0 if clip is None else clip / norm(whole)
    for parameter, gradient in zip(parameters, whole, strict=True):
        parameter.grad = factor * gradient
    before = [parameter.detach().clone() for parameter in parameters]
    optimiser.step()
    trained = list(view_of(target).layer(layer).parameters())
    trained += list(view_of(target).final_norm.parameters()) if layer == TARGET_DEPTH else []
    # The first step of Adam is about the sign of the gradient: compare the moves as a whole.
    error = norm([a.detach() - b.detach() for a, b in zip(trained, parameters, strict=True)])
    assert error < 0.02 * norm([a.detach() - b for a, b in zip(parameters, before, strict=True)])
    assert record.supervised_tokens == sum(len(ids) - prompt for ids, prompt in EXAMPLES)
    assert record.tokens == sum(len(ids) for ids, _ in EXAMPLES)


def test_gradients_are_clipped_to_the_norm(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *rest: Any) -> Any:
        norms.append(float(nn.utils.get_total_norm([p.grad for p in self.param_groups[0]["params"]])))
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    _, records = fit(target_model(), top, quick(clip=0.01))
    assert all(record.gradient_norm > 0.01 for record in records)
    assert norms == pytest.approx([0.01] * 8, rel=1e-3)
    norms.clear()
    _, records = fit(target_model(), top, quick(clip=None))
    assert norms == pytest.approx([record.gradient_norm for record in records], rel=1e-5)


class Unsplit:
    """A fit without micro-batches: weights before and after, and its records."""

    config = quick(batch_size=6, micro_batch_size=6, layers=(1, 4), weights=LossWeights(answer=0.5))

    def __init__(self, store: Supervision) -> None:
        target = target_model()
        self.before = weights(target)
        _, self.records = fit(target, store, self.config)
        self.after = weights(target)


@pytest.fixture(scope="module")
def unsplit(exact: Supervision) -> Unsplit:
    return Unsplit(exact)


@settings(max_examples=6)
@given(st.integers(1, 5))
def test_micro_batches_make_no_difference(exact: Supervision, unsplit: Unsplit, size: int) -> None:
    target = target_model()
    _, records = fit(target, exact, unsplit.config.model_copy(update={"micro_batch_size": size}))
    for record, other in zip(records, unsplit.records, strict=True):
        assert record.losses == pytest.approx(other.losses, rel=1e-3, abs=1e-5)
        assert record.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-3, abs=1e-5)
        assert record.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-3, abs=1e-5)
    for name, value in target.state_dict().items():
        moved = float((unsplit.after[name] - unsplit.before[name]).norm())
        assert float((value - unsplit.after[name]).norm()) <= 0.02 * moved, name


@each_trainable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_recomputing_the_suffix_trains_the_same_weights(dtype: torch.dtype, trainable: Any, top: Supervision) -> None:
    kept, recomputed = target_model(dtype=dtype), target_model(dtype=dtype)
    fit(kept, top, quick(trainable=trainable))
    fit(recomputed, top, quick(trainable=trainable, recompute=True))
    assert changed(weights(kept), weights(recomputed)) == set()


def test_recomputing_the_suffix_keeps_less_for_the_backward_run(top: Supervision) -> None:
    def kept_bytes(**more: Any) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        target = target_model(depth=4)
        parameters = {parameter.untyped_storage().data_ptr() for parameter in target.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            fit(target, top, quick(steps=1, layers=(1,), **more))
        return sum(size for place, size in kept.items() if place not in parameters)

    assert kept_bytes(recompute=True) < 0.7 * kept_bytes()


def test_replay_in_a_scratch_folder_trains_the_same_weights(tmp_path: Path, top: Supervision) -> None:
    plain, other = target_model(), target_model()
    fit(plain, top, quick())
    fit(other, top, quick(), scratch=str(tmp_path))
    assert changed(weights(plain), weights(other)) == set()
    with pytest.raises(SemalignError, match="scratch folder .*none does not exist: make it"):
        FrontierTrainer(target_model(), top, scratch=tmp_path / "none")


@each_trainable
def test_the_seed_decides_the_weights(trainable: Any, top: Supervision) -> None:
    results = []
    for seed in (0, 0, 1):
        target = target_model()
        torch.manual_seed(len(results))  # the global state plays no part
        fit(target, top, quick(seed=seed, trainable=trainable))
        results.append(weights(target))
    assert changed(results[0], results[1]) == set()
    assert changed(results[0], results[2])


SETTINGS: dict[str, dict[str, Any]] = {
    "relation": {"objective": Relation()},
    "cosine": {"objective": Cosine()},
    "fisher": {"objective": Fisher()},
    "output": {"weights": LossWeights(geometry=0, output=1)},
    "answer": {"weights": LossWeights(geometry=0, output=0, answer=1)},
}


@each_trainable
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_loss_falls(name: str, dtype: torch.dtype, trainable: Any, top: Supervision, exact: Supervision) -> None:
    target = target_model(dtype=dtype)
    given = {"weights": GEOMETRY} | SETTINGS[name]
    config = quick(steps=8, batch_size=COUNT, micro_batch_size=COUNT, layers=(2, 4), trainable=trainable, **given)
    report, _ = fit(target, top if dtype == torch.float32 else exact, config)
    for stage in report.stages:
        assert list(stage.first_losses) == list(stage.last_losses) == [next(iter(stage.first_losses))]
        for term, first in stage.first_losses.items():
            assert stage.last_losses[term] < 0.99 * first, stage


# What does not run


def count_runs(model: Any) -> tuple[list[int], list[int]]:
    """How often each layer runs, and how often the final norm does, counted from now on."""
    view = view_of(model)
    layers, norm = [0] * view.depth, [0]
    for index, layer in enumerate(view.layers):
        # A submodule: a layer that hands on its replayed input is called, but does not run.
        layer.self_attn.register_forward_hook(lambda *_, index=index: layers.__setitem__(index, layers[index] + 1))
    view.final_norm.register_forward_hook(lambda *_: norm.__setitem__(0, norm[0] + 1))
    return layers, norm


@pytest.mark.parametrize("objective", [Relation(), Cosine(), Fisher()], ids=["relation", "cosine", "fisher"])
def test_geometry_alone_runs_nothing_above_the_frontier(
    objective: Any, top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_model()
    layers, norm = count_runs(target)

    def refuse(self: Head, *rest: Any) -> Any:
        raise AssertionError("the head ran")

    if not isinstance(objective, Fisher):
        monkeypatch.setattr(Head, "logits", refuse)
    target.lm_head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    config = quick(objective=objective, weights=GEOMETRY, layers=(1, 3), steps=2, batch_size=4, micro_batch_size=2)
    fit(target, top, config)
    _, _, *batches = itertools.islice(optimisation_batches(config, COUNT), 4)
    chunks = math.ceil(len(set(itertools.chain(*batches))) / 2)
    # Layer 1 trains in 2 × 2 micro-batches and is run once over the examples of the stage of layer 3, and so on.
    assert layers == [4 + chunks, chunks, 4, 0] and norm == [0]


def test_layers_below_the_frontier_run_once(top: Supervision) -> None:
    target = target_model()
    layers, norm = count_runs(target)
    fit(target, top, quick(steps=3, batch_size=4, micro_batch_size=4))
    chunks = math.ceil(COUNT / 4)
    # Stage k runs layers k … 4 in each of 3 steps; each stage after the first is preceded by one pass of one layer.
    assert layers == [3 + chunks, 6 + chunks, 9 + chunks, 12] and norm == [12]


def test_examples_go_no_further_than_a_later_stage_needs_them(top: Supervision) -> None:
    target = target_model()
    layers, _ = count_runs(target)
    config = quick(steps=None, passes=1.0, batch_size=1, micro_batch_size=1)
    fit(target, top, config)
    order = optimisation_batches(config, COUNT)
    stages = [[next(order)[0] for _ in range(steps)] for steps in config.stage_steps(TARGET_DEPTH, COUNT)]
    for layer in LAYERS:
        trained = sum(len(stage) for stage in stages[:layer])  # in stages up to this layer's it runs in every step
        needed = {example for stage in stages[layer:] for example in stage}
        assert layers[layer - 1] == trained + len(needed)
    assert sum(layers) < TARGET_DEPTH * COUNT + sum(len(stage) * (TARGET_DEPTH - k) for k, stage in enumerate(stages))


# The order of the examples, and the learning rate


@settings(max_examples=15)
@given(st.integers(1, 17), st.integers(1, 6), st.integers(0, 99))
def test_batches_cover_all_examples_once_per_pass(batch_size: int, steps: int, seed: int) -> None:
    config = FrontierConfig(batch_size=batch_size, seed=seed)
    batches = optimisation_batches(config, COUNT)
    seen: Counter[int] = Counter()
    for _ in range(steps):
        indices = next(batches)
        assert len(indices) == batch_size
        seen.update(indices)
        numbers = [seen[index] for index in range(COUNT)]
        assert max(numbers) - min(numbers) <= 1 and sum(numbers) == seen.total()


def collated(store: Supervision, config: FrontierConfig, monkeypatch: pytest.MonkeyPatch) -> dict[int, list[int]]:
    """Examples that each stage was trained on, in order."""
    found: dict[int, list[int]] = {}
    original = Supervision.collate

    def spy(self: Supervision, indices: Any, *, layer: int | None = None, device: Any = "cpu") -> Any:
        found.setdefault(layer or 0, []).extend(indices)
        return original(self, indices, layer=layer, device=device)

    with monkeypatch.context() as patch:
        patch.setattr(Supervision, "collate", spy)
        fit(target_model(), store, config)
    return found


def test_stages_share_the_passes_equally(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(steps=None, passes=6.0, batch_size=3, micro_batch_size=3, layers=(1, 3), weights=GEOMETRY)
    found = collated(top, config, monkeypatch)
    assert sorted(found) == [1, 3]
    for indices in found.values():
        assert Counter(indices) == Counter({index: 3 for index in range(COUNT)})
    assert found[1] != found[3], "every pass has its own order"
    assert collated(top, config, monkeypatch) == found
    assert collated(top, config.model_copy(update={"seed": 1}), monkeypatch) != found


def test_a_stage_goes_on_where_the_one_before_stopped(top: Supervision, monkeypatch: pytest.MonkeyPatch) -> None:
    config = quick(steps=4, batch_size=1, layers=(1, 3), weights=GEOMETRY)
    found = collated(top, config, monkeypatch)
    assert sorted(found[1] + found[3][: COUNT - 4]) == list(range(COUNT))


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        ({"passes": 1.0}, (1, 1, 1, 1)),
        ({"passes": 9.0}, (4, 4, 4, 4)),
        ({"passes": 9.0, "layers": (2,)}, (16,)),
        ({"passes": 9.0, "layers": (2, 4)}, (8, 8)),
        ({"passes": 0.1}, (1, 1, 1, 1)),
        ({"passes": 2.5, "batch_size": 1}, (5, 5, 4, 4)),
        ({"passes": 9.0, "steps": 5}, (5, 5, 5, 5)),
        ({"batch_size": 100}, (1, 1, 1, 1)),
    ],
)
def test_stages_share_the_steps_as_evenly_as_possible(
    more: dict[str, Any], steps: tuple[int, ...], top: Supervision
) -> None:
    assert FrontierTrainer(target_model(), top, FrontierConfig(**({"batch_size": 4} | more))).stage_steps == steps


@given(
    passes=st.floats(0.01, 50), examples=st.integers(1, 500), batch_size=st.integers(1, 40), depth=st.integers(1, 12)
)
def test_frontier_training_takes_the_steps_of_joint_training(
    passes: float, examples: int, batch_size: int, depth: int
) -> None:
    """Where there are as many steps as stages."""
    shared = {"passes": passes, "batch_size": batch_size}
    total = JointConfig(**shared).total_steps(examples)
    assert total - 1 < passes * examples / batch_size <= total
    steps = FrontierConfig(**shared).stage_steps(depth, examples)
    assert sum(steps) == max(total, depth) and len(steps) == depth
    assert list(steps) == sorted(steps, reverse=True) and steps[0] - steps[-1] <= 1 <= steps[-1]


@pytest.mark.parametrize("warmup", [0.0, 0.3, 0.5])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_the_learning_rate_rises_and_falls(schedule: str, warmup: float, top: Supervision) -> None:
    config = quick(steps=10, batch_size=1, layers=(1, 2), weights=GEOMETRY, warmup=warmup, schedule=schedule)
    _, records = fit(target_model(), top, config)
    rates = [record.learning_rate for record in records]
    assert rates[:10] == rates[10:], "every stage has its own warm-up"
    rates = rates[:10]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(3e-3) and peak == 10 * warmup
    rises = [after - before for before, after in zip(rates[:peak], rates[1:peak], strict=False)]
    assert all(rise > 0 for rise in rises) and rises == pytest.approx([max(rises, default=0)] * len(rises))
    falling = [rate / 3e-3 for rate in rates[peak:]]
    # The rate would reach 0 one step after the last, so that the last step still moves.
    shares = [index / len(falling) for index in range(len(falling))]
    shape = {
        "linear": [1 - share for share in shares],
        "cosine": [(1 + math.cos(math.pi * share)) / 2 for share in shares],
        "constant": [1.0] * len(shares),
    }[schedule]
    assert falling == pytest.approx(shape)
    assert min(rates) > 0, "every step moves"


def test_every_stage_has_a_fresh_optimiser(top: Supervision) -> None:
    both, alone = target_model(), target_model()
    whole = {"batch_size": COUNT, "micro_batch_size": COUNT}  # every step sees all examples, whatever the order
    fit(both, top, quick(layers=(1, 2), **whole))
    fit(alone, top, quick(layers=(1,), **whole))
    assert changed(weights(both), weights(alone)) == names_of(both, 2)
    fit(alone, top, quick(layers=(2,), **whole))
    assert changed(weights(both), weights(alone)) == set()


# Records


def test_records_and_report_belong_together(top: Supervision) -> None:
    records: list[Any] = []
    config = quick(steps=None, passes=8.0)
    report = FrontierTrainer(target_model(), top, config, callback=records.append).fit()
    shares = (4, 4, 3, 3)  # of 14 steps
    kinds = [[*[StepRecord] * steps, StageRecord] for steps in shares]
    assert [type(record) for record in records] == list(itertools.chain(*kinds))
    assert report.config == config
    assert report.stages == tuple(record for record in records if isinstance(record, StageRecord))
    for number, (stage, steps) in enumerate(zip(report.stages, shares, strict=True), 1):
        own = [r for r in records if isinstance(r, StepRecord) and r.layer == number]
        assert [record.step for record in own] == list(range(1, steps + 1))
        assert all(record.steps == steps == stage.steps for record in own)
        assert (stage.layer, stage.source_layer) == (number, PAIRED[number - 1])
        assert (stage.first_losses, stage.last_losses) == (own[0].losses, own[-1].losses)
        assert stage.supervised_tokens == sum(record.supervised_tokens for record in own)
        layer = view_of(target_model()).layer(number)
        assert stage.trainable_parameters == sum(parameter.numel() for parameter in layer.parameters())
        assert all(set(record.gradient_norms) == {"relation", "output"} == set(record.losses) for record in own)
        assert all(record.tokens_per_second == pytest.approx(record.tokens / record.seconds) for record in own)
    assert report.supervised_tokens == sum(stage.supervised_tokens for stage in report.stages)
    assert report.seconds == sum(stage.seconds for stage in report.stages) > 0


def test_the_time_of_a_stage_has_the_advance_of_the_prefix_in_it(
    top: Supervision, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance, pause = PrefixCache.advance, 0.5

    def slowly(prefix: PrefixCache, *arguments: Any) -> None:
        time.sleep(pause)
        advance(prefix, *arguments)

    monkeypatch.setattr(PrefixCache, "advance", slowly)
    report, _ = fit(target_model(), top, quick(steps=1))
    assert all(stage.seconds >= pause for stage in report.stages)


def test_adapters_report_their_own_parameters(top: Supervision) -> None:
    report, _ = fit(target_model(), top, quick(layers=(1,), trainable=LORA))
    linear = [view_of(target_model()).layer(1).get_submodule(f"mlp.{name}") for name in ("up_proj", "down_proj")]
    linear += [view_of(target_model()).layer(1).get_submodule(f"self_attn.{name}") for name in ("v_proj", "o_proj")]
    expected = sum(4 * sum(part.weight.shape) for part in linear)
    assert report.stages[0].trainable_parameters == expected


# Objectives and stores of other kinds


class Size:
    """An own objective: half the square of the contribution."""

    name = "size"
    needs_output = False

    def total(self, step: Step) -> Tensor:
        return step.residual[step.mask].square().sum() / 2

    def count(self, counts: Tensor) -> int:
        return int(counts.sum())


def test_checkpoints_need_the_settings_of_an_own_objective(top: Supervision, tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="derive Size from semalign_geometry.base.Settings"):
        FrontierTrainer(target_model(), top, objective=Size(), checkpoints=tmp_path)


def test_an_own_objective_takes_the_place_of_the_configured_one(top: Supervision) -> None:
    target = target_model()
    layers, norm = count_runs(target)
    report, _ = fit(target, top, quick(steps=4, layers=(2,), weights=GEOMETRY), objective=Size())
    assert list(report.stages[0].first_losses) == ["size"]
    assert report.stages[0].last_losses["size"] < report.stages[0].first_losses["size"]
    assert layers[2:] == [0, 0] and norm == [0]


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_examples_with_two_supervised_tokens_have_no_relation(
    optimiser: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = source_model(), target_model()
    store = make_store(source, target, tmp_path / "two", examples=examples_of([(6, 4), (5, 4)]))
    with pytest.raises(SemalignError, match="no training example has enough supervised tokens for relation: supervise"):
        FrontierTrainer(target, store, quick(weights=GEOMETRY))
    before = weights(target)
    _, records = fit(target, store, quick(layers=(2,), optimiser=optimiser))
    assert "no training example has enough supervised tokens for relation, which has no effect" in caplog.text
    assert list(records[0].losses) == ["output"]
    assert changed(before, weights(target)) == names_of(target, 2)
    mixed = make_store(source, target, tmp_path / "three", examples=examples_of([(6, 4), (5, 2)]))
    config = quick(layers=(2,), weights=GEOMETRY, optimiser=optimiser, batch_size=1)
    report, records = fit(target_model(), mixed, config)
    assert sorted(len(record.losses) for record in records) == [0, 1]
    assert report.stages[0].supervised_tokens == sum(record.supervised_tokens for record in records) == 5


@pytest.mark.parametrize(("source_depth", "depth"), [(6, 2), (6, 6), (2, 5), (1, 3), (5, 1)])
def test_the_source_may_be_deeper_or_shallower(source_depth: int, depth: int, tmp_path: Path) -> None:
    from ..models import tiny_model

    source, target = tiny_model("llama", seed=1, depth=source_depth, width=SOURCE_WIDTH), target_model(depth=depth)
    layers = [max(1, source_depth * k // depth) for k in range(1, depth + 1)]
    store = make_store(source, target, tmp_path, pairing=pair(layers, source_depth=source_depth))
    before = weights(target)
    report, _ = fit(target, store, quick())
    assert [stage.source_layer for stage in report.stages] == layers
    assert changed(before, weights(target)) == {
        name for layer in range(1, depth + 1) for name in names_of(target, layer)
    }


@pytest.mark.parametrize("kept", [TOP, EXACT], ids=["top_k", "final_hidden"])
def test_a_shared_vocabulary_smaller_than_both_heads(kept: Any, tmp_path: Path) -> None:
    source, target = source_model(vocabulary=110), target_model(vocabulary=97)
    entries = torch.arange(3, 90)
    transport = transport_between(source, target, entries=entries)
    batches = [collate(examples_of([(9, 4), (7, 2), (8, 5)], vocabulary=90))]
    store = supervise(source, batches, pair(), transport, tmp_path, settings=kept, entries=entries)
    report, _ = fit(target, store, quick(steps=6, batch_size=3, layers=(4,), weights=LossWeights(geometry=0, output=1)))
    assert report.stages[0].last_losses["output"] < report.stages[0].first_losses["output"]


def test_relations_can_be_matched_without_transport(tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    store = supervise(source, [collate(EXAMPLES)], pair(), Transport.identity(SOURCE_WIDTH), tmp_path, settings=TOP)
    report, _ = fit(target, store, quick(steps=6, batch_size=COUNT, layers=(2,), weights=GEOMETRY))
    assert report.stages[0].last_losses["relation"] < report.stages[0].first_losses["relation"]
    for objective in (Cosine(), Fisher()):
        with pytest.raises(SemalignError, match=f"the {objective.name} objective compares vectors of one width"):
            fit(target_model(), store, quick(objective=objective))


def test_the_temperature_of_the_store_is_used(tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    losses = []
    for temperature in (1.0, 4.0):
        kept = EXACT.model_copy(update={"temperature": temperature})
        store = make_store(source, target, tmp_path / str(temperature), settings=kept)
        _, records = fit(target_model(), store, quick(steps=1, batch_size=COUNT, layers=(4,)))
        with torch.no_grad():
            p, q = (
                torch.cat(
                    [
                        run_plainly(model, collate([e])).logits[0, e[1] - 1 : len(e[0]) - 1] / temperature
                        for e in EXAMPLES
                    ]
                ).log_softmax(1)
                for model in (source, target)
            )
        assert records[0].losses["output"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-3)
        losses.append(records[0].losses["output"])
    assert losses[1] < losses[0] / 2


# Refusals


def test_a_float16_target_is_refused(top: Supervision) -> None:
    message = "the target's weights are float16, .*: load it in bfloat16 or float32"
    with pytest.raises(SemalignError, match=message):
        FrontierTrainer(target_model(dtype=torch.float16), top)
    mixed = target_model(dtype=torch.bfloat16)
    view_of(mixed).layer(2).half()
    with pytest.raises(SemalignError, match=message):
        FrontierTrainer(mixed, top)
    FrontierTrainer(target_model(dtype=torch.bfloat16), top)


def test_a_target_of_another_depth_is_refused(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="for a target of 4 layers, this one has 5"):
        FrontierTrainer(target_model(depth=5), top)


def test_a_target_of_another_width_is_refused(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="the supervision is for width 32, the target's is 40"):
        FrontierTrainer(target_model(width=40), top)


def test_a_target_with_a_smaller_vocabulary_is_refused(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="vocabulary ids up to 96, the target's head has 90 rows"):
        FrontierTrainer(target_model(vocabulary=90), top)
    FrontierTrainer(target_model(vocabulary=120), top)


@pytest.mark.parametrize("layers", [(0, 1), (1, 5), (2, 1), (1, 1, 2), (-1,)])
def test_layers_out_of_range_or_order_are_refused(layers: tuple[int, ...], top: Supervision) -> None:
    with pytest.raises(SemalignError, match="expected ascending numbers from 1 to 4") as caught:
        FrontierTrainer(target_model(), top, FrontierConfig(layers=layers))
    assert str(layers) in str(caught.value)


def test_no_layers_are_refused(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="layers"):
        FrontierTrainer(target_model(), top, FrontierConfig(layers=()))


def test_a_loss_without_terms_is_refused(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="every weight of the loss is 0: set one of geometry, output, answer"):
        FrontierTrainer(target_model(), top, FrontierConfig(weights=LossWeights(geometry=0, output=0)))


@each_trainable
def test_training_that_diverges_says_where(trainable: Any, top: Supervision) -> None:
    target = target_model()
    unsettle(target)
    before = state(target)
    config = quick(steps=6, layers=(2, 3), trainable=trainable, learning_rate=1e30, warmup=0.0)
    records: list[Any] = []
    message = r"^layer 2, step \d: the gradient is not finite .*lower learning_rate, else "
    with pytest.raises(SemalignError, match=message) as e:
        FrontierTrainer(target, top, config, callback=records.append).fit()
    assert f"step {len(records)}:" in str(e.value) and "\n" not in str(e.value)
    assert state(target) == before
    assert all(torch.isfinite(v).all() for n, v in target.state_dict().items() if n not in names_of(target, 2))


def test_names_that_match_no_module_are_refused(top: Supervision) -> None:
    target = target_model()
    before = snapshot(target)
    with pytest.raises(SemalignError, match="no linear module named w1: .* can name down_proj, gate_proj, k_proj"):
        fit(target, top, quick(trainable=LoraLayer(modules=("w1", "up_proj"))))
    assert snapshot(target) == before


@pytest.mark.parametrize("kind", ["stored", "live"])
def test_tokens_that_the_target_does_not_know_are_refused(kind: str, tmp_path: Path) -> None:
    source, target = source_model(vocabulary=110), target_model(vocabulary=97)
    entries = torch.arange(90)
    transport = transport_between(source, target, entries=entries)

    def supervised_with(largest: int) -> SupervisionSource:
        ids, prompt = examples_of([(9, 4)], vocabulary=90)[0]
        ids[2] = largest
        batches = [collate([(ids, prompt)])]
        if kind == "live":
            return LiveSupervision(source, batches, pair(), transport, settings=TOP, entries=entries)
        return supervise(source, batches, pair(), transport, tmp_path / str(largest), settings=TOP, entries=entries)

    FrontierTrainer(target, supervised_with(96))
    with pytest.raises(SemalignError, match="training rows hold token id 97, the target embeds 97: leave out the rows"):
        FrontierTrainer(target, supervised_with(97))
    guarded = quick(rollback=0.5)
    with pytest.raises(SemalignError, match="held-out rows hold token id 97"):
        FrontierTrainer(target, supervised_with(96), guarded, held_out=supervised_with(97))


def test_terms_have_the_names_of_their_objectives(top: Supervision) -> None:
    config = quick(steps=1, layers=(1,), weights=LossWeights(geometry=1, output=1, answer=1))
    _, (record,) = fit(target_model(), top, config)
    assert list(record.losses) == [Relation().name, OutputKL().name, AnswerNLL().name]


@pytest.mark.parametrize("kind", ["forward", "reverse", "jensen_shannon"])
def test_the_output_is_trained_by_the_divergence_that_is_set(kind: Divergence, top: Supervision) -> None:
    config = quick(steps=1, layers=(1,), batch_size=len(top), weights=LossWeights(geometry=0), divergence=kind)
    target = target_model()
    view, data = DecoderView(target), top.collate(range(len(top)))
    with torch.no_grad():
        final = view.trace(data.batch).final
        assert final is not None
        hidden, head = final[data.positions.mask], view.head.select(top.entries)
        temperature = top.manifest.settings.temperature
        values = OutputKL(divergence=kind).of(data.output, hidden, head, temperature)
    _, (record,) = fit(target, top, config)
    assert record.losses["output"] == pytest.approx(float(values.mean()), rel=1e-4)


# Compiled layers


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at every input's
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_compiled_layers_train_alike(
    architecture: str, recompute: bool, tmp_path: Path, compiled: list[nn.Module]
) -> None:
    source, target = source_model(architecture), target_model(architecture)
    store = make_store(source, target, tmp_path / "store")
    unsettle(target)
    before = snapshot(target)["modules"]
    config = quick(recompute=recompute, layers=(1, 3))
    _, steps = fit(target_model(architecture), store, config)
    assert not compiled
    _, others = fit(target, store, config.model_copy(update={"compile": True}))
    assert compiled == list(target.model.layers)
    assert snapshot(target)["modules"] == before
    for one, other in zip(steps, others, strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-4)
        assert one.gradient_norms == pytest.approx(other.gradient_norms, rel=1e-4)


def test_compiled_and_sharded_layers_exclude_each_other(top: Supervision) -> None:
    with pytest.raises(SemalignError, match="do not go together"):
        FrontierTrainer(target_model(), top, quick(compile=True, shard_frozen=True))


def test_checkpoints_with_a_live_source_need_its_key(exact: Supervision, tmp_path: Path) -> None:
    source, target = source_model(), target_model()
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport_between(source, target), settings=EXACT)
    with pytest.raises(SemalignError, match="supervision of the training rows need its key"):
        FrontierTrainer(target, live, quick(), checkpoints=tmp_path)
    guarded = quick(rollback=0.5)
    with pytest.raises(SemalignError, match="supervision of the held-out rows need its key"):
        FrontierTrainer(target, exact, guarded, held_out=live, checkpoints=tmp_path)
    FrontierTrainer(target, exact, quick(), held_out=live, checkpoints=tmp_path)  # which is not measured


def test_terms_of_one_name_are_refused(top: Supervision) -> None:
    class Named(Relation):
        @property
        def name(self) -> str:
            return "output"

    with pytest.raises(SemalignError, match=r"two terms of the loss have one name \(output, output\)"):
        FrontierTrainer(target_model(), top, quick(), objective=Named())


@pytest.mark.parametrize(("autocast", "dtype"), [("model", torch.float32), ("bfloat16", torch.bfloat16)])
def test_mixed_precision_holds_for_the_prefix_too(autocast: str, dtype: torch.dtype, top: Supervision) -> None:
    target, seen = target_model(), []
    target.model.layers[0].mlp.up_proj.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    fit(target, top, quick(autocast=autocast, layers=(2,), steps=1))
    assert set(seen) == {dtype}


def test_a_live_source_trains_as_a_store_does(exact: Supervision) -> None:
    source = source_model()
    transport = transport_between(source, target_model())
    live = LiveSupervision(source, [collate(EXAMPLES)], pair(), transport, settings=EXACT)
    for one, other in zip(fit(target_model(), exact, quick())[1], fit(target_model(), live, quick())[1], strict=True):
        assert one.losses == pytest.approx(other.losses, rel=1e-3)
