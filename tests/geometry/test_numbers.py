"""Every public function with numbers that are not finite, under its caller's autocast, and with what is no tensor."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import semalign_geometry
import torch
from semalign_geometry import (
    ClassHead,
    Head,
    PairedResiduals,
    SemanticBasis,
    TopEntries,
    Transport,
    answer_nll,
    categorical_divergence,
    decompose,
    fit_transport,
    kl_divergence,
    linear_cka,
    linear_cka_matrix,
    measure_fidelity,
    norm_gain,
    quadratic_divergence,
    recompose,
    relation_distance,
    relation_distances,
    span_divergence,
    top_entries,
    top_k_divergence,
    unit_rows,
)
from semalign_geometry._relation import _centred_alone
from semalign_geometry.base import SemalignError
from torch import Tensor, nn
from torch.testing import assert_close

from .strategies import normal

ENTRIES, WIDTH, TOKENS = 20, 4, 6
WEIGHT = normal(0, ENTRIES, WIDTH).float()
VECTORS = normal(1, TOKENS, WIDTH).float()
OTHERS = normal(2, TOKENS, WIDTH).float()
LOGS = normal(3, TOKENS, 5).float().log_softmax(1)
HEAD = Head(WEIGHT)
BASIS = SemanticBasis.from_head(WEIGHT)
IDENTITY = Transport.identity(WIDTH)
CLASSES = ClassHead.of(HEAD, torch.arange(ENTRIES) % 7, 7)
TOP = top_entries(OTHERS, HEAD, 3)
TOP_CLASSES = top_entries(OTHERS, CLASSES, 3)
SPANS = -VECTORS[:, 1].square()
IDS = torch.arange(TOKENS)


@dataclass(frozen=True)
class Case:
    """A public function of one tensor, and its answer to a number in it that is not finite."""

    call: Callable[[Any], Tensor]
    given: Tensor = VECTORS
    answer: Literal["refused", "nan", "carried"] = "nan"
    """An error; NaN; or, for linear maps, any number that is not finite."""
    each: bool = True
    """Whether a token's result is its own, so that the others keep theirs."""
    has_minus_infinity: bool = False
    """Whether −∞ is a number like others: the logarithm of zero."""


def fidelity(source: Tensor, target: Tensor) -> Tensor:
    pairs = [PairedResiduals(1, 2, target, source)]
    report = measure_fidelity(pairs, transport=IDENTITY, within_source=IDENTITY)
    layer = report.layers[0]
    return torch.tensor([layer.recomposition_cosine, layer.cka_transported, layer.cka_direct])


def gain_of(weight: Tensor) -> Tensor:
    norm = nn.RMSNorm(WIDTH)
    norm.weight = nn.Parameter(weight[1])
    return norm_gain(norm, WIDTH)


WHOLE, ONCE = {"each": False}, {"answer": "refused", "each": False}
CASES: dict[str, Case] = {
    "Head": Case(HEAD.logits, answer="carried"),
    "ClassHead": Case(CLASSES.log_probs),
    "SemanticBasis head": Case(lambda w: SemanticBasis.from_head(w).gram, WEIGHT, **ONCE),
    "SemanticBasis gain": Case(lambda g: SemanticBasis.from_head(WEIGHT, gain=g[1]).gain, **ONCE),
    "Transport": Case(lambda r: fit_transport(BASIS, BASIS, frame="dual")(r), answer="carried"),
    "Transport cosine": Case(lambda r: fit_transport(BASIS, BASIS, frame="cosine")(r)),
    "answer_nll": Case(lambda h: answer_nll(h, HEAD, IDS)),
    "categorical_divergence p": Case(lambda p: categorical_divergence(p, LOGS), LOGS, has_minus_infinity=True),
    "categorical_divergence q": Case(lambda q: categorical_divergence(LOGS, q), LOGS, has_minus_infinity=True),
    "categorical_divergence reverse": Case(
        lambda q: categorical_divergence(LOGS, q, kind="reverse"), LOGS, has_minus_infinity=True
    ),
    "top_k_divergence target": Case(lambda h: top_k_divergence(TOP, h, HEAD)),
    "top_k_divergence target classes": Case(lambda h: top_k_divergence(TOP_CLASSES, h, CLASSES)),
    "top_k_divergence source": Case(
        lambda p: top_k_divergence(TopEntries(TOP.ids, p, TOP.tail), VECTORS, HEAD),
        TOP.log_probs,
        has_minus_infinity=True,
    ),
    "decompose": Case(lambda r: decompose(BASIS, r), answer="carried"),
    "decompose top_k": Case(lambda r: decompose(BASIS, r, top_k=3), answer="carried"),
    "decompose cosine": Case(lambda r: decompose(BASIS, r, frame="cosine")),
    "fit_transport": Case(lambda w: fit_transport(SemanticBasis.from_head(w), BASIS).matrix, WEIGHT, **ONCE),
    "linear_cka x": Case(lambda x: linear_cka(x, OTHERS), **WHOLE),
    "linear_cka y": Case(lambda y: linear_cka(OTHERS, y), **WHOLE),
    "linear_cka debiased": Case(lambda x: linear_cka(x, OTHERS, debiased=True), **WHOLE),
    "linear_cka_matrix xs": Case(lambda x: linear_cka_matrix([x], [OTHERS, VECTORS]), **WHOLE),
    "linear_cka_matrix ys": Case(lambda y: linear_cka_matrix([OTHERS, VECTORS], [y]), **WHOLE),
    "measure_fidelity source": Case(lambda x: fidelity(x, OTHERS), **ONCE),
    "measure_fidelity target": Case(lambda x: fidelity(OTHERS, x), **ONCE),
    "norm_gain": Case(gain_of, **ONCE),
    "kl_divergence source": Case(lambda h: kl_divergence(h, HEAD, OTHERS, HEAD)),
    "kl_divergence target": Case(lambda h: kl_divergence(OTHERS, HEAD, h, HEAD)),
    "kl_divergence source classes": Case(lambda h: kl_divergence(h, CLASSES, OTHERS, CLASSES)),
    "kl_divergence target classes": Case(lambda h: kl_divergence(OTHERS, CLASSES, h, CLASSES)),
    "quadratic_divergence target": Case(lambda z: quadratic_divergence(z, OTHERS, HEAD)),
    "quadratic_divergence reference": Case(lambda z: quadratic_divergence(OTHERS, z, HEAD)),
    "recompose": Case(lambda a: recompose(BASIS, a), normal(4, TOKENS, ENTRIES).float(), answer="carried"),
    "relation_distance target": Case(lambda x: relation_distance(x, OTHERS), **WHOLE),
    "relation_distance reference": Case(lambda y: relation_distance(OTHERS, y), **WHOLE),
    "relation_distance features": Case(lambda x: relation_distance(x, OTHERS, route="feature"), **WHOLE),
    "relation_distances": Case(lambda x: relation_distances(x, OTHERS)[0], **WHOLE),
    "span_divergence source": Case(
        lambda x: span_divergence(x[:, 0], SPANS), -VECTORS.square(), has_minus_infinity=True
    ),
    "span_divergence target": Case(
        lambda x: span_divergence(SPANS, x[:, 0]), -VECTORS.square(), has_minus_infinity=True
    ),
    "top_entries": Case(lambda h: top_entries(h, HEAD, 3).log_probs[:, 0]),
    "unit_rows": Case(unit_rows),
}
WITHOUT_NUMBERS = {
    *("BasisManifest", "Divergence", "FidelityReport", "Frame", "LayerFidelity", "PairedResiduals"),
    *("SharedVocabulary", "TopEntries", "TransportManifest", "accumulation_dtype", "align_vocabularies"),
    *("OutputHead", "Vocabulary", "VocabularyClasses", "align_classes"),
    *("COARSE", "FRAMES", "KNOWN_FRAMES", "LEAST_TOKENS", "decoder_of", "final_norm"),
}
"""Names that compute nothing: types, constants, and parts of a model."""
every_case = pytest.mark.parametrize("name", list(CASES))


def test_no_public_name_is_forgotten() -> None:
    assert {name.split()[0] for name in CASES} | WITHOUT_NUMBERS == set(semalign_geometry.__all__)


@every_case
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_or_come_out_as_nan(name: str, value: float) -> None:
    case = CASES[name]
    if case.has_minus_infinity and value == -math.inf:
        return
    damaged = case.given.clone()
    damaged[1, 0] = value
    if case.answer == "refused":
        with pytest.raises(SemalignError, match="finite"):
            case.call(damaged)
        return
    found = case.call(damaged)
    its_own = found[1] if case.each else found
    broken = its_own.isnan().all() if case.answer == "nan" else ~its_own.isfinite().all()
    assert broken, f"{value} reads as {its_own}"
    if case.each:
        assert_close(found[[0, 2, 3, 4, 5]], case.call(case.given)[[0, 2, 3, 4, 5]])


CONSTANT = {
    *(
        "top_k_divergence source",
        "kl_divergence source",
        "kl_divergence source classes",
        "quadratic_divergence reference",
    ),
    *("span_divergence source", "top_entries"),
}
LOSSES = [name for name in CASES if CASES[name].answer == "nan" and name not in CONSTANT and "categorical" not in name]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_has_a_gradient_that_a_guard_sees(name: str, value: float) -> None:
    damaged = CASES[name].given.clone()
    damaged[1, 0] = value
    CASES[name].call(damaged.requires_grad_()).sum().backward()
    assert damaged.grad is not None and not damaged.grad.isfinite().all()


def test_an_overflow_in_half_precision_is_no_similarity_of_zero() -> None:
    halves = (1e5 * VECTORS).half()
    assert halves.isinf().any()
    assert linear_cka(halves, OTHERS).isnan()
    assert linear_cka_matrix([halves, VECTORS], [OTHERS]).isnan().tolist() == [[True], [False]]
    assert relation_distance(halves, OTHERS).isnan()
    pair, mask = torch.stack([halves, VECTORS.half()]), torch.ones(2, TOKENS, dtype=torch.bool)
    distances, _ = relation_distances(pair, torch.stack([OTHERS, OTHERS]), mask=mask)
    assert distances.isnan().tolist() == [True, False]
    mask[0, 2:] = False  # a sequence that is too short to count
    assert relation_distance(pair, torch.stack([OTHERS, OTHERS]), mask=mask).isnan() == halves[:2].isinf().any()


def test_a_matrix_that_its_dtype_cannot_hold_is_refused() -> None:
    small, large = (SemanticBasis.from_head(scale * WEIGHT) for scale in (1e-25, 1e25))
    with pytest.raises(SemalignError, match="transport by dual is not finite: the two heads differ too much in size"):
        fit_transport(large, small, frame="dual")
    assert_close(fit_transport(large, small).matrix, torch.eye(WIDTH))


@every_case
def test_a_caller_s_autocast_changes_nothing(name: str) -> None:
    case = CASES[name]
    expected = case.call(case.given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = case.call(case.given)
    assert found.dtype == expected.dtype
    assert_close(found, expected, rtol=0, atol=0)


INSIDE = (
    "SemanticBasis gain",
    "span_divergence",
    "top_k_divergence source",
    "measure_fidelity",
    "norm_gain",
    "linear_cka_matrix",
)


@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith(INSIDE)])
def test_what_is_no_tensor_is_refused_in_one_sentence(name: str) -> None:
    for given in (CASES[name].given.numpy(), CASES[name].given.tolist()):
        with pytest.raises(SemalignError, match=r"expected a floating-point tensor of shape .*: pass torch.as_tensor"):
            CASES[name].call(given)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: _centred_alone(VECTORS.numpy()), r"representation is of type ndarray, .* \(n, d\): pass torch"),
        (
            lambda: SemanticBasis.from_head(nn.Linear(4, 9)),
            r"weight is of type Linear, .* \(rows, d\): pass its .weight",
        ),
        (lambda: SemanticBasis.from_head(WEIGHT[0]), r"weight is a tensor of float32 of shape \(4,\), expected"),
        (
            lambda: SemanticBasis.from_head(WEIGHT, entries=[1, 2]),
            r"entries is of type list, expected an integer tensor",
        ),
        (
            lambda: SemanticBasis.from_head(WEIGHT.T),
            r"4 rows and 20 columns, .* pass weight.T, or entries=torch.arange",
        ),
        (lambda: SemanticBasis.from_model(WEIGHT), "model is a tensor of float32 .*, expected a Module"),
        (
            lambda: fit_transport(WEIGHT, WEIGHT),
            "source is .* expected a SemanticBasis: make one with SemanticBasis.from_model or SemanticBasis.from_head",
        ),
        (lambda: answer_nll(VECTORS, WEIGHT, IDS), "head is .* expected a Head: make one with Head.from_model"),
        (
            lambda: Head.__post_init__(SimpleNamespace(weight=nn.Linear(4, 9), bias=None)),
            "weight is of type Linear, .*: pass its .weight",
        ),
        (lambda: relation_distance(VECTORS, OTHERS, mask=[True] * TOKENS), "mask is of type list, .* a boolean tensor"),
    ],
)
def test_what_is_something_else_is_refused_with_the_remedy(call: Callable[[], object], words: str) -> None:
    with pytest.raises(SemalignError, match=words):
        call()


def test_a_small_vocabulary_has_a_basis_where_its_rows_are_named() -> None:
    basis = SemanticBasis.from_head(WEIGHT.T, entries=torch.arange(WIDTH))
    assert (basis.manifest.rank, basis.manifest.width) == (WIDTH, ENTRIES)
