"""Similarity of the layers of source and target, before a transfer and after it.

Shape suffixes: T target layers, S source layers.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from semalign_align import SupervisedBatch, Supervision
from semalign_attribution import DecoderView
from semalign_geometry import linear_cka_matrix
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..results.similarity import Matrix
from .source_phase import contributions_at

ROWS, TOKENS = 8, 1024
"""Held-out rows and spans in a comparison of layers, at most."""


Contributions = Mapping[int, Float[Tensor, "n _"]]


@torch.no_grad()
def compare_layers(view: DecoderView, held_out: Supervision) -> tuple[int, Matrix]:
    """Return the number of compared spans, and the linear CKA of each layer with each one that the store keeps."""
    rows = range(0, len(held_out), math.ceil(len(held_out) / ROWS))  # they are sorted by length
    every = math.ceil(int(held_out.counts[list(rows)].sum()) / TOKENS)
    supervised_by = {source: k for k, source in enumerate(held_out.manifest.pairing.source_layers, 1)}
    source: dict[int, Tensor] = {}
    for layer, k in sorted(supervised_by.items()):
        references = [held_out.collate([row], layer=k).reference for row in rows]
        source[layer] = torch.cat([each[0] for each in references if each is not None])[::every]
    batches = (held_out.collate([row], device=view.device) for row in rows)
    read = ((data.batch, _span_starts(data)) for data in batches)
    found = contributions_at(view, read, range(1, view.depth + 1))
    target = {k: vectors[::every] for k, vectors in found.items()}
    return len(target[1]), similarity_matrix(target, source)


def _span_starts(data: SupervisedBatch) -> Bool[Tensor, "b n"]:
    """Return True at the positions of a batch that predict the first token of a span."""
    starts = torch.zeros_like(data.positions.mask)
    starts[tuple(data.at_spans(data.positions.mask.nonzero()).T)] = True
    return starts


def similarity_matrix(target: Contributions, source: Contributions) -> Matrix:
    """Return the linear CKA of each target layer and each source layer, both in order.

    Raises:
        SemalignError: a layer adds values that are not finite, so that it is like none.
    """
    found_TS = linear_cka_matrix(*([vectors for _, vectors in sorted(side.items())] for side in (target, source)))
    for role, side, broken in (
        ("target", target, found_TS.isnan().all(1)),
        ("source", source, found_TS.isnan().all(0)),
    ):
        if broken.any():
            layer = sorted(side)[int(broken.nonzero()[0])]
            raise SemalignError(
                f"layer {layer} of the {role} adds values that are not finite: check its weights and dtype"
            )
    return tuple(tuple(row) for row in found_TS.tolist())
