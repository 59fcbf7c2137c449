"""Golden samples of the extractors, and laws: a number is read back however it is written, a program whole."""

import ast
import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from semalign_harness.benchmarks.extract import final_number, flexible_text, number_text, program, strict_number

NUMBERS = [
    # forms of a number
    ("She makes $18.00", "18"),
    ("18 dollars...", "18"),
    ("18 each day (2 ducks)", "18"),
    ("9 * 2 = 18.", "18"),
    ("#### 1,234", "1234"),
    ("\\boxed{42}", "42"),
    ("**The answer is 7.**", "7"),
    ("The answer is -3.", "-3"),
    ("The change is -$5.25", "-5.25"),
    ("The change is $-5.25", "-5.25"),
    ("\u22127 degrees", "-7"),
    ("10-5", "5"),
    ("- 5 apples", "5"),
    (".5 of it", "0.5"),
    ("He drinks 3/4 of it", "0.75"),
    ("a third is 1/3", "1/3"),
    ("It takes 3 1/2 hours", "3.5"),
    ("5/0", "5"),
    ("The rate is 20%.", "20"),
    ("It weighs 5kg", "5"),
    ("€1,000.50 in all", "1000.5"),
    ("1,2,3", "3"),
    ("1,000,000", "1000000"),
    ("It cost US$40", "40"),
    # LaTeX
    ("x = \\frac{1}{2}", "0.5"),
    ("1\\dfrac{1}{2} cups", "1.5"),
    ("\\[ \\boxed{1{,}234 \\text{ dollars}} \\]", "1234"),
    ("The cost is \\$1\\,234", "1234"),
    ("Janet makes \\(18\\) dollars.", "18"),
    ("\\[\n9 \\times 2 = 18\n\\]", "18"),
    ("It is 100 / 3 \\approx 33.3", "33.3"),
    ("The final answer is: $\\boxed{18}$.", "18"),
    # markers
    ("She has 3 left.\n#### 18 dollars per day.\n", "18"),
    ("#### 1. Count the eggs\nShe has 9.\n#### 2. Sell them\nShe makes 9 * 2 = 18 dollars.", "18"),
    ("##### 4\nThere are 18 eggs", "18"),
    ("**Answer:** $1,000.50 per week (7 days)", "1000.5"),
    ("Final Answer: 18 dollars. She keeps 2 eggs.", "18"),
    ("The answer is\n\n**18**\n\nI hope this helps with your 2nd question!", "18"),
    ("The answer to 3 times 4 is 12.", "12"),
    ("The answer is 2/3 of 9 = 6 apples, or 12 halves", "6"),
    ("The answer is 18 eggs a day, or 126 a week.", "18"),
    ("So the answer is 12. Wait, that is wrong. The answer is 13.", "13"),
    ("Answer: There are 3 cats. In all there are 7 animals.", "7"),
    ("Answer: There are 144/12 = 12 sets, so a total of $6 + $6 = $12. So the answer is 12.", "12"),
    ("Each question got 2 points/answer = 4 points.\nTogether 8 points.", "8"),
    # no marker
    ("16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18 every day. That is a good sum!", "18"),
    ("Therefore, Janet makes **$18** every day from 9 eggs.", "18"),
    ("**Step 1:** she has 9.\n\n**Step 2:** she makes 18", "18"),
    ("He won on the 3rd of his 23rd tries", None),
    ("He has 8 and came in 2nd", "8"),
    ("", None),
    ("I cannot tell.", None),
    ("...", None),
    (
        "To find how much Janet makes, follow these steps:\n\n1. **Eggs left**:\n   \\[\n   16 - 3 - 4 = 9\n   \\]\n\n"
        "2. **Money**:\n   \\[\n   9 \\text{ eggs} \\times 2 \\text{ dollars/egg} = 18 \\text{ dollars}\n   \\]\n\n"
        "So, Janet makes $\\boxed{18}$ dollars every day.",
        "18",
    ),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_final_number_golden(text: str, expected: str | None) -> None:
    found = final_number(text)
    assert (None if found is None else number_text(found)) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("#### 1,234", 1234),
        ("The answer is 18.", 18),
        ("so the answer is: $18.50", Fraction("18.5")),
        ("The answer is 12. The answer is 13", 13),
        ("#### 4\nThe answer is 5", 5),
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
    program(text, prompt=PROMPT, entry_point="double")


@pytest.mark.parametrize(
    "text",
    ["9" * 20_000, "#### 1" + " a" * 20_000, "answer to " * 4_000, "(" * 20_000 + "1", "1," * 20_000, "=" * 20_000],
    ids=["digits", "unit", "answer", "parentheses", "commas", "equals"],
)
def test_long_texts_are_read(text: str) -> None:
    final_number(text), strict_number(text), flexible_text(text)


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
    found = program(text, prompt=PROMPT, entry_point="double")
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


def compiles(source: str) -> bool:
    try:
        compile(source, "law.py", "exec")
    except SyntaxError:
        return False
    return True


def test_prose_before_a_function_without_a_fence_is_left_out() -> None:
    text = "Here it is:\n\nimport math\n\ndef root(x):\n    return math.sqrt(x)"
    found = program(text, prompt='from typing import Any\n\ndef root(x: Any):\n    """Root."""\n', entry_point="root")
    assert found.startswith("from typing import Any\n") and "Here it is" not in found
    space: dict[str, Any] = {}
    exec(compile(found, "golden.py", "exec"), space)  # our own sample, not a model's
    assert space["root"](9) == 3
