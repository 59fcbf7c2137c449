"""A language-model head over classes of its entries.

Shape suffixes: N tokens, D width, C classes, E entries behind them,
O entries other than the first of each class.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ._head import Head, full_precision
from .base import SemalignError, checked, short_repr


@dataclass(frozen=True, eq=False)
class ClassHead:
    """A head over classes of its entries: p(class) = Σ p(entry) over its members, that is a logit of logsumexp.

    Entries in no class are left out of the softmax. The head is the model's own, not a copy: its rows are picked chunk
    by chunk.

    Law: with one entry in each class it is `head.select(…)`.
    """

    head: Head
    """The head over entries."""
    ids: Int[Tensor, " e"]
    """Rows of the head: the first member of each class, class by class, then all other members, class by class."""
    others: Int[Tensor, " o"]
    """Classes of the other members, ascending."""
    starts: Int[Tensor, " c1"]
    """(c + 1,) where each class starts in `others`, and where the last one ends; on the CPU."""

    __repr__ = short_repr

    @classmethod
    @checked
    def of(cls, head: Head, classes: Int[Tensor, " v"], count: int) -> "ClassHead":
        """The head over `count` classes of its entries.

        Args:
            head: the head over entries.
            classes: (v,) class of each row of the head, −1 for rows in no class; a different number of rows is allowed
                where the rows beyond are in no class.
            count: number of classes, each with at least one member.

        Raises:
            SemalignError: a class outside of −1 … count − 1, a class without a member, or a member that is no row of
                the head.
        """
        classes = classes.cpu().long()
        members = (classes >= 0).nonzero()[:, 0]
        if len(members) and int(members[-1]) >= head.count:
            raise SemalignError(
                f"row {int(members[-1])} is in a class, the head has {head.count} rows: pass the number of rows to "
                "align_classes"
            )
        of_members, order = classes[members].sort(stable=True)
        if len(classes) and not -1 <= int(classes.min()) <= int(classes.max()) < count:
            raise SemalignError(
                f"classes run from {int(classes.min())} to {int(classes.max())}, expected −1 to {count - 1}"
            )
        sizes = of_members.bincount(minlength=count)
        if (sizes == 0).any():
            raise SemalignError(f"class {int(sizes.argmin())} has no member among the rows of the head")
        ends = sizes.cumsum(0)
        is_first = torch.zeros(len(members), dtype=torch.bool)
        is_first[ends - sizes] = True
        ids = torch.cat([members[order][is_first], members[order][~is_first]])
        starts = torch.cat([torch.zeros(1, dtype=torch.long), ends - torch.arange(1, count + 1)])
        device = head.weight.device
        return cls(head, ids.to(device), of_members[~is_first].to(device), starts)

    @property
    def count(self) -> int:
        """Number of classes."""
        return len(self.starts) - 1

    def to(self, device: torch.device) -> "ClassHead":
        """The head on a device; of the same tensors where they lie there."""
        return replace(self, head=self.head.to(device), ids=self.ids.to(device), others=self.others.to(device))

    def members(self, rows: slice) -> tuple[Int[Tensor, " e"], Int[Tensor, " o"]]:
        """Rows of the head behind some classes, the first member of each before all others; and the classes of the
        others, counted from the first of these classes."""
        start, stop, _ = rows.indices(self.count)
        others = slice(int(self.starts[start]), int(self.starts[stop]))
        ids = torch.cat([self.ids[start:stop], self.ids[self.count + others.start : self.count + others.stop]])
        return ids, self.others[others] - start

    @checked
    @full_precision
    def log_probs(self, hidden: Float[Tensor, "n d"], *, temperature: float = 1.0) -> Float[Tensor, "n c"]:
        """Log-probabilities of all classes; plain torch, differentiable in the hidden states and in the head.

        Args:
            hidden: (n, d), what the model feeds its head.
            temperature: divides the logits of the entries.

        Returns:
            (n, c) float32 (float64 for a float64 head).
        """
        logits_EN = self.head.logits(hidden).T[self.ids] / temperature
        return class_logits(logits_EN, self.others).log_softmax(0).T


OutputHead = Head | ClassHead
"""A head over the entries of a vocabulary, or over classes of them."""


def class_logits(logits_EN: Float[Tensor, "e n"], others: Int[Tensor, " o"]) -> Float[Tensor, "c n"]:
    """Logsumexp over the members of each class; entries are rows, as sums over rows are fast.

    Args:
        logits_EN: logits of the first member of each of c classes, then those of all others.
        others: classes of the others.
    """
    classes = len(logits_EN) - len(others)
    if not len(others):
        return logits_EN
    first_CN, others_ON = logits_EN[:classes], logits_EN[classes:]
    index_ON = others[:, None].expand_as(others_ON)
    with torch.no_grad():  # the value does not depend on the peaks
        peak_CN = first_CN.scatter_reduce(0, index_ON, others_ON, "amax").clamp_min_(torch.finfo(logits_EN.dtype).min)
    mass_CN = (first_CN - peak_CN).exp()
    mass_CN = mass_CN.scatter_add(0, index_ON, (others_ON - peak_CN[others]).exp())
    return peak_CN + mass_CN.log()
