"""The figures are those of a plain forward pass."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from semalign_align import FinalHidden, Supervision, SupervisionSettings, TopK, supervise
from semalign_attribution import DecoderView, LayerPairing
from semalign_geometry import Transport
from semalign_geometry.base import SemalignError
from semalign_harness import arithmetic_rows, encode_rows, gap_recovered, load_model
from semalign_harness.data.rows import batches
from semalign_harness.models.loading import LoadedModel
from semalign_harness.models.settings import ModelConfig
from semalign_harness.run.measure import measure, right_answers


@pytest.fixture(scope="module")
def models(pair: tuple[Path, Path]) -> tuple[LoadedModel, LoadedModel]:
    source, target = (load_model(ModelConfig(path=str(folder)), generates=True) for folder in pair)
    return source, target


def store(source: LoadedModel, folder: Path, output: FinalHidden | TopK) -> Supervision:
    examples = encode_rows(arithmetic_rows(6, seed=0, split="held_out"), source.tokenizer)
    pairing = LayerPairing(policy="manual", source_depth=4, source_layers=(1, 2, 4))
    settings = SupervisionSettings(output=output, dtype="float32")
    return supervise(source.model, batches(examples, 4), pairing, Transport.identity(40), folder, settings=settings)


def test_figures_equal_a_plain_forward_pass(
    models: tuple[LoadedModel, LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = models
    monkeypatch.setattr("semalign_harness.run.measure.TOKENS_AT_ONCE", 5)  # cuts through rows
    found = measure(DecoderView(target.model), store(source, tmp_path / "store", FinalHidden()), batch_size=4).metrics
    rows = []
    for example in sorted(encode_rows(arithmetic_rows(6, seed=0, split="held_out"), source.tokenizer), key=len):
        ids = torch.tensor([example.prompt_ids + example.answer_ids])
        place = slice(len(example.prompt_ids) - 1, ids.shape[1] - 1)
        with torch.no_grad():
            ours, theirs = (m.model(ids).logits[0, place].double().log_softmax(-1) for m in (target, source))
        nll = float(F.nll_loss(ours, ids[0, place.start + 1 :], reduction="sum"))
        kl = float(F.kl_div(ours, theirs, log_target=True, reduction="sum"))
        agreement = float((ours.argmax(-1) == theirs.argmax(-1)).sum())
        rows.append((len(ours), nll, kl, agreement))
    tokens, nll, kl, agreement = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    assert found.tokens == tokens.sum() and found.rows == 6
    assert found.answer_nll == pytest.approx(float(nll.sum() / tokens.sum()), rel=1e-4)
    assert found.kl == pytest.approx(float(kl.sum() / tokens.sum()), rel=1e-3)
    assert found.agreement == pytest.approx(float(agreement.sum() / tokens.sum()))
    assert found.by_row.tokens == tuple(tokens.tolist())
    assert found.by_row.nll == pytest.approx((nll / tokens).tolist(), rel=1e-4)
    assert found.by_row.kl == pytest.approx((kl / tokens).tolist(), rel=1e-3)
    assert found.by_row.agreement == pytest.approx((agreement / tokens).tolist())


def test_the_source_agrees_with_itself(
    models: tuple[LoadedModel, LoadedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, held_out = DecoderView(models[0].model), store(models[0], tmp_path / "store", FinalHidden())
    found = measure(view, held_out, batch_size=3).metrics
    assert found.kl == pytest.approx(0, abs=1e-5) and found.agreement == 1
    monkeypatch.setattr(DecoderView, "trace", None)  # its layers do not run again
    stored = measure(view, held_out, batch_size=3, is_source=True).metrics
    assert stored.kl == pytest.approx(0, abs=1e-6) and stored.agreement == 1
    assert stored.answer_nll == pytest.approx(found.answer_nll, rel=1e-5)


def test_top_entries_do_not_give_the_exact_kl(models: tuple[LoadedModel, LoadedModel], tmp_path: Path) -> None:
    with pytest.raises(SemalignError, match="final_hidden"):
        measure(DecoderView(models[1].model), store(models[0], tmp_path / "store", TopK(k=4)), batch_size=3)


@given(st.floats(-5, 5), st.floats(0.1, 5), st.floats(-1, 2))
def test_gap_recovered_is_the_share_of_the_way(before: float, gap: float, share: float) -> None:
    recovered = gap_recovered(before + gap, before, before + share * gap)
    assert recovered == pytest.approx(share, abs=1e-9)
    assert gap_recovered(before, before, before) is None


def test_a_model_that_knows_the_answers_scores_one(
    models: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = models[1]
    rows = arithmetic_rows(5, seed=2, split="held_out")
    examples = encode_rows(rows, target.tokenizer)
    answers = {example.prompt_ids: example.answer_ids for example in examples}

    def generate(model: object, prompts: list[tuple[int, ...]], **settings: object) -> list[list[int]]:
        return [list(answers[prompt]) for prompt in prompts]

    monkeypatch.setattr("semalign_harness.run.measure.generate", generate)
    assert all(right_answers(target, examples, max_new_tokens=20, batch_size=2))
    lengths = [len(example.prompt_ids) for example in examples]
    assert lengths != sorted(lengths)
    mixed = [replace(example, answer="is 99") if place % 2 else example for place, example in enumerate(examples)]
    assert right_answers(target, mixed, max_new_tokens=20, batch_size=2) == [True, False, True, False, True]
