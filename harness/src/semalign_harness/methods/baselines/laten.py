"""LaTen: neurons of the source, translated by a hypernetwork, are added onto neurons of the target."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from semalign_align import Ranks
from semalign_attribution import Batch, DecoderView, supervised, undisturbed
from semalign_geometry import answer_nll
from semalign_geometry.base import SemalignError
from semalign_train import StepRecord, optimisation_batches
from torch import Tensor, nn

from ...data.encoding import Example, Role
from ...data.sides import ROLES, batches_of, one_sided
from .._method import MethodContext, MethodReport
from .laten_settings import LaTenSettings
from .neurons import Located, Place, locate, parts_of, places, until_last_word


def transfer(settings: LaTenSettings, context: MethodContext) -> MethodReport:
    """Locate neurons in both models, train the hypernetworks, add the translated neurons.

    The source is in memory until its neurons are read. `seconds` counts the attribution. Several processes locate
    the same neurons each, and share the rows of a step.
    """
    started, ranks = time.perf_counter(), Ranks.current()
    target = DecoderView(context.target)
    rows = {role: _attribution_rows(context, role) for role in ROLES}
    with undisturbed(target.model):
        part = parts_of(target)[0]
        counts = _count(settings, part.down_proj.in_features), _count(settings, part.o_proj.in_features)
        source_neurons = _source_neurons(context, rows["source"], target, counts)
        found = _locate(context, target, rows["target"], target.depth, counts, "target")
        onto = places(target, ranks.broadcast_from_first(lambda: found))
        networks = _hypernetworks(source_neurons, target.width, settings.start, seed=context.train.seed)
        tokens = _train(settings, context, target, networks, source_neurons, onto)
        added = _translated(networks, source_neurons)
        changed = sum(
            place.fuse(neurons) for kind in onto for place, neurons in zip(onto[kind], added[kind], strict=True)
        )
        numbers = sum(each.numel() for each in added.values())
        context.progress.note(f"{changed} of the {numbers} numbers of the target's neurons changed")
    return MethodReport(
        method="laten",
        trained_parameters=sum(parameter.numel() for parameter in networks.parameters()),
        steps=settings.steps,
        supervised_tokens=tokens,
        seconds=time.perf_counter() - started,
    )


def _count(settings: LaTenSettings, neurons: int) -> int:
    return max(1, int(settings.share * neurons))


def _train(
    settings: LaTenSettings,
    context: MethodContext,
    target: DecoderView,
    networks: nn.ModuleDict,
    source_neurons: Mapping[str, Tensor],
    onto: Mapping[str, Sequence[Place]],
) -> int:
    """Train the hypernetworks in place; returns the number of supervised tokens."""
    config, rows = context.train, context.rows
    optimiser = torch.optim.AdamW(
        list(networks.parameters()), lr=settings.learning_rate, betas=config.betas, weight_decay=settings.weight_decay
    )
    order = optimisation_batches(config.model_copy(update={"batch_size": settings.batch_size}), len(rows))
    seen = 0
    for step in range(1, settings.steps + 1):
        begun, indices = time.perf_counter(), next(order)
        chosen = [rows[index] for index in indices]
        count = sum(len(row.answer_ids) for row in chosen)
        losses = _gradients(settings, context, target, networks, source_neurons, onto, chosen)
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
                steps=settings.steps,
                losses=losses,
                gradient_norms={},
                gradient_norm=norm,
                learning_rate=settings.learning_rate,
                supervised_tokens=count,
                tokens=tokens,
                seconds=seconds,
                tokens_per_second=tokens / seconds,
                examples=tuple(indices),
            )
        )
    return seen


def _gradients(
    settings: LaTenSettings,
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
        answer = _answer_gradients(target, chosen, onto, added, context.train.micro_batch_size, context.train.autocast)
        gradients = Ranks.current().all_reduce_sum([_gradient(value) / count for value in added.values()])
        penalty = settings.penalty * torch.stack([each.square().mean() for each in translated.values()]).sum()
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
