"""Hidden-state matching as in FitNets and TinyBERT: a learned projection onto the source's stream, and output KL."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from semalign_align import SupervisedBatch
from semalign_attribution import DecoderView, Trace, undisturbed
from torch import Tensor, nn

from ._joint import JointMethod, output_loss
from ._joint_training import train_jointly
from ._method import LayerUse, MethodContext, MethodReport


class Hidden(JointMethod):
    """MSE between the source's hidden states and a learned linear map of the target's, at each paired layer, and
    KL(p_S ‖ p_T).

    The source runs beside the target, as its streams are not stored. Source: FitNets (Romero et al. 2015), TinyBERT
    (Jiao et al. 2020).
    """

    stored: ClassVar[bool] = True
    layer_use: ClassVar[LayerUse] = "paired"
    kind: Literal["hidden"] = "hidden"
    """Chooses this method in a configuration."""
    weight: float = Field(1.0, ge=0)
    """Of the MSE, which is a mean over layers and channels relative to the mean square of the source's states."""

    def run(self, context: MethodContext) -> MethodReport:
        """Train all layers and the projections; the projections are dropped."""
        target, config, store = DecoderView(context.target.model), self.config(context), context.stores.train
        source = DecoderView(context.load_source().model)
        temperature, pairing = store.manifest.settings.temperature, store.manifest.pairing
        layers = range(1, target.depth + 1)
        generator = torch.Generator().manual_seed(config.seed)
        projections = [
            nn.Parameter(
                (torch.randn(source.width, target.width, generator=generator) * target.width**-0.5).to(target.device)
            )
            for _ in layers
        ]
        with undisturbed(source.model), self.parameters(target, config) as found:

            def losses(trace: Trace, data: SupervisedBatch) -> dict[str, Tensor]:
                with torch.no_grad():
                    theirs = source.trace(data.batch, keep=set(pairing.source_layers))
                mask = data.positions.mask
                matched = torch.zeros((), device=target.device)
                for layer, projection in zip(layers, projections, strict=True):
                    wanted = theirs.outputs[pairing.source_of(layer)][mask.to(source.device)].to(target.device).float()
                    states = trace.outputs[layer][mask].float() @ projection.T
                    # Relative, as a few channels of a stream are hundreds of times larger than the rest.
                    matched = matched + (states - wanted).square().sum(1).div(wanted.square().sum(1)).sum()
                terms = {"output": output_loss(target, trace, data, store.entries, temperature, config.divergence)}
                return terms | {"hidden": self.weight * matched / target.depth}

            return train_jointly(context, self, target, [*found, *projections], losses, config=config, keep=layers)
