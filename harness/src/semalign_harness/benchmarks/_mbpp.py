"""MBPP: small programs from a description and their tests, by running these tests."""

import ast
import builtins
from typing import Annotated

from pydantic import Field

from ..reading import program
from ..sandbox import Program
from ._benchmark import SPECIAL_STOPS, Benchmark, Document, Form, Judge, Reading, Row, judged

PLAIN = (
    "You are an expert Python programmer, and here is your task: {{ text }} Your code should pass these tests:\n\n"
    "{{ test_list | join('\\n') }}\n[BEGIN]\n"
)
CHAT = (
    "{{ text }}\n\nThe code must pass these tests:\n\n```python\n{{ test_list | join('\\n') }}\n```\n\n"
    "Answer with the whole code in one fenced code block, without the tests."
)
EXTRACTION = (
    "Everything up to the last </think> is dropped. The last block that defines the names that the tests call, and not "
    "as stubs, else text between blocks that does, else the first block, else the whole text; blocks are fences, "
    "[PYTHON]…[/PYTHON] and [BEGIN]…[DONE], and may lack their end. The longest run of lines that compiles is kept, "
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
    programs = []
    for document, response in zip(documents, responses, strict=True):
        tests = "\n".join([document["test_setup_code"], *document["test_list"]])
        programs.append(Program(code=program(response, names=_called(tests)), tests=tests))
    return judged(programs, judge)


def _called(tests: str) -> set[str]:
    """Names that the tests call and do not bind, built-in ones only where they call no other.

    No name where the tests do not parse: the judge reports that.
    """
    try:
        nodes = list(ast.walk(ast.parse(tests)))
    except SyntaxError:
        return set()
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    called -= {name for node in nodes for name in _bound(node)}
    return {name for name in called if not hasattr(builtins, name)} or called


def _bound(node: ast.AST) -> list[str]:
    """Names that a node binds by itself."""
    match node:
        case ast.Name(id=name, ctx=ast.Store()):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name) | ast.arg(arg=name):
            return [name]
        case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
            return [alias.asname or alias.name.partition(".")[0] for alias in aliases]
    return []


MBPP = Benchmark(
    name="mbpp",
    metric="pass@1",
    version=2,
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
