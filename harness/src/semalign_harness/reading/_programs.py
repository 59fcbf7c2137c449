"""The program that a response holds or completes.

1. Thoughts are dropped: everything up to the last `</think>`.
2. Code stands in blocks: fences of backticks or tildes, `[PYTHON]…[/PYTHON]`, `[BEGIN]…[DONE]` (or
   `[END]`). A block may lack its end, and text before an end that nothing began is a block. Fences in
   a triple-quoted string are text.
3. Where the tested names are known, the last block that defines most of them counts, and text between
   blocks only where no block does. A stub (a docstring, `...`, `pass`, `NotImplemented`) counts only
   where nothing else does. Where no name is known, the first block that defines a function counts.
   Else it is the first block, or the text.
4. Of the code, the longest run of first lines that compiles is kept, without a sentence before a program.
5. Unusual spaces outside strings are spaces, and byte order marks are dropped.
"""

import ast
import bisect
import re
import warnings
from collections.abc import Collection
from typing import NamedTuple

from ._thoughts import after_thoughts

ATTEMPTS = 50
"""Runs of first lines of one text that are compiled at most."""

_MARK = re.compile(
    r"(?:(?:^[ \t]+)?(?P<backtick>`{3,})|^[ \t]*(?P<tilde>~{3,}))(?P<info>[^\n`]*)\n?"
    r"|(?:^[ \t]*(?:(?P<begin>\[BEGIN\])|\[(?:DONE|END)\])|(?P<python>\[PYTHON\])|\[/PYTHON\])(?:[ \t]*\n)?",
    re.MULTILINE,
)
_LANGUAGE = re.compile(r"\s*\{?\.?[A-Za-z][\w+#.-]*\}?\s*")
_CODE_LINE = re.compile(r"^(?:async def|def|class|import|from|@)\b|^@", re.MULTILINE)
_INDENTED = re.compile(r"\s*^[ \t]+\S", re.MULTILINE)
_LITERAL = re.compile(
    r"""#[^\n]*|(?P<triple>\"{3}|'{3})(?:[^\\]|\\.?)*?(?:(?P<end>(?P=triple))|\Z)|"(?:[^"\\\n]|\\.)*+"|'(?:[^'\\\n]|\\.)*+'""",
    re.DOTALL,
)
_SPACES = dict.fromkeys([0xA0, 0x1680, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ") | dict.fromkeys(
    [0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF], ""
)
_UNREADABLE = re.compile("[\0\ud800-\udfff]")


def program(text: str, *, prompt: str = "", names: Collection[str] = ()) -> str:
    """Return the program that a response holds or completes, by the rules above.

    With a prompt, code that defines one of `names` follows the lines before its signature in the
    prompt, such as imports; other code follows the whole prompt, indented as its body.

    Args:
        text: the response.
        prompt: source up to the docstring of the function to complete; empty when the model writes
            everything.
        names: names that the tests call; empty where they are unknown.
    """
    text = _with_plain_spaces(after_thoughts(text))
    code = _answer_block(text, prompt, names)
    if not prompt:
        return _best("", [code, _from_code_line(code)])
    name = "|".join(map(re.escape, names)) or r"\w+"
    signature = re.compile(rf"^(?:async[ \t]+)?def[ \t]+(?:{name})\b", re.MULTILINE)
    if signature.search(code):
        place = list(signature.finditer(prompt))
        return _joined(prompt[: place[-1].start()] if place else prompt, _best("", [code, _from_code_line(code)]))
    first_line, _, rest = code.lstrip("\n").partition("\n")
    head = prompt if prompt.endswith("\n") else prompt + "\n"
    return head + _best(head, [code, "    " + first_line.lstrip() + "\n" + rest, _indented(code)])


def _with_plain_spaces(text: str) -> str:
    pieces, place = [], 0
    for literal in _LITERAL.finditer(text):
        if not literal["triple"] or literal["end"]:
            pieces += [text[place : literal.start()].translate(_SPACES), literal[0]]
            place = literal.end()
    return "".join(pieces) + text[place:].translate(_SPACES)


class _Block(NamedTuple):
    code: str
    marked: bool
    """Whether it stands in marks; else it is text between them."""


def _answer_block(text: str, prompt: str, names: Collection[str]) -> str:
    blocks = _blocks(text)
    scores = []
    for block in blocks:
        defined = _defined(_best("", [block.code, _from_code_line(block.code)]), names)
        scores.append((sum(defined.values()), len(defined), block.marked))
    best = max(scores)
    if best[1]:
        found = [block.code for block, score in zip(blocks, scores, strict=True) if score == best]
        return found[-1 if names else 0]
    if prompt and not blocks[0].marked and _INDENTED.match(text) and _compiling_lines(prompt, blocks[0].code):
        return blocks[0].code  # a body, then an example
    return next((block.code for block in blocks if block.marked), text)


def _blocks(text: str) -> list[_Block]:
    """The text, cut at its marks."""
    marks = _marks(text)
    tagged = [mark["info"] is not None and _LANGUAGE.fullmatch(mark["info"]) is not None for mark in marks]
    begins = [
        tag or mark["begin"] is not None or mark["python"] is not None for mark, tag in zip(marks, tagged, strict=True)
    ]
    fences = [mark["backtick"] or mark["tilde"] or "" for mark in marks]
    # An end that nothing began: a tag, or a fence without a language, alone or before the first begin.
    inside = bool(marks) and not begins[0] and (not fences[0] or len(marks) == 1 or begins[1])
    fence = fences[0] if inside else ""
    blocks, place, indent = [], 0, ""
    for mark, begin, sign in zip(marks, begins, fences, strict=True):
        if inside and fence and sign and sign[0] != fence[0]:
            continue  # backticks in a block of tildes, or the reverse
        blocks.append(_Block(_unindented(text[place : mark.start()], indent), inside))
        place = mark.end()
        inside = begin or (bool(sign) and not (inside and fence))
        fence, indent = (sign, mark[0][: -len(mark[0].lstrip(" \t"))]) if inside else ("", "")
    blocks.append(_Block(_unindented(text[place:], indent), inside))
    return [block for block in blocks if block.code.strip()] or [_Block(text, False)]


def _marks(text: str) -> list[re.Match[str]]:
    """Begins and ends of blocks, without those inside a triple-quoted string."""
    strings = [literal.span() for literal in _LITERAL.finditer(text) if literal["end"]]
    starts = [start for start, _ in strings]
    marks = []
    for mark in _MARK.finditer(text):
        place = bisect.bisect(starts, mark.start()) - 1
        if place < 0 or strings[place][1] <= mark.start():
            marks.append(mark)
    return marks


def _unindented(block: str, indent: str) -> str:
    return "\n".join(line.removeprefix(indent) for line in block.split("\n"))


def _defined(code: str, names: Collection[str]) -> dict[str, bool]:
    """Those of `names` (without any, the functions) that a module binds; False marks a stub."""
    try:
        found: list[ast.AST] = [ast.parse(code)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    defined = {}
    while found:
        match node := found.pop():
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                defined[node.name] = not all(map(_says_nothing, node.body))
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()) if name in names:
                defined[name] = True
            case ast.alias() if (name := node.asname or node.name) in names:
                defined[name] = True
            case _:
                found += reversed(list(ast.iter_child_nodes(node)))
    return {name: whole for name, whole in defined.items() if not names or name in names}


def _says_nothing(statement: ast.stmt) -> bool:
    match statement:
        case ast.Pass() | ast.Expr(ast.Constant()) | ast.Return(ast.Name("NotImplemented")):
            return True
        case ast.Raise(ast.Name("NotImplementedError") | ast.Call(ast.Name("NotImplementedError"))):
            return True
    return False


def _from_code_line(code: str) -> str:
    match = _CODE_LINE.search(code)
    return code[match.start() :] if match else code


def _indented(code: str) -> str:
    return "\n".join("    " + line if line.strip() else line for line in code.split("\n"))


def _joined(head: str, code: str) -> str:
    """Join lines of our own and a module, with its imports from `__future__` before them."""
    try:
        body = ast.parse(code).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return head + code
    first = ""
    lines = code.split("\n")
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            assert node.end_lineno is not None and node.end_col_offset is not None, "a parsed statement has an end"
            first += ast.unparse(node) + "\n"
            before = lines[node.lineno - 1].encode()[: node.col_offset].decode()
            after = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode()
            lines[node.lineno - 1 : node.end_lineno] = [f"{before}pass{after}", *[""] * (node.end_lineno - node.lineno)]
    return first + head + "\n".join(lines)


def _best(head: str, candidates: list[str]) -> str:
    """Candidate of which most lines compile after `head`, cut to these; the first when none does."""
    kept = [_compiling_lines(head, candidate) for candidate in candidates]
    longest = max(kept, key=len)
    return "\n".join(longest) or candidates[0]


def _compiling_lines(head: str, code: str) -> list[str]:
    """The longest run of first lines that compiles after `head`; empty without one."""
    lines, above = code.split("\n"), head.count("\n")
    for _ in range(ATTEMPTS):
        if not "".join(lines).strip():
            break
        wrong = _wrong_line(head + "\n".join(lines))
        if wrong is None:
            return lines
        # A run that reaches this line fails in the same place.
        del lines[max(0, min(wrong - above, len(lines)) - 1) :]
    return []


def _wrong_line(source: str) -> int | None:
    """Number of the line that does not compile, the last if it is unknown; None when all do."""
    if unreadable := _UNREADABLE.search(source):
        return source.count("\n", 0, unreadable.start()) + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a model's invalid escapes are not ours
        try:
            compile(source, "<answer>", "exec", dont_inherit=True)
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
            return getattr(error, "lineno", None) or source.count("\n") + 1
    return None
