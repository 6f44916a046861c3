"""Checks of arguments, which every other folder uses."""

from lightning_l2l.arguments.checks import (
    MOST,
    MOST_COUNTED,
    brief,
    check_at_least,
    check_callable,
    check_choice,
    check_fits_memory,
    check_flag,
    check_positive,
    check_type,
    is_number,
)

__all__ = [
    "MOST",
    "MOST_COUNTED",
    "brief",
    "check_at_least",
    "check_callable",
    "check_choice",
    "check_fits_memory",
    "check_flag",
    "check_positive",
    "check_type",
    "is_number",
]
