"""Laws of frames, transports and their fidelity."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from semalign_geometry import (
    Frame,
    PairedResiduals,
    SemanticBasis,
    Transport,
    decompose,
    fit_transport,
    linear_cka,
    measure_fidelity,
    recompose,
)
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.testing import assert_close

from .strategies import (
    condition_number,
    conditioned,
    elementwise,
    frames,
    from_svd,
    gains,
    heads,
    matrices,
    normal,
    rotation,
    seeds,
    tall_heads,
)

EPS = torch.finfo(torch.float64).eps
exact = pytest.mark.parametrize("frame", ["dual", "parseval"])


def tolerance(*readouts: Tensor) -> float:
    """Rounding of a product of Gram powers."""
    return 1e3 * max(max(w.shape) for w in readouts) * EPS * max(condition_number(w) for w in readouts) ** 2


@st.composite
def pairs(draw: st.DrawFn) -> tuple[SemanticBasis, SemanticBasis]:
    """Bases of two widths on the same entries, with gains, element-wise or conditioned."""
    entries = draw(st.integers(4, 10))
    bases = []
    for _ in range(2):
        width = draw(st.integers(1, 4))
        w = draw(st.one_of(elementwise(entries, width), conditioned(entries, width, 30)))
        bases.append(SemanticBasis.from_head(w, gain=draw(gains(width))))
    return bases[0], bases[1]


@exact
@given(w=heads(), data=st.data())
def test_exact_frames_are_the_projection_on_the_row_space(frame: str, w: Tensor, data: st.DataObject) -> None:
    gain = data.draw(gains(w.shape[1]))
    fold = data.draw(st.booleans())
    basis = SemanticBasis.from_head(w, gain=gain)
    readout = w * gain if fold else w
    projection = torch.linalg.pinv(readout, rtol=1e-7) @ readout
    matrix = fit_transport(basis, basis, frame=frame, fold_gain=fold).matrix
    assert_close(matrix, projection, rtol=0, atol=tolerance(readout))


@exact
@given(w=tall_heads(), seed=seeds)
def test_exact_frames_are_the_identity_on_full_rank(frame: str, w: Tensor, seed: int) -> None:
    basis = SemanticBasis.from_head(w)
    r = normal(seed, 3, w.shape[1])
    transport = fit_transport(basis, basis, frame=frame)
    assert_close(transport(r), r, rtol=0, atol=tolerance(w) * float(r.norm()))
    explicit = recompose(basis, decompose(basis, r, frame=frame), frame=frame)
    assert_close(explicit, r, rtol=0, atol=tolerance(w) * float(r.norm()))


@exact
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(seed=seeds, condition=st.sampled_from([1.0, 10.0, 1e4]))
def test_exact_frames_of_narrow_heads(frame: str, dtype: torch.dtype, seed: int, condition: float) -> None:
    basis = SemanticBasis.from_head(from_svd(seed, 40, 4, condition).to(dtype))
    transport = fit_transport(basis, basis, frame=frame)
    assert transport.matrix.dtype == torch.float32
    # float32 products stay in use up to a relative error of about 1e-3.
    assert_close(transport.matrix, torch.eye(4), rtol=0, atol=1e-2 if basis.dtype == torch.float32 else 1e-5)


@given(tall_heads())
def test_cosine_is_not_the_identity(w: Tensor) -> None:
    basis = SemanticBasis.from_head(w)
    matrix = fit_transport(basis, basis, frame="cosine").matrix
    # B̂ has v unit columns, so that the trace of B̂B̂ᵀ is v where the identity has d.
    assert_close(matrix.trace(), torch.tensor(float(len(w)), dtype=torch.float64))
    assert not torch.allclose(matrix, torch.eye(w.shape[1], dtype=torch.float64), atol=1e-3)


@given(tall_heads(), seeds)
def test_cosine_is_the_paper_s_formula(w: Tensor, seed: int) -> None:
    basis = SemanticBasis.from_head(w)
    b = torch.linalg.pinv(w)
    unit = b / b.norm(dim=0)
    r = normal(seed, 3, w.shape[1])
    expected = (r / r.norm(dim=1, keepdim=True)) @ unit
    coefficients = decompose(basis, r, frame="cosine")
    assert_close(coefficients, expected, rtol=0, atol=tolerance(w))
    assert coefficients.abs().max() <= 1 + 1e-9
    assert_close(recompose(basis, expected, frame="cosine"), expected @ unit.T, rtol=0, atol=len(w) * tolerance(w))


@given(tall_heads(), seeds)
def test_dual_coefficients_are_logits_and_parseval_keeps_lengths(w: Tensor, seed: int) -> None:
    basis = SemanticBasis.from_head(w)
    r = normal(seed, 3, w.shape[1])
    assert_close(decompose(basis, r, frame="dual"), r @ w.T)
    parseval = decompose(basis, r, frame="parseval")
    assert_close(parseval.norm(dim=1), r.norm(dim=1), rtol=tolerance(w), atol=0)


@given(pairs(), st.booleans())
def test_parseval_back_is_the_transpose_and_contracts(bases: tuple[SemanticBasis, SemanticBasis], fold: bool) -> None:
    there = fit_transport(*bases, frame="parseval", fold_gain=fold).matrix
    back = fit_transport(*reversed(bases), frame="parseval", fold_gain=fold).matrix
    slack = tolerance(*(basis.weight * basis.gain if fold else basis.weight for basis in bases))
    assert_close(back, there.T, rtol=0, atol=slack)
    assert float(torch.linalg.matrix_norm(there, 2)) <= 1 + slack


@given(pairs(), frames(), st.booleans(), seeds)
def test_collapsed_transport_is_the_explicit_route(
    bases: tuple[SemanticBasis, SemanticBasis], frame: str | Frame, fold: bool, seed: int
) -> None:
    source, target = bases
    r = normal(seed, 3, source.manifest.width)
    r[0] = 0
    transport = fit_transport(source, target, frame=frame, fold_gain=fold)
    explicit = recompose(target, decompose(source, r, frame=frame, fold_gain=fold), frame=frame, fold_gain=fold)
    assert torch.isfinite(explicit).all()
    size = max(1.0, float(explicit.norm()), float(transport.matrix.norm()))
    assert_close(transport(r), explicit, rtol=1e-6, atol=1e-7 * size)


def nearly_dependent(seed: int, width: int, apart: float) -> Tensor:
    """A head whose last column is its first one but for a part in 1/`apart`."""
    w = normal(seed, 60, width)
    w[:, -1] = w[:, 0] + apart * w[:, -1]
    return w


each_frame = pytest.mark.parametrize("frame", ["cosine", "dual", "parseval"])


@each_frame
@pytest.mark.parametrize("apart", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_the_explicit_route_keeps_the_digits_of_the_collapsed_one(frame: str, apart: float) -> None:
    """The float64 that a basis needs is that of its coefficients too."""
    heads = [nearly_dependent(seed, width, apart).float() for seed, width in ((1, 6), (2, 4))]
    source, target = (SemanticBasis.from_head(w) for w in heads)
    r = normal(3, 5, 6).float()
    explicit = recompose(target, decompose(source, r, frame=frame), frame=frame)
    collapsed = fit_transport(source, target, frame=frame)(r)
    eps = torch.finfo(torch.float32).eps * (1 if source.dtype == torch.float64 else source.manifest.condition)
    slack = 10 * (eps + max(source.rounding(), target.rounding()))
    assert float((explicit - collapsed).norm() / explicit.norm()) < slack


@pytest.mark.parametrize("apart", [1e-3, 1e-5])
def test_cosine_loses_few_digits_to_nearly_dependent_columns(apart: float) -> None:
    heads = [nearly_dependent(seed, width, apart) for seed, width in ((1, 6), (2, 4))]
    unit = []
    for w in heads:
        q, upper = torch.linalg.qr(w)  # the pseudo-inverse without a Gram matrix, whose condition number is a square
        columns = torch.linalg.solve_triangular(upper, q.T, upper=True)
        unit.append(columns / columns.norm(dim=0))
    matrix = fit_transport(*(SemanticBasis.from_head(w) for w in heads), frame="cosine").matrix
    expected = unit[1] @ unit[0].T
    assert float((matrix - expected).norm() / expected.norm()) < 1e-13 / apart**1.2


def test_nearly_dependent_columns_are_named(caplog: pytest.LogCaptureFixture) -> None:
    plain, close, closer = (SemanticBasis.from_head(nearly_dependent(1, 6, apart)) for apart in (1e-2, 1e-4, 1e-5))
    fit_transport(plain, close)
    fit_transport(closer, plain, frame="cosine")
    assert not caplog.messages
    fit_transport(plain, closer)
    (message,) = caplog.messages
    assert message == (
        "the columns of the target's head are nearly dependent (condition number of WᵀW about 5e+10): rounding changes "
        "the parseval transport by about one part in 1e+05"
    )
    gain = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1e5])
    folded = SemanticBasis.from_head(normal(1, 60, 6), gain=gain)
    fit_transport(folded, folded)
    assert len(caplog.messages) == 1
    fit_transport(folded, folded, fold_gain=True)
    assert len(caplog.messages) == 3 and folded.rounding(fold_gain=True) > 1e3 * folded.rounding()


def test_a_head_that_does_not_read_every_direction_is_named(caplog: pytest.LogCaptureFixture) -> None:
    w = normal(0, 9, 3)
    basis = SemanticBasis.from_head(torch.cat([w, w[:, :1]], 1))
    fit_transport(basis, SemanticBasis.from_head(w))
    assert caplog.messages == [
        "the source's head has rank 3 of 4 over the shared entries: the transport drops what it cannot read"
    ]
    assert basis.rounding() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(w=elementwise(7, 3), seed=seeds, frame=frames())
def test_zero_rows_and_narrow_vectors_stay_finite(dtype: torch.dtype, w: Tensor, seed: int, frame: str | Frame) -> None:
    """Unused entries are zero rows in some checkpoints; a deficient head reads in float64 in any case."""
    w = torch.cat([w, torch.zeros(1, 3, dtype=torch.float64)]).to(dtype)
    basis = SemanticBasis.from_head(w)
    r = normal(seed, 2, 3).float()
    coefficients = decompose(basis, r, frame=frame)
    assert coefficients.dtype == basis.dtype
    assert torch.isfinite(coefficients).all()
    assert not coefficients[:, -1].any()
    assert torch.isfinite(recompose(basis, coefficients, frame=frame)).all()
    assert torch.isfinite(fit_transport(basis, basis, frame=frame).matrix).all()


@given(pairs(), frames(), st.integers(1, 11), st.data())
def test_chunks_and_entry_order_change_nothing(
    bases: tuple[SemanticBasis, SemanticBasis], frame: str | Frame, chunk: int, data: st.DataObject
) -> None:
    source, target = bases
    expected = fit_transport(source, target, frame=frame).matrix
    order = torch.tensor(data.draw(st.permutations(range(source.manifest.entries))))
    permuted = [SemanticBasis.from_head(b.weight, entries=order, chunk=chunk) for b in bases]
    read = decompose(source, torch.eye(source.manifest.width, dtype=torch.float64), frame=frame)
    written = recompose(target, torch.eye(target.manifest.entries, dtype=torch.float64), frame=frame)
    terms = float((read.norm(dim=0) * written.norm(dim=1)).sum())  # the sum over entries may cancel; its terms do not
    assert_close(fit_transport(*bases, frame=frame, chunk=chunk).matrix, expected, rtol=1e-9, atol=1e-9 * terms + 1e-30)
    assert_close(
        fit_transport(*permuted, frame=frame, chunk=chunk).matrix,
        expected,
        rtol=1e-6,
        atol=1e-6 * terms + 1e-30,
    )


@given(matrices(9, 3), seeds, st.integers(1, 10), frames())
def test_top_k_keeps_the_largest(w: Tensor, seed: int, k: int, frame: str | Frame) -> None:
    basis = SemanticBasis.from_head(w)
    r = normal(seed, 4, 3)
    dense, sparse = decompose(basis, r, frame=frame), decompose(basis, r, frame=frame, top_k=k)
    if k >= 9:
        assert_close(sparse, dense, rtol=0, atol=0)
    kept = sparse != 0
    assert_close(sparse[kept], dense[kept], rtol=0, atol=0)
    assert int(kept.sum(1).max()) <= k
    # The same sizes as a dense top-k, ties in any order.
    sizes = dense.abs().sort(dim=1, descending=True).values[:, :k]
    assert_close(sparse.abs().sort(dim=1, descending=True).values[:, :k], sizes, rtol=0, atol=0)


def test_misuse_is_refused_with_the_numbers() -> None:
    five, six = SemanticBasis.from_head(normal(0, 5, 2)), SemanticBasis.from_head(normal(0, 6, 3))
    with pytest.raises(SemalignError, match="source basis has 5 entries, the target basis 6"):
        fit_transport(five, six)
    with pytest.raises(SemalignError, match="5 coefficients for a basis of 6 entries"):
        recompose(six, normal(0, 1, 5))
    with pytest.raises(SemalignError, match="width 2, got 3: pass vectors of its source"):
        fit_transport(five, five)(normal(0, 1, 3))
    with pytest.raises(SemalignError, match="top_k is 0"):
        decompose(five, normal(0, 1, 2), top_k=0)
    with pytest.raises(SemalignError, match="unknown frame 'dula': choose one of cosine, dual, parseval"):
        fit_transport(five, five, frame="dula")
    with pytest.raises(SemalignError, match="fold_gain"):
        fit_transport(five, five, fold_gain=True)


@given(seeds, st.integers(1, 5), st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_identity_leaves_vectors_alone(seed: int, width: int, dtype: torch.dtype) -> None:
    r = normal(seed, 2, 3, width).to(dtype)
    moved = Transport.identity(width)(r)
    assert moved.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(moved, r.to(moved.dtype), rtol=0, atol=0)


@given(tall_heads(), frames(), seeds, st.floats(1e-3, 1e3))
def test_unit_frames_forget_length_and_others_are_linear(
    w: Tensor, frame: str | Frame, seed: int, scale: float
) -> None:
    basis = SemanticBasis.from_head(w)
    transport = fit_transport(basis, basis, frame=frame)
    r = normal(seed, 2, 3, w.shape[1])
    factor = 1.0 if transport.manifest.unit_tokens else scale
    terms = float(transport.matrix.norm() * r.norm())
    assert_close(transport(scale * r), factor * transport(r), rtol=1e-9, atol=1e-12 * factor * terms)
    flat = transport(r.reshape(6, -1)).reshape(2, 3, -1)
    assert_close(transport(r), flat, rtol=1e-9, atol=1e-12 * terms)


@given(pairs(), frames(), st.booleans())
def test_save_and_load(bases: tuple[SemanticBasis, SemanticBasis], frame: str | Frame, fold: bool) -> None:
    transport = fit_transport(*bases, frame=frame, fold_gain=fold)
    with TemporaryDirectory() as folder:
        saved = transport.save(Path(folder) / "transport")
        loaded = Transport.load(Path(folder) / "transport")
    assert loaded.manifest == saved.manifest
    assert loaded.manifest.model_copy(update={"files": {}}) == transport.manifest
    assert loaded.manifest.fold_gain == fold
    assert (loaded.manifest.source_width, loaded.manifest.target_width) == tuple(b.manifest.width for b in bases)
    assert loaded.manifest.entries == bases[0].manifest.entries
    assert loaded.matrix.dtype == transport.matrix.dtype
    assert_close(loaded.matrix, transport.matrix, rtol=0, atol=0)


@exact
@given(w=tall_heads(), seed=seeds, fold=st.booleans())
def test_fidelity_within_the_source_is_one(frame: str, w: Tensor, seed: int, fold: bool) -> None:
    basis = SemanticBasis.from_head(w, gain=torch.linspace(0.5, 2, w.shape[1], dtype=torch.float64))
    same = fit_transport(basis, basis, frame=frame, fold_gain=fold)
    r = normal(seed, 5, w.shape[1])
    layers = (PairedResiduals(k, 2 * k, r @ rotation(seed, w.shape[1]), r) for k in (1, 2))
    report = measure_fidelity(layers, transport=same, within_source=same)
    assert (report.frame, report.fold_gain, report.tokens) == (frame, fold, 5)
    assert [(layer.target_layer, layer.source_layer) for layer in report.layers] == [(1, 2), (2, 4)]
    for layer in report.layers:
        assert layer.recomposition_cosine == pytest.approx(1, abs=1e-4)
        assert layer.cka_direct == pytest.approx(1, abs=1e-4)
        assert layer.cka_transported == pytest.approx(1, abs=1e-4)
    assert report.mean_cka_transported == pytest.approx(1, abs=1e-4)


@given(pairs(), frames(), seeds)
def test_fidelity_reports_the_cka_of_each_layer(
    bases: tuple[SemanticBasis, SemanticBasis], frame: str | Frame, seed: int
) -> None:
    source, target = bases
    transport = fit_transport(source, target, frame=frame)
    x, r = normal(seed, 5, target.manifest.width), normal(seed + 1, 5, source.manifest.width)
    report = measure_fidelity(
        [PairedResiduals(1, 1, x, r)],
        transport=transport,
        within_source=fit_transport(source, source, frame=frame),
    )
    (layer,) = report.layers
    assert layer.cka_direct == pytest.approx(float(linear_cka(x, r)), abs=1e-3)
    assert layer.cka_transported == pytest.approx(float(linear_cka(x.float(), transport(r.float()))), abs=1e-6)


@pytest.mark.parametrize("frame", ["cosine", "dual"])
def test_fidelity_is_the_mean_cosine_and_the_cka_written_out(frame: str) -> None:
    source, target = (SemanticBasis.from_head(normal(seed, 9, width)) for seed, width in ((0, 4), (1, 3)))
    transport, within = fit_transport(source, target, frame=frame), fit_transport(source, source, frame="cosine")
    x, r = normal(2, 6, 3).requires_grad_(), normal(3, 6, 4).requires_grad_()
    shallow = PairedResiduals(1, 3, x, r)
    report = measure_fidelity([shallow, PairedResiduals(2, 4, 2 * x + 1, r)], transport=transport, within_source=within)
    assert (report.frame, report.fold_gain, report.tokens) == (frame, False, 6)
    with torch.no_grad():
        recomposed = within(r)
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(recomposed, r, strict=True)]
        assert min(cosines) < max(cosines) < 0.999
        for layer in report.layers:
            assert layer.recomposition_cosine == pytest.approx(sum(cosines) / 6, abs=1e-4)
            assert layer.cka_transported == pytest.approx(float(linear_cka(x, transport(r))), abs=1e-4)
            assert layer.cka_direct == pytest.approx(float(linear_cka(x, r)), abs=1e-4)
    assert report.mean_cka_transported == pytest.approx(report.layers[0].cka_transported, abs=1e-4)
    assert abs(report.layers[0].cka_transported - report.layers[0].cka_direct) > 1e-3


def test_a_report_without_layers_has_a_mean_of_zero() -> None:
    identity = Transport.identity(2)
    report = measure_fidelity([], transport=identity, within_source=identity)
    assert (report.mean_cka_transported, report.tokens, report.layers, report.frame) == (0, 0, (), "none")


def test_vectors_of_another_width_are_refused() -> None:
    basis = SemanticBasis.from_head(normal(0, 9, 4))
    with pytest.raises(SemalignError, match="vectors of width 3 for a basis of width 4: decompose on the basis of"):
        decompose(basis, normal(1, 2, 3))


def test_a_transport_shows_no_tensor() -> None:
    assert repr(Transport.identity(8)).startswith("Transport(matrix=<float32 8×8>, manifest=TransportManifest(")
