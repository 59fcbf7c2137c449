"""MMLU: four choices, by log-likelihood of the letter."""

from typing import Annotated

from pydantic import Field

from ._benchmark import CHOICES, Benchmark, Document, Form, Row

PROMPT = (
    "The following are multiple choice questions (with answers) about {{ subject | replace('_', ' ') }}.\n\n"
    "{{ question | trim }}\n"
    "A. {{ choices[0] }}\nB. {{ choices[1] }}\nC. {{ choices[2] }}\nD. {{ choices[3] }}\nAnswer:"
)
PREFIX = "The answer is:"
"""Beginning of the assistant's turn.

Without it a chat model begins a sentence, and the probability of a bare letter depends little on
the choice."""
EXTRACTION = (
    "The letter among A, B, C and D, with a space before it, whose log-likelihood after {} is highest; the first of "
    "equal ones. Nothing is generated."
)


class MmluRow(Row):
    """A question with four choices."""

    question: Annotated[str, Field(min_length=1)]
    """Question."""
    subject: Annotated[str, Field(min_length=1)]
    """Subject, with underscores for spaces."""
    choices: Annotated[list[str], Field(min_length=4, max_length=4)]
    """Choices in the order of their letters."""
    answer: Annotated[int, Field(ge=0, le=3)]
    """Index of the right choice."""


def _answer(document: Document, chat: bool) -> str:
    return " " + CHOICES[document["answer"]]


MMLU = Benchmark(
    name="mmlu",
    metric="accuracy",
    version=2,
    hub=("cais/mmlu", "all"),
    row=MmluRow,
    forms={
        False: Form(prompt=PROMPT, extraction=EXTRACTION.format("the prompt")),
        True: Form(prompt=PROMPT, extraction=EXTRACTION.format("the beginning of the assistant's turn"), prefix=PREFIX),
    },
    answer=_answer,
    read=None,
)
