"""Arithmetic as a tool, and word problems solved with it."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from treegrpo.envs.tags import TagEnv, Tags

MAX_CHARS = 200
MAX_DEPTH = 50
MAX_EXPONENT = 64
MAX_MAGNITUDE = 10**30
_TOO_LARGE = "a number is too large, or has too many digits, beyond 1e30"

_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculate(expression: str) -> str:
    """Works out an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % ** and parentheses, for example "(48 / 2 + 1.5) * 3".

    Returns:
        The result: exact if it is a whole number, otherwise a decimal number of ten digits.

    Raises:
        ValueError: If it is no arithmetic, divides by zero, or is too long or too large.
    """
    # walked as a syntax tree, never evaluated as Python
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", expression.strip().rstrip("=")).replace("$", "").replace("^", "**")
    text = re.sub(r"(?<=[\d)\s])[xX\u00d7](?=[\d(\s])", "*", text).replace("\u00f7", "/").replace("\u2212", "-")
    text = " ".join(text.split())
    if not text:
        raise ValueError("the expression is empty: write one, for example 3 * 4")
    if len(text) > MAX_CHARS:
        raise ValueError(f"the expression has {len(text)} characters: {MAX_CHARS} are allowed, so work in steps")
    if strange := re.search(r"[^\d.+\-*/%() ]|[^\x00-\x7f]", text):
        raise ValueError(f"{strange[0]!r} is no arithmetic: use numbers, + - * / // % ** and parentheses")
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{text!r} cannot be read ({error.msg})") from error
    return _show(_value(tree, 0))


def _value(node: ast.expr, depth: int) -> Fraction:
    if depth > MAX_DEPTH:
        raise ValueError(f"the expression is nested deeper than {MAX_DEPTH}: work in steps")
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)) and not isinstance(node.value, bool):
        # the shortest decimal of the float is what was written: 0.1 is one tenth
        return _bounded(Fraction(repr(node.value)) if node.value < MAX_MAGNITUDE else Fraction(MAX_MAGNITUDE) * 10)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.UAdd, ast.USub)):
        value = _value(node.operand, depth + 1)
        return value if isinstance(node.op, ast.UAdd) else -value
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Pow, *_OPERATORS)):
        left, right = _value(node.left, depth + 1), _value(node.right, depth + 1)
        try:
            return _bounded(_power(left, right) if isinstance(node.op, ast.Pow) else _exact(node.op, left, right))
        except ZeroDivisionError as error:
            raise ValueError("division by zero") from error
        except OverflowError as error:  # of a root: 1e30 ** 63.5 is no float
            raise ValueError(_TOO_LARGE) from error
    raise ValueError("that is no arithmetic: use numbers, + - * / // % ** and parentheses")


def _exact(op: ast.operator, left: Fraction, right: Fraction) -> Fraction:
    return Fraction(_OPERATORS[type(op)](left, right))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if abs(exponent) > MAX_EXPONENT:
        raise ValueError(f"the exponent is beyond {MAX_EXPONENT}: use a smaller one")
    if exponent.denominator == 1:
        return base**exponent.numerator
    if base < 0:
        raise ValueError("a root of a negative number")
    root = float(base) ** float(exponent)
    return Fraction(repr(root)) if root < MAX_MAGNITUDE else Fraction(MAX_MAGNITUDE) * 10


def _bounded(value: Fraction) -> Fraction:
    if abs(value) > MAX_MAGNITUDE or value.denominator > MAX_MAGNITUDE**4:
        raise ValueError(_TOO_LARGE)
    return value


def _show(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    if not 1e-4 <= abs(value) < 1e15:
        return f"{float(value):.10g}"
    return f"{float(value):.10f}".rstrip("0").rstrip(".")


class CalculatorEnv(TagEnv):
    """A word problem with a calculator: `<calc> 48 / 2 </calc>` brings `<result> 24 </result>`, `<answer> 24 </answer>`
    ends. The reward is `math_answer`; GSM8K's rows serve as they are. For models with tool calls of their own, give
    `calculate` to `tools.ToolEnv`.

    >>> CalculatorEnv().step("<calc> 48 / 2 </calc>").observation
    '\\n<result>24</result>\\n'
    """

    def __init__(
        self,
        *,
        tokenizer: Any = None,
        tags: Tags | None = None,
        prompt_template: str | None = None,
        chat: bool = False,
        observation_template: str = "\n<{information}>{content}</{information}>\n",
        error_text: str = "That step held no expression in its tags and no answer in answer tags. Write one.",
        max_observation_chars: int = 1000,
    ) -> None:
        """Templates are as for `search.SearchEnv`. ValueError where one has a wrong field."""
        tags = tags or Tags(search="calc", information="result")
        super().__init__(
            tags=tags,
            tokenizer=tokenizer,
            prompt_template=_prompt(tags) if prompt_template is None else prompt_template,
            chat=chat,
            observation_template=observation_template,
            error_text=error_text,
            max_observation_chars=max_observation_chars,
        )

    def call(self, text: str) -> tuple[str, bool]:
        try:
            return calculate(text), False
        except ValueError as error:
            return f"error: {error}", True


def _prompt(tags: Tags) -> str:
    return (
        f"Solve the problem step by step. Begin every step by reasoning between <{tags.think}> and </{tags.think}>. "
        f"Leave arithmetic to the calculator: write <{tags.search}> expression </{tags.search}>, and the value comes "
        f"back between <{tags.information}> and </{tags.information}>. "
        f"End with the number alone between <{tags.answer}> and </{tags.answer}>.\n"
        "Problem: {question}\n"
    )
