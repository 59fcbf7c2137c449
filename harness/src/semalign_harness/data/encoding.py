"""The one way from text to token ids, for rows, answers, benchmarks and the doctor."""

import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from pydantic import JsonValue
from semalign_geometry.base import SemalignError

from ..util.failures import naming
from .settings import CLOCK, DAY

if TYPE_CHECKING:
    from semalign_align import Spans
    from transformers import PreTrainedTokenizerBase

ENCODING = 1
"""Raised when the same text may become other token ids: cached answers are then void."""
_THOUGHTS = ("reasoning_content", "thinking", "reasoning")
"""Keys of a message that hold the thoughts before its content, in the order of transformers."""

Role = Literal["source", "target"]
"""One of the two models of a pair."""
Message = dict[str, Any]
"""A turn: `role`, `content` and further keys that the template may read, such as `tool_calls`."""
DIALOGUE: list[Message] = [
    {"role": "user", "content": "What is 7 + 5?"},
    {"role": "assistant", "content": "7 + 5 = 12"},
]
"""A question with its answer, which templates are tried on."""


@dataclass(frozen=True)
class Conversation:
    """Turns, and further values that the template may read."""

    messages: list[Message]
    """The turns in order; `content` is text."""
    tools: Any = None
    """Functions that the model may call, as JSON schemas."""
    documents: Any = None
    """Texts that the model may quote."""

    def answered(self, answer: str) -> "Conversation":
        """Return the conversation with another last turn, which has text alone."""
        return replace(self, messages=[*self.messages[:-1], {"role": "assistant", "content": answer}])


@dataclass(frozen=True)
class SourceSide:
    """One row as the source reads it, where it has a tokenizer of its own."""

    prompt_ids: tuple[int, ...]
    """Prompt by the source's template, not supervised."""
    answer_ids: tuple[int, ...]
    """The same answer under the source's tokenizer, with its end."""
    spans: "Spans"
    """Spans of the answer."""
    framed: tuple[bool, bool]
    """Whether one side alone has space before the text, and before its end: the models then expect different entries
    there, and the first or the last span is read without supervision."""
    conversation: Conversation
    """The row before it was encoded, for an answer that a model writes in place of its own."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def compared(self) -> slice:
        """The supervised spans."""
        return slice(int(self.framed[0]), len(self.spans.source) - self.framed[1])


@dataclass(frozen=True)
class Example:
    """One row as token ids."""

    prompt_ids: tuple[int, ...]
    """Prompt, not supervised."""
    answer_ids: tuple[int, ...]
    """Supervised, end-of-sequence token included."""
    answer: str
    """The reference answer as text."""
    source: SourceSide | None = None
    """The row as the source reads it; None where both models read the ids above."""

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)

    @property
    def longest(self) -> int:
        """Tokens of the longer side."""
        return max(len(self), len(self.source or ()))

    def on(self, role: Role) -> "Example | SourceSide":
        """Return the side that one of the models reads."""
        return self.source if role == "source" and self.source is not None else self


class TextEncoder:
    """Turns conversations and plain texts into token ids, the same wherever a model reads them.

    Rules:
        - The text of a chat template is taken as it is: the tokenizer adds nothing, no BOS either.
        - Plain text gets the tokenizer's beginning (BOS), unless it has that already. The tokenizer's
          end (EOS) is never added, so that a prompt does not end.
        - A prompt is encoded on its own. Its continuation is encoded together with it, as
          SentencePiece writes words differently at the beginning of a text; where a token would
          span their border, the continuation is encoded alone.
        - Texts that name a special token are read as that token, as transformers and vLLM read them.
        - An answer ends in one end token: the first EOS that follows the whole answer; else the last
          special token that the template writes behind it; else an EOS, which is appended.
        - A template that reads the clock reads midnight of `date`.

    Source:
        ours; the first rule is that of `apply_chat_template(tokenize=True)`.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        options: Mapping[str, JsonValue] | None = None,
        date: datetime.date = DAY,
        chat: bool | None = None,
    ) -> None:
        """Choose the tokenizer and the options of its template.

        Args:
            tokenizer: of the model that reads the texts.
            options: passed to the chat template by name.
            date: today's date in a template that reads the clock.
            chat: whether prompts go through the chat template; None where the tokenizer has one.
        """
        self.tokenizer = tokenizer
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        self.options = dict(options or {})
        self.date = date
        self.start = _start(tokenizer)
        """Token ids that the tokenizer puts before a plain text."""

    @functools.cached_property
    def key(self) -> str:
        """Cache key of the settings that decide the ids of a text, without the tokenizer."""
        parts = [ENCODING, self.chat, self.options if self.chat else {}, str(self.told_date)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:8]

    @property
    def told_date(self) -> datetime.date | None:
        """Today's date in the chat template; None where it does not read the clock."""
        return self.date if self.chat and CLOCK in self._read.variables else None

    @property
    def ignored_options(self) -> list[str]:
        """Names of options that the template never reads, or all where prompts are plain text."""
        return [name for name in self.options if not self.chat or name not in self._read.variables]

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """Ids that end an answer: EOS, and the token that the template writes behind one."""
        found = {self.tokenizer.eos_token_id} - {None}
        with contextlib.suppress(SemalignError):  # a template that refuses this question may take others
            found.add(self.example(Conversation(DIALOGUE), name="a question with its answer").answer_ids[-1])
        return frozenset(found)

    @functools.cached_property
    def unknown(self) -> int | None:
        """Id for text that the tokenizer has no entry for; None where it reads every text."""
        marks = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        found: int | None = self.tokenizer.unk_token_id
        return None if found in marks else found  # as GPT-2's, which is never used

    def notes(self) -> list[str]:
        """Describe options that are ignored, and the date of the clock."""
        found = []
        if self.ignored_options:
            reader = "the chat template never reads" if self.chat else "prompts are plain text, so nothing reads"
            found.append(f"{reader} {', '.join(self.ignored_options)} of chat_template: leave it out")
        if self.told_date is not None:
            found.append(
                f"the chat template reads the clock, which stands at {self.told_date}: set date for another day"
            )
        return found

    def unread(self, conversation: Conversation) -> list[str]:
        """Return the keys of a conversation, besides role and content, that the template never reads."""
        given = {key for message in conversation.messages for key, value in message.items() if value}
        given |= {name for name in ("tools", "documents") if getattr(conversation, name)}
        names = self._read.names if self.chat else frozenset()
        thoughts = _THOUGHTS if self._reads_thoughts else ()
        return sorted(given - {"role", "content", "weight"} - names - {*thoughts})

    def prompt(self, messages: Sequence[Message], *, tools: Any = None, documents: Any = None) -> str:
        """Return the text that a model continues with its answer to some turns."""
        if not self.chat:
            return "\n".join(str(message.get("content") or "") for message in messages)
        return self.render(messages, tools=tools, documents=documents, generation=True)

    def render(
        self, messages: Sequence[Message], *, tools: Any = None, documents: Any = None, generation: bool = False
    ) -> str:
        """Render turns with the template; with `generation`, up to the beginning of the answer."""
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
        """Encode a prompt; with the chat template, it is one that `prompt` returned."""
        ids = self._bare(text)
        begun = self.chat or tuple(ids[: len(self.start)]) == self.start
        return ids if begun else [*self.start, *ids]

    def pair_ids(self, prompt: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode a prompt and its continuation."""
        prompt_ids, whole = self.ids(prompt), self.ids(prompt + continuation)
        if whole[: len(prompt_ids)] == prompt_ids:
            return prompt_ids, whole[len(prompt_ids) :]
        return prompt_ids, self._bare(continuation)

    def example(self, conversation: Conversation, *, name: str) -> Example:
        """Encode a conversation whose last turn is the answer; errors name it by `name`.

        Raises:
            SemalignError: the template refuses it or leaves out a part of the answer, or nothing is
                left of it.
        """
        messages, answer = conversation.messages, str(conversation.messages[-1]["content"])
        more = {"tools": conversation.tools, "documents": conversation.documents}
        for field, value in more.items():
            if value and not isinstance(value, list) and field not in self.unread(conversation):
                raise SemalignError(f"{name} has {field} that are no list: write a list of JSON objects there")
        with naming(f"the chat template refuses {name}"):
            prompt = self.prompt(messages[:-1], **more)
            whole = self.render(messages, **more) if self.chat else prompt + answer
        if not whole.startswith(prompt):
            raise SemalignError(
                "the chat template renders a prompt differently once its answer follows, so the answer cannot be "
                f"separated, in {name}: set the options in chat_template that fit the answers, such as "
                "enable_thinking, or give the tokenizer a template whose generation prompt begins the answer"
            )
        kept = (self._thoughts(messages[-1]), self._body(answer))
        with naming(f"the tokenizer refuses {name}"):
            prompt_ids, answer_ids = self.pair_ids(prompt, self._ended(whole[len(prompt) :], kept, name))
        if not prompt_ids or not answer_ids:
            raise SemalignError(f"{name} has an empty prompt or answer after encoding")
        return Example(tuple(prompt_ids), tuple(answer_ids), answer)

    def holds_end(self, answer: str) -> bool:
        """Return whether an answer names the end-of-sequence token before its own end."""
        eos = str(self.tokenizer.eos_token or "")
        return bool(eos) and eos in self._body(answer)

    @property
    def _reads_thoughts(self) -> bool:
        """Whether the template reads thoughts; transformers passes them under each of their names."""
        return self.chat and not self._read.names.isdisjoint(_THOUGHTS)

    def _thoughts(self, message: Message) -> str:
        """Thoughts that the template reads beside the content."""
        found = (message[key] for key in _THOUGHTS if isinstance(message.get(key), str))
        return next(found, "") if self._reads_thoughts else ""

    def _ended(self, tail: str, kept: Sequence[str], name: str) -> str:
        """Cut the tail of a prompt behind its end token; it must hold the texts `kept`, in order."""
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
        """Strip the space around an answer, and an EOS at its end."""
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
        """Matches every token that a text may name; a group, so that `split` keeps it."""
        added = {*self._special, *(token.content for token in self.tokenizer.added_tokens_decoder.values())}
        longest_first = sorted(filter(str.strip, added), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")

    @functools.cached_property
    def _read(self) -> "_Read":
        found = self.tokenizer.chat_template or ""
        each = [_read_by(text) for text in (found.values() if isinstance(found, dict) else [found])]
        return _Read(*(frozenset().union(*names) for names in zip(*each, strict=True)))


class _Read(NamedTuple):
    """Names that a template reads."""

    variables: frozenset[str]
    """Its arguments."""
    names: frozenset[str]
    """Its arguments, and keys that it looks up in any of its values."""


@functools.lru_cache
def _read_by(template: str) -> _Read:
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)  # a tag of transformers' own
    try:
        tree = environment.parse(plain)
    except TemplateSyntaxError:  # which is raised when the template is used
        return _Read(frozenset(), frozenset())
    variables = meta.find_undeclared_variables(tree)
    attributes = {node.attr for node in tree.find_all(nodes.Getattr)}
    texts = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return _Read(frozenset(variables), frozenset({*variables, *attributes, *texts}))


def _clock(date: datetime.date) -> str:
    """Macro that replaces the clock of the template behind it by midnight of a day.

    transformers passes only plain data into templates, so that the clock cannot be an argument.
    """
    midnight = datetime.datetime.combine(date, datetime.time())
    codes = [f"%{flag}{letter}" for letter in "aAbBcdHIjmMpSUwWxXyY" for flag in ("-", "")]
    parts = {code: midnight.strftime(code) for code in codes} | {"%f": "000000", "%z": "", "%Z": "", "%%": "%"}
    return (
        f"{{% macro {CLOCK}(format) %}}{{% set found = namespace(text=format) %}}"
        f"{{% for code, value in {json.dumps(parts)}.items() %}}"
        "{% set found.text = found.text.replace(code, value) %}{% endfor %}{{ found.text }}{% endmacro %}\n"
    )


def _start(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Token ids that a tokenizer puts before a text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    added = itertools.takewhile(
        lambda each: each[1], zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    )
    return tuple(token for token, _ in added)
