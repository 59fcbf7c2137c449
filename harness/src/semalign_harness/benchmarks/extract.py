"""Answers and programs read out of a model's text: pure functions that run nothing of it."""

import decimal
import re
import warnings
from collections.abc import Iterable
from fractions import Fraction

NUMBER = re.compile(
    r"(?P<sign>(?<![\w.)\]}])-)?(?:(?:US)?[$€£]\s?(?P<inner>-)?)?"
    r"(?P<whole>(?>[0-9]{1,3}(?:,[0-9]{3})++(?![0-9])|[0-9]++|(?=\.[0-9])))(?!(?:st|nd|rd|th)\b)"
    r"(?P<decimals>\.[0-9]++)?"
    r"(?:(?P<above>\s[0-9]++)?/(?P<below>[0-9]++)(?!\.[0-9]))?"
)
"""A number in running text; of `3 1/2`, `above` is the 1. Ordinals are no numbers."""
LONGEST_NUMBER = 100

_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r" \1/\2"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}|(?<=[0-9])\\,(?=[0-9])"), ","),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:approx|simeq|equiv)\b|[≈≃]"), "="),
    (re.compile("[\u2212\u2010\u2011]"), "-"),
    (re.compile("[\u00a0\u202f\u2009]"), " "),
)
_BOXED = re.compile(r"\\f?boxed\s*(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([0-9]+))")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t*]*([^\n]*)")
_UNIT = re.compile(r"\**\s*(?:%|(?:[a-z]++ ?){0,4})\.?\**\s*")
_IS = re.compile(r"\b(?:answer\b(?:\s+to\b[^.\n]{0,200}?)?[\s*_]*is\b|final answer\b[ \t*_]*:)[:*_\s]*", re.IGNORECASE)
_COLON = re.compile(r"\banswer\b[ \t*_]*:[:*_ \t]*(?=[-$€£\\([*]*[ \t]*\.?[0-9])", re.IGNORECASE)
_BOLD = re.compile(r"\*\*([-$€£]*[0-9][^*\n]*)\*\*")
_STRICT = re.compile(r"the answer is:?\s*", re.IGNORECASE)
_ASIDE = re.compile(r"(?<!\\)\([^()]*\)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")

_FENCE = re.compile(r"(?P<indent>^[ \t]+)?`{3,}(?P<info>[^\n`]*)\n?", re.MULTILINE)
_LANGUAGE = re.compile(r"\s*\{?\.?[A-Za-z][\w+#.-]*\}?\s*")
_CODE_LINE = re.compile(r"^(?:async def|def|class|import|from|@)\b|^@", re.MULTILINE)


def final_number(text: str) -> Fraction | None:
    r"""The number that a worked solution arrives at; None when it holds none.

    The last of these markers decides: `\boxed{…}`, `#### …`, "the answer is …", "Answer: …". Without one, the last
    sentence with a number does. Within a sentence, what follows the last equals sign comes first, then numbers in bold
    print, then numbers outside parentheses: the first of them in a box, after "the answer is" and after "final answer",
    else the last. Ordinals are no numbers, units and currencies are passed over, and `$18.00`, `18.` and `36/2` are all
    18.
    """
    text = _without_latex(text)
    found: list[tuple[int, Fraction]] = []
    for match in _BOXED.finditer(text):
        found += _at(match.start(), _conclusion([match[1] or match[2]], first=True))
    for match in _HASHES.finditer(text):
        found += _at(match.start(), _hashes(match[1]))
    for match in _IS.finditer(text):
        found += _at(match.end(), _conclusion(_SENTENCE.split(_line(text, match.end())), first=True))
    for match in _COLON.finditer(text):
        found += _at(match.end(), _conclusion(reversed(_SENTENCE.split(_line(text, match.end()))), first=False))
    if found:
        return max(found, key=lambda pair: pair[0])[1]
    sentences = [sentence for line in text.split("\n") for sentence in _SENTENCE.split(line)]
    return _conclusion(reversed(sentences), first=False)


def strict_number(text: str) -> Fraction | None:
    """The number of the last line `#### n` or phrase "the answer is n", whichever comes last; None without either."""
    found = [pair for match in _HASHES.finditer(text) for pair in _at(match.start(), _hashes(match[1]))]
    for match in _STRICT.finditer(text):
        if number := NUMBER.match(text, match.end()):
            found += _at(match.start(), _value(number))
    return max(found, key=lambda pair: pair[0])[1] if found else None


def flexible_text(text: str) -> str:
    """The last thing that looks like a number, as lm-eval's flexible-extract cleans it; empty without one.

    It reads `$18.00` as 18.00, which is not 18, and the dots of "18 dollars..." as an answer. Reported so that figures
    can be compared with published ones.
    """
    found = _FLEXIBLE.findall(text)
    match = next(filter(None, found[-1])) if found else ""
    return re.sub(r"\.$", "", match.replace(",", "").replace("$", ""))


def number_text(value: Fraction) -> str:
    """A number as plain text: 18, -3.25, or 1/3 where no decimal ends."""
    with decimal.localcontext(prec=4 * LONGEST_NUMBER):
        quotient = decimal.Decimal(value.numerator) / value.denominator
    return f"{quotient:f}" if Fraction(quotient) == value else str(value)


def program(text: str, *, prompt: str = "", entry_point: str | None = None) -> str:
    """The program that a text holds or completes.

    The code is the first fenced block that defines `entry_point` (any function, when that is None), else the first
    block; a block may lack its closing fence, and text before a closing fence that nothing opened is a block as well.
    Without fences, the code is the text. Code that defines the entry point follows what stands before the
    signature in the prompt, such as imports; other code follows the whole prompt, indented as its body. Of the code,
    the longest run of first lines that compiles is kept, without a sentence that stands before a whole program; all of
    it when none does.

    Args:
        text: what the model wrote.
        prompt: source up to the docstring of the function to complete; empty when the model writes everything.
        entry_point: name of that function.
    """
    code = _answer_block(text, entry_point)
    signature = _definition(entry_point)
    if not prompt:
        return _best("", [code, _from_code_line(code)])
    if signature.search(code):
        place = list(signature.finditer(prompt))
        head = prompt[: place[-1].start()] if place else prompt
        return _best(head, [code, _from_code_line(code)])
    first_line, _, rest = code.lstrip("\n").partition("\n")
    return _best(
        prompt if prompt.endswith("\n") else prompt + "\n",
        [code, "    " + first_line.lstrip() + "\n" + rest, _indented(code)],
    )


def _without_latex(text: str) -> str:
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return text


def _at(position: int, value: Fraction | None) -> list[tuple[int, Fraction]]:
    return [] if value is None else [(position, value)]


def _line(text: str, start: int) -> str:
    return text[start:].partition("\n")[0]


def _hashes(line: str) -> Fraction | None:
    """The number of a `####` line that holds a number and at most a unit, which a heading does not."""
    match = NUMBER.match(line)
    return _value(match) if match and _UNIT.fullmatch(line, match.end()) else None


def _conclusion(sentences: Iterable[str], *, first: bool) -> Fraction | None:
    """The number that the first of these sentences with a number concludes with, or begins with when `first`."""
    for sentence in sentences:
        after = sentence.rpartition("=")[2] if "=" in sentence else ""
        bold = " ; ".join(_BOLD.findall(sentence))
        outside = _ASIDE.sub(" ", sentence)
        for part, from_start in ((after, True), (bold, first), (outside, first), (sentence, first)):
            values = [value for match in NUMBER.finditer(part) if (value := _value(match)) is not None]
            if values:
                return values[0 if from_start else -1]
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    value = Fraction((match["whole"].replace(",", "") or "0") + (match["decimals"] or ""))
    below = int(match["below"] or 1)
    if below and match["above"]:
        value += Fraction(int(match["above"]), below)
    elif below:
        value /= below
    return -value if match["sign"] or match["inner"] else value


def _answer_block(text: str, entry_point: str | None) -> str:
    blocks = _blocks(text)
    defining = [block for block in blocks if _definition(entry_point).search(block)]
    return (defining or blocks or [text])[0]


def _blocks(text: str) -> list[str]:
    fences = list(_FENCE.finditer(text))
    tagged = [bool(_LANGUAGE.fullmatch(fence["info"])) for fence in fences]
    blocks = []
    start: int | None = None
    indent = ""
    if fences and not tagged[0] and (len(fences) == 1 or tagged[1]):
        start = 0  # a closing fence that nothing opened
    for fence, opens in zip(fences, tagged, strict=True):
        if start is not None:
            blocks.append(_unindented(text[start : fence.start()], indent))
        start, indent = (fence.end(), fence["indent"] or "") if opens or start is None else (None, "")
    return blocks if start is None else [*blocks, _unindented(text[start:], indent)]


def _unindented(block: str, indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in block.split("\n"))


def _definition(entry_point: str | None) -> re.Pattern[str]:
    name = re.escape(entry_point) if entry_point else r"\w+"
    return re.compile(rf"^(?:async[ \t]+)?def[ \t]+{name}\b", re.MULTILINE)


def _from_code_line(code: str) -> str:
    match = _CODE_LINE.search(code)
    return code[match.start() :] if match else code


def _indented(code: str) -> str:
    return "\n".join("    " + line if line.strip() else line for line in code.split("\n"))


def _best(head: str, candidates: list[str]) -> str:
    """`head` and the candidate of which most lines compile after it."""
    kept = [_compiling_lines(head, candidate) for candidate in candidates]
    best = max(range(len(candidates)), key=lambda index: len(kept[index]))
    return head + ("\n".join(kept[best]) if kept[best] else candidates[0])


def _compiling_lines(head: str, code: str) -> list[str]:
    lines = code.split("\n")
    while lines and "".join(lines).strip():
        if _compiles(head + "\n".join(lines)):
            return lines
        lines.pop()
    return []


def _compiles(source: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model's invalid escapes are not ours
        try:
            compile(source, "<answer>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False
    return True
