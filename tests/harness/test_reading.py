"""Golden samples of the extractors, and laws: a number is read back however it is written, a program whole."""

import ast
import math
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semalign_harness import arithmetic_rows, build_tokenizer
from semalign_harness.reading import (
    after_thoughts,
    answer_text,
    final_number,
    flexible_text,
    number_text,
    program,
    same_number,
    strict_number,
)
from semalign_harness.reading._programs import _compiling_lines

from .golden_numbers import GOLDEN


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: row[0][:30])
def test_final_number_golden(row: tuple[str, str | None]) -> None:
    found = final_number(row[0])
    assert (None if found is None else number_text(found)) == (row[1] and number_text(Fraction(row[1])))


def test_numbers_are_compared_exactly() -> None:
    assert same_number("7 + 5 = 12 . The answer is 12", "#### 12.0")
    assert same_number("\\boxed{$9{,}500}", "9 500") and same_number("1/3", "2/6")
    assert not same_number("33.33", "100/3"), "no tolerance"
    assert not same_number("1" + "0" * 90 + "1", "1" + "0" * 91), "no float"
    assert not same_number("none", "none") and not same_number("12", "none")


@pytest.mark.parametrize("seed", range(3))
def test_generated_answers_are_read_as_written(seed: int) -> None:
    for row in arithmetic_rows(50, seed=seed, split="held_out"):
        text = row["messages"][-1]["content"]
        chain = text.rpartition("The answer is")[0]
        assert all(final_number(part) == int(row["answer"]) for part in (text, chain, row["answer"]))


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("18", "18"),
        ("<think>5</think>18", "18"),
        ("5</think>6</think>18", "18"),
        ("<thinking>\n5\n</thinking>\n18", "\n18"),
        ("[THINK]5[/THINK]18", "18"),
        ("\n<think>5", ""),
        ("<think>5</think><think>6", ""),
        ("a <think> tag", "a <think> tag"),
    ],
)
def test_thoughts_are_dropped(text: str, rest: str) -> None:
    assert after_thoughts(text) == rest
    assert (flexible_text(text) or None) == (flexible_text(rest) or None)
    assert (final_number(text), strict_number(text)) == (final_number(rest), strict_number(rest))
    assert program(text) == program(rest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 1,234", 1234),
        ("The answer is 18.", 18),
        ("so the answer is: $18.50", Fraction("18.5")),
        ("The answer is 12. The answer is 13", 13),
        ("#### 4\nThe answer is 5", 4),
        ("#### 4\n\nQ: Tom has 2?\n#### 5", 4),
        ("The answer is 4.\n\nQ: Tom has 2?\nThe answer is 5.", 4),
        ("The answer is 3. </think>The answer is 4.", 4),
        ("The answer is $1 000.", 1000),
        ("The answer is 5\n#### 4", 4),
        ("The answer is about 18.", None),
        ("#### 1. Count the eggs", None),
        ("\\boxed{18}", None),
        ("9 * 2 = 18", None),
    ],
)
def test_strict_number_golden(text: str, expected: Fraction | None) -> None:
    assert strict_number(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("is 18.", "18"),
        ("is $18.00", "18.00"),
        ("18 dollars...", ".."),
        ("18 (2 ducks)", "2"),
        ("1,234", "1234"),
        ("", ""),
    ],
)
def test_flexible_text_golden(text: str, expected: str) -> None:
    assert flexible_text(text) == expected


@given(st.text(alphabet="ab 0123456789.,$-=()\n", max_size=40), st.sampled_from(["18", "-3", "0.5", "1234"]))
def test_flexible_text_is_that_of_lm_eval(text: str, right: str) -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import RegexFilter

    response = f"{text} {right}."
    ((theirs,),) = RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1).apply([[response]], [{}])
    ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
    score = exact_match_hf_evaluate([theirs], [f"Worked.\n#### {right}"], regexes_to_ignore=ignored, ignore_case=True)
    assert (flexible_text(response) == right) == bool(score["exact_match"])


VALUES = st.builds(
    lambda units, cents: Fraction(units) + Fraction(cents, 100), st.integers(-(10**9), 10**9), st.integers(0, 99)
)
CONTEXTS = [
    "{}",
    "She makes {} every day.",
    "She makes 9 * 2 = {} dollars",
    "16 - 3 - 4 = 9.\nSo she makes {}.",
    "The answer is {}.",
    "**The answer is {}.**",
    "The answer is **{}** dollars, from 9 eggs.",
    "Answer: {}",
    "With 9 eggs.\n#### {}",
    "Thus \\boxed{{{}}} from 9 eggs.",
    "It comes to {} (9 eggs at $2).",
    "Every one of the 9 gets **{}** coins of 2.",
]


def spellings(value: Fraction) -> list[str]:
    sign, size = "-" if value < 0 else "", abs(value)
    cents = f"{int(size)}.{int(size * 100) % 100:02}"
    grouped = f"{int(size):,}.{int(size * 100) % 100:02}"
    texts = [number_text(value), sign + cents, sign + grouped, f"{sign}${grouped}", f"${sign}{cents}"]
    texts += [f"{value.numerator}/{value.denominator}"]
    return texts + ([f"{sign}{int(size):,}", f"{sign}\\${int(size):,}"] if value.denominator == 1 else [])


@given(VALUES, st.sampled_from(CONTEXTS), st.data())
def test_a_number_is_read_back_however_it_is_written(value: Fraction, context: str, data: st.DataObject) -> None:
    text = context.format(data.draw(st.sampled_from(spellings(value))))
    assert final_number(text) == value, text


@given(st.fractions())
def test_number_text_is_the_number(value: Fraction) -> None:
    assert Fraction(number_text(value)) == value
    assert final_number(number_text(value)) == value


@given(st.text() | st.text(alphabet="0123456789.,/$#*=\\{}() answeri:\n", max_size=300))
def test_any_text_is_read(text: str) -> None:
    for read in (final_number, strict_number):
        found = read(text)
        assert found is None or math.isfinite(found)
    flexible_text(text)
    program(text)
    program(text, prompt=PROMPT, names=["double"])


NUMBER_UNITS = ["9", "1,", "1,111,", "9th ", "(1", "1=", "**1", "{}", "Q: ", "\\text{", "#### 1 a X\n", "1 because "]
NUMBER_UNITS += ["answer: 1st ", "answer to ", "The answer is 1st ", "\\boxed{1st ", "since 1 ", "between 1 and ", "\n"]
CODE_UNITS = [
    "```\n",
    "~~~\n",
    "[BEGIN]\n",
    '"""',
    '\\"""',
    "\"'",
    "x = (\n",
    "def f():\n",
    "a\0\n",
    "\u00a0",
    "</think>",
]


@pytest.mark.parametrize("unit", [*NUMBER_UNITS, *CODE_UNITS])
def test_the_time_is_linear_in_the_length(unit: str) -> None:
    # A quadratic pattern takes minutes for this length; these take a tenth of a second.
    text, begin = unit * (20_000 // len(unit)), time.process_time()
    final_number(text), strict_number(text), flexible_text(text), program(text, names=["f"])
    assert time.process_time() - begin < 5


PROMPT = 'import math\n\nHELP = 2\n\ndef double(x):\n    """Twice x.\n\n    >>> double(2)\n    4\n    """\n'
HEAD = "import math\n\nHELP = 2\n\n"
BODY = "    y = x * HELP\n    return y\n"
FUNCTION = "def double(x):\n    return x * HELP\n"

COMPLETIONS = [
    # plain continuations
    (BODY, PROMPT + BODY),
    ("\n\n" + BODY + "\n\n", None),
    (BODY + "\nThis function doubles its input.\n", None),
    (BODY + "\ndouble(", None),
    (BODY + "```\nIt doubles. For example:\n```python\ndouble(3)\n```", PROMPT + BODY),
    (BODY + "```", PROMPT + BODY),
    (BODY.removeprefix(" "), PROMPT + BODY),
    (BODY.removeprefix("    "), PROMPT + BODY),
    ("y = x * HELP\nreturn y\n", PROMPT + BODY),
    ("    for _ in [0]:\n        return x * HELP", None),
    ("for _ in [0]:\n        return x * HELP", None),
    (FUNCTION, HEAD + FUNCTION),
    # answers of a chat
    (f"```python\n{FUNCTION}```", HEAD + FUNCTION),
    (f"Sure!\n\n```python\n{FUNCTION}```\n\nCall it:\n\n```python\nprint(double(2))\n```", HEAD + FUNCTION),
    (f"First:\n```bash\npip install x\n```\nthen\n```py\n{FUNCTION}```", HEAD + FUNCTION),
    (f"```\n{FUNCTION}```", HEAD + FUNCTION),
    (f"```Python\r\n{FUNCTION}```", HEAD + FUNCTION),
    (f"Here it is:\n```python\n{FUNCTION}", HEAD + FUNCTION),
    (f"```python\n{FUNCTION}def helper(x):\n    return (x", None),
    (f"```python\n{BODY}```", PROMPT + BODY),
    ("```python\nreturn x * HELP\n```", PROMPT + "    return x * HELP\n"),
    ("1. Write it:\n\n   ```python\n   def double(x):\n       return x * HELP\n   ```", HEAD + FUNCTION),
    (
        '```python\ndef double(x):\n    assert """a\n    \nb""" == "a\\n    \\nb"\n    return 2 * x\n```',
        HEAD + 'def double(x):\n    assert """a\n    \nb""" == "a\\n    \\nb"\n    return 2 * x\n',
    ),
    (f"def halve(x):\n    return x / 2\n\n{FUNCTION}", None),
    (f"```python\nimport math\n\n{FUNCTION}\nprint(double(1))\n```", None),
    (f"```python\n{PROMPT}{BODY}```", HEAD + PROMPT + BODY),
]


@pytest.mark.parametrize(("text", "expected"), COMPLETIONS)
def test_program_completes_its_prompt(text: str, expected: str | None) -> None:
    found = program(text, prompt=PROMPT, names=["double"])
    assert expected is None or found == expected
    space: dict[str, object] = {"print": lambda *_: None}
    exec(compile(found, "golden.py", "exec"), space)  # our own samples, not a model's
    assert space["double"](21) == 42  # type: ignore[operator]


@pytest.mark.parametrize(
    "text",
    [
        FUNCTION,
        f"Here is the function:\n\n{FUNCTION}",
        f"{FUNCTION}\nIt doubles.",
        f"{FUNCTION}\nassert double(2) == 4\n```\nDone.",
        f"```python\n{FUNCTION}\n",
        f"```python\n{FUNCTION}```\nThis is how to call it:\n```\ndouble(2)\n```",
        f"I use a class.\n```python\nclass A:\n    pass\n```\nor better\n```python\n{FUNCTION}```",
        FUNCTION.replace("\n", "\r\n"),
        f"from math import pi\n{FUNCTION}[DONE",
    ],
)
def test_program_alone(text: str) -> None:
    space: dict[str, object] = {"HELP": 2}
    exec(compile(program(text), "golden.py", "exec"), space)  # our own samples, not a model's
    assert space["double"](21) == 42  # type: ignore[operator]


@pytest.mark.parametrize("text", ["I cannot do that.", "def double(x:\n    return", "    ", "", "```python\n```"])
def test_what_is_no_program_does_not_become_one(text: str) -> None:
    found = program(text)
    try:
        tree = ast.parse(found)
    except SyntaxError:
        return
    assert tree.body == []


def test_code_that_would_stop_the_compiler_is_kept_as_it_is() -> None:
    for text in ("(" * 5_000, "x" + ".a" * 5_000 + "(", "-" * 5_000 + "1 1", "a\0b", "'\ud800'", '"\\d" +'):
        assert program(text) == text


@given(st.lists(st.sampled_from(["x = 1", "    return x", "prose here", "", "def f():", "    pass"]), max_size=8))
def test_a_kept_program_is_no_shorter_than_the_longest_run_of_first_lines_that_compiles(lines: list[str]) -> None:
    text = "\n".join(lines)
    found = program(text)
    runs = ["\n".join(lines[:end]) for end in range(len(lines), 0, -1)]
    fitting = [run for run in runs if run.strip() and compiles(run)]
    if fitting:
        assert compiles(found) and found.count("\n") >= fitting[0].count("\n")
    assert found in text
    assert _compiling_lines("", text) == (fitting[0].split("\n") if fitting else [])


def compiles(source: str) -> bool:
    try:
        compile(source, "law.py", "exec")
    except SyntaxError:
        return False
    return True


def test_prose_before_a_function_without_a_fence_is_left_out() -> None:
    text = "Here it is:\n\nimport math\n\ndef root(x):\n    return math.sqrt(x)"
    found = program(text, prompt='from typing import Any\n\ndef root(x: Any):\n    """Root."""\n', names=["root"])
    assert found.startswith("from typing import Any\n") and "Here it is" not in found
    space: dict[str, Any] = {}
    exec(compile(found, "golden.py", "exec"), space)  # our own sample, not a model's
    assert space["root"](9) == 3


WHOLE = "import math\n\n\ndef double(x):\n    y = x * 2\n    return math.floor(y)\n"
DRAFT = "```python\ndef double(x):\n    return 'a draft'\n```\n"
QUOTED = WHOLE.replace("    y", '    """Twice x.\n\n    ```python\n    double(2)\n    ```\n    """\n    y')
NARROW = "\u202f" * 4
FORMS = {
    "thought": f"<think>\nPerhaps\n{DRAFT}</think>\n```python\n{WHOLE}```",
    "thought that the prompt opened": f"Perhaps\n{DRAFT}Hmm.\n</think>\n\n{WHOLE}",
    "tags": f"[PYTHON]\n{WHOLE}[/PYTHON]\n[TESTS]\nassert double(1) == 2\n[/TESTS]",
    "tags in a line": f"[PYTHON]{WHOLE}[/PYTHON] It doubles.",
    "begin and done": f"[BEGIN]\n{WHOLE}[DONE]\nThis (is it",
    "only done": f"{WHOLE}[DONE]\nThis (is it",
    "a fence in tags": f"[BEGIN]\nHere:\n```\n{WHOLE}```\n[DONE]",
    "tildes": f"Sure:\n~~~python\n{WHOLE}~~~\nIt doubles.",
    "tildes with backticks": f"~~~\n{QUOTED}~~~\nIt doubles.",
    "fence in a docstring": f"```python\n{QUOTED}```\nTry:\n```python\nprint(double(1))\n```",
    "fence in a docstring of plain text": QUOTED,
    "plain text, then an example": f"{WHOLE}\nTry:\n```python\nprint(double(1))\n```",
    "no-break spaces": "```python\n" + WHOLE.replace("    ", "\u00a0" * 4) + "```",
    "narrow no-break spaces": WHOLE.replace("    ", NARROW),
    "byte order mark": f"\ufeff{WHOLE}",
    "future": f"```python\nfrom __future__ import annotations\n{WHOLE}```",
    "future in lines": f"# Mine.\nfrom __future__ import (\n    annotations,\n    division,\n); {WHOLE}",
    "another function first": f"```python\ndef halve(x):\n    return x / 2\n```\nthen\n```python\n{WHOLE}```",
    "wrong first": f"{DRAFT}No:\n```python\n{WHOLE}```",
    "dots last": f"```python\n{WHOLE}```\nIn short\n```python\ndef double(x): ...\n```",
    "pass last": f"```python\n{WHOLE}```\n```python\ndef double(x):\n    pass\n```",
    "docstring last": f"```python\n{WHOLE}```\n```python\ndef double(x):\n    'Twice x.'\n```",
    "error last": f"```python\n{WHOLE}```\n```python\ndef double(x):\n    raise NotImplementedError('todo')\n```",
    "not implemented last": f"```python\n{WHOLE}```\n```python\nasync def double(x):\n    return NotImplemented\n```",
    "broken last": f"```python\n{WHOLE}```\n```python\ndef double(x) return x\n```",
    "lambda last": f"{DRAFT}Shorter:\n```python\ndouble = lambda x: 2 * x\n```",
    "imported last": f"{DRAFT}Known:\n```python\nfrom functools import partial\nfrom operator import mul\n"
    "double = partial(mul, 2)\n```",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("prompt", ["", PROMPT], ids=["whole", "completion"])
def test_forms_of_a_program(form: str, prompt: str) -> None:
    if form.endswith(("lambda last", "imported last")) and prompt:
        pytest.skip("a completion is a def")
    space: dict[str, Any] = {}
    exec(compile(program(FORMS[form], prompt=prompt, names=["double"]), "golden.py", "exec"), space)  # our own samples
    assert space["double"](21) == 42


BODIES = {
    "an example follows": f"{BODY}\nUsage:\n```python\nprint(double(1))\n```",
    "tildes": f"~~~\n{BODY}~~~",
    "tags": f"[PYTHON]\n{BODY}[/PYTHON]",
    "no-break spaces": BODY.replace("    ", "\u00a0" * 4),
    "thought": f"<think>\n    return 5\n</think>\n{BODY}",
}


@pytest.mark.parametrize("form", BODIES)
def test_forms_of_a_body(form: str) -> None:
    found = program(BODIES[form], prompt=PROMPT, names=["double"])
    assert ast.dump(ast.parse(found)) == ast.dump(ast.parse(PROMPT + BODY))


def test_spaces_inside_strings_are_kept() -> None:
    text = 'def double(x):\n\u00a0\u00a0return \'\u00a0\' + """a\n\u00a0b"""\n'
    assert program(text) == 'def double(x):\n  return \'\u00a0\' + """a\n\u00a0b"""\n'


def test_a_function_without_a_body_counts_where_there_is_no_other() -> None:
    stub = "def double(x):\n    ...\n"
    assert program(f"```python\n{stub}```\n```python\nprint(1)\n```", names=["double"]) == stub


def test_the_block_that_defines_most_names_counts() -> None:
    both = "class Node:\n    pass\n\ndef read(node):\n    return node\n"
    text = f"```python\n{both}```\nTo read:\n```python\ndef read(node):\n    return 1\n```"
    assert program(text, names=["Node", "read"]) == both


def test_a_stray_quote_hides_no_block() -> None:
    assert program(f"It has ''' and \"\"\" in it.\n```python\n{WHOLE}```", names=["double"]) == WHOLE


@pytest.mark.parametrize("special", [True, False])
def test_thoughts_are_dropped_whether_or_not_their_marks_are_special_tokens(special: bool) -> None:
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["[THINK]", "[/THINK]", "<think>", "</think>"], special_tokens=special)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|other|>"]})

    def text_of(written: str) -> str:
        return answer_text(tokenizer, tokenizer(written, add_special_tokens=False)["input_ids"])

    for begin, end in (("[THINK]", "[/THINK]"), ("<think>", "</think>")):
        text = text_of(f"<bos>{begin}The answer is 3 .{end}The answer<|other|> is 2{tokenizer.eos_token}")
        assert final_number(text) == 2 and after_thoughts(text).split() == "The answer is 2".split()
        assert final_number(text_of(f"{begin} 7 is the answer")) is None, "cut off while it thought"
    assert text_of(f"The answer is 3{tokenizer.eos_token}").strip() == "The answer is 3"
