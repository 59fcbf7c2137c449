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

from ..data.encoding import TextEncoder
from ..util.journal import Answer, Journal, request_key
from ._models import GreedyLM


class JournaledLM(LM):  # type: ignore[misc]  # lm-eval is untyped
    """A model of lm-eval whose answers are kept in a journal; it is made when one is missing."""

    all_gather = staticmethod(gather)

    def __init__(
        self,
        make: Callable[[], LM],
        journal: Journal,
        encoder: TextEncoder,
        *,
        batch_size: Callable[[str, int], int],
        progress: Callable[[str, int], Callable[[int], None]],
        state: PartialState,
    ) -> None:
        """Wrap a model.

        Args:
            make: makes the model.
            journal: keeps its answers.
            encoder: turns texts into token ids, by the model's tokenizer and template.
            batch_size: requests that run together, by their kind and the tokens of the longest one.
            progress: given a label and the number of missing answers, returns a function that is
                called with the number of further answers.
            state: the processes that share out the documents.
        """
        super().__init__()
        self._make, self._journal, self._encoder = make, journal, encoder
        self._batch_size, self._progress = batch_size, progress
        self._model: LM | None = None
        self._device, self._rank, self._world_size = state.device, state.process_index, state.num_processes
        self.barrier = state.wait_for_everyone

    @property
    def model(self) -> LM:
        """The model, made on first use."""
        if self._model is None:
            self._model = self._make()
        return self._model

    def release(self) -> None:
        """Release the model's memory."""
        self._model = None

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, which lm-eval needs."""
        return str(self._encoder.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the template, which lm-eval needs."""
        return str(self._encoder.tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render messages; without a generation prompt, the last one begins the answer."""
        if add_generation_prompt:
            return self._encoder.prompt(chat_history)
        *before, begun = chat_history
        return self._encoder.prompt(before) + begun["content"]

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Return the objects of all ranks on the rank `dst`, None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, gathered, dst)
        return gathered

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return log-likelihoods of continuations, in nats, and whether each is the greedy one."""
        answers = self._answered("loglikelihood", requests)
        return [(float(answer.value[0]), bool(answer.value[1])) for answer in answers]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return generated texts up to their stop rules."""
        return [str(answer.value) for answer in self._answered("generate_until", requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refuse: no benchmark needs rolling log-likelihoods."""
        raise SemalignError("rolling log-likelihoods are not kept: no benchmark here needs them")

    def tokens(self, arguments: Sequence[Any]) -> int:
        """Return the length of the longest input that a request can become, in tokens."""
        context, rest = arguments
        if isinstance(rest, dict):
            return len(self._encoder.ids(context)) + int(rest["max_gen_toks"])
        return sum(map(len, self._encoder.pair_ids(context, rest))) - 1  # the last token is no input

    def answers(self, kind: str, requests: Sequence[Sequence[object]]) -> list[Answer]:
        """Return the kept answers to requests, which are given by their arguments."""
        return self._journal.found(request_key(kind, *arguments) for arguments in requests)

    def _answered(self, kind: str, requests: list[Instance]) -> list[Answer]:
        keyed = {request_key(kind, *request.args): request for request in requests}
        if missing := {key: request for key, request in keyed.items() if self._journal.get(key) is None}:
            model = self.model  # loaded before batches are sized by the memory that it leaves
            report = self._progress(kind.replace("_until", ""), len(missing))
            for batch in self._batches(kind, missing):
                self._ask(model, kind, {key: missing[key] for key in batch}, report)
        return self.answers(kind, [request.args for request in requests])

    def _ask(self, model: LM, kind: str, batch: dict[str, Instance], report: Callable[[int], None]) -> None:
        """Let the model answer a batch, and keep each answer as soon as it is known."""
        keys, before = list(batch), time.perf_counter()

        def ended(place: int, text: str) -> None:
            nonlocal before
            now = time.perf_counter()
            self._journal.add({keys[place]: Answer(text, now - before, len(batch))})
            before = now
            report(1)

        if kind == "generate_until" and isinstance(model, GreedyLM):
            model.generate_until([*batch.values()], disable_tqdm=True, ended=ended)
            return
        values = getattr(model, kind)([*batch.values()], disable_tqdm=True)
        each = (time.perf_counter() - before) / len(batch)
        self._journal.add({key: Answer(value, each, len(batch)) for key, value in zip(keys, values, strict=True)})
        report(len(batch))

    def _batches(self, kind: str, missing: dict[str, Instance]) -> Iterator[list[str]]:
        """Keys in batches, the longest first; continuations of one context stay together."""
        lengths = {key: self.tokens(request.args) for key, request in missing.items()}
        order = sorted(missing, key=lambda key: (-lengths[key], missing[key].args[0]))
        contexts = [missing[key].args[0] for key in order]
        start = 0
        while start < len(order):
            stop = start + self._batch_size(kind, lengths[order[start]])
            while kind == "loglikelihood" and stop < len(order) and contexts[stop] == contexts[stop - 1]:
                stop += 1
            yield order[start:stop]
            start = stop
