"""LaTen: neurons of the source, translated by a hypernetwork, are added onto neurons of the target."""

from typing import ClassVar, Literal

from semalign_geometry.base import SemalignError
from semalign_train import TrainSettings

from ..models.shape import ModelShape
from ._method import Method, MethodContext, MethodNeeds, MethodReport, Work
from .baselines.laten_settings import MOVED, LaTenSettings


class LaTen(LaTenSettings, Method):
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
        """Locate neurons in both models, train the hypernetworks, add the translated neurons."""
        from .baselines.laten import transfer  # with torch

        return transfer(self, context)
