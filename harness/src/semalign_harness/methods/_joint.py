"""Training of all layers at once, which the methods without stages have in common."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from semalign_align import Ranks, SupervisedBatch
from semalign_attribution import DecoderView, Trace, undisturbed
from semalign_geometry import (
    Head,
    SemalignError,
    Settings,
    TopEntries,
    answer_nll,
    coarse_divergence,
    output_divergence,
)
from semalign_train import (
    FullLayer,
    LoraLayer,
    StepRecord,
    TransferConfig,
    micro_batches,
    optimisation_batches,
    rate_factor,
    trained,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from ._method import MethodContext, MethodReport

Losses = Callable[[Trace, SupervisedBatch], dict[str, Tensor]]
"""The terms of the loss, each with its weight, summed over the supervised tokens of a micro-batch."""
MOMENTS = 1000
"""Parts of a given wall time in which the learning rate changes."""


class JointMethod(Settings):
    """Settings of a method that trains all layers at once; those of `train` that concern stages play no part."""

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


def output_loss(view: DecoderView, trace: Trace, data: SupervisedBatch, entries: Tensor, temperature: float) -> Tensor:
    """KL(p_S ‖ p_T) at the supervised positions, their sum in nats; a lower bound where the source's top entries were
    stored."""
    hidden, head, source = final_states(trace, data), live_head(view).select(entries), data.output
    if not head.weight.requires_grad:
        if isinstance(source, TopEntries):
            return coarse_divergence(source, hidden, head, temperature=temperature).sum()
        return output_divergence(source.hidden, source.head, hidden, head, temperature=temperature).sum()
    log_q = (head.logits(hidden) / temperature).log_softmax(1)
    if isinstance(source, TopEntries):
        ids = source.ids.long()
        log_p = torch.cat([source.log_probs.to(log_q), source.tail[:, None].to(log_q)], 1)
        rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        log_q = torch.cat([log_q.gather(1, ids), rest], 1)
        kept = torch.isfinite(log_p)  # no tail where all entries are kept
        log_p, log_q = log_p[kept], log_q[kept]
    else:
        log_p = (source.head.logits(source.hidden) / temperature).log_softmax(1)
    return kl_div(log_q, log_p, reduction="sum", log_target=True)


def final_states(trace: Trace, data: SupervisedBatch) -> Tensor:
    """What the target feeds its head at the supervised positions, (p, d)."""
    assert trace.final is not None
    return trace.final[data.positions.mask]


def live_head(view: DecoderView) -> Head:
    """The head with the parameters themselves, which may train."""
    module = view.model.get_output_embeddings()
    assert module is not None
    return replace(view.head, weight=module.weight, bias=getattr(module, "bias", None))


def train_jointly(
    context: MethodContext,
    method: JointMethod,
    view: DecoderView,
    parameters: Sequence[nn.Parameter],
    losses: Losses,
    *,
    config: TransferConfig,
    keep: Collection[int] = (),
) -> MethodReport:
    """Minimise the mean of a loss over the supervised tokens of each optimisation batch, all layers at once.

    Batches, learning rate, clipping and guards are those of frontier training, so that methods see the same tokens in
    the same order. Several processes share every batch. An interrupted training begins anew.

    Args:
        context: of the method.
        method: for its wall time and its name.
        view: the target.
        parameters: what trains.
        losses: the terms of the loss.
        config: settings of the training.
        keep: layers whose streams the loss looks at.

    Raises:
        SemalignError: more gradients were not finite than `config.guards` allows.
    """
    store, ranks = context.stores.train, Ranks.current()
    optimiser = torch.optim.AdamW(
        parameters, lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay
    )
    batches = optimisation_batches(config, len(store))
    steps = sum(config.stage_steps(view.depth, len(store)))
    autocast = config.autocast == "bfloat16" or view.model.dtype == torch.bfloat16
    started, allowed, skipped, supervised, number = time.perf_counter(), method.seconds, 0, 0, 0
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(context.console.bar("train", steps))
        for number in itertools.count(1):
            begun = time.perf_counter()
            place, of = number, steps
            if allowed is not None:
                elapsed = ranks.from_first(lambda: time.perf_counter() - started)
                place, of = math.floor(elapsed / allowed * MOMENTS) + 1, MOMENTS
            if place > of:
                break
            indices = next(batches)
            count = max(1, int(store.counts[indices].sum()))
            terms: dict[str, float] = {}
            for micro, mine in ranks.deal(micro_batches(config, store, indices, ranks)):
                data = store.collate(micro, device=view.device)
                with torch.enable_grad(), torch.autocast(view.device.type, torch.bfloat16, enabled=autocast):
                    trace = view.trace(data.batch, keep=keep)
                    found = {name: mine * value / count for name, value in losses(trace, data).items()}
                    torch.stack([value.float() for value in found.values()]).sum().backward()
                terms = {name: terms.get(name, 0.0) + float(value.detach()) for name, value in found.items()}
            gradients = ranks.add([_gradient(parameter) for parameter in parameters])
            values = ranks.add([torch.tensor(list(terms.values()), dtype=torch.float64)])[0]
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            norm = float(nn.utils.clip_grad_norm_(parameters, math.inf if config.clip is None else config.clip))
            rate = config.learning_rate * rate_factor(place, of, config)
            for group in optimiser.param_groups:
                group["lr"] = rate
            if math.isfinite(norm):
                optimiser.step()
            else:
                skipped += 1
            optimiser.zero_grad()
            if skipped > config.guards.max_skipped:
                raise SemalignError(
                    f"step {number}: the gradient is not finite for the {skipped}. time; lower the learning rate of "
                    f"{method.kind}"
                )
            supervised += count
            tokens, seconds = int(store.lengths[indices].sum()), time.perf_counter() - begun
            record = StepRecord(
                layer=0,
                step=number,
                steps=steps,
                losses=dict(zip(terms, values.tolist(), strict=True)),
                gradient_norms={},
                gradient_norm=norm,
                skipped=not math.isfinite(norm),
                learning_rate=rate,
                supervised_tokens=count,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                examples=tuple(indices),
            )
            if ranks.is_first:
                context.metrics.add(record)
            bar.advance(", ".join(f"{name} {value:.3f}" for name, value in record.losses.items()))
    return MethodReport(
        method=method.kind,
        trained_parameters=sum(parameter.numel() for parameter in parameters),
        steps=number - 1,
        supervised_tokens=supervised,
        seconds=time.perf_counter() - started,
    )


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
