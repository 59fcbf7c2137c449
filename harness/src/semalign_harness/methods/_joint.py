"""Settings and losses that the methods without stages have in common."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from semalign_align import OutputKL, SupervisedBatch
from semalign_attribution import DecoderView, Trace, undisturbed
from semalign_geometry import Divergence, Head, Settings, TopEntries, answer_nll, cell_divergence
from semalign_train import FullLayer, LoraLayer, TransferConfig, trained
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ._method import MethodContext

STAGED = ("objective", "weights", "trainable", "train_final_norm", "shard_frozen")
"""Settings of `train` that only stages have a use for, `guards.rollback` aside."""


class JointMethod(Settings):
    """Settings of a method that trains all layers at once; those of `train` that concern stages play no part, as
    `unused` tells, and `train.recompute_suffix` recomputes every layer."""

    stored: ClassVar[bool] = False
    kind: str
    trainable: Annotated[FullLayer | LoraLayer, Field(discriminator="kind")] = LoraLayer()
    """What trains: adapters in every layer, or every parameter of the model."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate; None takes `train.learning_rate`."""
    seconds: float | None = Field(None, gt=0)
    """Wall time of the training; None trains for as many steps as frontier training has in all its stages."""

    def config(self, context: MethodContext) -> TransferConfig:
        """The experiment's settings of training with the method's own."""
        own = {} if self.learning_rate is None else {"learning_rate": self.learning_rate}
        return context.experiment.train.model_copy(update=own)

    def unused(self, train: TransferConfig) -> list[str]:
        """Settings of `train` that were changed, and play no part in this method."""
        usual = TransferConfig()
        changed = [f"train.{name}" for name in STAGED if getattr(train, name) != getattr(usual, name)]
        return changed + ["train.guards.rollback"] * (train.guards.rollback is not None)

    @contextlib.contextmanager
    def parameters(
        self, view: DecoderView, config: TransferConfig, *, lora: Mapping[str, Any] | None = None
    ) -> Iterator[list[nn.Parameter]]:
        """What trains, in float32; merged or cast back when the block ends."""
        module = view.model if isinstance(self.trainable, FullLayer) else view.layers
        with undisturbed(view.model), trained(module, self.trainable, seed=config.seed, lora=lora) as found:
            yield found


def answer_loss(view: DecoderView, trace: Trace, data: SupervisedBatch) -> Tensor:
    """Negative log-likelihood of the answer tokens, their sum in nats."""
    hidden, head, labels = final_states(trace, data), live_head(view), data.positions.labels
    if head.weight.requires_grad:
        return cross_entropy(head.logits(hidden), labels, reduction="sum")
    return answer_nll(hidden, head, labels).sum()


def output_loss(
    view: DecoderView,
    trace: Trace,
    data: SupervisedBatch,
    entries: Tensor,
    temperature: float,
    divergence: Divergence = "forward",
) -> Tensor:
    """KL(p_S ‖ p_T), or another divergence, at the supervised positions, their sum in nats; a lower bound where the
    source's top entries were stored.

    Raises:
        SemalignError: another one, where the source's final states were stored.
    """
    hidden, head, source = final_states(trace, data), live_head(view).select(entries), data.output
    if not head.weight.requires_grad:
        return OutputKL(divergence=divergence).of(source, hidden, head, temperature).sum()
    log_q = (head.logits(hidden) / temperature).log_softmax(1)
    if isinstance(source, TopEntries):
        ids = source.ids.long()
        log_p = torch.cat([source.log_probs.to(log_q), source.tail[:, None].to(log_q)], 1)
        rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        return cell_divergence(log_p, torch.cat([log_q.gather(1, ids), rest], 1), kind=divergence).sum()
    log_p = (source.head.logits(source.hidden) / temperature).log_softmax(1)
    return cell_divergence(log_p, log_q, kind=divergence).sum()


def final_states(trace: Trace, data: SupervisedBatch) -> Tensor:
    """What the target feeds its head at the supervised positions, (p, d)."""
    assert trace.final is not None
    return trace.final[data.positions.mask]


def live_head(view: DecoderView) -> Head:
    """The head with the parameters themselves, which may train."""
    module = view.model.get_output_embeddings()
    assert module is not None
    return replace(view.head, weight=module.weight, bias=getattr(module, "bias", None))
