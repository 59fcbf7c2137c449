"""Relation geometry: the centred token-token Gram matrices of two sets of vectors, and how far apart they are.

Shape suffixes: B sequences, N tokens, M pairs of tokens, D and E the widths of the two sides, X and Y how many
representations they have.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from ._head import accumulation_dtype, full_precision, least_size
from .base import SemalignError, checked

Route = Literal["auto", "token", "feature"]
"""Sum over token pairs (n×n) or over feature pairs (d×d): the same value; `auto` takes the cheaper."""

LEAST_TOKENS = 3
"""Tokens from which relations can differ: those of two that vary are all equal."""

HELD = 2**22
"""Entries of the relation matrices in memory at a time when all pairs are compared; 16 MiB in float32."""


@checked
def relation_distance(
    target: Float[Tensor, "*b n d"],
    reference: Float[Tensor, "*b n e"],
    *,
    mask: Bool[Tensor, "*b n"] | None = None,
    route: Route = "auto",
) -> Float[Tensor, ""]:
    """Mean over sequences of L_geo = ½‖K/‖K‖ − L/‖L‖‖², K = X_c X_cᵀ and L = Y_c Y_cᵀ, the centred relations.

    Laws: in [0, 1]; 0 for equal relations; symmetric; unchanged by rotating, translating or scaling either side and by
    reordering tokens; equal to 1 − CKA. Defined everywhere: a side without variance has K/‖K‖ = 0, so the distance is 0
    when neither varies and ½ when one does. All relations of two tokens are equal, so sequences with fewer than three
    are left out of the mean, and a batch without any other sequence has distance 0. Gradients are finite in each case.
    A side that varies by less than `least_size` (1e-31 in float32) counts as one without variance. A value that is not
    finite in a counted token makes the distance NaN; masked tokens may hold anything.

    Args:
        target: (n, d) or (b, n, d) vectors.
        reference: (n, e) or (b, n, e) vectors of the same tokens, of any width.
        mask: True for the tokens that count; None counts all.
        route: how the sums are taken.

    Returns:
        Scalar, accumulated in float32 (float64 for float64 input).

    Raises:
        SemalignError: the two sides have different tokens, or the mask is not one truth value for each.

    Example:
        >>> import torch
        >>> vectors, rotation = torch.randn(10, 4), torch.linalg.qr(torch.randn(4, 4)).Q
        >>> round(float(relation_distance(3 * vectors @ rotation + 1, vectors)), 4)
        0.0
        >>> float(relation_distance(torch.zeros(10, 7), vectors))
        0.5

    Source: v2, reading (method 2.4); definitions at n < 3 and zero variance ours.
    """
    distances, counted = relation_distances(target, reference, mask=mask, route=route)
    return (distances * counted).sum() / counted.sum().clamp_min(1)


@checked
@full_precision
def relation_distances(
    target: Float[Tensor, "*b n d"],
    reference: Float[Tensor, "*b n e"],
    *,
    mask: Bool[Tensor, "*b n"] | None = None,
    route: Route = "auto",
) -> tuple[Float[Tensor, " s"], Bool[Tensor, " s"]]:
    """`relation_distance` of each sequence, and which of them have three tokens or more.

    A sequence with a counted value that is not finite has the distance NaN; the others keep theirs.

    The arguments and errors are those of `relation_distance`.

    Returns:
        (s,) distances, float32 (float64 for float64 input), and (s,) truth values.
    """
    similarities, target_squares, reference_squares, counted = _alignments(target, reference, mask, route)
    # ½‖K̂ − L̂‖² with ‖K̂‖² either 1 or, without variance, 0.
    distances = (target_squares + reference_squares) / 2 - similarities
    return distances.clamp(0, 1), counted


@checked
@full_precision
def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], *, debiased: bool = False) -> Float[Tensor, ""]:
    """Linear centred kernel alignment ⟨K, L⟩ / (‖K‖‖L‖) of two representations of the same n tokens, in [0, 1].

    0 when either side has no variance, 1 for any two tokens that vary; NaN when a value is not finite. float32 (float64
    for float64 input).

    Few tokens of many features look alike: two random representations of 500 tokens and width 64 have a CKA of about
    0.11. The debiased one leaves each token's relation with itself out of K and L, so that its mean over all orders of
    the tokens of one side is 0. It lies in [−1, 1], and is 0 when either side has no relations that differ.

    Args:
        x: (n, d) vectors.
        y: (n, e) vectors of the same tokens, of any width.
        debiased: from unbiased estimates of the three inner products.

    Raises:
        SemalignError: the two sides have different numbers of tokens, or fewer than 4 for the debiased value.

    Source: Kornblith et al. 2019, eq. 2 with linear kernels. Debiased: Nguyen et al. 2021, eq. 3, with the estimator of
    Song et al. 2012, eq. 5, in the form of Székely and Rizzo 2014 (U-centred matrices).
    """
    if debiased:
        return _debiased(x, y)
    similarities, _, _, _ = _alignments(x, y, None, "auto")
    return similarities[0].clamp(0, 1)


@checked
@full_precision
def linear_cka_matrix(xs: Iterable[Float[Tensor, "n _"]], ys: Iterable[Float[Tensor, "n _"]]) -> Float[Tensor, "xs ys"]:
    """`linear_cka` of every representation of one side with every one of the other, all of the same n tokens.

    Each relation is made once, not once for each pair, and some rows of all of them are in memory at a time. A
    representation that holds a value that is not finite has the value NaN with every other.

    Args:
        xs: representations of any widths; with an iterator, one at a time is in memory beside its centred copy.
        ys: likewise.

    Raises:
        SemalignError: two representations have different numbers of tokens, or a side has none.
    """
    x_ND, y_NE = ([_centred_alone(each) for each in side] for side in (xs, ys))
    if not x_ND or not y_NE:
        raise SemalignError(f"both sides need a representation, got {len(x_ND)} and {len(y_NE)}")
    sizes = {len(each) for each in (*x_ND, *y_NE)}
    if len(sizes) != 1:
        raise SemalignError(f"all representations must have the same tokens, got {sorted(sizes)} tokens")
    tokens = sizes.pop()
    products_XY = torch.zeros(len(x_ND), len(y_NE), dtype=accumulation_dtype(*x_ND, *y_NE), device=x_ND[0].device)
    k_squares_X, l_squares_Y = products_XY.new_zeros(len(x_ND)), products_XY.new_zeros(len(y_NE))
    step = max(1, HELD // max(1, tokens * (len(x_ND) + len(y_NE))))
    for start in range(0, tokens, step):
        k_XM, l_YM = (
            torch.stack([(each[start : start + step] @ each.T).flatten() for each in side]).to(products_XY)
            for side in (x_ND, y_NE)
        )
        products_XY += k_XM @ l_YM.T
        k_squares_X += k_XM.square().sum(1)
        l_squares_Y += l_YM.square().sum(1)
    norms_XY = k_squares_X.sqrt()[:, None] * l_squares_Y.sqrt()
    # Without variance a relation is 0, and so is its product with any other.
    return (products_XY / norms_XY.clamp_min(torch.finfo(norms_XY.dtype).tiny)).clamp(0, 1)


def _debiased(x: Tensor, y: Tensor) -> Tensor:
    """⟨K̃, L̃⟩ / (‖K̃‖‖L̃‖) of the U-centred relations, some rows of them in memory at a time."""
    tokens = len(x)
    if tokens != len(y) or tokens < LEAST_TOKENS + 1:
        raise SemalignError(
            f"debiased CKA needs the same tokens on both sides, {LEAST_TOKENS + 1} at least, got shapes "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    dtype = accumulation_dtype(x, y)
    sides = [_centred_alone(side).to(dtype) for side in (x, y)]
    product, squares = x.new_zeros((), dtype=dtype), x.new_zeros(2, dtype=dtype)
    step = max(1, HELD // (2 * tokens))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        k_MN, l_MN = (_u_centred(side_ND, rows) for side_ND in sides)
        product = product + (k_MN * l_MN).sum()
        squares = squares + torch.stack([k_MN.square().sum(), l_MN.square().sum()])
    sizes = torch.stack([(side_ND.T @ side_ND).square().sum() for side_ND in sides])
    noise = (8 * torch.finfo(dtype).eps) ** 2
    norm = torch.where(squares <= noise * sizes, torch.inf, squares).sqrt().prod()  # relations that are all alike
    return (product / norm).clamp(-1, 1)


def _u_centred(side_ND: Tensor, rows: slice) -> Tensor:
    """Rows of K̃_ij = K_ij − Σ_l K_il / (n − 2) − Σ_l K_lj / (n − 2) + ΣΣ K / ((n − 1)(n − 2)), the sums without the
    diagonal of K; K̃_ii = 0."""
    n = len(side_ND)
    places = torch.arange(n, device=side_ND.device)
    sums_N = side_ND @ side_ND.sum(0) - side_ND.square().sum(1)
    k_MN = side_ND[rows] @ side_ND.T
    centred_MN = k_MN - (sums_N[rows, None] + sums_N) / (n - 2) + sums_N.sum() / ((n - 1) * (n - 2))
    return centred_MN.masked_fill(places[rows, None] == places, 0)


def _alignments(
    target: Tensor, reference: Tensor, mask: Tensor | None, route: Route
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """⟨K̂, L̂⟩, ‖K̂‖², ‖L̂‖² and whether there are three tokens, of each sequence; K̂ is K/‖K‖, or 0 without variance."""
    if target.shape[:-1] != reference.shape[:-1]:
        raise SemalignError(
            f"the two sides must have the same tokens, got shapes {tuple(target.shape)} and {tuple(reference.shape)}"
        )
    if mask is None:
        mask = torch.ones(target.shape[:-1], dtype=torch.bool, device=target.device)
    if mask.shape != target.shape[:-1] or mask.dtype != torch.bool:
        raise SemalignError(
            f"the mask must have one truth value for each token, shape {tuple(target.shape[:-1])}, got "
            f"{str(mask.dtype).removeprefix('torch.')} of shape {tuple(mask.shape)}"
        )
    dtype = accumulation_dtype(target, reference)
    pattern = "... n d -> (...) n d" if target.dim() > 2 else "n d -> 1 n d"
    mask_BN = rearrange(mask[..., None], pattern)[..., 0]
    target_BND, target_varies = _centred(rearrange(target, pattern).to(dtype), mask_BN)
    reference_BNE, reference_varies = _centred(rearrange(reference, pattern).to(dtype), mask_BN)

    tokens, d, e = mask_BN.shape[1], target.shape[-1], reference.shape[-1]
    # Multiplications for each token: of its pairs with other tokens, or of the pairs of features.
    if route == "token" or (route == "auto" and tokens * (d + e) < d * d + d * e + e * e):
        k_BNN = einsum(target_BND, target_BND, "b n d, b m d -> b n m")
        l_BNN = einsum(reference_BNE, reference_BNE, "b n e, b m e -> b n m")
        products = (k_BNN * l_BNN).sum((1, 2))
        k_squares, l_squares = k_BNN.square().sum((1, 2)), l_BNN.square().sum((1, 2))
    else:
        products = einsum(target_BND, reference_BNE, "b n d, b n e -> b d e").square().sum((1, 2))
        k_squares = einsum(target_BND, target_BND, "b n d, b n e -> b d e").square().sum((1, 2))
        l_squares = einsum(reference_BNE, reference_BNE, "b n d, b n e -> b d e").square().sum((1, 2))
    norms = torch.where(target_varies, k_squares, 1.0).sqrt() * torch.where(reference_varies, l_squares, 1.0).sqrt()
    similarities = torch.where(target_varies & reference_varies, products / norms, 0.0)
    return similarities, target_varies.to(dtype), reference_varies.to(dtype), mask_BN.sum(1) >= LEAST_TOKENS


def _centred(vectors_BND: Tensor, mask_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors minus their mean over the counted tokens, scaled to a total square of 1, and whether they vary at all.

    What is not finite in a counted token makes all of its sequence NaN.
    """
    counted_BN1 = mask_BN[..., None]
    # `where` and not a product: masked tokens may hold anything, infinities included.
    vectors_BND = torch.where(counted_BN1, vectors_BND, 0.0)
    # The distance does not depend on scale, so scales taken as constants leave its gradient exact, and they keep sums
    # and the fourth powers of the relations inside the range of float32.
    least = least_size(vectors_BND.dtype)
    sizes = vectors_BND.new_full((len(vectors_BND), 1, 1), least)
    if vectors_BND.shape[1]:
        sizes = vectors_BND.detach().abs().amax((1, 2), keepdim=True).clamp_min(least)
    vectors_BND = vectors_BND / sizes
    counts = mask_BN.sum(1).clamp_min(1).to(vectors_BND.dtype)
    mean_B1D = vectors_BND.sum(1, keepdim=True) / counts[:, None, None]
    centred_BND = torch.where(counted_BN1, vectors_BND - mean_B1D, 0.0)
    with torch.no_grad():
        total = vectors_BND.square().sum((1, 2))
        spread = centred_BND.square().sum((1, 2))
        noise = (8 * torch.finfo(vectors_BND.dtype).eps) ** 2
        flat = (spread <= noise * total) | (spread.sqrt() * sizes[:, 0, 0] < least)  # neither where they are NaN
        scale = torch.where(flat, 1.0, spread.sqrt())[:, None, None]
    return torch.where(flat[:, None, None], 0.0, centred_BND / scale), ~flat


@checked
def _centred_alone(representation: Float[Tensor, "n d"]) -> Tensor:
    """`_centred` of one set of vectors that all count."""
    counted_1N = representation.new_ones(1, len(representation), dtype=torch.bool)
    return _centred(representation[None].to(accumulation_dtype(representation)), counted_1N)[0][0]
