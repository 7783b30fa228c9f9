"""Tools to start with: ``reinforcepp.environments.examples:calculator``, ``:python`` and ``:search_notes``.

``calculator`` and ``python`` walk the syntax tree of an expression. They run no code, know no builtins, attributes or names apart
from a table, and check the size of each value before they make it, because the policy chooses the expression.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

MAX_BITS = 4_096
"""Size of an integer; Python converts up to 4,300 digits to text."""
MAX_ITEMS = 10_000
"""Characters of a text, and items of a collection with those of its items."""
MAX_EXPRESSION_CHARACTERS = 2_000
RESULTS = 3

BINARY: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
UNARY: Mapping[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
COMPARE: Mapping[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _range(*bounds: int) -> list[int]:
    if len(range(*bounds)) > MAX_ITEMS:
        raise ValueError(f"a range has up to {MAX_ITEMS:,} numbers")
    return list(range(*bounds))


FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{function.__name__: function for function in (abs, all, any, bool, float, len, max, min, round, sorted, sum)},
    **{function.__name__: function for function in (math.gcd, math.sqrt, math.floor, math.ceil, math.log, math.sin)},
    **{function.__name__: function for function in (math.cos, math.tan, math.exp, math.isqrt)},
    "range": _range,
}
CONSTANTS = {"pi": math.pi, "e": math.e}


def calculator(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, such as (3 + 4) * 12.

    Returns:
        The value.
    """
    value = _Evaluator(functions={}).evaluate(expression)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("the expression isn't a number")
    return str(value)


def python(expression: str) -> str:
    """Evaluate a Python expression without variables, such as sum(range(10)) or sorted([3, 1, 2])[0].

    Args:
        expression: A Python expression of numbers, texts, lists, tuples, sets, dictionaries, operators and common functions.

    Returns:
        The value as Python writes it.
    """
    return repr(_Evaluator(FUNCTIONS).evaluate(expression))


class _Evaluator:
    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self._functions = functions

    def evaluate(self, expression: str) -> Any:
        if len(expression) > MAX_EXPRESSION_CHARACTERS:
            raise ValueError(f"an expression has up to {MAX_EXPRESSION_CHARACTERS:,} characters")
        return self._value(ast.parse(expression.strip(), mode="eval").body)

    def _value(self, node: ast.expr) -> Any:
        value = self._compute(node)
        _check_size(value)
        return value

    def _compute(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.Name() if node.id in CONSTANTS:
                return CONSTANTS[node.id]
            case ast.UnaryOp() if type(node.op) in UNARY:
                return UNARY[type(node.op)](self._value(node.operand))
            case ast.BinOp() if type(node.op) in BINARY:
                return _binary(type(node.op), self._value(node.left), self._value(node.right))
            case ast.BoolOp():
                return self._boolean(node)
            case ast.Compare():
                return self._compare(node)
            case ast.IfExp():
                return self._value(node.body if self._value(node.test) else node.orelse)
            case ast.List() | ast.Tuple() | ast.Set():
                make = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
                return make(map(self._value, node.elts))
            case ast.Dict() if None not in node.keys:
                return dict(zip(map(self._value, filter(None, node.keys)), map(self._value, node.values), strict=True))
            case ast.Subscript(slice=ast.Slice() as part):
                bounds = [bound and self._value(bound) for bound in (part.lower, part.upper, part.step)]
                return self._value(node.value)[slice(*bounds)]
            case ast.Subscript():
                return self._value(node.value)[self._value(node.slice)]
            case ast.Call(func=ast.Name(id=name), keywords=[]) if name in self._functions:
                return self._functions[name](*map(self._value, node.args))
        raise ValueError(f"{ast.unparse(node)[:80]!r} isn't supported")

    def _boolean(self, node: ast.BoolOp) -> Any:
        value: Any = None
        for part in node.values:
            value = self._value(part)
            if bool(value) == isinstance(node.op, ast.Or):
                break
        return value

    def _compare(self, node: ast.Compare) -> bool:
        left = self._value(node.left)
        for compare, other in zip(node.ops, node.comparators, strict=True):
            right = self._value(other)
            if type(compare) not in COMPARE:
                raise ValueError(f"{ast.unparse(node)[:80]!r} isn't supported")
            if not COMPARE[type(compare)](left, right):
                return False
            left = right
        return True


def _binary(kind: type[ast.operator], left: Any, right: Any) -> Any:
    """Return the result of an operator, after a check of its size where it can be larger than both values together."""
    if kind is ast.Mod and not isinstance(left, int | float):  # '%9999999d' % 1
        raise ValueError("% is for numbers")
    if kind is ast.Pow and isinstance(left, int) and isinstance(right, int):
        if left.bit_length() * abs(right) > MAX_BITS:
            raise ValueError("the number is too large")
    elif kind is ast.Mult:
        for one, other in ((left, right), (right, left)):
            if isinstance(one, int) and not isinstance(other, int | float) and _size(other) * one > MAX_ITEMS:
                raise ValueError("the result is too large")
    return BINARY[kind](left, right)


def _check_size(value: Any) -> None:
    if isinstance(value, int) and value.bit_length() > MAX_BITS:
        raise ValueError("the number is too large")
    if not isinstance(value, int | float) and _size(value) > MAX_ITEMS:
        raise ValueError("the value is too large")


def _size(value: Any) -> int:
    """Return the number of characters, or of items with those of the items."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(1 + _size(key) + _size(item) for key, item in value.items())
    return sum(1 + _size(item) for item in value) if isinstance(value, list | tuple | set) else 0


# --- search -----------------------------------------------------------------------------------------------------------


def search_notes(query: str) -> str:
    """Search notes on network problems.

    Args:
        query: Words that describe the problem, such as trace the route to a server.

    Returns:
        The notes that fit best, one per line.
    """
    return "\n".join(_notes().search(query, RESULTS)) or "No note has any of these words."


@cache
def _notes() -> Corpus:
    from reinforcepp.data.builtin.corpus import load_facts

    return Corpus([f"{fact.tasks[0]}: {fact.good[0]}" for fact in load_facts()])


class Corpus:
    """Texts in memory, ranked for a query by BM25 (Robertson and Zaragoza 2009, equation 3.15, k1 = 1.2, b = 0.75)."""

    def __init__(self, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> None:
        self.texts, self._k1, self._b = list(texts), k1, b
        self._counts = [Counter(_words(text)) for text in texts]
        self._mean_length = sum(sum(counts.values()) for counts in self._counts) / max(1, len(texts))
        self._texts_with = Counter(word for counts in self._counts for word in counts)

    def search(self, query: str, limit: int) -> list[str]:
        """Return up to ``limit`` texts that share a word with ``query``, best first."""
        scores = {i: self._score(counts, _words(query)) for i, counts in enumerate(self._counts)}
        return [self.texts[i] for i in sorted(scores, key=lambda i: -scores[i])[:limit] if scores[i] > 0]

    def _score(self, counts: Counter[str], query: Sequence[str]) -> float:
        length = self._k1 * (1 - self._b + self._b * sum(counts.values()) / self._mean_length)
        return math.fsum(
            math.log(1 + (len(self.texts) - found + 0.5) / (found + 0.5)) * counts[word] / (counts[word] + length)
            for word in set(query)
            if (found := self._texts_with[word])
        )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
