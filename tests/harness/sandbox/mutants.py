"""Broken versions of a right program."""

import ast
import warnings
from collections.abc import Iterator

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def parse(code: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sloppy escapes in strings
        return ast.parse(code)


class _Returns(ast.NodeTransformer):
    """Changes what one function of the module returns, and nothing that is defined inside it."""

    def __init__(self, function: str, wrapped: bool) -> None:
        self.function, self.wrapped, self.inside = function, wrapped, False

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        if self.inside or node.name != self.function:
            return node
        self.inside = True
        self.generic_visit(node)
        self.inside = False
        node.body.append(ast.Return(ast.Constant("mutant")))
        return node

    def visit_Return(self, node: ast.Return) -> ast.AST:
        if not self.inside:
            return node
        old = node.value or ast.Constant(None)
        node.value = ast.Tuple([old, ast.Constant("mutant")], ast.Load()) if self.wrapped else ast.Constant(None)
        return node


class _Swap(ast.NodeTransformer):
    """Changes the operator or the number at one site of the module."""

    def __init__(self, site: int) -> None:
        self.left, self.done = site, False

    def visit(self, node: ast.AST) -> ast.AST:
        number = isinstance(node, ast.Constant) and type(node.value) is int
        if (number or type(node) in SWAPPED) and not self.done:
            self.left -= 1
            if self.left < 0:
                self.done = True
                return ast.Constant(node.value + 1) if isinstance(node, ast.Constant) else SWAPPED[type(node)]()
        return self.generic_visit(node)


def wrong_returns(code: str, function: str) -> Iterator[str]:
    """Versions that return None, and that return the right value inside a tuple: none of them is right."""
    for wrapped in (False, True):
        tree = _Returns(function, wrapped).visit(parse(code))
        yield ast.unparse(ast.fix_missing_locations(tree))


def swapped(code: str, most: int) -> Iterator[str]:
    """Versions with one operator or number changed; a few of them may still be right."""
    for site in range(most):
        swap = _Swap(site)
        tree = swap.visit(parse(code))
        if not swap.done:
            return
        yield ast.unparse(ast.fix_missing_locations(tree))
