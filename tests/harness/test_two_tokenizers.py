"""Runs of a source and a target with tokenizers of their own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from semalign_align import FinalHidden, Supervision, SupervisionSettings, supervise
from semalign_attribution import Batch, DecoderView, LayerPairing
from semalign_geometry import Transport
from semalign_geometry.base import SemalignError
from semalign_harness import Experiment, load_experiment
from semalign_harness.data.rows import batches
from semalign_harness.data.sides import batches_of
from semalign_harness.methods import known_methods
from semalign_harness.methods._method import Method
from semalign_harness.methods.baselines import laten, seeking
from semalign_harness.models.tiny import build_other_tokenizer
from semalign_harness.results.entries import EntryChanges
from semalign_harness.results.run import RunResult
from semalign_harness.run.inputs import Inputs, read_inputs
from semalign_harness.run.measure import answer_bytes, measure
from semalign_harness.run.pipeline import run_experiment
from semalign_harness.run.run_folder import steps_of
from semalign_harness.util.console import Console
from semalign_harness.util.settings import merged
from torch import Tensor
from transformers import AutoModelForCausalLM

from ..models import tiny_model

TOKENIZERS_APART = ("semalign", "kd", "hidden", "gold", "alm", "sft", "seeking", "laten")


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    tokenizer = build_other_tokenizer()
    model = tiny_model("llama", seed=7, depth=3, width=24, vocabulary=len(tokenizer) + 5)
    model.config.max_position_embeddings = 160
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def settings(overrides: list[str], other: Path) -> list[str]:
    return [*overrides, f"target.path={other}", "measure.answer_rows=0"]


def experiment_of(settings: list[str], name: str) -> Experiment:
    tree = load_experiment("tiny", overrides=settings).model_dump(mode="json")
    return Experiment.parse(merged(tree, known_methods()[name]), origin=name)


def inputs_of(settings: list[str]) -> Inputs:
    return read_inputs(load_experiment("tiny", overrides=settings), Console(quiet=True))


def store(inputs: Inputs, pair: tuple[Path, Path], folder: Path) -> Supervision:
    source = AutoModelForCausalLM.from_pretrained(pair[0])
    pairing = LayerPairing(policy="manual", source_depth=4, source_layers=(1, 2, 4))
    return supervise(
        source,
        batches(inputs.split.held_out, 4),
        pairing,
        Transport.identity(40),
        folder,
        settings=SupervisionSettings(output=FinalHidden(), dtype="float32"),
        classes=inputs.classes,
    )


def log_probs_of(model: Path, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the whole vocabulary where each answer token is predicted, by a plain forward pass."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model)(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].double().log_softmax(1)


def by_classes(log_probs: Tensor, classes: Tensor, count: int) -> Tensor:
    """Probabilities of classes; entries in none are left out."""
    known = classes >= 0
    found = torch.zeros(len(log_probs), count, dtype=torch.float64)
    found.index_add_(1, classes[known], log_probs[:, : len(classes)][:, known].exp())
    return found / found.sum(1, keepdim=True)


def test_metrics_equal_a_plain_forward_pass(
    settings: list[str], pair: tuple[Path, Path], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(settings)
    classes = inputs.classes
    assert classes is not None
    held_out = store(inputs, pair, tmp_path / "store")
    monkeypatch.setattr("semalign_harness.run.measure.TOKENS_AT_ONCE", 5)  # cuts through rows
    sizes = answer_bytes(held_out, inputs.target.tokenizer)
    found, probabilities = measure(
        DecoderView(AutoModelForCausalLM.from_pretrained(other)), held_out, batch_size=3, answer_bytes=sizes
    )
    of_source, _ = measure(
        DecoderView(AutoModelForCausalLM.from_pretrained(pair[0])),
        held_out,
        batch_size=3,
        answer_bytes=sizes,
        is_source=True,
    )
    rows, sums = [], torch.zeros(2, classes.count, dtype=torch.float64)
    for example in sorted(inputs.split.held_out, key=len):
        assert example.source is not None
        both, nll, starts = [], [], []
        for model, ids, role in ((pair[0], classes.source, "source"), (other, classes.target, "target")):
            side = example.on(role)  # type: ignore[arg-type]
            log_probs = log_probs_of(model, side.prompt_ids, side.answer_ids)
            nll.append(-float(log_probs.gather(1, torch.tensor(side.answer_ids)[:, None]).sum()))
            lengths = torch.tensor(getattr(example.source.spans, role))
            starts.append(lengths.cumsum(0) - lengths)
            both.append(by_classes(log_probs[starts[-1]], ids, classes.count))
        kl = float((both[0] * (both[0] / both[1]).log()).sum())
        agreement = float((both[0].argmax(1) == both[1].argmax(1)).sum())
        rows.append((len(starts[0]), nll[0], nll[1], kl, agreement, len(example.answer.strip().encode())))
        sums += torch.stack([each.sum(0) for each in both])
    columns = (torch.tensor(column).double() for column in zip(*rows, strict=True))
    spans, source_nll, target_nll, kl, agreement, size = columns
    assert (found.spans, found.rows, sum(found.by_row.tokens)) == (int(spans.sum()), len(rows), found.spans)
    assert found.tokens == sum(len(row.answer_ids) for row in inputs.split.held_out)
    assert found.by_row.answer_bytes == tuple(size.long().tolist())
    whole = float(spans.sum())
    assert found.kl == pytest.approx(float(kl.sum()) / whole, rel=1e-3)
    assert found.agreement == pytest.approx(float(agreement.sum()) / whole)
    assert found.by_row.kl == pytest.approx((kl / spans).tolist(), rel=1e-3)
    for measured, nll_of in ((found, target_nll), (of_source, source_nll)):
        assert measured.answer_nll == pytest.approx(float(nll_of.sum()) / whole, rel=1e-4)
        bits = nll_of / torch.tensor(2.0).log()
        assert measured.bits_per_byte == pytest.approx(float(bits.sum() / size.sum()), rel=1e-4)
        assert measured.by_row.bits_per_byte == pytest.approx((bits / size).tolist(), rel=1e-4)
    assert (of_source.kl, of_source.agreement) == (pytest.approx(0, abs=1e-6), 1)
    torch.testing.assert_close(probabilities.double(), sums / whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", TOKENIZERS_APART)
def test_methods_train_on_two_tokenizers(name: str, settings: list[str], other: Path, tmp_path: Path) -> None:
    result = run_experiment(experiment_of(settings, name), tmp_path / name)
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())
        for folder in (other, tmp_path / name / "model")
    )
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    assert all(torch.isfinite(value).all() for value in after.values())
    assert result.after.spans == result.before.spans == result.source.spans is not None
    assert result.source.kl == pytest.approx(0, abs=1e-6)
    assert all(each.bits_per_byte is not None for each in (result.source, result.before, result.after))
    changes = EntryChanges.read(tmp_path / name / "entries.json")
    assert changes.spans == result.after.spans and (changes.gained or name == "laten")  # which changes next to nothing
    assert RunResult.read(tmp_path / name / "result.json") == result


def test_a_live_source_trains_as_a_stored_one(settings: list[str], tmp_path: Path) -> None:
    losses = []
    for live in ("false", "true"):
        run_experiment(experiment_of([*settings, f"live={live}", "supervision.dtype=float32"], "kd"), tmp_path / live)
        losses.append(steps_of(tmp_path / live)[0]["losses"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and set(losses[0]) == {"output", "span"}


def test_baselines_give_the_source_its_own_tokens(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Batch] = []

    def stop(view: DecoderView, rows: Any, **given: Any) -> None:
        read.extend(rows)
        raise SemalignError("seen")

    monkeypatch.setattr(seeking, "sensitivities", stop)
    monkeypatch.setattr(laten, "locate", stop)
    inputs = inputs_of(settings)
    rows = batches_of(inputs.split.train[:4], 1, "source")
    with pytest.raises(SemalignError, match="seen"):
        run_experiment(experiment_of(settings, "seeking"), tmp_path / "seeking")
    assert [batch["input_ids"].tolist() for batch in read] == [batch["input_ids"].tolist() for batch in rows]
    read.clear()
    with pytest.raises(SemalignError, match="seen"):
        run_experiment(experiment_of(settings, "laten"), tmp_path / "laten")
    assert set(read[0]["input_ids"].flatten().tolist()) <= {0, *(i for b in rows for i in b["input_ids"][0].tolist())}


class OneOnly(Method):
    """A method that reads one tokenisation."""

    kind: str = "one_only"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": OneOnly()}, "the tokenizers differ, and method.kind=one_only presumes that one serves both models"),
        ({"scorer": {"kind": "similarity"}}, "scorer.kind=similarity compares both models token by token"),
    ],
)
def test_what_needs_one_tokenizer_is_refused(changes: dict[str, Any], message: str, settings: list[str]) -> None:
    experiment = load_experiment("tiny", overrides=settings)
    with pytest.raises(SemalignError, match=message):
        read_inputs(
            experiment.model_copy(update=changes)
            if "method" in changes
            else Experiment.parse(merged(experiment.model_dump(mode="json"), changes)),
            Console(quiet=True),
        )


def test_alm_needs_two_tokenizers(overrides: list[str]) -> None:
    with pytest.raises(SemalignError, match="one tokenizer serves both models, and method.kind=alm compares spans"):
        read_inputs(experiment_of(overrides, "alm"), Console(quiet=True))
