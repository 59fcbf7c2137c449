"""The laws of the methods: the same tokens for each, nothing changed but the target, and what they save is what they
trained."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import pytest
import torch
from semalign_align import Supervision
from semalign_attribution import DecoderView
from semalign_geometry import Divergence, SemalignError, Settings, sha256_of
from semalign_harness import Experiment, RunResult
from semalign_harness.cli.main import main
from semalign_harness.loading import load_experiment
from semalign_harness.methods import (
    MethodContext,
    MethodReport,
    as_method,
    find_methods,
    known_kinds,
    known_methods,
    layer_use_of,
    parse_method,
    settings_of,
)
from semalign_harness.methods._joint import answer_loss, output_loss
from semalign_harness.methods._joint_training import _JointTrainer
from semalign_harness.run.pipeline import run_experiment
from semalign_harness.run.run_folder import steps_of
from semalign_harness.run.tracking import Metrics
from semalign_harness.util.console import Console
from semalign_harness.util.settings import merged
from semalign_train import LoraLayer, Muon, StepRecord, TransferConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from ..align.chain import (
    EXACT,
    EXAMPLES,
    PAIRED,
    SOURCE_WIDTH,
    TARGET_DEPTH,
    TARGET_WIDTH,
    make_store,
    run_plainly,
    source_model,
    supervised_of,
    target_model,
)
from ..attribution.snapshot import snapshot
from ..components import bring
from ..models import collate

TRAIN_ALIKE = ("sft", "sft_full", "kd", "kd_full", "hidden", "pissa", "no_geometry", "semalign_fisher")
"""Methods that see the tokens that SemAlign sees."""


def experiment_of(overrides: list[str], name: str, *more: str) -> Experiment:
    """The tiny experiment with the settings of a method."""
    tree = load_experiment("tiny", overrides=[*overrides, *more]).model_dump(mode="json")
    return Experiment.parse(merged(tree, known_methods()[name]), origin=name)


@pytest.fixture
def run(tmp_path: Path, overrides: list[str]) -> Iterator[Any]:
    def runner(name: str, *more: str) -> RunResult:
        return run_experiment(experiment_of(overrides, name, *more), tmp_path / name)

    yield runner


def weights(folder: str | Path) -> dict[str, Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_of(file) for file in folder.iterdir()}


@pytest.mark.parametrize("name", [name for name in known_methods() if not name.startswith("frame_")])
def test_every_method_changes_the_target_alone_and_saves_it(
    name: str, run: Any, tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    source, target = map(hashes, pair)
    result = run(name)
    assert (hashes(pair[0]), hashes(pair[1])) == (source, target)
    before, after = weights(pair[1]), weights(tmp_path / name / "model")
    changed = [key for key, value in after.items() if not torch.equal(value, before[key])]
    assert bool(changed) == (name != "laten_as_released")
    assert all(torch.isfinite(value).all() for value in after.values())
    assert result.training.steps > 0 and result.training.trained_parameters > 0
    assert RunResult.read(tmp_path / name / "result.json") == result


def test_methods_see_the_same_tokens_at_the_same_steps(run: Any) -> None:
    reference = run("semalign").training
    for name in TRAIN_ALIKE:
        report = run(name).training
        assert (report.steps, report.supervised_tokens) == (reference.steps, reference.supervised_tokens), name


def context(tmp_path: Path, store: Supervision, target: Any, **train: Any) -> MethodContext:
    """What a joint method needs of a run."""
    settings = {"batch_size": 4, "micro_batch_size": 2, "passes": 3, "learning_rate": 1e-2, **train}
    experiment = load_experiment("tiny").model_copy(update={"train": TransferConfig(**settings)})
    tmp_path.mkdir(exist_ok=True)
    loaded = SimpleNamespace(model=target, tokenizer=None)
    stores = SimpleNamespace(train=store)
    rest: Any = (None, loaded, stores, None, tmp_path, Console(quiet=True), torch.device("cpu"), Metrics(tmp_path))
    return MethodContext(experiment, *rest)


def trained(tmp_path: Path, store: Supervision, name: str, target: Any, **train: Any) -> MethodReport:
    settings = dict(known_methods()[name]["method"])
    return as_method(parse_method({**settings, **train.pop("method", {})})).run(
        context(tmp_path, store, target, **train)
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    return make_store(source_model(), target_model(), tmp_path_factory.mktemp("store") / "top")


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Supervision:
    return make_store(source_model(), target_model(), tmp_path_factory.mktemp("store") / "exact", settings=EXACT)


def test_a_start_of_adapters_needs_adapters() -> None:
    with pytest.raises(SemalignError, match="start=pissa is about adapters: set trainable.kind=lora"):
        load_experiment("tiny", overrides=["method={kind: sft, start: pissa, trainable: {kind: full}}"])


@pytest.mark.parametrize("name", ["sft", "sft_full", "kd", "kd_full", "pissa"])
def test_no_steps_are_the_identity(name: str, store: Supervision, tmp_path: Path) -> None:
    target = target_model()
    before = {key: value.clone() for key, value in target.named_parameters()}
    report = trained(tmp_path, store, name, target, method={"seconds": 1e-9})
    assert report.steps == report.supervised_tokens == 0
    for key, value in target.named_parameters():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6 if name == "pissa" else 0)


@pytest.mark.parametrize("name", ["sft", "sft_full", "kd", "kd_full"])
def test_training_lowers_its_loss_and_leaves_the_model_as_it_was_otherwise(
    name: str, store: Supervision, tmp_path: Path
) -> None:
    target = target_model()
    before = snapshot(target)
    report = trained(tmp_path, store, name, target, passes=30)
    after = snapshot(target)
    assert after["modules"] == before["modules"] and after["gradients"] == before["gradients"]
    assert after["random"] == before["random"]
    for key, (requires_grad, identity, _, gradient) in after["parameters"].items():
        assert (requires_grad, identity, gradient) == (*before["parameters"][key][:2], None)
    steps = [StepRecord.model_validate_json(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [step.step for step in steps] == list(range(1, report.steps + 1)) and {step.layer for step in steps} == {0}
    (term,) = steps[0].losses
    ends = [sum(step.losses[term] for step in some) for some in (steps[:5], steps[-5:])]
    assert ends[1] < 0.9 * ends[0]


def test_full_training_reaches_the_head_and_adapters_do_not(store: Supervision, tmp_path: Path) -> None:
    for name, reaches in (("sft_full", True), ("sft", False)):
        target = target_model()
        before = {key: value.clone() for key, value in target.named_parameters()}
        trained(tmp_path / name, store, name, target)
        changed = [key for key, value in target.named_parameters() if not torch.equal(value, before[key])]
        assert any("lm_head" in key or "embed" in key for key in changed) == reaches
        assert any("layers.3" in key for key in changed) and any("layers.0" in key for key in changed)


def test_muon_moves_the_layers_and_leaves_embeddings_and_head_to_adamw(store: Supervision, tmp_path: Path) -> None:
    after = {}
    for optimiser in ("adamw", "muon"):
        target = target_model()
        trained(tmp_path / optimiser, store, "kd_full", target, optimiser=optimiser, layers=(1,), steps=1)
        after[optimiser] = dict(target.named_parameters())
    for key, value in after["muon"].items():
        assert torch.equal(value, after["adamw"][key]) == (value.ndim == 1 or "layers" not in key), key


@pytest.mark.parametrize("name", ["kd", "kd_full"])
def test_recomputed_layers_train_alike_and_keep_less(name: str, store: Supervision, tmp_path: Path) -> None:
    after, kept = [], []
    for recompute in (False, True):
        target, held = target_model(), {}

        def pack(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trained(tmp_path / str(recompute), store, name, target, recompute_suffix=recompute, layers=(1,), steps=2)
        after.append(dict(target.named_parameters()))
        kept.append(sum(held.values()))
    assert all(torch.equal(value, after[1][key]) for key, value in after[0].items())
    assert kept[1] < 0.8 * kept[0]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch.compile looks at every input's
@pytest.mark.parametrize("name", ["kd", "kd_full"])
def test_compiled_layers_train_alike(name: str, store: Supervision, tmp_path: Path, compiled: list[nn.Module]) -> None:
    after = []
    for compile in (False, True):
        target = target_model()
        trained(tmp_path / str(compile), store, name, target, compile=compile, layers=(1,), steps=2)
        after.append(dict(target.named_parameters()))
    assert compiled == list(target.model.layers)
    for key, value in after[0].items():
        torch.testing.assert_close(value, after[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["kd", "kd_full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_the_precision_of_the_model(
    name: str, dtype: torch.dtype, store: Supervision, tmp_path: Path, monkeypatch: Any
) -> None:
    seen = set()
    product = nn.functional.linear

    def watched(*given: Any) -> Tensor:
        found = product(*given)
        seen.add(found.dtype)
        return found

    monkeypatch.setattr(nn.functional, "linear", watched)
    trained(tmp_path, store, name, target_model(dtype=dtype), layers=(1,), steps=1)
    assert (torch.bfloat16 in seen) == (dtype == torch.bfloat16)


def test_the_projections_of_hidden_are_left_to_adamw(store: Supervision, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(MethodContext, "load_source", lambda self: SimpleNamespace(model=source_model()))
    given: list[nn.Parameter] = []

    class Seen(Muon):
        def __init__(self, matrices: Any, **more: Any) -> None:
            given.extend(matrices)
            super().__init__(given, **more)

    monkeypatch.setattr("semalign_train._optimiser.Muon", Seen)
    trained(tmp_path, store, "hidden", target_model(), optimiser="muon", layers=(1,), steps=1)
    assert given and all(LoraLayer().rank in matrix.shape for matrix in given), "adapters, no projection"


@pytest.mark.parametrize(
    ("kind", "divergence"),
    [("store", "forward"), ("store", "reverse"), ("store", "jensen_shannon"), ("exact", "forward")],
)
def test_losses_do_not_depend_on_whether_the_head_trains(
    kind: str, divergence: Divergence, request: pytest.FixtureRequest
) -> None:
    store: Supervision = request.getfixturevalue(kind)
    view = DecoderView(target_model())
    data = store.collate(range(len(store)))
    trace = view.trace(data.batch)
    head = view.model.get_output_embeddings()
    assert isinstance(head, nn.Module)
    found = []
    for trains in (False, True):
        head.requires_grad_(trains)
        found.append((answer_loss(view, trace, data), output_loss(view, trace, data, store.entries, 1.5, divergence)))
    for streamed, whole in zip(*found, strict=True):
        torch.testing.assert_close(whole.detach(), streamed.detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["kd", "hidden"])
def test_methods_train_by_the_divergence_that_is_set(
    name: str, store: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MethodContext, "load_source", lambda self: SimpleNamespace(model=source_model()))
    first_losses = {}
    for divergence in ("forward", "reverse", "jensen_shannon"):
        trained(tmp_path / divergence, store, name, target_model(), divergence=divergence)
        first_losses[divergence] = steps_of(tmp_path / divergence)[0]["losses"]["output"]
    assert len(set(first_losses.values())) == 3


def test_the_answer_loss_is_the_models_own(store: Supervision) -> None:
    model = target_model()
    data = store.collate([0, 3])
    theirs = model(input_ids=data.batch["input_ids"], attention_mask=data.batch["attention_mask"]).logits
    labels = data.batch["labels"]
    wanted = nn.functional.cross_entropy(theirs[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    view = DecoderView(model)
    torch.testing.assert_close(answer_loss(view, view.trace(data.batch), data), wanted, rtol=1e-5, atol=1e-5)


def test_the_split_into_micro_batches_changes_nothing(store: Supervision, tmp_path: Path) -> None:
    targets = []
    for size in (1, 4):
        targets.append(target_model())
        trained(tmp_path / str(size), store, "kd", targets[-1], micro_batch_size=size)
    for one, other in zip(targets[0].parameters(), targets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_a_mix_of_both_terms_is_their_mix(store: Supervision, tmp_path: Path) -> None:
    def first_losses(**method: Any) -> dict[str, float]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        trained(folder, store, "kd", target_model(), method=method)
        return StepRecord.model_validate_json((folder / "metrics.jsonl").read_text().splitlines()[0]).losses

    alone, mixed = first_losses(), first_losses(answer=0.25)
    assert mixed["output"] == pytest.approx(0.75 * alone["output"], rel=1e-4)
    assert mixed["answer"] > 0 and set(alone) == {"output"}


def test_hidden_matching_leaves_the_source_as_it_was(
    store: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = source_model(), target_model()
    monkeypatch.setattr(MethodContext, "load_source", lambda self: SimpleNamespace(model=source))
    before = snapshot(source)
    report = trained(tmp_path, store, "hidden", target, passes=30)
    assert snapshot(source) == before
    steps = [json.loads(line)["losses"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["hidden"] < 0.9 * steps[0]["hidden"]
    adapters = trained(tmp_path / "kd", store, "kd", target_model()).trained_parameters
    assert report.trained_parameters == adapters + 4 * 48 * 32, "a projection for each target layer"


@torch.no_grad()
def test_hidden_matching_is_the_relative_error_of_each_paired_layer(
    store: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = source_model(), target_model()
    monkeypatch.setattr(MethodContext, "load_source", lambda self: SimpleNamespace(model=source))
    generator = torch.Generator().manual_seed(3)
    scale = TARGET_WIDTH**-0.5
    projections = [scale * torch.randn(SOURCE_WIDTH, TARGET_WIDTH, generator=generator) for _ in PAIRED]
    trained(tmp_path, store, "hidden", target_model(), passes=1, seed=3, method={"weight": 2.5})
    step = StepRecord.model_validate_json((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    errors: list[Tensor] = []
    for example in (EXAMPLES[index] for index in step.examples):
        ours, theirs = (run_plainly(model, collate([example])).hidden for model in (target, source))
        where = supervised_of(example)
        for layer, (paired, projection) in enumerate(zip(PAIRED, projections, strict=True), 1):
            wanted = theirs[paired][0, where]
            error = ours[layer][0, where] @ projection.T - wanted
            errors.extend(error.norm(dim=1) ** 2 / wanted.norm(dim=1) ** 2)
    assert len(errors) == TARGET_DEPTH * step.supervised_tokens
    assert step.losses["hidden"] == pytest.approx(2.5 * float(torch.stack(errors).mean()), rel=1e-4)


def test_seconds_bound_the_training(store: Supervision, tmp_path: Path) -> None:
    report = trained(tmp_path, store, "sft", target_model(), method={"seconds": 1.0}, passes=100_000)
    assert report.steps > 3 and report.seconds < 5
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert max(rates) <= 1e-2 and rates[-1] < 0.2 * max(rates)


@pytest.mark.parametrize(("seconds", "kept"), [(None, [3, 4]), (1e9, [3, 6])])
def test_states_are_kept_when_they_are_due_and_at_the_planned_end(
    seconds: float | None, kept: list[int], store: Supervision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps are planned; where the wall time is given, training goes past them."""
    place = _JointTrainer._place
    monkeypatch.setattr(_JointTrainer, "_place", lambda *given: (given[1], 8) if seconds is not None else place(*given))
    trained(tmp_path, store, "sft", target_model(), method={"seconds": seconds}, steps=1, checkpoint_steps=3)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"state-000-{n:06}" for n in kept]


def test_training_that_diverges_stops_with_the_remedy(store: Supervision, tmp_path: Path) -> None:
    target = target_model()
    with torch.no_grad():
        target.model.layers[1].mlp.up_proj.weight.fill_(3e38)
    with pytest.raises(SemalignError, match=r"not finite for the 4\. time; .* lower method\.learning_rate, which is "):
        trained(tmp_path, store, "sft", target, passes=100)


@pytest.mark.parametrize("name", ["sft", "kd_full"])
def test_training_that_ends_without_a_finite_gradient_or_weights_stops_with_the_remedy(
    name: str, store: Supervision, tmp_path: Path
) -> None:
    remedy = r"not finite when training ends; .* lower method\.learning_rate, which is 1e\+30, else "
    with pytest.raises(SemalignError, match=f"step 4: the last gradient is {remedy}"):
        trained(tmp_path / "skipped", store, name, target_model(), steps=1, learning_rate=1e30, warmup=0)
    once: dict[str, Any] = {"steps": 1, "layers": (1,), "schedule": "constant", "warmup": 0}
    with pytest.raises(SemalignError, match=f"step 1: the weights are {remedy}"):
        trained(tmp_path / "weights", store, name, target_model(), learning_rate=1e30, weight_decay=1e30, **once)


@pytest.mark.parametrize(("given", "steps"), [("2", 6), ("[1,2,2]", 5)])
def test_the_critical_layer_alone_trains(given: str, steps: int, run: Any, tmp_path: Path) -> None:
    """For the steps of all stages."""
    report = run("semalign_v1", f"train.steps={given}").training
    assert report.transfer is not None
    (stage,) = report.transfer.stages
    assert report.steps == stage.steps == steps
    scores = json.loads((tmp_path / "semalign_v1" / "attribution.json").read_text())["mean"]
    assert stage.source_layer == 1 + scores.index(max(scores))
    assert set(stage.first_losses) == {"cosine", "label"}


class Circle(Settings):
    """No method."""

    kind: Literal["foreign"] = "foreign"


class Foreign(Settings):
    """A method of another package."""

    stored: ClassVar[bool] = False
    kind: Literal["foreign"] = "foreign"
    """Chooses this method in a configuration."""
    factor: float = 2.0
    """Scales the first layer's output projection."""

    def run(self, context: MethodContext) -> MethodReport:
        """Scale a matrix."""
        with torch.no_grad():
            context.target.model.model.layers[0].mlp.down_proj.weight *= self.factor  # type: ignore[union-attr, operator]
        return MethodReport(method=self.kind, trained_parameters=0, steps=0, supervised_tokens=0, seconds=0.0)


def test_methods_of_installed_packages_are_known(
    run: Any, tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(monkeypatch, {"semalign.methods": [("foreign", Foreign)]})
    assert "foreign" in known_methods()
    run("foreign", "method.kind=foreign", "method.factor=3.0")
    key = "model.layers.0.mlp.down_proj.weight"
    torch.testing.assert_close(weights(tmp_path / "foreign" / "model")[key], 3 * weights(pair[1])[key])
    environment = json.loads((tmp_path / "foreign" / "environment.json").read_text())
    assert environment["packages"]["extras"] == "1.5"


class Stored(Foreign):
    """One that trains on what the source left behind."""

    stored: ClassVar[bool] = True


def test_what_methods_take_of_the_layers_is_known() -> None:
    """Methods of other packages need not tell: what they do not store they do not use."""
    found = {kind: layer_use_of(as_method(parse_method({"kind": kind}))) for kind in known_kinds()}
    assert found == {
        "semalign": "transported",
        "hidden": "paired",
        **dict.fromkeys(("kd", "sft", "seeking", "laten"), "none"),
    }
    assert layer_use_of(Foreign()) == "none" and layer_use_of(Stored()) == "transported"


def test_what_packages_bring_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for loaded in (dict, Settings, Circle):
        bring(monkeypatch, {"semalign.methods": [("foreign", loaded)]})
        with pytest.raises(SemalignError, match="no class of settings with kind, run, stored"):
            known_kinds()
    bring(monkeypatch, {"semalign.methods": [("kd", Foreign)]})
    with pytest.raises(SemalignError, match="another name"):
        known_kinds()


def test_a_broken_package_is_in_nobody_elses_way(monkeypatch: pytest.MonkeyPatch) -> None:
    bring(monkeypatch, {"semalign.methods": [("foreign", dict)]})
    assert find_methods("semalign,sft.late") == ["semalign", "sft.late"]
    assert settings_of("sft.late") == settings_of("sft")
    with pytest.raises(SemalignError, match="no class of settings"):
        find_methods("sft,foreign")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.kind=sfd", "unknown method 'sfd': choose one of semalign, sft"),
        ("method=sft", "expected settings such as method.kind=sft"),
        ("method={kind: kd, answr: 1}", "unknown key 'method.answr': did you mean 'answer'?"),
        ("method={kind: kd, answer: 2}", "'method.answer' is 2"),
        ("method.learning_rate=1", "unknown key 'method.learning_rate'"),
    ],
)
def test_wrong_methods_are_one_sentence(
    override: str, words: str, tmp_path: Path, overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "tiny", *overrides, override, "--out", str(tmp_path / "run")]) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "run").exists()
