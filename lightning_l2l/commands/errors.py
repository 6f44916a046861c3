"""Mistakes of users in one line each; what was not foreseen keeps its traceback."""

from __future__ import annotations

import dis
import inspect
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningArgumentParser

from lightning_l2l.commands.imports import HELP as IMPORT_HELP
from lightning_l2l.meta.meta_gradient import MetaGradient
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import subclasses_of
from lightning_l2l.tasks import Task

PROG = "python -m lightning_l2l"
DESCRIPTION = "Learning to learn by gradient descent by gradient descent."
#: What each command does, for `--help`.
COMMANDS = {
    "fit": "meta-train a rule; without arguments an LSTM on random quadratics",
    "validate": "the figures of a rule on the validation tasks",
    "test": "compare a rule with tuned optimizers on the test tasks: tables, CSV files, a plot",
    "predict": "the loss of every test task at every inner step, as a CSV file",
    "export": "write the rule of a checkpoint to a small file, to load or to mail",
    "sweep": "fit or test at many settings: a table, a CSV file, a plot",
    "map": "run rules on grids of tasks, to see where they win and where they break",
}
_RAISE = dis.opmap["RAISE_VARARGS"]
#: Lines of the parser's messages about types that say nothing to a user.
_NOISE = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|Given value type: .*|"
    r"Given value: (NestedArg|Namespace)\(.*|Expected a <class 'NoneType'>.*|Expected a path but .*"
)
#: Arguments of before, and what they are now.
_MOVED = {
    "second_derivatives": "--model.meta_gradient SecondOrder",
    "memory": "--model.meta_gradient.memory",
    "memory_budget": "--model.meta_gradient.memory_budget",
    "imitation": "--model.imitation.weight",
    "imitation_epochs": "--model.imitation.epochs",
    "teacher": "--model.imitation.teacher",
    "teacher_schedule": "--model.imitation.schedule",
}
_OF_BEFORE = re.compile(
    r"(?:unrecognized arguments: --|does not accept option ')model\.(\w+)\b|^--model\.(imitation): .*got [\d.]+$"
)
_LONGEST = 800  # characters of a message: of a file that is no configuration the parser shows the whole
_NO_MEMORY = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory")


def find_foreseen(error: BaseException | None) -> BaseException | None:
    """The first error of the chain whose message says all there is to say.

    That is one that the project raised itself, by a `raise` statement and not within torch or NumPy, or one with
    which Lightning says that it is used in a wrong way.
    """
    while error is not None:
        if isinstance(error, MisconfigurationException) or _raised_here(error):
            return error
        error = error.__cause__
    return None


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    # What C code raises has no frame of its own: its traceback ends at the call, not at a `raise`.
    raised = code.co_code[trace.tb_lasti] == _RAISE
    return raised and Path(code.co_filename).is_relative_to(Path(__file__).parents[1])


def in_one_line(error: BaseException) -> str | None:
    """What to tell a user about an error; None where it was not foreseen."""
    foreseen = find_foreseen(error)
    if foreseen is not None:
        return " ".join(str(foreseen).split())
    lacking = isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    if lacking or isinstance(error, MemoryError | torch.OutOfMemoryError):
        return (
            "there is not enough memory for this; use a smaller --data.num_tasks (and --data.eval_tasks), "
            "--model.unroll_length or optimizee, or --model.meta_gradient.memory flat"
        )
    return None


class OneLineParser(LightningArgumentParser):
    """A parser that tells a mistake in one line, with the nearest name where one is misspelt."""

    _files: Sequence[str] = ()

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.allow_abbrev = False  # what is cut short may be another option tomorrow

    def add_import(self) -> None:
        """The option `--import`, which is looked at before anything is parsed."""
        self.add_argument("--import", type=str | None, default=None, metavar="MODULE,...", help=IMPORT_HELP)

    def parse_args(self, args: Any = None, *more: Any, **options: Any) -> Any:
        """As that of jsonargparse; remembers which files were given."""
        given: list[str] = sys.argv[1:] if args is None else list(args)
        flags = ("-c", "--config")
        self._files = [b for a, b in pairwise(given) if a in flags]
        self._files += [arg.partition("=")[2] for arg in given if arg.partition("=")[0] in flags and "=" in arg]
        return super().parse_args(args, *more, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Tell the message and exit with status 2; where the parser is to raise instead, raise."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        sys.stderr.write(f"error: {tidy(message, parser, self._files)}\n")
        self.exit(2)


def tidy(message: str, parser: Any = None, files: Sequence[str] = ()) -> str:
    """A message of the parser in one line.

    Args:
        message: As the parser gives it, with a bullet for each type that did not fit.
        parser: Whose options may have been meant.
        files: Configuration files that were given.
    """
    prog = PROG if parser is None else parser.prog.replace(" [options]", "")
    parts = [line.strip().removeprefix("- ").strip() for line in message.splitlines()]
    text = "; ".join(dict.fromkeys(part for part in parts if part and not _NOISE.fullmatch(part)))
    text = re.sub(r'Parser key "([^"]*)":;? ?', r"--\1: ", text)
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text.replace("typing.", "")).replace(":; ", ": ")
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", text)
    text = re.sub(r"\. Got value: |; Given value: ", ", got ", text).replace("Expected a ", "expected ")
    if files and re.match(r"Unexpected config|Problems parsing config", text):
        text = text.replace('in "<unicode string>", ', "").rstrip(":;")
        text = f"{' '.join(files)}: {text}, where a YAML file of fields belongs"
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    nearest = _nearest(text, parser)
    hint = f"did you mean {' or '.join(nearest)}? " if nearest else ""
    if files and _OF_BEFORE.search(text):
        hint += f"{' '.join(files)} is of an earlier version: mend it, or give a checkpoint of it without --config; "
    if text.startswith("unrecognized") and prog == PROG:
        hint = f"begin with a command: {', '.join(COMMANDS)}; "
    return f"{text}; {hint}see {prog} --help"


def _nearest(text: str, parser: Any) -> list[str]:
    """What is spelt nearly as what was not understood: an option, an argument of a class, a class or a command."""
    if (found := _OF_BEFORE.search(text)) and (found[1] or found[2]) in _MOVED:
        return [_MOVED[found[1] or found[2]]]
    if found := re.search(r"Option '([\w.-]+)' is not accepted", text):
        owners = re.findall(r"class_path '([\w.]+)'", text)  # the innermost is the last
        return get_close_matches(found[1], _arguments(owners[-1] if owners else ""), n=1)
    if found := re.search(r"no class (\S+)|has no attribute '(\w+)'|path (\S+) does not correspond", text):
        name = next(group for group in found.groups() if group)
        classes = {known.lower(): known for known in _classes()}
        return [classes[match] for match in get_close_matches(name.rpartition(".")[2].lower(), classes, n=1)]
    if found := re.search(r"invalid choice: '(\w+)'", text):
        return get_close_matches(found[1], COMMANDS, n=1)
    if "unrecognized arguments" in text and parser is not None:
        known = [option for action in parser._actions for option in action.option_strings]
        given = [word.partition("=")[0] for word in text.split() if word.startswith("--")]
        return [match for word in given[:3] for match in get_close_matches(word, known, n=1, cutoff=0.8)]
    return []


def _arguments(path: str) -> Iterable[str]:
    module, _, name = path.rpartition(".")
    owner = getattr(sys.modules.get(module), name, None)
    bases = owner.__mro__ if isinstance(owner, type) else ()  # those of parents too, which it takes as **options
    return [
        name
        for base in bases
        if "__init__" in vars(base)
        for name in inspect.signature(vars(base)["__init__"]).parameters
    ]


def _classes() -> Iterator[str]:
    bases: tuple[Any, ...] = (UpdateRule, Task, MetaGradient, LightningDataModule)
    for base in bases:
        for cls in subclasses_of(base):
            yield cls.__name__
