"""Layer attribution: the share of the task that each source layer carries."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from semalign_geometry.base import SemalignError
from torch import Tensor

from ._batch import Batch
from ._decoder import DecoderView, view_of
from ._scores import LayerScores, Scorer
from ._undisturbed import undisturbed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGGER = logging.getLogger(__name__)


def attribute_layers(
    source: "PreTrainedModel | DecoderView",
    batches: Iterable[Batch],
    *,
    scorer: Scorer,
    bootstrap: int = 1000,
    seed: int = 0,
) -> LayerScores:
    """Score every source layer on task examples, with the uncertainty over examples.

    Laws: independent of how examples are split into batches; the model is left as found.

    Args:
        source: the source model or its view.
        batches: task examples, answers supervised.
        scorer: one of `GradientActivation`, `Ablation`, `Similarity`, or any `Scorer`.
        bootstrap: resamples of the examples for `stability` and `top_frequency`.
        seed: seed of the resampling.

    Raises:
        SemalignError: no examples, no bootstrap samples, scores that are not finite, or not one for each example and
            layer.

    Example:
        >>> import torch
        >>> from semalign_attribution import GradientActivation
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 32}
        >>> source = LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, **sizes))
        >>> ids = torch.randint(0, 32, (4, 8))
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> scores = attribute_layers(source, [batch], scorer=GradientActivation())
        >>> scores.examples, scores.depth
        (4, 3)

    Source: v2 stage 1.
    """
    if bootstrap < 1:
        raise SemalignError(f"bootstrap is {bootstrap}, expected at least 1 resample")
    view = view_of(source)
    with undisturbed(view.model):
        parts = [_scored(scorer, view, batch) for batch in batches if len(next(iter(batch.values()), ()))]
    if not parts:
        raise SemalignError("there are no examples to attribute on: the batches are empty")
    values = torch.cat(parts)
    if not torch.isfinite(values).all():
        raise SemalignError(f"{scorer.name} returned scores that are not finite: check the source's weights and dtype")
    if view.depth > 1 and bool((values == values[..., :1]).all()):
        LOGGER.warning("%s scores all source layers alike: the examples do not distinguish them", scorer.name)
    similarity = None
    if values.dim() == 3:
        similarity = tuple(tuple(row) for row in values.mean(0).tolist())
        values = values.mean(1)
    count = len(values)
    mean = values.mean(0)
    error = values.std(0) / count**0.5 if count > 1 else torch.zeros_like(mean)
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(count, (bootstrap, count), generator=generator)
    shares = torch.zeros(bootstrap, count, dtype=values.dtype).scatter_add_(1, draws, torch.ones_like(draws).to(values))
    resampled = shares @ values / count
    first = torch.nn.functional.one_hot(resampled.argmax(1), len(mean)).double().mean(0)
    return LayerScores(
        scorer=scorer.name,
        examples=count,
        mean=tuple(mean.tolist()),
        standard_error=tuple(error.tolist()),
        stability=float(_spearman(resampled, mean).mean()),
        top_frequency=tuple(first.tolist()),
        similarity=similarity,
    )


def _scored(scorer: Scorer, view: DecoderView, batch: Batch) -> Tensor:
    scores = scorer(view, batch).detach().cpu().double()
    examples, shape = len(next(iter(batch.values()))), tuple(scores.shape)
    if len(shape) not in (2, 3) or (shape[0], shape[-1]) != (examples, view.depth):
        raise SemalignError(
            f"{scorer.name} returned scores of shape {shape} for {examples} examples and {view.depth} source layers: "
            "expected (examples, layers) or (examples, targets, layers)"
        )
    return scores


def _spearman(rows: Float[Tensor, "r n"], reference: Float[Tensor, " n"]) -> Float[Tensor, " r"]:
    """Rank correlation of each row with the reference; 1 if neither has an order, 0 if one of them has none."""
    ranks, own = _centred_ranks(rows), _centred_ranks(reference[None])[0]
    ranks_vary, own_varies = ranks.any(1), own.any()
    correlations = (ranks @ own) / torch.where(ranks_vary & own_varies, ranks.norm(dim=1) * own.norm(), 1.0)
    return torch.where(ranks_vary | own_varies, correlations, 1.0)


def _centred_ranks(rows: Float[Tensor, "r n"]) -> Float[Tensor, "r n"]:
    """Places of the values of each row in its order, minus their mean; ties share the mean of their places."""
    lower = (rows[:, None, :] < rows[:, :, None]).sum(2)
    higher = (rows[:, None, :] > rows[:, :, None]).sum(2)
    return (lower - higher).to(rows.dtype) / 2
