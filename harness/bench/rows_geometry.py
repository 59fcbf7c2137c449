"""Rows of geometry: the semantic basis, fitting a transport, transporting tokens, relations and CKA.

Shape suffixes: N tokens, V vocabulary entries, S source width, T target width, D either.
"""

import torch
from meter import Meter
from semalign_geometry import (
    SemanticBasis,
    decompose,
    fit_transport,
    linear_cka,
    recompose,
    relation_distances,
)
from torch import Tensor

STRIDE = 1999
"""Every so many columns of a basis are compared."""


def basis_ours(meter: Meter, *, entries: int, width: int) -> dict[str, Tensor]:
    """Fit the basis and stream over all its columns."""
    head_VD = _normal(meter, 0, entries, width, scale=width**-0.5)
    kept = []
    with meter.both():
        basis = SemanticBasis.from_head(head_VD)
        start = 0
        for part_DW in basis.columns():
            kept.append(part_DW[:, -start % STRIDE :: STRIDE].clone())
            start += part_DW.shape[1]
    return {"columns": torch.cat(kept, 1)}


def basis_peer(meter: Meter, *, entries: int, width: int) -> dict[str, Tensor]:
    """All columns at once, by singular value decomposition."""
    head_VD = _normal(meter, 0, entries, width, scale=width**-0.5)
    with meter.both():
        columns_DV = torch.linalg.pinv(head_VD)
    return {"columns": columns_DV[:, ::STRIDE]}


def basis_bound(meter: Meter, *, entries: int, width: int) -> None:
    """The two products that no basis can do without: (d, v) × (v, d) and (d, d) × (d, v)."""
    head_VD = _normal(meter, 0, entries, width, scale=width**-0.5)
    with meter.both():
        gram_DD = head_VD.T @ head_VD
        gram_DD @ head_VD.T


def transport_ours(meter: Meter, *, entries: int, source_width: int, target_width: int) -> dict[str, Tensor]:
    """Two bases and the transport, from two heads."""
    source_VS, target_VT = _heads(meter, entries, source_width, target_width)
    with meter.both():
        transport = fit_transport(SemanticBasis.from_head(source_VS), SemanticBasis.from_head(target_VT))
    return {"matrix": transport.matrix}


def transport_peer(meter: Meter, *, entries: int, source_width: int, target_width: int) -> dict[str, Tensor]:
    """Two pseudo-inverses B and one product; F = (B Bᵀ)^(−½) B makes the frames tight, so M = F_T F_Sᵀ."""
    source_VS, target_VT = _heads(meter, entries, source_width, target_width)
    with meter.both():
        source_SV, target_TV = torch.linalg.pinv(source_VS), torch.linalg.pinv(target_VT)
        cross_TS = target_TV @ source_SV.T
        matrix_TS = _inverse_root(target_TV @ target_TV.T) @ cross_TS @ _inverse_root(source_SV @ source_SV.T)
    return {"matrix": matrix_TS}


def tokens_ours(meter: Meter, *, entries: int, source_width: int, target_width: int, tokens: int) -> dict[str, Tensor]:
    """One product for each token."""
    source_VS, target_VT = _heads(meter, entries, source_width, target_width)
    transport = fit_transport(SemanticBasis.from_head(source_VS), SemanticBasis.from_head(target_VT))
    vectors_NS = _normal(meter, 2, tokens, source_width)
    with meter.both():
        transported_NT = transport(vectors_NS)
    return {"transported": transported_NT}


def tokens_peer(meter: Meter, *, entries: int, source_width: int, target_width: int, tokens: int) -> dict[str, Tensor]:
    """One coefficient for each token and vocabulary entry."""
    source_VS, target_VT = _heads(meter, entries, source_width, target_width)
    source, target = SemanticBasis.from_head(source_VS), SemanticBasis.from_head(target_VT)
    vectors_NS = _normal(meter, 2, tokens, source_width)
    with meter.both():
        transported_NT = recompose(target, decompose(source, vectors_NS))
    return {"transported": transported_NT}


def relation_ours(meter: Meter, *, tokens: int, width: int) -> dict[str, Tensor]:
    """Whichever route is cheaper, forward and backward."""
    target_ND, reference_ND = _sides(meter, tokens, width, width)
    target_ND.requires_grad_(True)
    with meter.both():
        distances, _ = relation_distances(target_ND[None], reference_ND[None])
        distances.sum().backward()
    assert target_ND.grad is not None
    return {"distance": distances, "gradient": target_ND.grad}


def relation_peer(meter: Meter, *, tokens: int, width: int) -> dict[str, Tensor]:
    """The formula as it stands, on n×n Gram matrices, forward and backward.

    It is compared in float64: in float32 its sums over n² numbers are off by 1e-2 at 8,192 tokens.
    """
    target_ND, reference_ND = _sides(meter, tokens, width, width)
    target_ND.requires_grad_(True)
    with meter.both():
        _token_space_distance(target_ND, reference_ND).backward()
    exact_ND = target_ND.detach().double().requires_grad_(True)
    distance = _token_space_distance(exact_ND, reference_ND.double())
    distance.backward()
    assert exact_ND.grad is not None
    return {"distance": distance[None], "gradient": exact_ND.grad}


def cka_ours(
    meter: Meter, *, tokens: int, target_width: int, source_width: int, dtype: str | None = None
) -> dict[str, Tensor]:
    """Linear CKA, forward only."""
    target_ND, source_ND = _sides(meter, tokens, target_width, source_width, dtype)
    with meter.both():
        value = linear_cka(target_ND, source_ND)
    return {"cka": value[None]}


def cka_peer(
    meter: Meter, *, tokens: int, target_width: int, source_width: int, dtype: str | None = None
) -> dict[str, Tensor]:
    """Linear CKA of the public package, which always computes in float64."""
    from ckatorch import cka_base

    target_ND, source_ND = _sides(meter, tokens, target_width, source_width, dtype)
    with meter.both():
        value = cka_base(target_ND, source_ND, kernel="linear")
    return {"cka": value[None]}


def _normal(meter: Meter, seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    """Gaussian numbers, drawn on the CPU, so that every device gets the same."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)
    return values.to(meter.device, meter.dtype)


def _heads(meter: Meter, entries: int, source_width: int, target_width: int) -> tuple[Tensor, Tensor]:
    """Two heads that share half of what they say."""
    target_VT = _normal(meter, 0, entries, target_width, scale=target_width**-0.5)
    source_VS = _normal(meter, 1, entries, source_width, scale=source_width**-0.5)
    source_VS[:, :target_width] += target_VT
    return source_VS, target_VT


def _sides(
    meter: Meter, tokens: int, target_width: int, reference_width: int, dtype: str | None = None
) -> tuple[Tensor, Tensor]:
    """Two sets of vectors of the same tokens that share half of their variance."""
    target_ND, reference_ND = _normal(meter, 0, tokens, target_width), _normal(meter, 1, tokens, reference_width)
    reference_ND[:, :target_width] += target_ND
    own = meter.dtype if dtype is None else getattr(torch, dtype)
    return target_ND.to(own), reference_ND.to(own)


def _token_space_distance(target_ND: Tensor, reference_ND: Tensor) -> Tensor:
    """½‖K/‖K‖ − L/‖L‖‖², K and L the centred Gram matrices."""
    x_ND, y_ND = target_ND - target_ND.mean(0), reference_ND - reference_ND.mean(0)
    k_NN, l_NN = x_ND @ x_ND.T, y_ND @ y_ND.T
    distance: Tensor = (k_NN / k_NN.norm() - l_NN / l_NN.norm()).square().sum() / 2
    return distance


def _inverse_root(matrix_DD: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix_DD)
    root_DD: Tensor = (vectors * eigenvalues.rsqrt()) @ vectors.T
    return root_DD
