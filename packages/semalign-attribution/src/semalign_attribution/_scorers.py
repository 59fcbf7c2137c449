"""The scorers: gradient × activation, ablation, similarity to a target."""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from semalign_geometry import accumulation_dtype, answer_nll, linear_cka_matrix
from semalign_geometry.base import Settings
from torch import Tensor
from transformers import PreTrainedModel

from ._batch import Batch, supervised
from ._decoder import DecoderView, view_of
from ._undisturbed import undisturbed


class GradientActivation(Settings):
    """score_ℓ = Σ over tokens and channels of |∂L/∂a_ℓ ⊙ a_ℓ|, L the mean NLL of the example's answer tokens.

    One backward pass scores every layer: parameters are frozen, gradients are those of activations alone.
    Source: v1 (layer output); v2, reading (residual contribution).
    """

    kind: Literal["gradient_activation"] = "gradient_activation"
    """Chooses this scorer in a configuration."""
    activation: Literal["residual", "output"] = "residual"
    """a_ℓ: the layer's residual contribution, or the stream after it. ∂L/∂r_ℓ = ∂L/∂h_ℓ, as h_ℓ = h_{ℓ−1} + r_ℓ."""
    aggregate: Literal["absolute", "signed"] = "absolute"
    """Sum the sizes of the products, or the products."""

    @property
    def name(self) -> str:
        """Kind, activation and aggregation."""
        return f"{self.kind}({self.activation}, {self.aggregate})"

    def __call__(self, source: DecoderView, batch: Batch) -> Float[Tensor, "examples layers"]:
        """One score per example and layer."""
        layers = range(1, source.depth + 1)
        with torch.enable_grad():
            trace = source.trace(batch, keep=layers, input_gradient=True)
            losses = _answer_losses(source, batch, trace.final)
            gradients = torch.autograd.grad(losses.sum(), [trace.outputs[layer] for layer in layers])
        scores = []
        for layer, gradient in zip(layers, gradients, strict=True):
            activation = trace.residual(layer) if self.activation == "residual" else trace.outputs[layer]
            dtype = accumulation_dtype(activation)
            products = gradient.to(dtype) * activation.detach().to(dtype)
            scores.append((products.abs() if self.aggregate == "absolute" else products).sum((1, 2)))
        return torch.stack(scores, dim=1)


class Ablation(Settings):
    """score_ℓ = drop of the mean answer log-probability when the layer's residual contribution is left out.

    Only the layers after the one left out run again. Source: method 1.
    """

    kind: Literal["ablation"] = "ablation"
    """Chooses this scorer in a configuration."""

    @property
    def name(self) -> str:
        """The kind."""
        return self.kind

    @torch.no_grad()
    def __call__(self, source: DecoderView, batch: Batch) -> Float[Tensor, "examples layers"]:
        """One score per example and layer, in nats per answer token."""
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

    target: PreTrainedModel
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
