"""A source that is ready to supervise: for a batch, the contributions that target layers match, and its output.

Shape suffixes: B sequences, N tokens, P supervised positions of all sequences, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, undisturbed, view_of
from semalign_geometry import Head, Transport
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedModel

from ._codec import TAIL, decode_residual, encode_output, encode_residual
from ._settings import Shard, SupervisionManifest, SupervisionSettings


class SupervisingSource:
    """A source with the pairing, the transport and the settings that decide what is read from it."""

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
            settings: what is kept, and in which form.
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

    @torch.no_grad()
    def read(self, batch: Batch, positions: Supervised, layers: Sequence[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Run the source on a batch; it is left as found.

        Args:
            batch: right-padded tokens.
            positions: its supervised positions.
            layers: source layers whose contributions are needed, counted from 1.

        Returns:
            The contributions and the output distribution at the supervised positions, as a store keeps them, on the
            source's device; and ‖stored − computed‖² and ‖computed‖² of the contributions, float64 on the CPU.

        Raises:
            SemalignError: the source computes values that are not finite.
        """
        mask_BN = positions.mask.to(self.view.device)
        with undisturbed(self.view.model):
            trace = self.view.trace(batch, keep=layers, positions=mask_BN)
        part: dict[str, Tensor] = {}
        squares = torch.zeros(2, dtype=torch.float64)
        for layer in layers:
            vectors_PD = self.transport(trace.outputs[layer].float() - trace.inputs[layer].float())
            part |= encode_residual(vectors_PD, layer, self.settings.dtype)
            loss_PD = decode_residual(part.__getitem__, layer, self.settings.dtype) - vectors_PD
            squares += torch.stack([loss_PD.square().sum(), vectors_PD.square().sum()]).cpu().double()
        assert trace.final is not None
        part |= encode_output(trace.final[mask_BN], self.head, self.settings)
        broken = [name for name, value in part.items() if name != TAIL and not torch.isfinite(value).all()]
        if broken:
            raise SemalignError(
                f"the source computed {broken[0]} values that are not finite: check its weights and dtype"
            )
        return part, squares

    def manifest(
        self,
        *,
        key: str,
        examples: int,
        tokens: int,
        supervised_tokens: int,
        files: Mapping[str, str] | None = None,
        shards: Sequence[Shard] = (),
        residual_error: float = 0.0,
    ) -> SupervisionManifest:
        """The manifest of what is read from this source; the fields of `SupervisionManifest` explain the arguments."""
        return SupervisionManifest(
            files=dict(files or {}),
            key=key,
            settings=self.settings,
            pairing=self.pairing,
            transport=self.transport.manifest,
            examples=examples,
            tokens=tokens,
            supervised_tokens=supervised_tokens,
            residual_error=residual_error,
            entries=len(self.head.weight),
            head_scale=self.head.scale,
            head_softcap=self.head.softcap,
            shards=tuple(shards),
        )
