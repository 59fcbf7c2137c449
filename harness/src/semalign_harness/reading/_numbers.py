r"""The final number of a worked solution.

**The part of the text that counts**

1. Thoughts are dropped: everything up to the last `</think>`.
2. A line `#### n` ends the solution: the first of them is the answer, and the text behind it is
   ignored. A heading such as `#### 1. Count the eggs` is no such line.
3. `Q:`, `Question:`, `Problem:`, `User:` and `Human:` begin another exercise: the first exercise with
   an answer counts, as models invent further questions.
4. Without `####`, the last of these markers decides: `\boxed{n}`, "the answer is n",
   "final answer: n", "Answer: n". A model that corrects itself is read by its last word.
5. Without a marker, the last sentence with a number decides.

**The number of a sentence that counts**

6. Never: a denied number ("not 20", "rather than 20", "instead of 20"), a range ("between 5 and 7"),
   an ordinal (3rd), digits after a letter or in an exponent (mp3, cm^2), a division by zero.
7. Parentheses, "because …" and "since …," are reasons, the rest is the claim. A reason whose equation
   arrives at a number of the claim confirms that number; else the claim alone counts, and reasons
   where it has no number.
8. In an equation: the value furthest to the right that is not a calculation. `9 * 2 = 18 dollars` is
   18, and `36 = 12 × 3` is 36. The signs ≈ and ≡ are equals signs.
9. Else numbers in bold print, else all others; those outside calculations first. After a marker that
   names the answer the first of them counts, else the last.

**The value of a number**

10. Digits may be grouped by commas (1,000; 10,00,000), spaces of any width (1 000), apostrophes
    (1'000), underscores, or two and more points (1.000.000). The decimal mark is the point.
11. Fractions count: 3/4, 3 1/2, 1 and 1/2, ½, `\frac{3}{4}`. So do 1.5e3, `2\times 10^3`, 10³ and "1.5 million".
12. Currencies, percent signs and units are ignored: $18.00, 18%, 18 dollars are 18.

**Choices between two fair readings**

- `1 000` in plain spaces is one number, as in solutions; so is the "5 100" of "room 5 100 people".
- `1.000` is 1, and `2,50` are two numbers, as in English.
- `20%` is 20, and "3 dozen" is 3: questions ask for percent and for dozens. "4 million" is 4,000,000,
  although a few questions count in millions.
- "25 because 20 + 10 = 30" is 25, the claim, and not 30, the computation.
- Of two lines `####` the first counts: models run on more often than they correct themselves.
- Numbers in words are not read.

Numbers are compared as exact fractions, without a tolerance: 33.33 is not 100/3.

Every pattern has bounded or possessive repeats, so that the time is linear in the length of the text.
"""

import decimal
import itertools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from ._thoughts import after_thoughts

LONGEST_NUMBER = 100
"""Characters of the longest number, and the largest exponent: anything beyond has no value."""
REACH = 300
"""Characters after a marker in which its number must stand."""

_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_WORD = re.compile("|".join(_SCALES))
_DIGITS = r"""
    (?:(?>[0-9]{1,2}(?:,[0-9]{2}){1,10},[0-9]{3}(?![0-9])                # 10,00,000
        | [0-9]{1,3}(?:,[0-9]{3}){1,10}(?![0-9])                          # 1,000
        | [0-9]{1,3}(?:['’_][0-9]{3}){1,10}(?![0-9])                      # 1'000
        | [1-9][0-9]{0,2}(?:[ ][0-9]{3}){1,10}(?![0-9]|-[A-Za-z])         # 1 000, but not of "5 100-dollar bills"
        | [1-9][0-9]{0,2}(?:\.[0-9]{3}){2,10}(?![0-9])                    # 1.000.000
        | [0-9]++
    )(?:\.[0-9]++)? | (?<!\.)\.[0-9]++)"""
_NUMBER = re.compile(
    rf"""
    (?P<sign>(?<![\w.)\]}}])(?<![0-9]\s)-)?
    (?:(?:[A-Z]{{0,3}}[$€£¥₹]|\b(?:USD|EUR|GBP|INR|Rs\.?))\s?(?P<inner>-)?|(?<![A-Za-z0-9^]))
    (?:(?P<wholes>[0-9]{{1,9}})\s(?:and\s)?(?P<above>[0-9]{{1,2}})/(?P<parts>[0-9]{{1,3}})(?![0-9])
        | (?P<number>{_DIGITS})(?!(?:st|nd|rd|th)\b)
          (?:[eE](?P<e>[+-]?[0-9]{{1,3}})
            | \s?[×*]\s?10\^\{{?(?P<ten>-?[0-9]{{1,3}})(?![0-9])
            | \^\{{?(?P<power>-?[0-9]{{1,3}})(?![0-9])
          )?
          (?:\s?/\s?(?P<below>{_DIGITS}))?
          (?P<scale>(?:[ -](?:{"|".join(_SCALES)})s?\b){{1,2}})?
    )""",
    re.VERBOSE,
)
_SEPARATORS = re.compile(r"[,'’_ ]")

_PLAIN = (
    (re.compile("([⁰¹²³⁴-⁹⁻]+)"), r"^\1"),
    (re.compile("(?<=[0-9])(?=[¼-¾⅐-⅞])"), " "),
)
"""Signs that Unicode's compatibility form would join with the digits before them."""
_ASCII = (
    (re.compile("[\u2010-\u2013\u2212]"), "-"),
    (re.compile("\u2044"), "/"),
    (re.compile(r"\{,\}|(?<=[0-9])\\[,;:](?=[0-9])"), ","),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
    (re.compile(r"\\(?:text|mathrm|mathbf|textbf|operatorname)\s{0,9}\{([^{}]*)\}"), r" \1"),
    (re.compile(r"(?<=[0-9])(?=\\[dt]?frac)"), " "),
    (
        re.compile(r"\\[dt]?frac\s{0,9}\{\s{0,9}(-?[0-9.,]{1,99})\s{0,9}\}\s{0,9}\{\s{0,9}([0-9.,]{1,99})\s{0,9}\}"),
        r"\1/\2",
    ),
    (re.compile(r"\\[dt]?frac ?([0-9]) ?([0-9])"), r"\1/\2"),
    (re.compile(r"\\(?:approx|simeq|equiv)\b|[≈≃≡]"), "="),
    (re.compile(r"\\(?:times|cdot)\b|·|(?<=[0-9]) ?[xX] ?(?=\$?[0-9])"), " × "),
    (re.compile(r"\\div\b"), "÷"),
    (re.compile(r"\\[()\[\] ]"), " "),
    (re.compile(r"[ \t]{2,}"), " "),
)
"""LaTeX and other signs, as plain text."""
_BOXED = re.compile(r"\\f?boxed\s{0,9}(?:\{|(?=[0-9]))")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t*]*([^\n]*)")
_UNIT = re.compile(r"\**\s*(?:%|(?:[a-z]++ ?){0,4})\.?\**\s*")
_IS = re.compile(
    r"\b(?:answer\b(?:\s{1,9}to\b[^.\n]{0,200}?)?[\s*_]{0,9}\bis\b|final answer\b[ \t*_]{0,9}:)[:*_\s]{0,9}",
    re.IGNORECASE,
)
_COLON = re.compile(r"\banswer\b[ \t*_]{0,9}:[:*_ \t]{0,9}(?=[-$€£\\([*]{0,9}[ \t]{0,9}\.?[0-9])", re.IGNORECASE)
_STRICT = re.compile(r"the answer is:?\s{0,9}", re.IGNORECASE)
_NEXT = re.compile(r"(?<!\S)\**(?:Q|Question|Problem|User|Human)\b\**:")
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_BOLD = re.compile(r"\*\*([-$€£]{0,3}[0-9][^*\n]*)\*\*")
_PARENTHESIS = re.compile(r"\([^()]*\)")
_SINCE = re.compile(r"(?:\bsince\b|\A\W*\bbecause\b)(?:[^,]|,(?!\s))*(?:,|\Z)", re.IGNORECASE)
_BECAUSE = re.compile(r"\bbecause\b", re.IGNORECASE)
_DENIED = re.compile(r"(?:\bnot|n't|\brather than|\binstead of)\s{1,5}$", re.IGNORECASE)
_BETWEEN = re.compile(r"\bbetween\s{1,5}$", re.IGNORECASE)
_AND = re.compile(r"[\w\s%]*\band\s{1,5}")
_OPERATOR = re.compile(r"[+×÷]|(?<!\S)[-*/](?!\S)")
_MINUS = re.compile(r"\A\s*-\s+(?=[$€£.0-9])")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")


class _Number(NamedTuple):
    value: Fraction
    in_calculation: bool
    """Whether an operator stands between it and the number before or after it."""
    bold: bool


def final_number(text: str) -> Fraction | None:
    """Return the final number of a worked solution, by the rules above; None without one."""
    exercises = _exercises(text)
    for read in (_marked, _last_sentence):
        for exercise in exercises:
            if (value := read(exercise)) is not None:
                return value
    return None


def strict_number(text: str) -> Fraction | None:
    """Return the number of the first line `#### n`, else of the last "the answer is n", if any."""
    for exercise in _exercises(text):
        if (value := _hashes(exercise)) is not None:
            return value
        found = [_NUMBER.match(exercise, match.end()) for match in _STRICT.finditer(exercise)]
        values = [value for match in found if match and (value := _value(match)) is not None]
        if values:
            return values[-1]
    return None


def same_number(text: str, reference: str) -> bool:
    """Return whether two texts have exactly the same final number; False when either has none."""
    number = final_number(text)
    return number is not None and number == final_number(reference)


def flexible_text(text: str) -> str:
    """Return the last text like a number as lm-eval's flexible-extract cleans it; empty without one.

    It reads `$18.00` as 18.00, which is not 18, and the dots of "18 dollars..." as an answer. It is
    reported for comparison with published metrics; thoughts are dropped here too.
    """
    found = _FLEXIBLE.findall(after_thoughts(text))
    match = next(filter(None, found[-1])) if found else ""
    return re.sub(r"\.$", "", match.replace(",", "").replace("$", ""))


def number_text(value: Fraction) -> str:
    """Write a number as plain text: 18, -3.25, or 1/3 where the decimals do not end."""
    with decimal.localcontext(prec=4 * LONGEST_NUMBER):
        quotient = decimal.Decimal(value.numerator) / value.denominator
    return f"{quotient:f}" if Fraction(quotient) == value else str(value)


def _exercises(text: str) -> list[str]:
    """The text after its thoughts, in plain signs, cut before each further question."""
    text = after_thoughts(text)
    for pattern, replacement in _PLAIN:
        text = pattern.sub(replacement, text)
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _ASCII:
        text = pattern.sub(replacement, text)
    return _NEXT.split(text)


def _marked(text: str) -> Fraction | None:
    """The number of the first line `####`, else of the last marker that has one."""
    if (value := _hashes(text)) is not None:
        return value
    markers = [(start, [content], True) for start, content in _boxes(text)]
    for match in _IS.finditer(text):
        markers.append((match.end(), _SENTENCE.split(_line(text, match.end())[:REACH]), True))
    for match in _COLON.finditer(text):
        if len(line := _line(text, match.end())) <= REACH:  # a longer one is the solution, not the answer
            markers.append((match.end(), _SENTENCE.split(line)[::-1], False))
    for _, sentences, first in sorted(markers, key=lambda marker: marker[0], reverse=True):
        for sentence in sentences:
            if (value := _conclusion(_MINUS.sub("-", sentence) if first else sentence, first=first)) is not None:
                return value
    return None


def _hashes(text: str) -> Fraction | None:
    """The number of the first line `####` that holds a number and at most a unit."""
    for line in _HASHES.finditer(text):
        match = _NUMBER.match(line[1])
        if match and _UNIT.fullmatch(line[1], match.end()) and (value := _value(match)) is not None:
            return value
    return None


def _boxes(text: str) -> list[tuple[int, str]]:
    r"""Start and content of each `\boxed{…}`; one that is not closed ends with its line."""
    closing: dict[int, int] = {}
    opened: list[int] = []
    for brace in re.finditer("[{}]", text):
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened:
            closing[opened.pop()] = brace.start()
    found = []
    for match in _BOXED.finditer(text):
        end = closing.get(match.end()) if match[0].endswith("{") else None
        content = _line(text, match.end()) if end is None else text[match.end() : min(end, match.end() + REACH)]
        found.append((match.start(), content))
    return found


def _line(text: str, start: int) -> str:
    """The rest of a line, without what stands out of reach."""
    return text[start : start + REACH + 1].partition("\n")[0]


def _last_sentence(text: str) -> Fraction | None:
    for sentence in reversed(_SENTENCE.split(text)):
        if (value := _conclusion(sentence, first=False)) is not None:
            return value
    return None


def _conclusion(sentence: str, *, first: bool) -> Fraction | None:
    """The number that a sentence concludes with; the one that it begins with where `first`."""
    claim = _claim(sentence)
    if not (numbers := _numbers(claim)):
        claim, numbers = sentence, _numbers(sentence)
    result = _equal(sentence)
    if any(number.value == result for number in numbers):  # the claim itself, or a reason that arrives at it
        return result
    if (result := _equal(claim)) is not None:
        return result
    numbers = [number for number in numbers if number.bold] or numbers
    numbers = [number for number in numbers if not number.in_calculation] or numbers
    return numbers[0 if first else -1].value if numbers else None


def _claim(sentence: str) -> str:
    """A sentence without its asides and reasons."""
    claim = _SINCE.sub(" ", _PARENTHESIS.sub(" ", sentence))
    *before, _ = _BECAUSE.split(claim)
    return "because".join(before) if before else claim


def _equal(part: str) -> Fraction | None:
    """The value furthest to the right in an equation; None where there is none."""
    *lefts, right = part.split("=")
    if lefts:
        numbers = _numbers(_MINUS.sub("-", right))
        if numbers and not numbers[0].in_calculation:
            return numbers[0].value
        for left in reversed(lefts):
            numbers = _numbers(left)
            if numbers and not numbers[-1].in_calculation:
                return numbers[-1].value
    return None


def _numbers(part: str) -> list[_Number]:
    """The numbers of a text in their order, without those that are denied and without ranges."""
    bold = {match.start(1) for match in _BOLD.finditer(part)}
    part = part.replace("**", "  ")
    matches = list(_NUMBER.finditer(part))
    gaps = [part[left.end() : right.start()] for left, right in itertools.pairwise(matches)]
    calculations = [_OPERATOR.search(gap) is not None for gap in gaps]
    found, in_range = [], False
    for place, match in enumerate(matches):
        before = max(0, match.start() - 20), match.start()
        if in_range:
            in_range = False
        elif _BETWEEN.search(part, *before) and place < len(gaps) and _AND.fullmatch(gaps[place]):
            in_range = True
        elif not _DENIED.search(part, *before) and (value := _value(match)) is not None:
            in_calculation = any(calculations[max(0, place - 1) : place + 1])
            found.append(_Number(value, in_calculation, match.start() in bold))
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    """The value of a number; None for a division by zero, and beyond `LONGEST_NUMBER`."""
    if match.end() - match.start() > LONGEST_NUMBER:
        return None
    try:
        if match["wholes"]:
            value = int(match["wholes"]) + Fraction(int(match["above"]), int(match["parts"]))
        else:
            power = int(match["power"] or 1)
            shift = int(match["e"] or match["ten"] or 0) + sum(
                map(_SCALES.__getitem__, _WORD.findall(match["scale"] or ""))
            )
            if max(abs(shift), abs(power) * len(match["number"])) > LONGEST_NUMBER:
                return None
            value = _fraction(match["number"]) ** power * Fraction(10) ** shift / _fraction(match["below"] or "1")
    except ZeroDivisionError:
        return None
    return -value if match["sign"] or match["inner"] else value


def _fraction(digits: str) -> Fraction:
    digits = _SEPARATORS.sub("", digits)
    return Fraction(digits if digits.count(".") < 2 else digits.replace(".", ""))
