"""The one way from text to token ids: of rows, written answers, exact answers, benchmarks and the doctor."""

import datetime
import functools
import hashlib
import inspect
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from pydantic import AfterValidator, JsonValue
from semalign_geometry.base import SemalignError
from transformers import PreTrainedTokenizerBase

from ..util.failures import naming

ENCODING = 1
"""Raised when the same text may become other token ids: kept answers of benchmarks are then computed again."""
DAY = datetime.date(2024, 7, 26)
"""The day that a template that reads the clock is told, unless another is set: the one that Llama's templates fall back
to. A fixed day makes a run the same on every day."""
CLOCK = "strftime_now"
"""Name of the clock in chat templates."""
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold the thoughts before its content, in the order in which transformers looks for them."""

Message = dict[str, Any]
"""A turn: `role`, `content` and further keys, such as `tool_calls`, which the template may read."""


def _checked(options: dict[str, JsonValue]) -> dict[str, JsonValue]:
    own = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages", CLOCK}
    if reserved := sorted(own & {*options}):
        remedy = "set date for the day" if reserved == [CLOCK] else "leave it out"
        raise ValueError(f"{reserved[0]} is no option of a chat template, it is set by semalign: {remedy}")
    return options


TemplateOptions = Annotated[dict[str, JsonValue], AfterValidator(_checked)]
"""Keyword arguments of a chat template by their names, such as `enable_thinking`."""


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt_ids: tuple[int, ...]
    """What the answer follows, not supervised."""
    answer_ids: tuple[int, ...]
    """Supervised, end-of-sequence token included."""
    answer: str
    """The reference answer as text."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


@dataclass(frozen=True)
class Conversation:
    """Turns, and what the template may read besides."""

    messages: list[Message]
    """The turns in order; `content` is text."""
    tools: Any = None
    """Functions that the model may call, as JSON schemas."""
    documents: Any = None
    """Texts that the model may quote."""


class TextEncoder:
    """Turns conversations and plain texts into token ids, the same wherever a model reads them.

    Rules:
        - With a chat template, what the template writes is taken as it is: the tokenizer adds nothing, no BOS either.
        - Plain text gets what the tokenizer puts before a text (BOS), unless it begins with that; what the tokenizer
          puts behind a text (EOS) is never added, so that a prompt does not end.
        - A prompt is encoded on its own. What continues it is encoded together with it, as SentencePiece writes words
          differently at the beginning of a text; where a token would span their border, it is encoded alone.
        - Texts that name a special token are read as that token, as transformers and vLLM read them.
        - An answer ends in one end token: the first EOS that follows the whole answer; else the last special token
          that the template writes behind it; else an EOS, which is appended.
        - A template that reads the clock is told `date`, at midnight.

    Source:
        ours; the first rule is that of `apply_chat_template(tokenize=True)`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        options: Mapping[str, JsonValue] | None = None,
        date: datetime.date = DAY,
        chat: bool | None = None,
    ) -> None:
        """Settle how texts are encoded.

        Args:
            tokenizer: of the model that reads them.
            options: passed to the chat template by name.
            date: told to a template that reads the clock.
            chat: whether prompts go through the chat template; None where the tokenizer has one.
        """
        self.tokenizer = tokenizer
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        self.options = dict(options or {})
        self.date = date
        self.start = _start(tokenizer)
        """What the tokenizer puts before a plain text."""

    @functools.cached_property
    def key(self) -> str:
        """Cache key of everything that decides the ids of a text, the tokenizer aside."""
        parts = [ENCODING, self.chat, self.options if self.chat else {}, str(self.told_date)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def told_date(self) -> datetime.date | None:
        """The day that the chat template is told; None where it does not read the clock."""
        return self.date if self.chat and CLOCK in self._read.variables else None

    @property
    def ignored_options(self) -> list[str]:
        """Names of options that have no effect: the template never reads them, or prompts are plain text."""
        return [name for name in self.options if not self.chat or name not in self._read.variables]

    def notes(self) -> list[str]:
        """Sentences on options that have no effect, and on the clock."""
        found = []
        if self.ignored_options:
            reader = "the chat template never reads" if self.chat else "prompts are plain text, so nothing reads"
            found.append(f"{reader} {', '.join(self.ignored_options)} of chat_template: leave it out")
        if self.told_date is not None:
            found.append(f"the chat template reads the clock, and is told {self.told_date}: set date for another day")
        return found

    def unread(self, conversation: Conversation) -> list[str]:
        """Names of what a conversation holds and the template never reads, `role` and `content` aside."""
        given = {key for message in conversation.messages for key, value in message.items() if value}
        given |= {name for name in ("tools", "documents") if getattr(conversation, name)}
        names = self._read.names if self.chat else frozenset()
        thoughts = _THOUGHTS if self._reads_thoughts else ()
        return sorted(given - {"role", "content", "weight"} - names - {*thoughts})

    def prompt(self, messages: Sequence[Message], *, tools: Any = None, documents: Any = None) -> str:
        """The text that a model continues with its answer to some turns."""
        if not self.chat:
            return "\n".join(str(message.get("content") or "") for message in messages)
        return self.render(messages, tools=tools, documents=documents, generation=True)

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, documents: Any = None, generation: bool = False
    ) -> str:
        """Turns as the chat template writes them; with `generation`, up to where the answer begins."""
        more: dict[str, Any] = {**self.options}
        if self.told_date is not None:
            more["chat_template"] = _clock(self.told_date) + str(self.tokenizer.get_chat_template(tools=tools or None))
        for name, value in (("tools", tools), ("documents", documents)):
            if value and name in self._read.names:
                more[name] = value
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generation, **more
        )
        return str(text)

    def ids(self, text: str) -> list[int]:
        """A prompt as token ids; with the chat template, it is one that `prompt` gave."""
        ids = self._bare(text)
        begun = self.chat or tuple(ids[: len(self.start)]) == self.start
        return ids if begun else [*self.start, *ids]

    def pair_ids(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """A prompt and what continues it, as token ids."""
        prompt_ids, whole = self.ids(prompt), self.ids(prompt + continuation)
        if whole[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole[len(prompt_ids) :]
        return prompt_ids, self._bare(continuation)

    def example(self, conversation: Conversation, *, name: str) -> Example:
        """A conversation whose last turn is the answer, as token ids; errors call it by `name`.

        Raises:
            SemalignError: the template refuses it, or leaves out a part of the answer, or nothing is left of it.
        """
        messages, answer = conversation.messages, str(conversation.messages[-1]["content"])
        more = {"tools": conversation.tools, "documents": conversation.documents}
        for field, value in more.items():
            if value and not isinstance(value, list) and field not in self.unread(conversation):
                raise SemalignError(f"{name} has {field} that are no list: write a list of JSON objects there")
        with naming(f"the chat template refuses {name}"):
            prompt = self.prompt(messages[:-1], **more)
            tail = self._tail(prompt, self.render(messages, **more), name) if self.chat else answer
        kept = (self._thoughts(messages[-1]), self._body(answer))
        with naming(f"the tokenizer refuses {name}"):
            prompt_ids, answer_ids = self.pair_ids(prompt, self._ended(tail, kept, name))
        if not prompt_ids or not answer_ids:
            raise SemalignError(f"{name} has an empty prompt or answer after encoding")
        return Example(tuple(prompt_ids), tuple(answer_ids), answer)

    def holds_end(self, answer: str) -> bool:
        """Whether an answer names the end-of-sequence token before its own end."""
        eos = str(self.tokenizer.eos_token or "")
        return bool(eos) and eos in self._body(answer)

    def _tail(self, prompt: str, whole: str, name: str) -> str:
        if not whole.startswith(prompt):
            raise SemalignError(
                "the chat template renders a prompt differently once its answer follows, so the answer cannot be told "
                f"apart, in {name}: set the options in chat_template that fit the answers, such as enable_thinking, or "
                "give the tokenizer a template whose generation prompt begins the answer"
            )
        return whole[len(prompt) :]

    @property
    def _reads_thoughts(self) -> bool:
        """Whether the template reads thoughts, which transformers passes to it under every name that they go by."""
        return self.chat and not self._read.names.isdisjoint(_THOUGHTS)

    def _thoughts(self, message: Message) -> str:
        """Thoughts that the template reads beside the content."""
        found = (message[key] for key in _THOUGHTS if isinstance(message.get(key), str))
        return next(found, "") if self._reads_thoughts else ""

    def _ended(self, tail: str, kept: Sequence[str], name: str) -> str:
        """What follows the prompt, up to its one end token; texts that it must keep, in order."""
        end, eos = 0, str(self.tokenizer.eos_token or "")
        for part in (part for text in kept for part in self._marks.split(text)):  # the space around marks may change
            if (place := tail.find(part.strip(), end)) < 0:
                raise SemalignError(
                    f"the chat template leaves out a part of the answer of {name}, {part.strip()[:60]!r}: set its "
                    "options in chat_template so that it keeps the whole answer, or leave the row out"
                )
            end = place + len(part.strip())
        if eos and (place := tail.find(eos, end)) >= 0:
            return tail[: place + len(eos)]
        special = [found.end() for found in self._marks.finditer(tail, end) if found[0] in self._special]
        return tail[: special[-1]] if special else tail + eos

    def _body(self, answer: str) -> str:
        """An answer without space around it, and without an EOS that it already ends in."""
        body, eos = answer.strip(), str(self.tokenizer.eos_token or "")
        while eos and body.endswith(eos):
            body = body.removesuffix(eos).rstrip()
        return body

    def _bare(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    @functools.cached_property
    def _special(self) -> frozenset[str]:
        added = self.tokenizer.added_tokens_decoder.values()
        return frozenset([*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)])

    @functools.cached_property
    def _marks(self) -> re.Pattern[str]:
        """Matches every token that is read as a whole wherever a text names it; a group, so that `split` keeps it."""
        added = {*self._special, *(token.content for token in self.tokenizer.added_tokens_decoder.values())}
        longest_first = sorted(filter(str.strip, added), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @functools.cached_property
    def _read(self) -> "_Read":
        found = self.tokenizer.chat_template or ""
        texts = found.values() if isinstance(found, dict) else [found]
        each = [_read_by(text) for text in texts]
        return _Read(
            frozenset().union(*(one.variables for one in each)), frozenset().union(*(one.names for one in each))
        )


@dataclass(frozen=True)
class _Read:
    """Names that a template reads."""

    variables: frozenset[str]
    """Those that it gets from outside."""
    names: frozenset[str]
    """Those, and keys that it looks up in any of its values."""


@functools.lru_cache
def _read_by(template: str) -> _Read:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)  # a tag of transformers' own
    try:
        tree = environment.parse(plain)
    except TemplateSyntaxError:  # which is told when the template is used
        return _Read(frozenset(), frozenset())
    variables = meta.find_undeclared_variables(tree)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return _Read(frozenset(variables), frozenset({*variables, *attributes, *texts}))


def _clock(date: datetime.date) -> str:
    """What makes the clock of a template that follows it stand at midnight of a day.

    transformers passes plain data into templates only, so that the clock cannot be an argument.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    codes = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY" for flag in ("-", "")]
    told = {code: midnight.strftime(code) for code in codes} | {"%f": "000000", "%z": "", "%Z": "", "%%": "%"}
    return (
        f"{{% macro {CLOCK}(format) %}}{{% set found = namespace(text=format) %}}"
        f"{{% for code, value in {json.dumps(told)}.items() %}}"
        "{% set found.text = found.text.replace(code, value) %}{% endfor %}{{ found.text }}{% endmacro %}\n"
    )


def _start(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What a tokenizer puts before a text; what it puts behind one is no part of it."""
    found = tokenizer("a", return_special_tokens_mask=True)
    added = itertools.takewhile(
        lambda each: each[1], zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    )
    return tuple(token for token, _ in added)
