"""Share of the source's geometry that survives the transport, layer by layer."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ._contracts import FidelityReport, LayerFidelity
from ._head import accumulation_dtype
from ._relation import linear_cka
from ._transport import Transport
from .base import SemalignError, checked, short_repr
from .base._checked import check


@dataclass(frozen=True, eq=False)
class PairedResiduals:
    """Residual contributions of one pair of layers at the same n tokens."""

    target_layer: int
    """k, counted from 1."""
    source_layer: int
    """π(k), counted from 1."""
    target: Float[Tensor, "n t"]
    """Those of the target, at its width."""
    source: Float[Tensor, "n s"]
    """Those of the source, at its own."""

    __repr__ = short_repr


@torch.no_grad()
@checked
def measure_fidelity(
    pairs: Iterable[PairedResiduals], *, transport: Transport, within_source: Transport
) -> FidelityReport:
    """Fidelity of a transport on the residual contributions of paired layers.

    Args:
        pairs: residuals of each target layer and its source layer; may be a generator, one pair in memory at a time.
        transport: source → target.
        within_source: the same frame from the source to itself, `fit_transport(source, source, …)`.

    Raises:
        SemalignError: residuals of a layer are not finite, or of another width than the transports'.

    Source: method 2.2 (ours).
    """
    layers, tokens = [], 0
    for pair in pairs:
        check("a pair", pair, PairedResiduals)
        tokens = len(pair.source)
        for role, layer, residuals in (
            ("source", pair.source_layer, pair.source),
            ("target", pair.target_layer, pair.target),
        ):
            if not torch.isfinite(residuals).all():
                raise SemalignError(
                    f"layer {layer} of the {role} adds values that are not finite: check its weights and dtype"
                )
        source = pair.source.to(accumulation_dtype(pair.source))
        cosines = torch.cosine_similarity(within_source(source), source, dim=-1)
        layers.append(
            LayerFidelity(
                target_layer=pair.target_layer,
                source_layer=pair.source_layer,
                recomposition_cosine=float(cosines.mean()),
                cka_transported=float(linear_cka(pair.target, transport(source))),
                cka_direct=float(linear_cka(pair.target, source)),
            )
        )
    manifest = transport.manifest
    return FidelityReport(frame=manifest.frame, fold_gain=manifest.fold_gain, tokens=tokens, layers=tuple(layers))
