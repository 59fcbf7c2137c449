"""A model of lm-eval whose answers are kept in a journal."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from semalign_geometry.base import SemalignError
from torch import Tensor

from ..data.encoding import TextEncoder
from ..util.journal import Answer, Journal, request_key


class JournaledLM(LM):  # type: ignore[misc]  # lm-eval is untyped
    """A language model of lm-eval whose answers are kept in a journal.

    The model itself is made only when an answer is missing.
    """

    def __init__(
        self,
        make: Callable[[], LM],
        journal: Journal,
        encoder: TextEncoder,
        *,
        batch_size: Callable[[str, int], int],
        progress: Callable[[str, int], Callable[[int], None]],
        state: PartialState,
        answers_as_it_goes: bool = False,
    ) -> None:
        """Wrap a model.

        Args:
            make: makes the model.
            journal: where its answers are kept.
            encoder: turns texts into token ids, by the model's tokenizer and template.
            batch_size: requests that run together, by their kind and the tokens of the longest one.
            progress: given a label and the number of missing answers, returns what is told of those that came.
            state: the processes that share out the documents.
            answers_as_it_goes: whether the model tells each generated text as soon as it ends, as `GreedyLM` does.
        """
        super().__init__()
        self._make, self._journal, self._encoder = make, journal, encoder
        self._batch_size, self._progress = batch_size, progress
        self._model: LM | None = None
        self._state = state
        self._answers_as_it_goes = answers_as_it_goes

    @property
    def model(self) -> LM:
        """The model, made on first use."""
        if self._model is None:
            self._model = self._make()
        return self._model

    def release(self) -> None:
        """Give the model's memory back."""
        self._model = None

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, as lm-eval asks for it."""
        return str(self._encoder.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template, as lm-eval asks for it."""
        return str(self._encoder.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as the prompt of one text; without a generation prompt, the last one is the answer's beginning."""
        if add_generation_prompt:
            return self._encoder.prompt(chat_history)
        *before, begun = chat_history
        return self._encoder.prompt(before) + begun["content"]

    @property
    def device(self) -> torch.device:
        """Where ranks exchange what they hold."""
        return torch.device(self._state.device)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return int(self._state.process_index)

    @property
    def world_size(self) -> int:
        """Processes that share out the documents."""
        return int(self._state.num_processes)

    def all_gather(self, tensor: Tensor) -> Tensor:
        """A tensor of every rank, end to end."""
        gathered: Tensor = gather(tensor)
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """An object of every rank, on one of them."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for every rank."""
        self._state.wait_for_everyone()

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, nats, and whether each is the greedy one."""
        answers = self._answered("loglikelihood", requests)
        return [(float(answer.value[0]), bool(answer.value[1])) for answer in answers]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Generated texts up to their stop rules."""
        return [str(answer.value) for answer in self._answered("generate_until", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Not asked for by any benchmark here."""
        raise SemalignError("rolling log-likelihoods are not kept: no benchmark here asks for them")

    def tokens(self, arguments: Sequence[Any]) -> int:
        """Longest input that a request can become, in tokens."""
        context, rest = arguments
        if isinstance(rest, dict):
            return len(self._encoder.ids(context)) + int(rest["max_gen_toks"])
        return sum(map(len, self._encoder.pair_ids(context, rest))) - 1  # the last token is no input

    def answers(self, kind: str, requests: Sequence[Sequence[object]]) -> list[Answer]:
        """What was kept of requests, given by their arguments."""
        kept = [self._journal.get(request_key(kind, *arguments)) for arguments in requests]
        return [answer for answer in kept if answer is not None]

    def _answered(self, kind: str, requests: list[Instance]) -> list[Answer]:
        missing = {
            key: request for request in requests if self._journal.get(key := request_key(kind, *request.args)) is None
        }
        if missing:
            model = self.model  # batches are sized by the memory that it leaves
            report = self._progress(kind.replace("_until", ""), len(missing))
            for batch in self._batches(kind, missing):
                if kind == "generate_until" and self._answers_as_it_goes:
                    self._generate(batch, [missing[key] for key in batch], report)
                    continue
                begun = time.perf_counter()
                values = getattr(model, kind)([missing[key] for key in batch], disable_tqdm=True)
                each = (time.perf_counter() - begun) / len(batch)
                self._journal.add({key: Answer(v, each, len(batch)) for key, v in zip(batch, values, strict=True)})
                report(len(batch))
        found = [self._journal.get(request_key(kind, *request.args)) for request in requests]
        return [answer for answer in found if answer is not None]

    def _generate(self, batch: list[str], requests: list[Instance], report: Callable[[int], None]) -> None:
        model, before = self.model, time.perf_counter()

        def ended(place: int, text: str) -> None:
            nonlocal before
            now = time.perf_counter()
            self._journal.add({batch[place]: Answer(text, now - before, len(batch))})
            before = now
            report(1)

        model.generate_until(requests, disable_tqdm=True, ended=ended)

    def _batches(self, kind: str, missing: dict[str, Instance]) -> Iterator[list[str]]:
        """Keys in batches of alike length, the longest first; continuations of one context stay together."""
        lengths = {key: self.tokens(request.args) for key, request in missing.items()}
        order = sorted(missing, key=lambda key: (-lengths[key], missing[key].args[0]))
        start = 0
        while start < len(order):
            size = self._batch_size(kind, lengths[order[start]])
            stop = start + size
            while kind == "loglikelihood" and stop < len(order) and self._same_context(missing, order, stop):
                stop += 1
            yield order[start:stop]
            start = stop

    @staticmethod
    def _same_context(missing: dict[str, Instance], order: list[str], stop: int) -> bool:
        before, after = missing[order[stop - 1]].args[0], missing[order[stop]].args[0]
        return bool(before == after)
