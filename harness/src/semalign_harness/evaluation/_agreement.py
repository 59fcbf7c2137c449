"""Distance of a model's distribution from its source's on gold answers."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from semalign_attribution import DecoderView, supervised, undisturbed
from semalign_geometry import SharedVocabulary, kl_divergence

from ..data.encoding import Example, TextEncoder
from ..data.sides import batches_of
from ..models.loading import load_model
from ..run.measure import TOKENS_AT_ONCE
from ..util.console import Console
from ..util.failures import naming
from ..util.journal import Answer, Journal, request_key
from ._models import Models


class Text(NamedTuple):
    """A gold answer and its prompt, both as the model reads them."""

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


def gold_example(text: Text, encoder: TextEncoder, limit: int | None) -> Example:
    """Encode a gold answer and its prompt, cut on the left so that both fit into `limit` tokens.

    The answer must be shorter than the limit.
    """
    prompt_ids, answer_ids = encoder.pair_ids(*text)
    if limit is not None:
        assert len(answer_ids) < limit
        prompt_ids = prompt_ids[-(limit - len(answer_ids)) :]
    return Example(tuple(prompt_ids), tuple(answer_ids), text.answer)


def short(sha256: str) -> str:
    """Hash of a hash, short enough for the name of a file."""
    return hashlib.sha256(sha256.encode()).hexdigest()[:16]


class Comparer:
    """Compares a model with its source on gold answers; loads both when a comparison is missing."""

    def __init__(self, models: Models, journals: Path, batch_size: Callable[[str, int], int], console: Console) -> None:
        """Read no file yet.

        Args:
            models: the model and its source.
            journals: folder that keeps the comparisons.
            batch_size: examples that run together, by kind and tokens.
            console: shows the progress.
        """
        assert models.source is not None and models.shared is not None
        self._models, self._shared, self._device = (models.source, models.opened), models.shared, models.device
        precision = models.source.precision(models.device)
        self._file = journals / f"agreement-{short(str(models.hashes[1]))}-{precision}.jsonl"
        self._encoder, self._limit = models.encoder, models.limit_of_both
        self._batch_size, self._console = batch_size, console
        self.truncated: Counter[str] = Counter()
        """Prompts that were cut on the left, by benchmark."""

    @functools.cached_property
    def _journal(self) -> Journal:
        """Read by the one rank that compares: two would both mend a torn last line."""
        return Journal(self._file)

    def check(self, texts: Sequence[Text]) -> None:
        """Load and release the source if a comparison is missing: a broken one is refused early.

        Raises:
            SemalignError: the source cannot be used.
        """
        if self._missing(self._examples(texts)):
            with self._console.step("load the source, to check it"):
                load_model(self._models[0], device=self._device)

    def compare(self, benchmark: str, texts: Sequence[Text]) -> list[Agreement]:
        """Return KL to the source and top-1 agreement on each gold answer of a benchmark."""
        examples = self._examples(texts)
        pairs = zip(texts, examples, strict=True)
        cut = sum(len(self._encoder.ids(text.prompt)) > len(example.prompt_ids) for text, example in pairs)
        self.truncated[benchmark] = cut
        if cut:
            self._console.note(
                f"{cut} prompts of {benchmark} with their solutions are longer than both models read, and were cut on "
                "the left for the comparison with the source"
            )
        if missing := self._missing(examples):
            source, target = (opened.settings.path for opened in self._models)
            with naming(f"{target} cannot be compared with {source}"):
                self._fill(missing)
        return [Agreement(*answer.value) for answer in self._journal.found(map(_key, examples))]

    def _examples(self, texts: Sequence[Text]) -> list[Example]:
        return [gold_example(text, self._encoder, self._limit) for text in texts]

    @functools.cached_property
    def _views(self) -> list[DecoderView]:
        with self._console.step("load the source and the model"):
            return [DecoderView(load_model(each, device=self._device).model) for each in self._models]

    def _missing(self, examples: Sequence[Example]) -> dict[str, Example]:
        keyed = {_key(example): example for example in examples}
        return {key: example for key, example in keyed.items() if self._journal.get(key) is None}

    def _fill(self, missing: dict[str, Example]) -> None:
        source, target = self._views
        report = self._console.counter("compare with the source", len(missing))
        order = sorted(missing, key=lambda key: -len(missing[key]))
        while order:
            size = self._batch_size("agreement", len(missing[order[0]]))
            part, order = sorted(order[:size], key=lambda key: len(missing[key])), order[size:]
            found = _compare(source, target, self._shared, [missing[key] for key in part])
            self._journal.add({key: Answer(list(each), 0.0, len(part)) for key, each in zip(part, found, strict=True)})
            report(len(part))


def _key(example: Example) -> str:
    return request_key("agreement", example.prompt_ids, example.answer_ids)


@torch.no_grad()
def _compare(
    source: DecoderView, target: DecoderView, shared: SharedVocabulary, examples: list[Example]
) -> list[Agreement]:
    """Agreements of examples that are sorted by length, in one batch."""
    (batch,) = batches_of(examples, len(examples), "target")
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
    means = (positions.example_means(values.float().cpu()).tolist() for values in (kl, same))
    return [Agreement(*each) for each in zip(*means, positions.counts.tolist(), strict=True)]
