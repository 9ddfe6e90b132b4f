"""The value of an arithmetic expression, computed exactly and without running any code."""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

from transformer_jax.settings import shown

# Expressions without spaces, as in the training data of GSM8K: 48/2, (3+4)*5, -2.5*4.
EXPRESSION = r"""
sum: product (("+" | "-") product)*
product: factor (("*" | "/") factor)*
factor: NUMBER | "-" factor | "(" sum ")"
NUMBER: /(0|[1-9][0-9]{0,11})(\.[0-9]{1,6})?/
"""

_LONGEST = 1000  # characters
_CHARACTERS = re.compile(r"[0-9.+\-*/() ]*")
_DIGITS = 6  # after the point
_OPERATIONS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """Computes an expression of numbers, ``+ - * /`` and parentheses.

    Args:
      expression: the expression, such as ``"(3+4)*5"``.

    Returns:
      The value with at most six digits after the point, such as ``"35"`` or ``"0.333333"``.

    Raises:
      ValueError: if it is not such an expression, or divides by zero.
    """
    if not isinstance(expression, str) or len(expression) > _LONGEST:
        raise ValueError(f"{shown(expression)} is not an expression of at most {_LONGEST} characters")
    try:
        if not _CHARACTERS.fullmatch(expression):
            raise SyntaxError(expression)
        value = _value(ast.parse(expression.strip(), mode="eval").body, expression)
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError(f"{shown(expression)} is not an expression of numbers, + - * / and parentheses") from None
    except ZeroDivisionError:
        raise ValueError(f"{shown(expression)} divides by zero") from None
    if value.denominator == 1:
        return str(value.numerator)
    rounded = round(value * 10**_DIGITS)
    whole, part = divmod(abs(rounded), 10**_DIGITS)
    digits = f"{part:0{_DIGITS}d}".rstrip("0")
    return ("-" if rounded < 0 else "") + str(whole) + (f".{digits}" if digits else "")


def _value(node: ast.expr, expression: str) -> Fraction:
    """Returns the value of a part of an expression."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return Fraction(ast.get_source_segment(expression.strip(), node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, expression)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left, expression), _value(node.right, expression))
    raise ValueError(f"{shown(expression)} is not an expression of numbers, + - * / and parentheses")
