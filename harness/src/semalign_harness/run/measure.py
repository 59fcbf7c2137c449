"""Measurements of a model against the source on held-out rows."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from semalign_align import FinalStates, Ranks, SupervisedBatch, Supervision
from semalign_attribution import DecoderView, undisturbed
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from ..data.encoding import Example
from ..generation import end_ids, generate
from ..models.loading import LoadedModel
from ..reading import answer_text, same_number
from ..results.measurement import Measurement, RowFigures
from ..util.failures import naming
from .job import Job

TOKENS_AT_ONCE = 128
"""Supervised tokens whose full logits are in memory at a time."""


@torch.no_grad()
def measure(
    view: DecoderView,
    held_out: Supervision,
    *,
    batch_size: int,
    is_source: bool = False,
    progress: Callable[[Sequence[range]], Iterable[range]] = iter,
) -> Measurement:
    """Measure a model against the source's stored final states (output supervision `final_hidden`); the processes of a
    job share the rows.

    Args:
        view: the model.
        held_out: the source's states on rows.
        batch_size: rows at a time.
        is_source: whether it is the source itself, whose states are read from the store: its layers do not run again.
        progress: passes the batches of this process on, and may show progress.

    Raises:
        SemalignError: the store keeps top entries only.
    """
    entries, ranks = held_out.entries.to(view.device), Ranks.current()
    sums = torch.zeros(len(held_out), 3, dtype=torch.float64)
    chunks = [range(start, min(start + batch_size, len(held_out))) for start in range(0, len(held_out), batch_size)]
    with undisturbed(view.model):
        for indices in progress(chunks[ranks.rank :: ranks.size]):
            data = held_out.collate(indices, device=view.device)
            if not isinstance(data.output, FinalStates):
                raise SemalignError("measuring the exact KL needs a store with output supervision final_hidden")
            source = data.output
            hidden = source.hidden if is_source else _final_states(view, data)
            of_tokens = (hidden, source.hidden, data.positions.labels)
            found = [
                _figures(view.head.logits(ours), labels, entries, source.head.logits(theirs))
                for ours, theirs, labels in zip(*(each.split(TOKENS_AT_ONCE) for each in of_tokens), strict=True)
            ]
            row = torch.tensor(indices).repeat_interleave(data.positions.counts.cpu())
            sums.index_add_(0, row, torch.cat(found).cpu().double())
    (sums,) = ranks.all_reduce_sum([sums])
    tokens = held_out.manifest.supervised_tokens
    nll, kl, agreement = (sums.sum(0) / tokens).tolist()
    columns = (sums / held_out.counts[:, None]).T.tolist()
    by_row = RowFigures(tokens=held_out.counts.tolist(), nll=columns[0], kl=columns[1], agreement=columns[2])
    return Measurement(answer_nll=nll, kl=kl, agreement=agreement, tokens=tokens, rows=len(held_out), by_row=by_row)


def _figures(
    logits: Float[Tensor, "n v"], labels: Int[Tensor, " n"], entries: Int[Tensor, " e"], source: Float[Tensor, "n e"]
) -> Float[Tensor, "n 3"]:
    """Return NLL over the whole vocabulary, and KL and agreement over the entries of both models."""
    nll = cross_entropy(logits, labels, reduction="none")
    ours, theirs = logits.index_select(1, entries), source
    agreement = ours.argmax(1) == theirs.argmax(1)
    kl = kl_div(ours.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True).sum(1)
    return torch.stack([nll, kl, agreement.to(nll)], 1)


def _final_states(view: DecoderView, data: SupervisedBatch) -> Float[Tensor, "p d"]:
    trace = view.trace(data.batch)
    assert trace.final is not None
    return trace.final[data.positions.mask]


@torch.no_grad()
def right_answers(
    loaded: LoadedModel,
    examples: Sequence[Example],
    *,
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[Sequence[list[int]]], Iterable[list[int]]] = iter,
) -> list[bool]:
    """Return whether each greedily generated answer has the number of the reference answer (see `reading`).

    The model was loaded with `generates`.
    """
    assert loaded.way is not None
    ends, ranks = end_ids(loaded.model, loaded.tokenizer), Ranks.current()
    found: dict[int, bool] = {}
    order = sorted(range(len(examples)), key=lambda place: len(examples[place].prompt_ids))
    parts = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with undisturbed(loaded.model):
        for part in progress(parts[ranks.rank :: ranks.size]):
            prompts = [examples[place].prompt_ids for place in part]
            output = generate(loaded.model, prompts, max_new_tokens=max_new_tokens, ends=ends, way=loaded.way)
            texts = [answer_text(loaded.tokenizer, ids) for ids in output]
            found |= {place: same_number(text, examples[place].answer) for place, text in zip(part, texts, strict=True)}
    of_all = {place: right for share in ranks.all_gather(found) for place, right in share.items()}
    return [of_all[place] for place in range(len(examples))]


def measured(
    job: Job, label: str, loaded: LoadedModel, held_out: Supervision, *, is_source: bool = False
) -> Measurement:
    """Measure one model by the settings of the experiment; `is_source` as in `measure`."""
    wanted, batch_size = job.experiment.measure, job.experiment.batch_size
    with naming(f"{label}, {loaded.folder}, cannot be measured"):
        found = measure(
            DecoderView(loaded.model),
            held_out,
            batch_size=batch_size,
            is_source=is_source,
            progress=partial(job.console.progress, f"measure {label}"),
        )
        rows = job.inputs.split.held_out[: wanted.answer_rows]
        if not rows:
            return found
        right = right_answers(
            loaded,
            rows,
            max_new_tokens=wanted.max_new_tokens,
            batch_size=4 * batch_size,
            progress=partial(job.console.progress, f"{len(rows)} answers of {label}"),
        )
    by_row = found.by_row.model_copy(update={"correct": tuple(right)})
    accuracy = sum(right) / len(right)
    return found.model_copy(update={"accuracy": accuracy, "answer_rows": len(rows), "by_row": by_row})
