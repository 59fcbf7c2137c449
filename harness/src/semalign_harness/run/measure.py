"""Measurements of a model against the source on held-out rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from semalign_align import FinalStates, Ranks, SupervisedBatch, Supervision, span_log_likelihoods
from semalign_attribution import IGNORE, DecoderView, undisturbed
from semalign_geometry import Head, OutputHead, answer_nll
from semalign_geometry.base import SemalignError
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedTokenizerBase

from ..data.encoding import Example, Role
from ..data.sides import one_sided
from ..generation import end_ids, generate
from ..models.loading import LoadedModel
from ..reading import answer_text, same_number
from ..results.measurement import Measurement, RowMetrics
from ..util.failures import naming
from .job import Job

TOKENS_AT_ONCE = 128
"""Supervised tokens whose full logits are in memory at a time."""


class Measured(NamedTuple):
    """Metrics of a model, with the distributions behind them."""

    metrics: Measurement
    probabilities: Float[Tensor, "2 e"]
    """Probabilities of each shared entry, or class, by the source and by the model; means over all spans, float32."""


@torch.no_grad()
def measure(
    view: DecoderView,
    held_out: Supervision,
    *,
    batch_size: int,
    answer_bytes: Sequence[int] = (),
    is_source: bool = False,
    progress: Callable[[Sequence[range]], Iterable[range]] = iter,
) -> Measured:
    """Measure a model against the source's stored final states (output supervision `final_hidden`); the processes of a
    job share the rows.

    Where the tokenizers differ, KL and agreement are of prefix classes at the starts of spans.

    Args:
        view: the model.
        held_out: the source's states on rows.
        batch_size: rows at a time.
        answer_bytes: length of the answer of each row; empty to leave bits per byte out.
        is_source: whether it is the source itself, whose states are read from the store: its layers do not run again.
        progress: passes the batches of this process on, and may show progress.

    Raises:
        SemalignError: the store keeps top entries only.
    """
    ranks, head = Ranks.current(), held_out.output_head(view.head)
    sums = torch.zeros(len(held_out), 3, dtype=torch.float64)
    probabilities = torch.zeros(2, held_out.manifest.entries, dtype=torch.float64)
    chunks = [range(start, min(start + batch_size, len(held_out))) for start in range(0, len(held_out), batch_size)]
    with undisturbed(view.model):
        for indices in progress(chunks[ranks.rank :: ranks.size]):
            data = held_out.collate(indices, device=view.device)
            if data.spans is None:
                found = _of_tokens(view, data, held_out.entries.to(view.device), is_source=is_source)
            else:
                found = _of_spans(view, data, head, is_source=is_source)
            row = torch.tensor(indices).repeat_interleave(data.counts.cpu())
            sums.index_add_(0, row, torch.cat([values for values, _ in found]).cpu().double())
            probabilities += sum(each.cpu().double() for _, each in found)
    sums, probabilities = ranks.all_reduce_sum([sums, probabilities])
    return Measured(_metrics(held_out, sums, answer_bytes), (probabilities / held_out.counts.sum()).float())


def _metrics(held_out: Supervision, sums: Float[Tensor, "r 3"], answer_bytes: Sequence[int]) -> Measurement:
    """Return metrics from NLL, KL and agreement, summed over the spans of each row."""
    nll, kl, agreement = (sums.sum(0) / held_out.counts.sum()).tolist()
    columns = (sums / held_out.counts[:, None]).T.tolist()
    return Measurement(
        answer_nll=nll,
        bits_per_byte=float(sums[:, 0].sum()) / sum(answer_bytes) / math.log(2) if answer_bytes else None,
        kl=kl,
        agreement=agreement,
        tokens=held_out.manifest.supervised_tokens,
        spans=held_out.manifest.spans,
        rows=len(held_out),
        by_row=RowMetrics(
            tokens=held_out.counts.tolist(),
            nll=columns[0],
            kl=columns[1],
            agreement=columns[2],
            answer_bytes=tuple(answer_bytes),
        ),
    )


_Compared = tuple[Float[Tensor, "n 3"], Float[Tensor, "2 e"]]
"""NLL, KL and agreement of some spans, and the sums of the source's and the model's probabilities."""


def _of_tokens(
    view: DecoderView, data: SupervisedBatch, entries: Int[Tensor, " e"], *, is_source: bool
) -> list[_Compared]:
    """Return NLL over the whole vocabulary, and KL and agreement over the entries of both models, part by part."""
    source = _final(data)
    assert isinstance(source.head, Head)  # of one tokenizer
    hidden = source.hidden if is_source else _final_states(view, data)
    found = []
    for ours, theirs, labels in zip(
        *(each.split(TOKENS_AT_ONCE) for each in (hidden, source.hidden, data.positions.labels)), strict=True
    ):
        logits = view.head.logits(ours)
        nll = cross_entropy(logits, labels, reduction="none")
        found.append(_compared(nll, logits.index_select(1, entries), source.head.logits(theirs)))
    return found


def _of_spans(view: DecoderView, data: SupervisedBatch, head: OutputHead, *, is_source: bool) -> list[_Compared]:
    """Return the NLL of spans, and KL and agreement of the classes that they begin with, part by part."""
    source, spans = _final(data), data.spans
    assert spans is not None
    if is_source:
        nll, hidden, head = -spans.log_likelihood, source.hidden, source.head
    else:
        states = _final_states(view, data)
        nll = -span_log_likelihoods(-answer_nll(states, view.head, data.positions.labels), spans)
        hidden = data.at_spans(states)
    parts = (each.split(TOKENS_AT_ONCE) for each in (nll, hidden, source.hidden))
    return [
        _compared(own, head.log_probs(ours), source.head.log_probs(theirs))
        for own, ours, theirs in zip(*parts, strict=True)
    ]


def _compared(nll: Float[Tensor, " n"], ours: Float[Tensor, "n e"], theirs: Float[Tensor, "n e"]) -> _Compared:
    """Compare the logits of the model with the source's."""
    agreement = ours.argmax(1) == theirs.argmax(1)
    log_q, log_p = ours.log_softmax(1), theirs.log_softmax(1)
    kl = kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
    probabilities = torch.stack([log_p.exp().sum(0), log_q.exp().sum(0)])
    return torch.stack([nll, kl, agreement.to(nll)], 1), probabilities


def _final(data: SupervisedBatch) -> FinalStates:
    if not isinstance(data.output, FinalStates):
        raise SemalignError("measuring the exact KL needs a store with output supervision final_hidden")
    return data.output


def answer_bytes(held_out: Supervision, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the length of each answer of a store in UTF-8, at least 1; the end of a turn counts nothing.

    Args:
        held_out: the store.
        tokenizer: the target's, whose tokens it holds.
    """
    answers = (batch["labels"][0] for batch in (held_out.tokens([row]) for row in range(len(held_out))))
    texts = (
        tokenizer.decode(
            labels[labels != IGNORE].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        for labels in answers
    )
    return [max(1, len(str(text).encode())) for text in texts]


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


def measured(job: Job, label: str, loaded: LoadedModel, held_out: Supervision, *, is_source: bool = False) -> Measured:
    """Measure one model by the settings of the experiment, with generated answers where they are wanted; `is_source` as
    in `measure`."""
    wanted, batch_size = job.experiment.measure, job.experiment.batch_size
    with naming(f"{label}, {loaded.folder}, cannot be measured"):
        found = measure(
            DecoderView(loaded.model),
            held_out,
            batch_size=batch_size,
            answer_bytes=answer_bytes(held_out, job.inputs.target.tokenizer),
            is_source=is_source,
            progress=partial(job.console.progress, f"measure {label}"),
        )
        role: Role = "source" if is_source else "target"
        rows = [one_sided(row, role) for row in job.inputs.split.held_out[: wanted.answer_rows]]
        if not rows:
            return found
        right = right_answers(
            loaded,
            rows,
            max_new_tokens=wanted.max_new_tokens,
            batch_size=4 * batch_size,
            progress=partial(job.console.progress, f"{len(rows)} answers of {label}"),
        )
    changes = {
        "accuracy": sum(right) / len(right),
        "answer_rows": len(rows),
        "by_row": found.metrics.by_row.model_copy(update={"correct": tuple(right)}),
    }
    return found._replace(metrics=found.metrics.model_copy(update=changes))
