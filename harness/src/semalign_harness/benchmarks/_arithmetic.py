"""Arithmetic: the generated problems, by the final number; nothing is downloaded."""

from typing import Annotated, Any

from pydantic import Field, model_validator

from ..reading import final_number, number_text
from ._benchmark import SPECIAL_STOPS, Benchmark, Document, Form, Judge, Reading, Row

FORM = Form(
    prompt="{{ question }}",
    extraction="The final number, read as in gsm8k, and compared as an exact number.",
    stop=SPECIAL_STOPS,
    max_new_tokens=32,
)


class ArithmeticRow(Row):
    """A generated problem with its worked solution."""

    question: Annotated[str, Field(min_length=1)]
    """Problem."""
    solution: str
    """Steps, and `The answer is n`."""
    answer: str
    """Digits of the result."""

    @model_validator(mode="before")
    @classmethod
    def _of_turns(cls, row: Any) -> Any:
        """Take the problem and its solution from the turns of a generated row."""
        if not isinstance(row, dict) or "messages" not in row:
            return row
        question, solution = (message["content"] for message in row["messages"])
        return {"question": question, "solution": solution, "answer": row["answer"]}


def _answer(document: Document, chat: bool) -> str:
    return f"{'' if chat else ' '}{document['solution']}"


def _read(documents: list[Document], responses: list[str], _: Judge | None) -> list[Reading]:
    readings = []
    for document, response in zip(documents, responses, strict=True):
        found = final_number(response)
        extracted = None if found is None else number_text(found)
        readings.append({"extracted": extracted, "correct": extracted == document["answer"]})
    return readings


ARITHMETIC = Benchmark(
    name="arithmetic",
    metric="accuracy",
    version=1,
    hub=("generated:arithmetic", None),
    row=ArithmeticRow,
    forms=dict.fromkeys((False, True), FORM),
    answer=_answer,
    read=_read,
)
