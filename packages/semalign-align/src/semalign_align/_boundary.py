"""Checks of what objectives of other authors return; an error names the objective."""

import operator
from typing import Any

import torch
from jaxtyping import Float, Int
from semalign_geometry import Head, TopEntries
from semalign_geometry.base import ComponentError, brief
from torch import Tensor

from ._objectives import Objective, Step


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
    """The units of examples with these numbers of supervised tokens, as `Objective.count` returns them.

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


def check_objective(objective: Objective, *, width: int, reference_width: int) -> None:
    """Try an objective on two made-up examples, so that one that returns something else is refused before a source has
    worked for it. Whatever else it raises is ignored: it need not accept examples that are made up.

    Args:
        objective: the objective.
        width: of the target's vectors.
        reference_width: of the supervision's.

    Raises:
        ComponentError: `total` or `count` returned something else, see `total_of` and `count_of`.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.ones(2, 4, dtype=torch.bool)
    tokens, entries = int(mask.sum()), 8
    head = Head(drawn(entries, width))
    log_probs = drawn(tokens, entries).log_softmax(1)
    ids = torch.arange(entries, dtype=torch.int32).expand(tokens, entries)
    step = Step(
        residual=drawn(2, 4, width).requires_grad_(),
        reference=drawn(2, 4, reference_width),
        mask=mask,
        hidden=drawn(tokens, width).requires_grad_() if objective.needs_output else None,
        labels=torch.zeros(tokens, dtype=torch.long),
        output=TopEntries(ids, log_probs, torch.full((tokens,), -torch.inf)),
        head=head,
        shared_head=head,
        temperature=1.0,
    )
    try:
        count_of(objective, mask.sum(1))
        with torch.enable_grad():
            total_of(objective, step)
    except ComponentError:
        raise
    except Exception:  # its own, SemalignError too
        return
