"""Generated arithmetic problems."""

import dataclasses
import hashlib
import random
from collections.abc import Sequence
from typing import Any, Literal

from semalign_geometry.base import SemalignError

Split = Literal["train", "held_out"]


_NAMES = """
Ada Adam Aisha Alan Amir Ana Anya Ari Arlo Ben Bela Boris Cara Carl Chen Cleo Dana Dario Demi Dina Edith Eli
Elsa Emil Enzo Eva Farah Felix Finn Flora Gita Greta Gus Hana Hans Hugo Ida Igor Ines Iris Ivan Jana Joel
Jonas Juno Karim Kofi Lars Lena Leo Lila Luca Luis Maja Marco Mei Mia Milo Mina Nadia Nils Nina Noah Nora
Olga Omar Oscar Otto Paco Petra Pia Priya Quinn Raj Ravi Remy Rita Rosa Ruth Sami Sara Selma Sven Tara Theo
Tilda Tom Uma Vera Viktor Wanda Wei Yara Yuki Zara Zeno Zoe
""".split()


_OBJECTS = """
acorns apples bagels balls baskets beads bells berries blankets bolts books bottles bowls bricks brushes
buckets buns buttons cakes candles caps cards carrots chairs cherries clocks coins combs cones corks crayons
crates cups dates dolls drums eggs envelopes feathers figs flags flutes forks gloves grapes hats herbs hooks
jars kettles keys kites knots ladders lamps leaves lemons letters limes magnets maps marbles melons mirrors
mugs nails needles nuts olives onions papers peaches pears pebbles pencils pins plates plums posters pots
radishes ribbons rings ropes roses rulers scarves seeds shells shirts socks spoons stamps stickers stones
tiles tulips turnips vases wheels whistles
""".split()


_PLACES = """
attic bakery barn basement cabin cafe cellar classroom cottage courtyard den garage garden gym hall hut
kitchen laundry library lodge market museum office orchard pantry park school shed shop stable studio
workshop
""".split()


_START = (
    "{name} has {first} {object} .",
    "{name} finds {first} {object} .",
    "There are {first} {object} in the {place} .",
)


_GROUPS = (
    "{name} has {first} boxes with {second} {object} each .",
    "{name} fills {first} bags with {second} {object} .",
)


_ADD = ("{name} buys {count} more .", "{other} brings {count} more .", "Then {name} adds {count} .")


_SUBTRACT = ("{name} loses {count} .", "{name} gives {other} {count} .", "{other} takes {count} away .")


_QUESTION = ("How many {object} now ?", "How many {object} are there ?")


_ANSWER = "The answer is"


_LARGEST_NUMBER = 40


_OPERATIONS: tuple[str, ...] = ("+", "-", "*", "++", "+-", "-+", "--", "*+", "*-")


_OPERATION_WEIGHTS = (1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5)


_HELD_OUT_OF_256 = 51
_START_RANGE, _FACTOR_RANGE, _CHANGE_RANGE = (2, 12), (2, 5), (1, 9)


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    """One line of the chain of thought, `left operation right = result`."""

    left: int
    operation: str
    right: int
    result: int


def arithmetic_rows(count: int, *, seed: int, split: Split) -> list[dict[str, Any]]:
    """Generate arithmetic word problems as chat rows.

    A *problem* is its operations and its numbers; names, objects and wording dress it. A hash of the problem
    decides its split, so no problem of `train` occurs in `held_out`, whatever the two seeds. Prompts do not
    repeat within one call, problems do. Same arguments, same rows.

    Args:
        count: Number of rows, at least 0.
        seed: Seed of the draw; its own stream, the global random state is neither read nor changed.
        split: About four fifths of all problems belong to `train`, the rest to `held_out`.

    Returns:
        Rows with `messages` (a user turn, then an assistant turn such as `7 + 5 = 12 . The answer is 12`) and
        `answer`, the digits of the result, which is also the last number of the assistant turn.

    Raises:
        SemalignError: If `count` is negative or `split` is unknown.

    Source:
        ours.
    """
    if split not in ("train", "held_out"):
        raise SemalignError(f"split is {split!r}; expected 'train' or 'held_out'")
    if count < 0:
        raise SemalignError(f"count is {count}; expected 0 or more rows")
    return _draw_rows(count, stream=f"rows:{split}:{seed}", split=split)


def _draw_rows(count: int, *, stream: str, split: Split) -> list[dict[str, Any]]:
    generator = random.Random(stream)
    rows: list[dict[str, Any]] = []
    seen: set[str] = set()
    while len(rows) < count:
        operations = generator.choices(_OPERATIONS, _OPERATION_WEIGHTS)[0]
        steps = _draw_steps(operations, generator)
        if steps is None or _split_of(operations, steps) != split:
            continue
        prompt = _tell(steps, generator)
        if prompt in seen:
            continue
        seen.add(prompt)
        answer = str(steps[-1].result)
        chain = "".join(f"{step.left} {step.operation} {step.right} = {step.result} . " for step in steps)
        messages = [
            {"role": "user", "content": prompt},
            {"role": "assistant", "content": f"{chain}{_ANSWER} {answer}"},
        ]
        rows.append({"messages": messages, "answer": answer})
    return rows


def _draw_steps(operations: str, generator: random.Random) -> list[_Step] | None:
    """Draw the steps of a problem; None where nothing is left to subtract from."""
    steps: list[_Step] = []
    value = generator.randint(*(_FACTOR_RANGE if operations[0] == "*" else _START_RANGE))
    for operation in operations:
        low, high = _FACTOR_RANGE if operation == "*" else _CHANGE_RANGE
        if operation == "-":
            high = min(high, value)
        if high < low:
            return None
        right = generator.randint(low, high)
        result = {"+": value + right, "-": value - right, "*": value * right}[operation]
        steps.append(_Step(value, operation, right, result))
        value = result
    return steps


def _split_of(operations: str, steps: Sequence[_Step]) -> Split:
    # With this prefix the hash gives both splits every kind of problem (there are only 16 single products).
    numbers = ":".join(str(number) for number in (steps[0].left, *(step.right for step in steps)))
    problem = f"problem:{operations}:{numbers}"
    byte = hashlib.sha256(problem.encode()).digest()[0]
    return "held_out" if byte < _HELD_OUT_OF_256 else "train"


def _tell(steps: Sequence[_Step], generator: random.Random) -> str:
    """Dress the problem in words: who, what, where, and one of several wordings for every sentence."""
    name, other = generator.sample(_NAMES, 2)
    words: dict[str, str | int] = {
        "name": name,
        "other": other,
        "object": generator.choice(_OBJECTS),
        "place": generator.choice(_PLACES),
        "first": steps[0].left,
        "second": steps[0].right,
    }
    grouped = steps[0].operation == "*"
    sentences = [generator.choice(_GROUPS if grouped else _START)]
    for step in steps[1:] if grouped else steps:
        sentence = generator.choice(_ADD if step.operation == "+" else _SUBTRACT)
        sentences.append(sentence.replace("{count}", str(step.right)))
    sentences.append(generator.choice(_QUESTION))
    return " ".join(sentence.format(**words) for sentence in sentences)
