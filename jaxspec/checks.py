"""What callers and files hand over, in one sentence where it cannot be: numbers, texts, and whatever others raise."""

import math
import numbers
import operator
from typing import Any, cast

import numpy as np


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer (NumPy's and JAX's, too) of at least `least` and at most `most`; ValueError for anything else."""
    try:
        number = None if isinstance(value, bool | np.bool_) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise ValueError(f"{name} must be an integer, got {shown(value)}")
    if most is not None and not least <= number <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {number}")
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def real_number(name: str, value: Any) -> float:
    """A number as a float (not a number is one); ValueError for anything else."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    try:
        return float(value)
    except OverflowError:  # an integer that no float can hold
        return math.inf if cast(int, value) > 0 else -math.inf


def encodable(text: str, what: str) -> str:
    """The text itself. Raises ValueError where UTF-8 cannot hold it, as half of a surrogate pair, which JSON can."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} cannot be written as UTF-8: character {error.start} is {text[error.start]!a}"
        ) from None
    return text


def one_line(text: str, length: int = 300) -> str:
    """A text as a sentence shows it: on one line, cut where it is long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[:length] + ".."


def shown(value: Any) -> str:
    """A value as a sentence shows it."""
    return one_line(repr(value), 60)


def reason(error: Exception) -> str:
    """What went wrong, on one line, from an exception that was not made to be read by users."""
    text = one_line(str(error)) or type(error).__name__
    if isinstance(error, KeyError):
        return f"{text} is missing"
    if isinstance(error, TypeError | AttributeError | ArithmeticError):
        return f"a value has the wrong type or size ({text})"
    return text
