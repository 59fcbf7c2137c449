"""GSM8K: word problems, by the final number of a worked solution."""

import re
from fractions import Fraction
from typing import Annotated

from pydantic import Field, field_validator

from ..reading import final_number, flexible_text, number_text, strict_number
from ._benchmark import SPECIAL_STOPS, Benchmark, Document, Form, Judge, Reading, Row

PLAIN = "Q: {{ question }}\nA: Let's think step by step."
# Asked to "end with" the phrase, small models write the phrase alone: the prompt must name the order of the two.
CHAT = "Question: {{ question }}\n\nFirst reason step by step. Then, on the last line, write: The answer is <number>."
EXTRACTION = (
    "Everything up to the last </think> is dropped, and what follows a further question. The first line #### n "
    'decides, else the last of the markers \\boxed{…}, "the answer is …", "Answer: …", else the last sentence with a '
    "number. Within a sentence: the value furthest to the right in an equation (36 = 12 × 3 is 36), then bold numbers, "
    "then others; reasons, parentheses, ranges and denied numbers do not count. Compared as an exact number: $18.00, "
    '1.8e1 and 36/2 are 18, 1 000 and 1,000 are 1000. Also reported: strict, where only "#### n" and "the answer is n" '
    "count, and flexible, the last thing that looks like a number, compared as text as lm-eval's flexible-extract does."
)
_NOTES = re.compile(r"<<[^<>\n]*>>")
_REFERENCE = re.compile(r"####\s*(-?[$]?[0-9][0-9,]*(?:\.[0-9]+)?)\s*$")


class Gsm8kRow(Row):
    """A problem with its worked solution."""

    question: Annotated[str, Field(min_length=1)]
    """Problem."""
    answer: str
    """Solution that ends in `#### n`."""

    @field_validator("answer")
    @classmethod
    def _ends_in_a_number(cls, answer: str) -> str:
        if not _REFERENCE.search(answer):
            raise ValueError("a solution ends in a line #### and a number")
        return answer


def reference(document: Document) -> Fraction:
    """Return the right number of a document."""
    return Fraction(_reference_text(document))


def _reference_text(document: Document) -> str:
    match = _REFERENCE.search(document["answer"])
    assert match is not None, "documents are validated"
    return match[1].replace(",", "").replace("$", "")


def _answer(document: Document, chat: bool) -> str:
    """The worked solution without the calculator's notes, ending in "The answer is n."."""
    solution = _NOTES.sub("", _REFERENCE.sub("", document["answer"])).strip()
    return f"{'' if chat else ' '}{solution}\nThe answer is {number_text(reference(document))}."


def _read(documents: list[Document], responses: list[str], _: Judge | None) -> list[Reading]:
    readings = []
    for document, response in zip(documents, responses, strict=True):
        found, right = final_number(response), reference(document)
        readings.append(
            {
                "extracted": None if found is None else number_text(found),
                "correct": found == right,
                "strict": strict_number(response) == right,
                "flexible": flexible_text(response) == _reference_text(document),
            }
        )
    return readings


GSM8K = Benchmark(
    name="gsm8k",
    metric="accuracy",
    version=2,
    hub=("openai/gsm8k", "main"),
    row=Gsm8kRow,
    forms={
        False: Form(prompt=PLAIN, extraction=EXTRACTION, stop=("Q:", "Question:", *SPECIAL_STOPS), max_new_tokens=512),
        True: Form(prompt=CHAT, extraction=EXTRACTION, stop=SPECIAL_STOPS, max_new_tokens=512),
    },
    answer=_answer,
    read=_read,
    other_metrics=("strict", "flexible"),
)
