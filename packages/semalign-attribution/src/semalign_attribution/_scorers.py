"""Settings of the scorers; their maths, with torch, is imported when they are called."""

from typing import TYPE_CHECKING, Literal

from semalign_geometry.base import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ._batch import Batch
    from ._decoder import DecoderView


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

    def __call__(self, source: "DecoderView", batch: "Batch") -> "Float[Tensor, 'examples layers']":
        """One score per example and layer."""
        from ._scoring import gradient_activation

        return gradient_activation(source, batch, self.activation, self.aggregate)


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

    def __call__(self, source: "DecoderView", batch: "Batch") -> "Float[Tensor, 'examples layers']":
        """One score per example and layer, in nats per answer token."""
        from ._scoring import ablation

        return ablation(source, batch)
