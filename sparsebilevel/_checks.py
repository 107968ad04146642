"""Checks of arguments. What is refused is named, with its value and what is allowed."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

LARGEST_WHOLE = 2**63 - 1  # that torch's integers hold


def check_whole(name: str, value: Any, least: int, most: int = LARGEST_WHOLE) -> None:
    """Raise ValueError unless ``value`` is a whole number in [least, most]."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not least <= int(value) <= most:
        limits = f"at least {least}" if most == LARGEST_WHOLE else f"from {least} to {most}"
        raise ValueError(f"{name}={value!r} is not allowed; expected a whole number, {limits}")


def check_shape(name: str, value: Any, axes: str) -> None:
    """Raise ValueError unless ``value`` is a sequence of whole numbers, at least 1; ``axes`` says of which."""
    if not isinstance(value, Sequence) or not all(isinstance(v, numbers.Integral) and int(v) >= 1 for v in value):
        raise ValueError(f"{name}={value!r} is not allowed; expected {axes}, whole numbers >= 1")


def check_number(
    name: str, value: Any, most: float = math.inf, *, without_least: bool = False, without_most: bool = False
) -> float:
    """``value``, or ValueError unless it is a finite number in [0, most], without the ends that are left out."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_left_out = (without_least and value == 0) or (without_most and value == most)
    if is_number and 0 <= value <= most and value != math.inf and not is_left_out:
        return value
    if math.isinf(most):
        allowed = f"a finite number {'above' if without_least else '>='} 0"
    else:
        allowed = f"a number in {'(' if without_least else '['}0, {most:g}{')' if without_most else ']'}"
    raise ValueError(f"{name}={value!r} is not allowed; expected {allowed}")
