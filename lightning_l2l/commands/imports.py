"""`--import`: modules with tasks, rules and data modules of one's own."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib import import_module
from itertools import pairwise

HELP = (
    "modules with rules, tasks or data modules of your own, with commas between them: mine for a file mine.py in this "
    "folder; a checkpoint alone never has anything imported"
)


def given_in(args: list[str]) -> list[str]:
    """The modules that a command line names.

    Example:
        >>> given_in(["fit", "--import", "mine,ours.rules", "--import=more"])
        ['mine', 'ours.rules', 'more']
    """
    found = [after for flag, after in pairwise(args) if flag == "--import"]
    found += [arg.partition("=")[2] for arg in args if arg.startswith("--import=")]
    return [name for names in found for name in names.split(",")]


def import_modules(names: Iterable[str]) -> None:
    """Import modules; those of this folder are found however the program was started.

    Raises:
        ValueError: There is no such module.
    """
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # at the end: a file here takes the place of nothing that is installed
    for name in filter(None, (name.strip() for name in names)):
        try:
            if not all(part.isidentifier() for part in name.split(".")):
                raise ModuleNotFoundError(name=name)
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # one that this module imports
            raise ValueError(
                f"--import {name}: there is no module of this name in {here!r} or among those installed; give the "
                "name of a Python file there, without .py"
            ) from error
