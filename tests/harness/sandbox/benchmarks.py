"""Small programs of our own in the style of HumanEval and MBPP."""

from semalign_harness.sandbox import Program


def humaneval(prompt: str, solution: str, entry_point: str, check: str) -> Program:
    body = "".join(f"    {line}\n" for line in check.splitlines())
    tests = f"METADATA = {{}}\n\n\ndef check(candidate):\n{body}\n\ncheck({entry_point})"
    return Program(prompt + solution, tests, entry_point, prompt)


def mbpp(code: str, *asserts: str, setup: str = "") -> Program:
    return Program(code.replace("\n", "\r\n"), "\n".join([setup, *asserts]))


PROGRAMS: dict[str, Program] = {
    "list": humaneval(
        "from typing import List\n\n\ndef evens(numbers: List[int]) -> List[int]:\n    '''The even ones.'''\n",
        "    return [n for n in numbers if n % 2 == 0]\n",
        "evens",
        "assert candidate([1, 2, 3, 4]) == [2, 4]\nassert candidate([]) == []",
    ),
    "tolerance": humaneval(
        "import math\n\n\ndef area(r: float) -> float:\n    '''Of a circle.'''\n",
        "    return math.pi * r * r\n",
        "area",
        "import math\nassert abs(candidate(1.0) - math.pi) < 1e-9\nassert math.isclose(candidate(2), 4 * math.pi)",
    ),
    "helper in the prompt": humaneval(
        "def shift(s):\n    return ''.join(chr(ord(c) + 1) for c in s)\n\n\ndef back(s):\n    '''Undo shift.'''\n",
        "    return ''.join(chr(ord(c) - 1) for c in s)\n",
        "back",
        "from random import Random\nrandom = Random(0)\nfor _ in range(9):\n"
        "    str = ''.join(random.choice('abc') for _ in range(5))\n    assert candidate(shift(str)) == str",
    ),
    "text": humaneval(
        "def greet(name):\n    '''Politely.'''\n",
        "    print('debug')\n    return f'Hello {name}'\n",
        "greet",
        "assert candidate('Zoë') == 'Hello Zoë', 'accent'\nassert candidate(name='x').startswith('Hello')",
    ),
    "recursion": humaneval(
        "def depth(n):\n    '''n.'''\n",
        "    return 0 if n == 0 else 1 + depth(n - 1)\n",
        "depth",
        "assert candidate(900) == 900",
    ),
    "error": humaneval(
        "def positive(x):\n    '''x, or ValueError.'''\n",
        "    if x <= 0:\n        raise ValueError('not positive')\n    return x\n",
        "positive",
        "assert candidate(3) == 3\ntry:\n    candidate(-1)\nexcept ValueError as error:\n"
        "    assert str(error) == 'not positive'\nelse:\n    assert False",
    ),
    "argument changed in place": humaneval(
        "def sort_it(rows):\n    '''In place, and how many.'''\n",
        "    for row in rows: row.sort()\n    rows.append([])\n    return len(rows)\n",
        "sort_it",
        "rows = [[2, 1], [3]]\nfirst = rows[0]\nassert candidate(rows) == 3\nassert rows == [[1, 2], [3], []]",
    ),
    "tuples changed in place": mbpp(
        "def order(rows, pairs):\n    rows.sort()\n    pairs[0] = (0,)\n    pairs[1][0].append(5)\n"
        "    return len(rows)\n",
        "rows, inner = [(3, 1), (1, 2)], [4]\npairs = [(1, 2), (inner, 3)]\nassert order(rows, pairs) == 2\n"
        "assert rows == [(1, 2), (3, 1)] and pairs == [(0,), ([4, 5], 3)] and inner == [4, 5]",
    ),
    "several values": mbpp(
        "def both(a, b):\n    return a + b, {a, b}, {'a': a}, frozenset([b])\n",
        "assert both(1, 2) == (3, {1, 2}, {'a': 1}, frozenset({2}))",
    ),
    "complex numbers": mbpp(
        "import cmath\ndef convert(numbers):\n    return (complex(numbers, 0).real, cmath.sqrt(-1))\n",
        "assert convert(1.0 / 3) == (0.3333333333333333, 1j)",
    ),
    "counter": mbpp(
        "from collections import Counter\ndef frequency(xs):\n    return Counter(xs)\n",
        "assert frequency('aab') == {'a': 2, 'b': 1}",
        "assert frequency('').most_common() == []",
    ),
    "iterators": mbpp(
        "def squares(n):\n    return map(lambda i: i * i, range(n))\n",
        "assert list(squares(3)) == [0, 1, 4]",
        "assert next(iter(squares(3))) == 0",
    ),
    "redefined builtin": mbpp("def sum(a, b):\n    return a * b\n", "assert sum(3, 4) == 12"),
    "builtin around the call": mbpp(
        "def pairs(xs):\n    return [(x, x) for x in xs]\n", "assert set(pairs([1])) == {(1, 1)}"
    ),
    "class of the program": mbpp(
        "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n"
        "def longest(pairs):\n    return max(p.b - p.a for p in pairs)\n",
        "assert longest([Pair(1, 4), Pair(2, 3)]) == 3",
    ),
    "tree of objects": mbpp(
        "class Node:\n    def __init__(self, data):\n        self.data, self.left, self.right = data, None, None\n"
        "def height(n):\n    return 0 if n is None else 1 + max(height(n.left), height(n.right))\n",
        "assert height(root) == 3",
        "assert root.left.left.data == 4",
        setup="root = Node(1)\nroot.left = Node(2)\nroot.right = Node(3)\nroot.left.left = Node(4)\n",
    ),
    "module of the program": mbpp(
        "import sys\ndef size(x):\n    return sys.getsizeof(x)\n", "assert size((1, 2)) == sys.getsizeof((1, 2))"
    ),
    "type as an argument": mbpp(
        "def without(xs, kind):\n    return [x for x in xs if not isinstance(x, kind)]\n",
        "assert without((1, 'a', 2.0), str) == [1, 2.0]",
    ),
    "special numbers": mbpp(
        "def last(xs):\n    return sorted(xs)[-1]\n",
        "assert last([1, float('inf')]) == float('inf')",
        "assert last([10**50]) == 10**50",
    ),
    "main guard": mbpp(
        "def one():\n    return 1\nif __name__ == '__main__':\n    raise SystemExit(input('number? '))\n",
        "assert one() == 1",
    ),
}
