"""MBPP: small programs from a description and their tests, by running these tests."""

from typing import Annotated

from pydantic import Field

from ..sandbox import Program
from ._benchmark import SPECIAL_STOPS, Benchmark, Document, Form, Reading, Row
from ._judge import Judge, judged
from .extract import program

PLAIN = (
    "You are an expert Python programmer, and here is your task: {{ text }} Your code should pass these tests:\n\n"
    "{{ test_list | join('\\n') }}\n[BEGIN]\n"
)
CHAT = (
    "{{ text }}\n\nThe code must pass these tests:\n\n```python\n{{ test_list | join('\\n') }}\n```\n\n"
    "Answer with the whole code in one fenced code block, without the tests."
)
EXTRACTION = (
    "The first fenced block that defines a function, else the first block (a closing fence may be missing; text before "
    "a fence that nothing opened is a block), else the whole text. The longest run of lines that compiles is kept, "
    "from the first line on, or from the first line of code where a sentence stands before it. "
    "Run in the order program, set-up, tests."
)


class MbppRow(Row):
    """A task with its tests."""

    task_id: int
    """Number of the task."""
    text: Annotated[str, Field(min_length=1)]
    """Description."""
    code: str
    """Reference program."""
    test_list: Annotated[list[str], Field(min_length=1)]
    """Assertions."""
    test_setup_code: str
    """Source that runs between the program and the assertions."""


def _answer(document: Document, chat: bool) -> str:
    code = document["code"].replace("\r\n", "\n").rstrip()
    return f"```python\n{code}\n```" if chat else code


def _read(documents: list[Document], responses: list[str], judge: Judge | None) -> list[Reading]:
    programs = [
        Program(
            code=program(response),
            tests="\n".join([document["test_setup_code"], *document["test_list"]]),
        )
        for document, response in zip(documents, responses, strict=True)
    ]
    return judged(programs, judge)


MBPP = Benchmark(
    name="mbpp",
    metric="pass@1",
    version=1,
    hub=("google-research-datasets/mbpp", "full"),
    row=MbppRow,
    forms={
        False: Form(prompt=PLAIN, extraction=EXTRACTION, stop=("[DONE]", "[END]", *SPECIAL_STOPS), max_new_tokens=512),
        True: Form(prompt=CHAT, extraction=EXTRACTION, stop=SPECIAL_STOPS, max_new_tokens=512),
    },
    answer=_answer,
    read=_read,
    runs_code=True,
)
