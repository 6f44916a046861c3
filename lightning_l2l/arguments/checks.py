"""Checks of arguments: each refuses in one line that names the argument, its value and what is allowed."""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from typing import Any

#: Most of what is held one by one: tasks side by side, inner steps, layers.
MOST = 10**6
#: Most of what is only counted, or is bounded by memory.
MOST_COUNTED = 10**9
_LARGEST = 1e38
_LARGEST_INTEGER = 2**53


def brief(value: object, length: int = 80) -> str:
    """A value in one line of at most `length` characters, for a message; quick also for what a file made up."""
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxlist, short.maxtuple = 3, 8, 8, 8
    short.maxstring, short.maxother = length, length
    try:
        text = " ".join(short.repr(value).split())
    except Exception:  # an integer of thousands of digits, or somebody's own __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def check_at_least(minimum: int, maximum: int = MOST_COUNTED, *, optional: bool = False, **values: Any) -> None:
    """Refuse what is no integer from `minimum` to `maximum`; None passes where it is `optional`.

    Raises:
        ValueError: With the name and value of the first that is not.

    Example:
        >>> check_at_least(1, num_steps=True)
        Traceback (most recent call last):
        ...
        ValueError: num_steps=True is not an integer of 1 or more; set num_steps=1
    """
    for name, value in values.items():
        if optional and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise ValueError(f"{name}={brief(value)} is not an integer of {minimum} or more; set {name}={minimum}")
        if value > maximum:
            raise ValueError(f"{name}={brief(value)} is too large; use at most {maximum}")


def is_number(value: object) -> bool:
    """Whether it is a real number that a tensor can be multiplied with: up to 1e38; a truth value is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= (_LARGEST_INTEGER if isinstance(value, int) else _LARGEST)


def check_positive(*, optional: bool = False, **values: Any) -> None:
    """Refuse what is no finite number above 0; None passes where it is `optional`.

    Raises:
        ValueError: With the name and value of the first that is not.
    """
    for name, value in values.items():
        if not (optional and value is None) and not (is_number(value) and value > 0):
            raise ValueError(f"{name}={brief(value)} is out of range; use a finite number above 0")


def check_choice(choices: Iterable[str], **values: Any) -> None:
    """Refuse what is none of the `choices`.

    Raises:
        ValueError: With the name and value of the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{name}={brief(value)} is unknown; use one of {', '.join(choices)}")


def check_flag(**values: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        ValueError: With the name and value of the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}={brief(value)} is neither True nor False; use one of them")


def check_type(wanted: type | tuple[type, ...], example: str, **values: Any) -> None:
    """Refuse what is of another type than the one wanted.

    Args:
        wanted: The type, or several.
        example: What could be given, for the message.
        **values: What was given.

    Raises:
        TypeError: With the name and value of the first that is of another type.
    """
    for name, value in values.items():
        if not isinstance(value, wanted):
            kind = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            raise TypeError(f"{name}={brief(value)} is {kind}; give {example}")


def check_callable(example: str, **values: Any) -> None:
    """Refuse what cannot be called.

    Raises:
        TypeError: With the name and value of the first that cannot.
    """
    for name, value in values.items():
        if not callable(value):
            raise TypeError(f"{name}={brief(value)} cannot be called; give {example}")


def check_fits_memory(num_bytes: int, **sizes: Any) -> None:
    """Refuse sizes that need more memory than the machine has, before the system kills the process for it.

    Args:
        num_bytes: What they need.
        **sizes: The arguments to blame, for the message.

    Raises:
        ValueError: They need more.
    """
    installed = _installed_memory()
    if num_bytes > installed:
        named = ", ".join(f"{name}={brief(value)}" for name, value in sizes.items())
        raise ValueError(
            f"{named} need {num_bytes / 1e9:.4g} GB of memory, and this machine has {installed / 1e9:.4g} GB; "
            f"use a smaller {' or '.join(sizes)}"
        )


def _installed_memory() -> int:
    """Bytes; where the system does not say, more than any machine has."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such function on Windows
        return 2**50
