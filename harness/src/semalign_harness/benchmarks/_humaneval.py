"""HumanEval: functions to complete, by running their tests."""

from typing import Annotated

from pydantic import Field

from ..reading import program
from ..sandbox import Program
from ._benchmark import SPECIAL_STOPS, Benchmark, Document, Form, Judge, Reading, Row, judged

PLAIN = "{{ prompt }}"
CHAT = (
    "Complete this Python function. Answer with the whole function in one fenced code block.\n\n"
    "```python\n{{ prompt | trim }}\n```"
)
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
EXTRACTION = (
    "Everything up to the last </think> is dropped. The last block that defines the function, and not as a stub, else "
    "text between blocks that does, else the first block, else the whole text; blocks are fences, [PYTHON]…[/PYTHON] "
    "and [BEGIN]…[DONE], and may lack their end. A whole function follows the imports and helpers of the prompt, and "
    "its imports from __future__ come first; a body follows the prompt. Of a whole function the longest run of lines "
    "that compiles is kept, from the first line on, or from the first line of code where a sentence stands before it; "
    "of a body the longest run of first lines."
)


class HumanEvalRow(Row):
    """A function to complete."""

    task_id: Annotated[str, Field(min_length=1)]
    """Name of the task."""
    prompt: Annotated[str, Field(min_length=1)]
    """Imports, helpers, signature and docstring."""
    canonical_solution: str
    """Body of the function."""
    test: Annotated[str, Field(min_length=1)]
    """Source that defines `check(candidate)`."""
    entry_point: Annotated[str, Field(pattern=r"^[^\W\d]\w*$")]
    """Name of the function."""


def _answer(document: Document, chat: bool) -> str:
    body = document["canonical_solution"]
    return f"```python\n{document['prompt'].strip()}\n{body.rstrip()}\n```" if chat else body


def _read(documents: list[Document], responses: list[str], judge: Judge | None) -> list[Reading]:
    programs = [
        Program(
            code=program(response, prompt=document["prompt"], names=[document["entry_point"]]),
            tests=f"{document['test']}\ncheck({document['entry_point']})\n",
            entry_point=document["entry_point"],
            prompt=document["prompt"],
        )
        for document, response in zip(documents, responses, strict=True)
    ]
    return judged(programs, judge)


HUMANEVAL = Benchmark(
    name="humaneval",
    metric="pass@1",
    version=2,
    hub=("openai/openai_humaneval", None),
    row=HumanEvalRow,
    forms={
        False: Form(prompt=PLAIN, extraction=EXTRACTION, stop=(*STOP, *SPECIAL_STOPS), max_new_tokens=512),
        True: Form(prompt=CHAT, extraction=EXTRACTION, stop=SPECIAL_STOPS, max_new_tokens=1024),
    },
    answer=_answer,
    read=_read,
    runs_code=True,
)
