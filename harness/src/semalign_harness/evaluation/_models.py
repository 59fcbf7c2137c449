"""The models of an evaluation, opened; models of lm-eval that read and generate text as a run does."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text
from semalign_geometry import SharedVocabulary
from semalign_geometry.base import SemalignError

from ..data.encoding import TextEncoder
from ..generation import end_ids, generate
from ..models.loading import LoadedModel
from ..models.opening import OpenedModel, check_tokenizers, identity, open_model, prepare
from ..reading import answer_text
from ..results.evaluation import EvaluationConfig
from ..util.console import Console

UNLIMITED = 10**9
"""Tokens: a tokenizer that declares so many or more declares no limit."""


def longest_input(opened: OpenedModel) -> int | None:
    """Return the longest input of a model in tokens, by its configuration, else by its tokenizer.

    None stands for no limit.
    """
    if opened.positions is not None:
        return opened.positions
    declared = opened.tokenizer.model_max_length
    return int(declared) if 0 < declared < UNLIMITED else None


@dataclass(frozen=True)
class Models:
    """A model and the source that it is compared with, before their weights are read."""

    opened: OpenedModel
    source: OpenedModel | None
    shared: SharedVocabulary | None
    """Entries of both vocabularies."""
    encoder: TextEncoder
    """Turns texts into token ids, by the model's tokenizer and template."""
    device: torch.device

    @functools.cached_property
    def hashes(self) -> tuple[str, str | None]:
        """Hashes of the model and the source."""
        return identity(self.opened), identity(self.source) if self.source else None

    @functools.cached_property
    def limit(self) -> int | None:
        """Longest input of the model, in tokens."""
        return longest_input(self.opened)

    @functools.cached_property
    def limit_of_both(self) -> int | None:
        """Longest input of the model and the source, in tokens."""
        limits = [self.limit, longest_input(self.source) if self.source else None]
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def dtype(self) -> str:
        """Name of the dtype that the model computes in."""
        return str(self.opened.dtype(self.device)).removeprefix("torch.")


def open_models(config: EvaluationConfig, device: torch.device, console: Console) -> Models:
    """Open the models of an evaluation.

    Raises:
        SemalignError: they are not found, do not fit each other, or lack a setting's requirement.
    """
    for role, settings in (("model", config.model), ("source", config.source)):
        if settings is not None:
            prepare(settings, progress=console.ticker(f"pre-train the {role}"), note=console.note)
    with console.step("read tokenizers and configurations"):
        model, source = open_model(config.model), open_model(config.source) if config.source else None
    if config.chat and model.tokenizer.chat_template is None:
        raise SemalignError(f"{config.model.path} has no chat template: set chat=false, or leave it out")
    if config.backend == "vllm" and config.model.load_in_4bit:
        raise SemalignError("the backend vllm does not load in 4 bits: set backend=transformers, or leave that out")
    encoder = TextEncoder(model.tokenizer, options=config.chat_template, date=config.date, chat=config.chat)
    return Models(model, source, check_tokenizers(source, model, []) if source else None, encoder, device)


class EncodedLM:
    """Tokenisation for a model of lm-eval, which follows it among the bases of a class."""

    encoder: TextEncoder
    """Turns texts into token ids."""

    def tok_encode(
        self,
        string: str | Sequence[str],
        add_special_tokens: Any = None,
        left_truncate_len: int | None = None,
        **_: Any,
    ) -> list[Any]:
        """Return the token ids of a prompt, or of each of several.

        Args:
            string: the text of a prompt, or several.
            add_special_tokens: ignored, as are further settings: the encoder decides.
            left_truncate_len: most tokens, above 0; the first ones are cut. None keeps all.
        """
        assert left_truncate_len is None or left_truncate_len > 0
        if not isinstance(string, str):
            return [self.tok_encode(each, left_truncate_len=left_truncate_len) for each in string]
        ids = self.encoder.ids(string)
        return ids[-left_truncate_len:] if left_truncate_len is not None else ids

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return self.encoder.pair_ids(context, continuation)


class GreedyLM(EncodedLM, HFLM):  # type: ignore[misc]  # lm-eval is untyped
    """Generates greedily with our own `generate`, and reports each text when it ends."""

    def __init__(
        self, loaded: LoadedModel, encoder: TextEncoder, *, batch_size: int = 1, max_length: int | None = None
    ) -> None:
        """Wrap a model.

        Args:
            loaded: the model, loaded with `generates` where it will.
            encoder: turns texts into token ids, by the model's tokenizer.
            batch_size: rows of a forward run.
            max_length: longest input in tokens, the answer included; None never cuts a prompt.
        """
        self.encoder = encoder
        super().__init__(
            loaded.model,
            tokenizer=encoder.tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_length=UNLIMITED if max_length is None else max_length,  # lm-eval would replace None by a guess
        )
        self._way = loaded.way

    def generate_until(
        self,
        requests: list[Instance],
        disable_tqdm: bool = False,
        *,
        ended: Callable[[int, str], None] = lambda place, text: None,
    ) -> list[str]:
        """Generate texts up to their stop rules.

        Args:
            requests: of one task; they run together.
            disable_tqdm: no bar is drawn either way.
            ended: called with each request's place and its text as soon as the text is complete.

        Raises:
            SemalignError: the requests need sampling, or have different settings.
        """
        assert self._way is not None
        settings = requests[0].args[1]
        if any(request.args[1] != settings for request in requests):
            raise SemalignError("requests that generate together must share their settings")
        if settings.get("do_sample") or settings.get("temperature"):
            raise SemalignError(f"only greedy generation is supported, not {settings}")
        rules = handle_stop_sequences(
            list(settings["until"]), eos=self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        )
        longest = int(settings["max_gen_toks"])

        def text_of(row: list[int]) -> str:
            return str(postprocess_generated_text(answer_text(self.tokenizer, row), rules, None))

        def stopped(row: list[int]) -> bool:
            text = answer_text(self.tokenizer, row)
            return any(rule in text for rule in rules)

        rows = generate(
            self.model,
            [self.tok_encode(request.args[0], left_truncate_len=self.max_length - longest) for request in requests],
            max_new_tokens=longest,
            ends=end_ids(self.model, self.tokenizer),
            way=self._way,
            stopped=stopped,
            ended=lambda place, row: ended(place, text_of(row)),
        )
        return [text_of(row) for row in rows]


def vllm_model(models: Models) -> LM:
    """Make a model that vLLM runs on the encoder's token ids.

    Raises:
        SemalignError: vLLM is not installed.
    """
    try:
        from lm_eval.models.vllm_causallms import VLLM

        model, opened = type("EncodedVLLM", (EncodedLM, VLLM), {"encoder": models.encoder}), models.opened
        return model(
            opened.place,
            revision=opened.commit,
            dtype=models.dtype,
            max_model_len=models.limit,
            trust_remote_code=False,
        )
    except ImportError as error:
        raise SemalignError(
            f"the backend vllm is not installed ({error}): pip install 'semalign-harness[vllm]', or set "
            "backend=transformers"
        ) from error
