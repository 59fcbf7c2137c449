"""A source that is ready to supervise: for a batch, the contributions that target layers match, and its output.

Shape suffixes: B sequences, N tokens, P answer tokens and S spans of all sequences, D width.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool, Int
from semalign_attribution import Batch, DecoderView, LayerPairing, Supervised, undisturbed, view_of
from semalign_geometry import ClassHead, Head, OutputHead, Transport, VocabularyClasses, answer_nll
from semalign_geometry.base import SemalignError
from torch import Tensor
from transformers import PreTrainedModel

from ._codec import LIKELIHOOD, TAIL, decode_residual, encode_output, encode_residual
from ._settings import Shard, SupervisionManifest, SupervisionSettings
from ._spans import sums_within
from ._supervision import target_entries


class SupervisingSource:
    """A source with the pairing, the transport and the settings that decide what is read from it."""

    def __init__(
        self,
        source: PreTrainedModel | DecoderView,
        pairing: LayerPairing,
        transport: Transport,
        settings: SupervisionSettings,
        entries: Int[Tensor, " v"] | None,
        classes: VocabularyClasses | None,
    ) -> None:
        """Check that they fit together; nothing is computed yet.

        Args:
            source: the source model or its view.
            pairing: the source layer of each target layer.
            transport: from the source's width to the target's.
            settings: what is kept, and in which form.
            entries: vocabulary ids that both models share with equal ids; None for the source's whole head.
            classes: classes of two vocabularies.

        Raises:
            SemalignError: a pairing for another depth, a transport for another width, entries or classes of another
                head, or both.
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
        if entries is not None and classes is not None:
            raise SemalignError("entries and classes exclude each other: classes say which ids the output is over")
        self.pairing, self.settings, self.classes = pairing, settings, classes
        self.transport = Transport(transport.matrix.to(view.device, torch.float32), transport.manifest)
        if classes is not None:
            head, ids = ClassHead.of(view.head, classes.source, classes.count), target_entries(classes)
        elif entries is not None:
            head, ids = view.head.select(entries), entries.cpu()
        else:
            head, ids = view.head, torch.arange(rows)
        self.head: OutputHead = head
        """The source's head over the shared entries or the classes."""
        self.stored_head: Head = head if isinstance(head, Head) else view.head
        """The head that a store keeps beside final hidden states: whole where `head` is over classes."""
        self.entries: Int[Tensor, " v"] = ids
        """Ids of the target's vocabulary that are in them."""

    @torch.no_grad()
    def read(
        self,
        batch: Batch,
        positions: Supervised,
        layers: Sequence[int],
        *,
        span_tokens: Int[Tensor, " s"] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run the source on a batch; it is left as found.

        Args:
            batch: right-padded tokens as the source reads them.
            positions: its supervised positions.
            layers: source layers whose contributions are needed, counted from 1.
            span_tokens: answer tokens of each span; None where each is a span, with one tokenizer.

        Returns:
            The contributions and the output distribution at the start of each span, and with two tokenizers the
            log-likelihood of each span, as a store keeps them, on the source's device; and ‖stored − computed‖² and
            ‖computed‖² of the contributions, float64 on the CPU.

        Raises:
            SemalignError: the source computes values that are not finite.
        """
        mask_BN = positions.mask.to(self.view.device)
        starts_BN = mask_BN if span_tokens is None else _starts(positions.mask, span_tokens).to(self.view.device)
        with undisturbed(self.view.model):
            trace = self.view.trace(batch, keep=layers, positions=starts_BN)
        part: dict[str, Tensor] = {}
        squares = torch.zeros(2, dtype=torch.float64)
        for layer in layers:
            vectors_SD = self.transport(trace.outputs[layer].float() - trace.inputs[layer].float())
            part |= encode_residual(vectors_SD, layer, self.settings.dtype)
            loss_SD = decode_residual(part.__getitem__, layer, self.settings.dtype) - vectors_SD
            squares += torch.stack([loss_SD.square().sum(), vectors_SD.square().sum()]).cpu().double()
        assert trace.final is not None
        part |= encode_output(trace.final[starts_BN], self.head, self.settings)
        if span_tokens is not None:
            labels = positions.labels.to(self.view.device)
            log_probs_P = -answer_nll(trace.final[mask_BN], self.view.head, labels)
            part[LIKELIHOOD] = sums_within(log_probs_P.float(), span_tokens.to(log_probs_P.device))
        broken = [name for name, value in part.items() if not _is_right(name, value)]
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
        spans: int,
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
            spans=None if self.classes is None else spans,
            residual_error=residual_error,
            entries=len(self.entries) if self.classes is None else self.classes.count,
            head_scale=self.view.head.scale,
            head_softcap=self.view.head.softcap,
            shards=tuple(shards),
        )


def _starts(mask_BN: Bool[Tensor, "b n"], span_tokens: Int[Tensor, " s"]) -> Bool[Tensor, "b n"]:
    """The positions of a mask that predict the first token of a span."""
    places = mask_BN.nonzero()[(span_tokens.cumsum(0) - span_tokens).to(mask_BN.device)]
    starts_BN = torch.zeros_like(mask_BN)
    starts_BN[places[:, 0], places[:, 1]] = True
    return starts_BN


def _is_right(name: str, value: Tensor) -> bool:
    """Whether numbers are finite; logarithms of probabilities that may be 0 may be −∞."""
    return not bool((value.isnan() if name in (TAIL, LIKELIHOOD) else ~value.isfinite()).any())
