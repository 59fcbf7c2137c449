"""The maths of the scorers: gradient × activation, ablation, similarity to a target."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from semalign_geometry import accumulation_dtype, answer_nll, linear_cka_matrix
from torch import Tensor

from ._batch import Batch, supervised
from ._decoder import DecoderView, view_of
from ._undisturbed import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def gradient_activation(
    source: DecoderView,
    batch: Batch,
    activation: Literal["residual", "output"],
    aggregate: Literal["absolute", "signed"],
) -> Float[Tensor, "examples layers"]:
    """Score each example and layer; see `GradientActivation`."""
    layers = range(1, source.depth + 1)
    with torch.enable_grad():
        trace = source.trace(batch, keep=layers, input_gradient=True)
        losses = _answer_losses(source, batch, trace.final)
        gradients = torch.autograd.grad(losses.sum(), [trace.outputs[layer] for layer in layers])
    scores = []
    for layer, gradient in zip(layers, gradients, strict=True):
        values = trace.residual(layer) if activation == "residual" else trace.outputs[layer]
        dtype = accumulation_dtype(values)
        products = gradient.to(dtype) * values.detach().to(dtype)
        scores.append((products.abs() if aggregate == "absolute" else products).sum((1, 2)))
    return torch.stack(scores, dim=1)


@torch.no_grad()
def ablation(source: DecoderView, batch: Batch) -> Float[Tensor, "examples layers"]:
    """Score each example and layer, in nats per answer token; see `Ablation`."""
    layers = range(1, source.depth + 1)
    trace = source.trace(batch, keep=layers)
    whole = _answer_losses(source, batch, trace.final)
    scores = []
    for layer in layers:
        ablated = source.trace(batch, start=layer + 1, hidden=trace.inputs[layer])
        scores.append(_answer_losses(source, batch, ablated.final) - whole)
    return torch.stack(scores, dim=1)


@dataclass(frozen=True, eq=False)
class Similarity:
    """score_{k,ℓ} = linear CKA of target layer k's and source layer ℓ's residual contributions, within each example.

    Learning-free; tokens are the supervised positions. Source: method 1, with the CKA of Kornblith et al. 2019.
    """

    target: "PreTrainedModel"
    """The target; it must read the source's token ids."""

    name = "similarity"
    """Name of the scores in results."""

    @torch.no_grad()
    def __call__(self, source: DecoderView, batch: Batch) -> Float[Tensor, "examples targets layers"]:
        """One score per example, target layer and source layer, in [0, 1]; an example with fewer than three supervised
        tokens distinguishes no pairs."""
        positions = supervised(batch)
        mask, counts = positions.mask, positions.counts.tolist()
        target = view_of(self.target)
        with undisturbed(self.target):
            target_trace = target.trace(batch, keep=range(1, target.depth + 1), positions=mask)
        source_trace = source.trace(batch, keep=range(1, source.depth + 1), positions=mask)
        ours, theirs = (
            [trace.residual(layer).split(counts) for layer in trace.outputs] for trace in (target_trace, source_trace)
        )
        scores = torch.zeros(len(counts), target.depth, source.depth)
        for example in range(len(counts)):
            scores[example] = linear_cka_matrix([each[example] for each in ours], [each[example] for each in theirs])
        return scores


def _answer_losses(view: DecoderView, batch: Batch, final: Tensor | None) -> Float[Tensor, " examples"]:
    """Mean answer NLL of each example, the head applied at the supervised positions only."""
    assert final is not None
    positions = supervised(batch)
    hidden = final[positions.mask.to(final.device)]
    return positions.example_means(answer_nll(hidden, view.head, positions.labels.to(final.device)))
