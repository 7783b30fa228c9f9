"""The tools that ship as examples: values, and expressions that would need much time, memory or trust."""

from __future__ import annotations

import math

import pytest

from reinforcepp.environments.examples import MAX_ITEMS, Corpus, calculator, python, search_notes


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("(3 + 4) * 12", "84"),
        ("-2 ** 2", "-4"),
        ("7 // 2 + 7 % 4", "6"),
        ("1 / 4", "0.25"),
        (" 2 ** 0.5 ", str(2**0.5)),
        ("2 ** 2000", str(2**2000)),
    ],
)
def test_calculator(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression", ["", "1 +", "1 < 2", "'a' * 3", "[1]", "abs(1)", "x", "1j", "(-1) ** 0.5", "1 / 0", "1; 2", "pi.real"]
)
def test_calculator_refuses_anything_else(expression):
    with pytest.raises((ValueError, SyntaxError, ArithmeticError)):
        calculator(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("sum(range(10))", "sorted([3, 1, 2])[::-1]", "max(3, abs(-7)) / 2", "(1, 'a', None, True)", "{'a': 1}['a']"),
        *("1 < 2 < 3", "3 > 2 > 2", "0 or 'x'", "1 and 0", "not []", "'b' in 'abc'", "1 if 2 > 3 else [4]"),
        *("len({1, 2, 2})", "round(7.5) + int", "'ab' * 3 + 'c'", "[1, 2] + [3]", "[[1, 2], [3]][0][1]"),
    ],
)
def test_python_is_python(expression):
    if "int" in expression:
        with pytest.raises(ValueError, match="'int' isn't supported"):
            python(expression)
    else:
        assert python(expression) == repr(eval(expression))


def test_python_knows_mathematics():
    assert python("sqrt(2) + pi + gcd(12, 18)") == repr(math.sqrt(2) + math.pi + 6)


@pytest.mark.parametrize(
    "expression",
    [
        *(
            "__import__('os')",
            "().__class__",
            "open('/etc/passwd')",
            "eval('1')",
            "lambda: 1",
            "print(1)",
            "getattr(1, 'real')",
        ),
        *(
            "[x for x in range(3)]",
            "f'{1:>99999999}'",
            "(y := 1)",
            "max([1], key=abs)",
            "{**{}}",
            "sum(*[[1]])",
            "range",
        ),
        *("1 << 9999", "1" + "0" * 2000, "(" * 500 + ")" * 500, "b'a'", "..."),
    ],
)
def test_python_refuses_what_is_unsafe(expression):
    with pytest.raises((ValueError, SyntaxError, MemoryError, RecursionError)):
        python(expression)


@pytest.mark.parametrize(
    "expression",
    [
        *("9 ** 9 ** 9", "2 ** 5000", "'a' * 10 ** 12", "10 ** 12 * 'a'", "[[0] * 999] * 10 ** 9", "'%99999999d' % 1"),
        *("range(10 ** 12)", "[[0] * 100] * 100 * 100", "sum([[0] * 5000, [0] * 5000, [0] * 5000], [])"),
        *("(9 ** 999) ** 9 * (9 ** 999)", "'a' * 10_000 + 'a'"),
    ],
)
def test_python_refuses_what_is_large_before_it_is_made(expression):
    with pytest.raises(ValueError, match=r"too large|% is for numbers|a range has up to"):
        python(expression)


def test_the_largest_value():
    assert len(python(f"'a' * {MAX_ITEMS}")) == MAX_ITEMS + 2


# --- search -----------------------------------------------------------------------------------------------------------


def test_search_ranks_by_bm25():
    """Three texts of 2, 2 and 4 words (mean 8/3); "ping" is in two, idf = ln(1 + 1.5 / 2.5) = 0.470004.

    Text 0: length 1.2 · (0.25 + 0.75 · 2 / 2.6667) = 0.975; 0.470004 / 1.975 = 0.237977.
    Text 2: length 1.2 · (0.25 + 0.75 · 4 / 2.6667) = 1.65; twice: 0.470004 · 2 / 3.65 = 0.257536.
    """
    corpus = Corpus(["ping host", "trace route", "Ping the host: ping"])
    assert corpus._score(corpus._counts[0], ["ping"]) == pytest.approx(0.237977, abs=1e-6)
    assert corpus._score(corpus._counts[2], ["ping"]) == pytest.approx(0.257536, abs=1e-6)
    assert corpus.search("PING!", 5) == ["Ping the host: ping", "ping host"]
    assert corpus.search("ping", 1) == ["Ping the host: ping"]
    assert corpus.search("printer", 5) == []


def test_search_notes():
    assert "resolvectl" in search_notes("which DNS server does Linux use").splitlines()[0]
    assert search_notes("xylophone") == "No note has any of these words."
