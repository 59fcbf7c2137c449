"""How close a model's distribution is to its source's on gold answers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from semalign_attribution import DecoderView, supervised, undisturbed
from semalign_geometry import SharedVocabulary, kl_divergence

from ..data.encoding import Example, TextEncoder
from ..data.rows import batches
from ..run.measure import TOKENS_AT_ONCE
from ..util.journal import Answer, Journal, request_key


class Text(NamedTuple):
    """A gold answer after its prompt, both as the model reads them."""

    prompt: str
    answer: str


class Agreement(NamedTuple):
    """Means over the tokens of one gold answer."""

    kl: float
    """KL(p_S ‖ p_T), nats per token."""
    agreement: float
    """Share of the tokens where the likeliest entry is the source's."""
    tokens: int
    """Tokens."""


def missing_agreements(examples: Sequence[Example], journal: Journal) -> dict[str, Example]:
    """The gold answers that a journal does not hold, by their keys in it."""
    keyed = {request_key("agreement", each.prompt_ids, each.answer_ids): each for each in examples}
    return {key: example for key, example in keyed.items() if journal.get(key) is None}


def agreements(
    views: Callable[[], tuple[DecoderView, DecoderView, SharedVocabulary]],
    examples: Sequence[Example],
    *,
    journal: Journal,
    batch_size: Callable[[str, int], int],
    progress: Callable[[str, int], Callable[[int], None]],
) -> list[Agreement]:
    """KL to the source and top-1 agreement on each gold answer, kept in a journal.

    Args:
        views: loads the source, the model, and the vocabulary that both share; called only if an answer is missing.
        examples: gold answers with their prompts.
        journal: where the answers are kept.
        batch_size: examples that run together, by kind and tokens.
        progress: given a label and the number of missing answers, returns what is told of those that came.
    """
    keys = [request_key("agreement", example.prompt_ids, example.answer_ids) for example in examples]
    if missing := missing_agreements(examples, journal):
        source, target, shared = views()
        report = progress("compare with the source", len(missing))
        order = sorted(missing, key=lambda key: -len(missing[key]))
        while order:
            size = batch_size("agreement", len(missing[order[0]]))
            part, order = order[:size], order[size:]
            found = _compare(source, target, shared, [missing[key] for key in part])
            journal.add({key: Answer(list(value), 0.0, len(part)) for key, value in zip(part, found, strict=True)})
            report(len(part))
    answers = [journal.get(key) for key in keys]
    return [Agreement(*answer.value) for answer in answers if answer is not None]


def gold_example(text: Text, encoder: TextEncoder, limit: int | None) -> Example:
    """A gold answer after its prompt, whose beginning is cut so that both fit into `limit` tokens.

    A caller has seen to it that the answer and one token do.
    """
    prompt_ids, answer_ids = encoder.pair_ids(*text)
    if limit is not None:
        assert len(answer_ids) < limit
        prompt_ids = prompt_ids[-(limit - len(answer_ids)) :]
    return Example(tuple(prompt_ids), tuple(answer_ids), text.answer)


@torch.no_grad()
def _compare(
    source: DecoderView, target: DecoderView, shared: SharedVocabulary, examples: list[Example]
) -> list[Agreement]:
    """In the order of the examples, which `batches` sorts by length."""
    (batch,) = batches(examples, len(examples))
    places = sorted(range(len(examples)), key=lambda place: len(examples[place]))
    positions = supervised(batch)
    hidden = []
    for view in (source, target):
        with undisturbed(view.model):
            final = view.trace(batch).final
        assert final is not None
        hidden.append(final[positions.mask.to(view.device)])
    of_source, of_target = hidden[0].to(target.device), hidden[1]
    source_head, target_head = source.head.select(shared.source_ids), target.head.select(shared.target_ids)
    kl = kl_divergence(of_source, source_head, of_target, target_head)
    same = torch.cat(
        [
            source_head.logits(theirs).argmax(1) == target_head.logits(ours).argmax(1)
            for theirs, ours in zip(of_source.split(TOKENS_AT_ONCE), of_target.split(TOKENS_AT_ONCE), strict=True)
        ]
    )
    means = [positions.example_means(values.float().cpu()).tolist() for values in (kl, same)]
    found: list[Agreement | None] = [None] * len(examples)
    for row, place in enumerate(places):
        found[place] = Agreement(means[0][row], means[1][row], int(positions.counts[row]))
    return [value for value in found if value is not None]
