"""A source that is ready to supervise: for a batch, the contributions that target layers match, and its output.

Shape suffixes: B sequences, N tokens, P supervised positions of all sequences, D width.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, Trace, undisturbed, view_of
from semalign_geometry import Head, Transport, top_entries
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedModel

from ._residuals import restored_residual, stored_residual
from ._settings import SupervisionSettings, TopK

Span = tuple[int, int]
"""The (a, b) of a contribution h_b − h_a of the source."""


class SupervisingSource:
    """A source with the pairing, the transport and the settings that say what is read from it."""

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        pairing: LayerPairing,
        transport: Transport,
        settings: SupervisionSettings,
        entries: Int[Tensor, " v"] | None,
    ) -> None:
        """Check that they fit together; nothing is computed yet.

        Args:
            source: the source model or its view.
            pairing: the source layer of each target layer.
            transport: from the source's width to the target's.
            settings: what is kept, and how.
            entries: vocabulary ids that both models share with equal ids; None for the source's whole head.

        Raises:
            SemalignError: a pairing for another depth, a transport for another width, or entries outside of the head.
        """
        self.view = view = view_of(source)
        if pairing.source_depth != view.depth:
            raise SemalignError(
                f"the pairing is for {pairing.source_depth} source layers, the source has {view.depth}: pair again, "
                "with scores of this source"
            )
        if transport.manifest.source_width != view.width:
            raise SemalignError(
                f"the transport takes width {transport.manifest.source_width}, the source's is {view.width}: fit it "
                "from this source"
            )
        rows = len(view.head.weight)
        if entries is not None and (not len(entries) or int(entries.min()) < 0 or int(entries.max()) >= rows):
            raise SemalignError(
                f"entries must name some of the head's rows 0 to {rows - 1}, got {entries.tolist()[:8]}"
            )
        self.pairing, self.settings = pairing, settings
        self.transport = Transport(transport.matrix.to(view.device, torch.float32), transport.manifest)
        self.head: Head = view.head if entries is None else view.head.select(entries)
        """The source's head over the shared entries."""
        self.entries: Int[Tensor, " v"] = torch.arange(rows) if entries is None else entries.cpu()
        """The vocabulary ids of its rows."""
        self.spans = source_spans(pairing, settings.residual)
        """The contributions that supervise, each once."""

    @torch.no_grad()
    def read(self, batch: Batch, positions: Supervised, spans: Sequence[Span]) -> tuple[dict[str, Tensor], Tensor]:
        """Run the source on a batch; it is left as found.

        Args:
            batch: right-padded tokens.
            positions: its supervised positions.
            spans: the contributions that are wanted.

        Returns:
            The contributions and the output distribution at the supervised positions, as a store keeps them, on the
            source's device; and ‖stored − computed‖² and ‖computed‖² of the contributions, float64 on the CPU.

        Raises:
            SemalignError: the source computes values that are not finite.
        """
        kept = sorted({layer for span in spans for layer in (span[0] + 1, span[1])})
        mask_BN = positions.mask.to(self.view.device)
        with undisturbed(self.view.model):
            trace = self.view.trace(batch, keep=kept, positions=mask_BN)
        part: dict[str, Tensor] = {}
        squares = torch.zeros(2, dtype=torch.float64)
        for span in spans:
            vectors_PD = self.transport(_contribution(trace, span))
            rounded = stored_residual(vectors_PD, self.settings.dtype)
            part |= {residual_key(span) + suffix: value for suffix, value in rounded.items()}
            loss_PD = restored_residual(rounded) - vectors_PD
            squares += torch.stack([loss_PD.square().sum(), vectors_PD.square().sum()]).cpu().double()
        assert trace.final is not None
        part |= self._output(trace.final[mask_BN])
        broken = [name for name, value in part.items() if name != "tail" and not torch.isfinite(value).all()]
        if broken:
            raise SemalignError(
                f"the source computed {broken[0]} values that are not finite: check its weights and dtype"
            )
        return part, squares

    def _output(self, final_PD: Tensor) -> dict[str, Tensor]:
        settings = self.settings
        if isinstance(settings.output, TopK):
            top = top_entries(final_PD, self.head, settings.output.k, temperature=settings.temperature)
            return {
                "top_ids": top.ids.to(torch.int32),
                "top_log_probs": top.log_probs.float(),
                "tail": top.tail.float(),
            }
        return {"final": final_PD.to(torch.float32 if settings.dtype == "float32" else torch.bfloat16)}


def source_spans(pairing: LayerPairing, residual: str) -> list[Span]:
    """The (a, b) whose h_b − h_a are stored, one for each paired source layer, without repeats.

    `layer`: (π(k) − 1, π(k)). `span`: (the next shallower paired layer, or 0, π(k)).

    Example:
        >>> from semalign_attribution import LayerPairing
        >>> pairing = LayerPairing(policy="manual", source_depth=6, source_layers=(2, 4, 4, 6))
        >>> source_spans(pairing, "layer")
        [(1, 2), (3, 4), (5, 6)]
        >>> source_spans(pairing, "span")
        [(0, 2), (2, 4), (4, 6)]
    """
    paired = sorted(set(pairing.source_layers))
    below = [layer - 1 for layer in paired] if residual == "layer" else [0, *paired[:-1]]
    return list(zip(below, paired, strict=True))


def residual_key(span: Span) -> str:
    """Tensor name of the stored contribution h_b − h_a of the source."""
    return f"residual.{span[0]}-{span[1]}"


def _contribution(trace: Trace, span: Span) -> Tensor:
    below, layer = span
    return trace.outputs[layer].float() - trace.inputs[below + 1].float()
