"""LaTen: neurons of the source, translated by a hypernetwork, are added onto neurons of the target."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt
from semalign_align import Ranks
from semalign_attribution import Batch, DecoderView, supervised, undisturbed
from semalign_geometry import answer_nll
from semalign_geometry.base import SemalignError
from semalign_train import StepRecord, TrainSettings, optimisation_batches
from torch import Tensor, nn

from ...data.encoding import Example, Role
from ...data.sides import ROLES, batches_of, one_sided
from ...models.shape import ModelShape
from .._method import Method, MethodContext, MethodNeeds, MethodReport, Work
from .neurons import MOVED, Located, Place, locate, parts_of, places, until_last_word


class LaTen(Method):
    """Locate-then-align: the neurons of the source that serve the task best, translated to the target's width, are
    added onto the target's best neurons.

    Neurons are located by static attribution (`locate`) on the rows that serve attribution, at the last token of the
    answer that says something: in each of the source's L_T best layers in depth order, and in every layer of the
    target, as many as a share of the target's neurons. The source's up and value rows, down and output columns are
    translated by one hypernetwork for each of the four kinds, and the j-th best of a layer is added onto the j-th best
    of the target's layer of the same place in the order. Only the hypernetworks train, on
    NLL(answer) + penalty · Σ_kinds mean(translated²); then the neurons are fused into the weights.

    Ours, where the paper and its code differ or leave it open: one set of neurons, found once on all rows of
    attribution, instead of one for each step's row; a constant learning rate. Where query heads of the target share a
    value row, their additions to it add up. Embeddings and head stay as they are, so that the vocabularies may differ;
    each model reads the rows by its own tokenizer.

    Source: LaTen (Tan et al., ACL 2025) and its released code.
    """

    keeps_source: ClassVar[bool] = True
    one_tokenizer: ClassVar[bool] = False
    kind: Literal["laten"] = "laten"
    """Chooses this method in a configuration."""
    share: float = Field(0.1, gt=0, le=1)
    """Neurons that are moved, as a share of the target's feed-forward and attention neurons in a layer."""
    steps: PositiveInt = 4
    """Optimiser steps of the hypernetworks."""
    batch_size: int = Field(16, ge=1)
    """Rows in an optimiser step."""
    learning_rate: float = Field(3e-5, gt=0)
    """Learning rate of the hypernetworks, constant."""
    weight_decay: float = Field(0.05, ge=0)
    """Decoupled weight decay."""
    penalty: float = Field(1000.0, ge=0)
    """Weight of the mean square of the translated neurons, summed over the four kinds."""
    start: float = Field(1e-5, ge=0)
    """Standard deviation of the hypernetworks' weights at the start."""

    def check(self, source: ModelShape, target: ModelShape, train: TrainSettings, *, reference_width: int) -> None:
        """Check that both models have the modules that neurons belong to."""
        for role, shape in (("source", source), ("target", target)):
            if missing := [name for name in MOVED if name not in shape.linear_features]:
                raise SemalignError(
                    f"the {role}'s layers have no linear module named {', '.join(missing)}, which method.kind=laten "
                    f"needs: choose a {role} of the Llama family, or another method"
                )

    def work(self, train: TrainSettings, depth: int, rows: int) -> Work:
        """Return the amount of training of the hypernetworks."""
        return Work(self.steps, self.steps * self.batch_size)

    def needs(self, source: ModelShape, target: ModelShape, *, rows: int, tokens: int) -> MethodNeeds:
        """Return the needs of a hypernetwork for each of four kinds of neurons."""
        return MethodNeeds(trained=4 * source.width * (source.width + target.width))

    def run(self, context: MethodContext) -> MethodReport:
        """Locate neurons in both models, train the hypernetworks, add the translated neurons.

        The source is in memory until its neurons are read. `seconds` counts the attribution. Several processes locate
        the same neurons each, and share the rows of a step.
        """
        started, ranks = time.perf_counter(), Ranks.current()
        target = DecoderView(context.target)
        rows = {role: _attribution_rows(context, role) for role in ROLES}
        with undisturbed(target.model):
            part = parts_of(target)[0]
            counts = self._count(part.down_proj.in_features), self._count(part.o_proj.in_features)
            source_neurons = _source_neurons(context, rows["source"], target, counts)
            found = _locate(context, target, rows["target"], target.depth, counts, "target")
            onto = places(target, ranks.broadcast_from_first(lambda: found))
            networks = _hypernetworks(source_neurons, target.width, self.start, seed=context.train.seed)
            tokens = self._train(context, target, networks, source_neurons, onto)
            added = _translated(networks, source_neurons)
            changed = sum(
                place.fuse(neurons) for kind in onto for place, neurons in zip(onto[kind], added[kind], strict=True)
            )
            numbers = sum(each.numel() for each in added.values())
            context.progress.note(f"{changed} of the {numbers} numbers of the target's neurons changed")
        return MethodReport(
            method=self.kind,
            trained_parameters=sum(parameter.numel() for parameter in networks.parameters()),
            steps=self.steps,
            supervised_tokens=tokens,
            seconds=time.perf_counter() - started,
        )

    def _count(self, neurons: int) -> int:
        return max(1, int(self.share * neurons))

    def _train(
        self,
        context: MethodContext,
        target: DecoderView,
        networks: nn.ModuleDict,
        source_neurons: Mapping[str, Tensor],
        onto: Mapping[str, Sequence[Place]],
    ) -> int:
        """Train the hypernetworks in place; returns the number of supervised tokens."""
        config, rows = context.train, context.rows
        optimiser = torch.optim.AdamW(
            list(networks.parameters()), lr=self.learning_rate, betas=config.betas, weight_decay=self.weight_decay
        )
        order = optimisation_batches(config.model_copy(update={"batch_size": self.batch_size}), len(rows))
        seen = 0
        for step in range(1, self.steps + 1):
            begun, indices = time.perf_counter(), next(order)
            chosen = [rows[index] for index in indices]
            count = sum(len(row.answer_ids) for row in chosen)
            losses = self._gradients(context, target, networks, source_neurons, onto, chosen)
            norm = float(nn.utils.get_total_norm([_gradient(parameter) for parameter in networks.parameters()]))
            if not math.isfinite(norm):
                raise SemalignError(
                    f"step {step}: the gradient is not finite; if losses rose before, lower method.learning_rate, "
                    "else set target.dtype to another"
                )
            optimiser.step()
            optimiser.zero_grad()
            seen += count
            tokens, seconds = sum(map(len, chosen)), time.perf_counter() - begun
            context.callback(
                StepRecord(
                    layer=0,
                    step=step,
                    steps=self.steps,
                    losses=losses,
                    gradient_norms={},
                    gradient_norm=norm,
                    learning_rate=self.learning_rate,
                    supervised_tokens=count,
                    tokens=tokens,
                    seconds=seconds,
                    tokens_per_second=tokens / seconds,
                    examples=tuple(indices),
                )
            )
        return seen

    def _gradients(
        self,
        context: MethodContext,
        target: DecoderView,
        networks: nn.ModuleDict,
        source_neurons: Mapping[str, Tensor],
        onto: Mapping[str, Sequence[Place]],
        chosen: Sequence[Example],
    ) -> dict[str, float]:
        """Leave the gradient of a step in the hypernetworks; returns the terms of the loss."""
        count = sum(len(row.answer_ids) for row in chosen)
        with torch.enable_grad():
            translated = _translated(networks, source_neurons)
            added = {kind: value.detach().requires_grad_() for kind, value in translated.items()}
            answer = _answer_gradients(
                target, chosen, onto, added, context.train.micro_batch_size, context.train.autocast
            )
            gradients = Ranks.current().all_reduce_sum([_gradient(value) / count for value in added.values()])
            penalty = self.penalty * torch.stack([each.square().mean() for each in translated.values()]).sum()
            torch.autograd.backward([penalty, *translated.values()], [None, *gradients])
        return {"answer": answer / count, "penalty": float(penalty.detach())}


def _attribution_rows(context: MethodContext, role: Role) -> list[Batch]:
    """Return the rows of attribution as one of the models reads them, up to their last word."""
    tokenizer = context.source_tokenizer if role == "source" else context.tokenizer
    examples = [until_last_word(one_sided(each, role), tokenizer) for each in context.attribution_rows]
    return batches_of(examples, context.batch_size, role)


def _locate(
    context: MethodContext,
    view: DecoderView,
    rows: Sequence[Batch],
    layers: int,
    counts: tuple[int, int],
    role: str,
) -> Located:
    return locate(
        view,
        rows,
        layers=layers,
        feed_forward=counts[0],
        attention=counts[1],
        progress=lambda numbers: context.progress.progress(f"locate neurons of the {role}", numbers),
    )


def _source_neurons(
    context: MethodContext, rows: Sequence[Batch], target: DecoderView, counts: tuple[int, int]
) -> dict[str, Tensor]:
    """Read the source's neurons of each kind, (layers, neurons, d_S); nothing else of the source is kept."""
    source = DecoderView(context.load_source())
    with undisturbed(source.model):
        located = _locate(context, source, rows, target.depth, counts, "source")
        found = places(source, Ranks.current().broadcast_from_first(lambda: located))
        return {kind: torch.stack([place.read() for place in found[kind]]).to(target.device) for kind in found}


def _hypernetworks(neurons: Mapping[str, Tensor], width: int, start: float, *, seed: int) -> nn.ModuleDict:
    """Linear → ReLU → Linear without biases for each kind, N(0, start²)."""
    generator = torch.Generator().manual_seed(seed)
    networks = nn.ModuleDict()
    for kind, found in neurons.items():
        size = found.shape[-1]
        first, second = (
            nn.utils.skip_init(nn.Linear, size, out, bias=False, dtype=found.dtype) for out in (size, width)
        )
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=start, generator=generator)
        networks[kind] = nn.Sequential(first, nn.ReLU(), second).to(found.device)
    return networks


def _translated(networks: nn.ModuleDict, neurons: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The source's neurons in the target's width, (layers, neurons, d_T)."""
    return {kind: networks[kind](found) for kind, found in neurons.items()}


def _answer_gradients(
    target: DecoderView,
    examples: Sequence[Example],
    onto: Mapping[str, Sequence[Place]],
    added: Mapping[str, Tensor],
    micro_batch_size: int,
    autocast: str,
) -> float:
    """The NLL of the answers with neurons added onto the target's, and its gradient in `added`: sums over the answer
    tokens, the gradient's over those of this process."""
    ranks, total = Ranks.current(), 0.0
    with ExitStack() as stack:
        for kind, neurons in added.items():
            for place, own in zip(onto[kind], neurons, strict=True):
                stack.enter_context(place.added(own))
        for batch, mine in ranks.shard(batches_of(examples, micro_batch_size, "target")):
            positions = supervised(batch)
            with torch.autocast(target.device.type, torch.bfloat16, enabled=autocast == "bfloat16"):
                final = target.trace(batch).final
                assert final is not None
                labels = positions.labels.to(final.device)
                loss = mine * answer_nll(final[positions.mask.to(final.device)], target.head, labels).sum()
            loss.backward()
            total += float(loss.detach())
    return float(ranks.all_reduce_sum([torch.tensor([total], dtype=torch.float64)])[0])


def _gradient(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
