"""`python -m lightning_l2l COMMAND ...`: finds the command."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

from lightning_l2l import __version__
from lightning_l2l.commands import cli, export, map, sweep
from lightning_l2l.commands.errors import in_one_line
from lightning_l2l.commands.imports import given_in, import_modules

_OWN: dict[str, Callable[[list[str]], int | None]] = {
    "export": export.main,
    "sweep": sweep.main,
    "map": map.main,
}


def main(args: Any = None) -> None:
    """Run a command.

    Args:
        args: As on the command line, such as `["fit", "--model.num_steps", "50"]`; None takes them from there. From
            Python, mistakes raise; on the command line they are one line on stderr and exit status 1.
    """
    # Lightning 2.6 with a recent torch: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated")
    given = sys.argv[1:] if args is None else args
    try:
        if not isinstance(given, list):
            cli.run(given)
            return
        if given == ["--version"]:
            print(f"lightning_l2l {__version__}")
            return
        import_modules(given_in(given))
        if given[:1] and given[0] in _OWN:
            if status := _OWN[given[0]](given[1:]):
                sys.exit(status)
            return
        cli.run(given)
    except Exception as error:
        told = in_one_line(error)
        if args is not None or told is None:
            raise
        sys.exit(f"error: {told}")
