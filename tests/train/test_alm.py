"""The laws of ALM's loss."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from semalign_align import BatchSpans, Supervision, SupervisionSettings, TopK
from semalign_geometry import span_divergence
from semalign_geometry.base import SemalignError
from semalign_train import AlmLoss, JointConfig, JointStep, JointTrainer
from semalign_train._losses import target_likelihoods
from torch import Tensor

from ..align.chain import EXACT
from ..align.chain import target_model as target_of_one
from .paired import classes, make_store, step_of

BEGINS = (b" ", b"\n", b" a", b" b", "end", "rest")
"""Classes that count as white space."""


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Supervision]:
    """Every class of the source's output, as top entries and by final hidden states."""
    folder, every = tmp_path_factory.mktemp("stores"), SupervisionSettings(output=TopK(k=99), dtype="float32")
    return {"top": make_store(folder / "top", settings=every), "exact": make_store(folder / "exact", settings=EXACT)}


def spans_of(step: JointStep) -> BatchSpans:
    assert step.spans is not None
    return step.spans


def with_likelihoods(step: JointStep, likelihoods: Tensor) -> JointStep:
    """The step with other likelihoods of spans under the source."""
    spans = replace(spans_of(step), log_likelihood=likelihoods)
    return replace(step, data=replace(step.data, spans=spans))


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_equal_likelihoods_have_no_loss(temperature: float, stores: dict[str, Supervision]) -> None:
    step, loss = step_of(stores["top"]), AlmLoss(temperature=temperature, threshold=None)
    equal = target_likelihoods(step, spans_of(step)).detach()
    assert float(loss.terms(with_likelihoods(step, equal))["span"].detach()) == 0
    assert float(loss.terms(with_likelihoods(step, equal - 0.5))["span"].detach()) > 0


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31), threshold=st.sampled_from([None, 0.1]))
def test_it_does_not_matter_how_the_target_splits_a_span(
    seed: int, threshold: float | None, stores: dict[str, Supervision]
) -> None:
    """Nor how much of the likelihood each of its tokens has."""
    step, generator = step_of(stores["top"]), torch.Generator().manual_seed(seed)
    whole = torch.rand(len(spans_of(step).lengths), generator=generator)
    found = []
    for _ in range(2):
        parts = torch.rand(len(step.labels), generator=generator).split(spans_of(step).lengths.tolist())
        tokens = torch.cat([size * part / part.sum() for size, part in zip(whole, parts, strict=True)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("semalign_train._losses.answer_nll", lambda *given, tokens=tokens: tokens)
            found.append(AlmLoss(threshold=threshold).terms(step)["span"].detach())
    torch.testing.assert_close(found[0], found[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["top", "exact"])
@pytest.mark.parametrize("threshold", [1e-9, 0.2, 0.3, 0.999999])
def test_a_chunk_goes_on_until_white_space_is_likely(
    threshold: float, kind: str, stores: dict[str, Supervision]
) -> None:
    step = step_of(stores[kind])
    spans, spaces = spans_of(step), [name in BEGINS for name in classes().names]
    data = stores["exact"].collate(range(len(stores["exact"])))
    p, q = (
        head.log_probs(hidden)[:, spaces].logsumexp(1).tolist()
        for head, hidden in ((data.output.head, data.output.hidden), (step.shared_head, step.span_hidden))  # type: ignore[union-attr]
    )
    ours, theirs = spans.log_likelihood.tolist(), target_likelihoods(step, spans).tolist()
    chunks, place = [], 0
    for count in spans.counts.tolist():
        chunk = [0.0, 0.0]
        for number in range(place, place + count):
            chunk = [chunk[0] + ours[number], chunk[1] + theirs[number]]
            if number + 1 == place + count:
                chunks.append(chunk)
            elif p[number + 1] > torch.tensor(threshold).log():
                chunks.append([chunk[0] + p[number + 1], chunk[1] + q[number + 1]])
                chunk = [0.0, 0.0]
        place += count
    ends = {1e-9: len(ours), 0.999999: len(spans.counts)}
    assert len(chunks) == ends.get(threshold, len(chunks)) and len(spans.counts) <= len(chunks) <= len(ours)
    expected = span_divergence(*torch.tensor(chunks).T, temperature=5.0).sum()
    found = AlmLoss(temperature=5.0, threshold=threshold).terms(step)["span"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_mistakes_are_one_sentence(top: Supervision, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(SemalignError, match="^threshold is 1.5, expected a probability above 0 and below 1, or None$"):
        AlmLoss(threshold=1.5)
    with pytest.raises(SemalignError, match="^ALM needs spans of two tokenizers, the supervision has one: use Output"):
        JointTrainer(target_of_one(), top, JointConfig(steps=1), loss=AlmLoss()).fit()
    warm = SupervisionSettings(temperature=2.0)
    step = step_of(make_store(tmp_path_factory.mktemp("warm") / "store", settings=warm))
    with pytest.raises(
        SemalignError, match="^the supervision is at temperature 2.0, ALM with a threshold needs 1: sup"
    ):
        AlmLoss().terms(step)
    AlmLoss(threshold=None).terms(step)
