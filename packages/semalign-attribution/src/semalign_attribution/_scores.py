"""Scores of the source's layers, and the protocol of what scores them."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from pydantic import model_validator
from semalign_geometry.base import Contract

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from ._batch import Batch
    from ._decoder import DecoderView


class LayerScores(Contract):
    """Scores of the source's layers on task examples, shallow to deep."""

    scorer: str
    """Name of the scorer."""
    examples: int
    """Examples that were scored."""
    mean: tuple[float, ...]
    """Mean score of each source layer over the examples."""
    standard_error: tuple[float, ...]
    """Standard error of each mean over the examples; 0 for a single example."""
    stability: float
    """Mean Spearman correlation of the ranking with the rankings of bootstrap samples of the examples; 1 is stable."""
    top_frequency: tuple[float, ...]
    """Share of the bootstrap samples in which each layer ranks first."""
    similarity: tuple[tuple[float, ...], ...] | None = None
    """For scorers that compare with a target: one row of source-layer scores for each target layer."""

    @property
    def depth(self) -> int:
        """L_S, the number of source layers."""
        return len(self.mean)

    @model_validator(mode="after")
    def _lengths_agree(self) -> "LayerScores":
        rows = (self.standard_error, self.top_frequency, *(self.similarity or ()))
        for row in rows:
            if len(row) != self.depth:
                raise ValueError(
                    f"every row must have one value for each source layer: mean has {self.depth}, another row has "
                    f"{len(row)}"
                )
        return self


@runtime_checkable
class Scorer(Protocol):
    """Scores the source's layers on each example of a batch; the score of an example must not depend on the others."""

    @property
    def name(self) -> str:
        """Name of the scores in results."""
        ...

    def __call__(
        self, source: "DecoderView", batch: "Batch"
    ) -> "Float[Tensor, 'examples layers'] | Float[Tensor, 'examples targets layers']":
        """One score per example and source layer, or per example, target layer and source layer."""
        ...
