"""Checks of what objectives of other authors return; an error names the objective."""

import operator
from typing import Any

import torch
from jaxtyping import Float, Int
from semalign_geometry import ClassHead, Head, TopEntries
from semalign_geometry.base import ComponentError, brief
from torch import Tensor

from ._objectives import Objective
from ._spans import BatchSpans
from ._step import Step


def total_of(objective: Objective, step: Step) -> Float[Tensor, "*one"]:
    """The sum of an objective over the units of a micro-batch, as `Objective.total` returns it: one number, with a
    gradient where gradients are recorded.

    Raises:
        ComponentError: the objective returned something else.
    """
    total: Any = objective.total(step)
    returned = None
    if not isinstance(total, Tensor):
        returned = brief(total)
    elif total.numel() != 1:
        returned = f"a tensor of shape {tuple(total.shape)}"
    elif torch.is_grad_enabled() and not total.requires_grad:
        returned = f"{brief(total.item())} without a gradient"
    if returned is not None:
        raise ComponentError(
            f"the objective {objective.name} returned {returned} from total: expected one number, the sum over the "
            "units of the micro-batch as a tensor without dimensions, computed from step.residual or step.hidden"
        )
    assert isinstance(total, Tensor)
    return total


def count_of(objective: Objective, counts: Int[Tensor, " b"]) -> int:
    """The units of examples with these numbers of spans, as `Objective.count` returns them.

    Raises:
        ComponentError: the objective returned no whole number, or one below 0.
    """
    count: Any = objective.count(counts)
    try:
        found = operator.index(count)
    except (TypeError, ValueError, RuntimeError):  # the last two of tensors that hold no whole number
        found = -1
    if found < 0:
        raise ComponentError(
            f"the objective {objective.name} returned {brief(count)} from count: expected the number of units as an "
            "int of 0 or more, such as int(counts.sum())"
        )
    return found


def check_objective(objective: Objective, *, width: int, reference_width: int, spans: bool = False) -> None:
    """Try an objective on two made-up examples, so that one that returns something else is refused before a source has
    worked for it. Whatever else it raises is ignored: it need not accept examples that are made up.

    Args:
        objective: the objective.
        width: of the target's vectors.
        reference_width: of the supervision's.
        spans: whether source and target have different tokenizers.

    Raises:
        ComponentError: `total` or `count` returned something else, see `total_of` and `count_of`.
    """
    step = _made_up(width, reference_width, spans=spans, hidden=objective.needs_output)
    try:
        count_of(objective, step.mask.sum(1))
        with torch.enable_grad():
            total_of(objective, step)
    except ComponentError:
        raise
    except Exception:  # its own, SemalignError too
        return


def _made_up(width: int, reference_width: int, *, spans: bool, hidden: bool) -> Step:
    """Two examples of four spans; with two tokenizers, each span is two tokens for the target."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(2, 4, dtype=torch.bool)
    places, entries = int(mask.sum()), 8
    tokens = 2 * places if spans else places
    head = Head(drawn(entries, width))
    log_probs = drawn(places, entries).log_softmax(1)
    ids = torch.arange(entries, dtype=torch.int32).expand(places, entries)
    return Step(
        residual=drawn(2, 4, width).requires_grad_(),
        reference=drawn(2, 4, reference_width),
        mask=mask,
        hidden=drawn(tokens, width).requires_grad_() if hidden else None,
        labels=torch.zeros(tokens, dtype=torch.long),
        output=TopEntries(ids, log_probs, torch.full((places,), -torch.inf)),
        head=head,
        shared_head=ClassHead.of(head, torch.arange(entries), entries) if spans else head,
        temperature=1.0,
        spans=_made_up_spans(places) if spans else None,
    )


def _made_up_spans(count: int) -> BatchSpans:
    """Spans of one source token and two target tokens, in two examples."""
    places = torch.arange(count)
    return BatchSpans(
        counts=torch.full((2,), count // 2),
        starts=2 * places,
        lengths=torch.full((count,), 2),
        source_starts=places,
        several=torch.ones(count, dtype=torch.bool),
        log_likelihood=torch.full((count,), -1.0),
    )
