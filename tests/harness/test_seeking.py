"""SEEKING: windows against brute force, sensitivities against plain autograd, and a start that changes nothing."""

import copy
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import Supervision
from semalign_attribution import DecoderView
from semalign_geometry.base import SemalignError
from semalign_harness import build_tokenizer
from semalign_harness.data.encoding import Example
from semalign_harness.methods import MethodReport, _seeking
from semalign_harness.methods._seeking import Seeking
from semalign_harness.methods.baselines.seeking import (
    LowRank,
    best_window,
    dropping,
    extracted,
    injected,
    linear_modules,
    low_rank,
    matched,
    most_sensitive,
    outputs_first,
    sensitivities,
)
from semalign_harness.methods.baselines.seeking_settings import SoughtLora
from semalign_train import StepRecord, _joint, _loop
from torch import Tensor, nn
from torch.testing import assert_close

from ..align.chain import EXAMPLES, TARGET_DEPTH, make_store, source_model, target_model
from ..geometry.strategies import elementwise, matrices, seeds
from ..models import collate, random_batch
from .contexts import context_of

ROWS = [Example(tuple(ids[:n].tolist()), tuple(ids[n:].tolist()), "") for ids, n in EXAMPLES]
KEPT = (1, 3, 4, 6)
SMALL = {"trainable": {"rank": 3}}

architectures = pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gpt2", "pythia", "opt"])


def state(model: nn.Module) -> dict[str, Any]:
    """What must be as it was found: values, flags, gradients, modes and hooks."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "parameters": {n: (id(p), p.dtype, p.requires_grad, p.grad is None) for n, p in model.named_parameters()},
        "hooks": [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks],
        "parts": {name: (type(part), sorted(part.__dict__), part.training) for name, part in model.named_modules()},
    }


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["values"].keys() == expected["values"].keys()
    for name, value in found["values"].items():
        assert torch.equal(value, expected["values"][name]), name
    assert {**found, "values": 0} == {**expected, "values": 0}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{k: v for k, v in random_batch(7).items() if k != "labels"}, use_cache=False).logits
    return found


def sought(source: Any, target: Any, trainable: SoughtLora, kept: tuple[int, ...] = KEPT) -> dict[str, LowRank]:
    view = DecoderView(source)
    scores = sensitivities(view, [collate([example]) for example in EXAMPLES[:3]])
    return extracted(view, DecoderView(target), scores, kept, trainable)


@st.composite
def windows(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Sensitivities, whole ones with many ties or real ones, and the shape of a window."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    scores = draw(st.one_of(elementwise(rows, columns), matrices(rows, columns))).abs()
    return scores, draw(st.integers(1, rows)), draw(st.integers(1, columns))


@given(windows())
def test_the_window_is_the_one_that_brute_force_finds(case: tuple[Tensor, int, int]) -> None:
    scores, rows, columns = case
    places = [(t, s) for t in range(len(scores) - rows + 1) for s in range(scores.shape[1] - columns + 1)]
    sums = {(t, s): float(scores[t : t + rows, s : s + columns].sum()) for t, s in places}
    best = max(places, key=lambda place: sums[place])
    found = best_window(scores, rows, columns)
    if scores.equal(scores.round()):
        assert found == best, "of equal sums the first"
    else:
        assert sums[tuple(found)] == pytest.approx(sums[best], rel=1e-12)


def test_prefix_sums_do_not_lose_what_single_precision_would() -> None:
    scores = torch.full((64, 64), 2.0**24)
    scores[40, 50] += 2
    assert best_window(scores, 1, 1) == (40, 50)


@given(st.integers(1, 7), st.integers(1, 7), st.integers(1, 8), st.data())
def test_the_product_is_the_nearest_of_its_rank(rows: int, columns: int, rank: int, data: st.DataObject) -> None:
    window = data.draw(matrices(rows, columns))
    b, a = low_rank(window, rank)
    used = min(rank, rows, columns)
    values = torch.linalg.svdvals(window)
    close: Any = {"rtol": 0, "atol": 1e-12 * max(1.0, float(values.max()))}
    assert b.shape == (rows, used) and a.shape == (used, columns)
    assert_close(torch.linalg.matrix_norm(window - b @ a), values[used:].square().sum().sqrt(), **close)
    assert_close(a @ a.T, torch.eye(used, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(
        b.T @ b, torch.diag(values[:used].square()), rtol=0, atol=close["atol"] * max(1.0, float(values.max()))
    )


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, 0.5]), min_size=1, max_size=9), st.data())
def test_the_most_sensitive_layers_keep_their_order(totals: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(totals)))
    kept = most_sensitive(totals, count)
    assert kept == sorted(set(kept)) and len(kept) == count
    for other in set(range(1, len(totals) + 1)) - set(kept):
        for layer in kept:
            more, less = totals[layer - 1], totals[other - 1]
            assert more > less or (more == less and layer < other), "of equal ones the shallower"


@architectures
def test_sensitivities_are_sums_of_plain_autograd(architecture: str) -> None:
    model = source_model(architecture, dtype=torch.float64)
    found = sensitivities(DecoderView(model), [collate([example]) for example in EXAMPLES[:3]])
    plain = copy.deepcopy(model).requires_grad_(True)
    wanted = [dict(linear_modules(layer)) for layer in DecoderView(plain).layers]
    sums = [{name: torch.zeros_like(part.weight) for name, part in layer.items()} for layer in wanted]
    for ids, prompt in EXAMPLES[:3]:
        plain.zero_grad()
        log_p = plain(ids[None], use_cache=False).logits[0, prompt - 1 : -1].log_softmax(1)
        (-log_p.gather(1, ids[prompt:, None]).mean()).backward()
        for layer, of_layer in zip(wanted, sums, strict=True):
            for name, part in layer.items():
                of_layer[name] += (part.weight * part.weight.grad).abs().detach()
    for layer, of_layer, ours in zip(wanted, sums, found, strict=True):
        assert ours.keys() == of_layer.keys() and ours
        for name, score in ours.items():
            assert float(score.max()) > 0
            assert_close(score, outputs_first(layer[name], of_layer[name]).detach(), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sensitivities_are_single_precision_and_leave_the_source_as_it_was(dtype: torch.dtype) -> None:
    model = source_model(dtype=dtype)
    model.train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    scores = sensitivities(DecoderView(model), [collate(EXAMPLES[:1])])
    assert {score.dtype for layer in scores for score in layer.values()} == {torch.float32}
    same(state(model), before)


def test_a_source_comes_back_when_an_exception_passes() -> None:
    model = source_model()
    before = state(model)
    with pytest.raises(SemalignError, match="no answer token"):
        ids = torch.ones(1, 4, dtype=torch.long)
        sensitivities(DecoderView(model), [{"input_ids": ids, "attention_mask": ids, "labels": ids * 0 - 100}])
    same(state(model), before)


@architectures
def test_a_whole_window_is_cut_where_it_is_most_sensitive(architecture: str) -> None:
    source, target = source_model(architecture), target_model(architecture)
    trainable = SoughtLora(rank=1000)
    scores = sensitivities(DecoderView(source), [collate([EXAMPLES[0]])])
    nuggets = extracted(DecoderView(source), DecoderView(target), scores, KEPT, trainable)
    for place, layer in enumerate(KEPT):
        theirs, ours = (
            linear_modules(part) for part in (DecoderView(source).layer(layer), DecoderView(target).layers[place])
        )
        for name, module in ours.items():
            b, a = nuggets[f"{place}.{name}"]
            rows, columns = outputs_first(module, module.weight).shape
            top, left = best_window(scores[layer - 1][name], rows, columns)
            whole = outputs_first(theirs[name], theirs[name].weight).detach()
            assert_close(b @ a, whole[top : top + rows, left : left + columns], rtol=0, atol=1e-5)
    assert len(nuggets) == len(KEPT) * len(linear_modules(DecoderView(target).layer(1)))


@architectures
def test_the_start_leaves_logits_as_they_were(architecture: str) -> None:
    source, target = source_model(architecture), target_model(architecture)
    before, found = logits(target), state(target)
    trainable = SoughtLora(rank=3, dropout=0.5)
    nuggets = sought(source, target, trainable)
    with injected(DecoderView(target), nuggets, trainable, seed=0) as parameters:
        assert len(parameters) == 2 * len(nuggets)
        assert all(p.dtype == torch.float32 and p.requires_grad for p in parameters)
        starts = [start for b, a in nuggets.values() for start in (a, b)]
        assert sorted(float(p.detach().norm()) for p in parameters) == sorted(float(s.norm()) for s in starts)
        assert_close(logits(target), before, rtol=0, atol=1e-5 * float(before.abs().max()))
        for name, (b, a) in nuggets.items():
            base = DecoderView(target).layers.get_submodule(f"{name}.base_layer")
            inside = DecoderView(target).layers.get_submodule(name)
            at = next(n for n, part in target.named_modules() if part is inside)
            taken = found["values"][f"{at}.weight"] - base.weight.detach()
            assert_close(outputs_first(base, taken), b @ a, rtol=0, atol=1e-5)
    assert_close(logits(target), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    after = state(target)
    assert {**after, "values": 0} == {**found, "values": 0}
    for name, value in after["values"].items():
        assert_close(value, found["values"][name], rtol=0, atol=1e-6)


def test_narrow_weights_are_rounded_twice_at_most() -> None:
    source, target = source_model(dtype=torch.bfloat16), target_model(dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    trainable = SoughtLora(rank=3)
    nuggets = sought(source, target, trainable)
    with injected(DecoderView(target), nuggets, trainable, seed=0):
        pass
    added = max(float((b @ a).abs().max()) for b, a in nuggets.values())
    for name, value in target.state_dict().items():
        rounding = torch.finfo(torch.bfloat16).eps * (before[name].float().abs() + added)
        assert bool(((value.float() - before[name].float()).abs() <= rounding).all()), name


@given(seeds)
def test_dropout_is_drawn_from_the_seed_and_the_random_state_comes_back(seed: int) -> None:
    dropouts: Any = nn.ModuleDict({"lora_dropout": nn.Dropout(0.5), "own": nn.Dropout(0.5)}).eval()
    ones = torch.ones(64)
    state_before = torch.get_rng_state()
    masks = []
    for each in (seed, seed, seed + 1):
        with dropping(dropouts, torch.device("cpu"), seed=each):
            masks.append(dropouts["lora_dropout"](ones))
            assert torch.equal(dropouts["own"](ones), ones), "the model's own dropout stays off"
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    assert torch.equal(dropouts["lora_dropout"](ones), ones)
    assert torch.equal(torch.get_rng_state(), state_before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    return make_store(source_model(), target_model(), tmp_path_factory.mktemp("seeking") / "store")


Run = Callable[..., MethodReport]


@pytest.fixture
def run(store: Supervision, tmp_path: Path) -> Run:
    """Run the method on a target, with a source that is loaded by a function."""

    def run(
        method: Seeking, target: Any, load_source: Callable[[], Any] = source_model, **train_settings: Any
    ) -> MethodReport:
        settings = {"steps": 2, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "seed": 5}
        context = context_of(
            tmp_path, target, load_source, ROWS, build_tokenizer(), supervision=store, **settings | train_settings
        )
        return method.run(context)

    return run


def records(folder: Path) -> list[StepRecord]:
    return [StepRecord.model_validate_json(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_training_moves_the_linear_weights_alone_and_merges(run: Run, tmp_path: Path) -> None:
    target = target_model()
    before = state(target)
    report = run(Seeking.parse(SMALL), target)
    after = state(target)
    moved = {name for name, value in after["values"].items() if not torch.equal(value, before["values"][name])}
    assert moved == {name for name in after["values"] if name.endswith("proj.weight")}
    assert {**after, "values": 0} == {**before, "values": 0}
    steps = records(tmp_path)
    assert len(steps) == report.steps == 2 * TARGET_DEPTH
    assert steps[-1].losses["answer"] < steps[0].losses["answer"]
    sides = sum(sum(value.shape) for name, value in after["values"].items() if name in moved)
    assert report.trained_parameters == 3 * sides
    assert report.seconds > 0 and report.transfer is None


def test_the_first_loss_is_that_of_the_target_as_it_was(run: Run, tmp_path: Path) -> None:
    target = target_model()
    with torch.no_grad():
        log_p = [target(ids[None], use_cache=False).logits[0, n - 1 : -1].log_softmax(1) for ids, n in EXAMPLES]
    nll = [-p.gather(1, ids[n:, None]).sum() for p, (ids, n) in zip(log_p, EXAMPLES, strict=True)]
    run(Seeking.parse({"trainable": {"rank": 3, "dropout": 0}}), target)
    first = records(tmp_path)[0]
    assert first.losses["answer"] == pytest.approx(
        float(sum(nll[i] for i in first.examples)) / first.supervised_tokens, rel=1e-5
    )


def test_a_seed_gives_one_model_and_dropout_is_part_of_it(run: Run) -> None:
    results = []
    for dropout in (0.3, 0.3, 0.0):
        target = target_model()
        torch.rand(1)  # another global state
        run(Seeking.parse({"trainable": {"rank": 3, "dropout": dropout}}), target)
        results.append(target.state_dict())
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert any(not torch.equal(value, results[2][name]) for name, value in results[0].items())


def test_the_source_is_gone_before_training_begins(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []

    def load_source() -> Any:
        model = source_model()
        held.append(weakref.ref(model))
        return model

    train = Seeking.train

    def watched(*args: Any, **more: Any) -> MethodReport:
        assert len(held) == 1 and held[0]() is None
        return train(*args, **more)

    monkeypatch.setattr(Seeking, "train", watched)
    run(Seeking.parse(SMALL), target_model(), load_source)


@pytest.fixture
def slow_source(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """A source that takes six seconds to load, by a clock that moves a tenth of one whenever it is read."""
    now = 0.0

    def tick() -> float:
        nonlocal now
        now += 0.1
        return now

    def load_source() -> Any:
        nonlocal now
        now += 6
        return source_model()

    for module in (_seeking, _joint, _loop):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=tick))
    return load_source


def test_the_wall_time_counts_seeking(run: Run, slow_source: Callable[[], Any]) -> None:
    assert run(Seeking.parse(SMALL), target_model(), slow_source).seconds > 6


def test_an_interrupted_training_keeps_its_seconds(run: Run, tmp_path: Path, slow_source: Callable[[], Any]) -> None:
    method = Seeking.parse(SMALL)
    whole = run(method, target_model(), slow_source, checkpoint_steps=1)
    before = sum(step.seconds for step in records(tmp_path))
    again = run(method, target_model(), slow_source, checkpoint_steps=1)
    assert again.steps == whole.steps == len(records(tmp_path)), "no step is repeated"
    assert before > 0.7 and before + 6 < again.seconds < before + 7


def in_integers(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for module in linear_modules(DecoderView(model).layer(1)).values():
        module.weight.data = module.weight.data.to(torch.int8)
    return model


def test_a_source_that_is_too_shallow_or_too_small_is_one_sentence(run: Run) -> None:
    target = target_model()
    before = state(target)
    for made, message in (
        (lambda: target_model(depth=3), "the source has 3 layers and the target 4: .* choose a source that is as deep"),
        (
            lambda: target_model(width=24),
            r"q_proj is 24 × 24 in the source and 32 × 32 in the target: .* choose a large",
        ),
        (lambda: source_model("pythia"), "do not both have linear modules named alike: .* can name nothing"),
        (lambda: in_integers(source_model()), "torch.int8, which have no gradient .* source.load_in_4bit=false"),
    ):
        with pytest.raises(SemalignError, match=message) as caught:
            run(Seeking.parse(SMALL), target, made)
        assert "\n" not in str(caught.value)
        same(state(target), before)


def test_gradients_that_are_not_finite_are_one_sentence() -> None:
    with pytest.raises(SemalignError, match="not finite: set source.dtype=float32"):
        most_sensitive([1.0, float("nan")], 1)


def test_modules_are_those_of_both_models() -> None:
    both = [DecoderView(model).layer(1) for model in (source_model("llama"), target_model("qwen2"))]
    assert len(matched(*both, ())) == 7
    assert list(matched(*both, ("v_proj",))) == ["self_attn.v_proj"]
    with pytest.raises(
        SemalignError, match="named fc1: method.trainable.modules can name down_proj, gate_proj, k_proj"
    ):
        matched(*both, ("fc1", "v_proj"))
    other = DecoderView(target_model("opt", width=24)).layer(1)
    assert {name.rsplit(".", 1)[-1] for name in matched(both[0], other, ())} == {"q_proj", "k_proj", "v_proj"}


def test_adapters_have_scale_one() -> None:
    assert (SoughtLora().rank, SoughtLora().alpha, SoughtLora().dropout) == (16, 16, 0.05)
    assert Seeking.parse({"trainable": {"rank": 8}}).trainable.alpha == 8
    method = Seeking.parse(SMALL)
    assert Seeking.model_validate_json(method.model_dump_json()) == method
    with pytest.raises(SemalignError, match="alpha is 32 and rank 8"):
        Seeking.parse({"trainable": {"rank": 8, "alpha": 32}})
    with pytest.raises(SemalignError, match="'lora'"):
        Seeking.parse({"trainable": {"kind": "full"}})
