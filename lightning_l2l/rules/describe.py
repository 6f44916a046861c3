"""Objects as plain types and back: what checkpoints hold in place of pickled classes."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import brief
from lightning_l2l.rules.base import UpdateRule

T = TypeVar("T")
PLAIN: tuple[type, ...] = (bool, int, float, str)


def describe(thing: object) -> dict[str, Any]:
    """Class and constructor arguments of an object that keeps each argument under its own name.

    Args:
        thing: Such as an `UpdateRule` or a `Task`.

    Returns:
        `{"class_path": ..., "init_args": {...}}` of plain types alone, as LightningCLI writes it. Arguments that
        are objects are described likewise; functions are named.

    Raises:
        ValueError: An argument is not kept under its name, or is something that cannot be described.

    Example:
        >>> from lightning_l2l.tasks import Quadratic
        >>> describe(Quadratic(dim=3))
        {'class_path': 'lightning_l2l.tasks.quadratic.Quadratic', 'init_args': {'dim': 3, 'noise': 0.0}}
    """
    arguments = {}
    if type(thing).__init__ not in (object.__init__, nn.Module.__init__):
        for parameter in list(inspect.signature(type(thing).__init__).parameters.values())[1:]:
            missing = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if missing or not hasattr(thing, parameter.name):
                raise ValueError(
                    f"{_path(type(thing))} does not keep its argument {parameter.name!r}; "
                    f"set self.{parameter.name} in its constructor, so that a checkpoint can say what it was"
                )
            arguments[parameter.name] = _plain(getattr(thing, parameter.name))
    return {"class_path": _path(type(thing)), "init_args": arguments}


def describe_call(make: Callable[..., Any]) -> dict[str, Any]:
    """Class and arguments of what makes an object, such as `partial(torch.optim.Adam, lr=0.01)`.

    Raises:
        ValueError: It is no class with arguments by name, or an argument cannot be described.

    Example:
        >>> describe_call(partial(torch.optim.Adam, lr=0.01))
        {'class_path': 'torch.optim.adam.Adam', 'init_args': {'lr': 0.01}}
    """
    given: dict[str, Any] = {}
    cls: Any = make
    if isinstance(make, partial):  # jsonargparse's have the class as the last of their own arguments
        cls, given = (make.args or (make.func,))[-1], make.keywords
    if not inspect.isclass(cls):
        raise ValueError(f"{brief(make)} is no class, and a checkpoint can describe no other function")
    return {"class_path": _path(cls), "init_args": {name: _plain(value) for name, value in given.items()}}


def signature_of(rule: UpdateRule) -> str:
    """A rule in a line: its class, and its arguments by name."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in describe(rule)["init_args"].items())
    return f"{type(rule).__name__}({arguments})"


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: Any) -> Any:
    for kind in PLAIN:
        if isinstance(value, kind):
            return kind(value)  # of a subclass, such as NumPy's float64, a checkpoint could not be read
    if value is None:
        return None
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Tensor):
        raise ValueError(f"a tensor of shape {list(value.shape)} is no argument that a checkpoint can describe")
    return _path(value) if inspect.isroutine(value) or inspect.isclass(value) else describe(value)


def build_rule(description: dict[str, Any]) -> UpdateRule:
    """The rule that `describe` described.

    Only classes that are imported already are considered: a file cannot have code imported.

    Raises:
        ValueError: The class is unknown, or its arguments do not fit it.
    """
    path = description.get("class_path") if isinstance(description, dict) else None
    for known in subclasses_of(UpdateRule):  # type: ignore[type-abstract]
        if _path(known) == path:
            try:
                return known(**{name: _built(value) for name, value in description["init_args"].items()})
            except Exception as error:  # whatever arguments that do not fit make a constructor raise
                told = " ".join(f"{type(error).__name__}: {error}".split())
                raise ValueError(f"{path} cannot be built from {brief(description, 300)}: {told}") from error
    module = path.rpartition(".")[0] if isinstance(path, str) else "MODULE"
    raise ValueError(
        f"update rule {brief(path)} is not known; import its module first (--import {brief(module)[1:-1]} on the "
        "command line), since a file has nothing imported by itself"
    )


def _built(value: Any) -> Any:
    """An argument, with the rules in it built."""
    if isinstance(value, dict):
        if value.keys() == {"class_path", "init_args"}:
            return build_rule(value)
        return {name: _built(one) for name, one in value.items()}
    return [_built(one) for one in value] if isinstance(value, list) else value


def outline(description: dict[str, Any]) -> dict[str, Tensor]:
    """The state_dict of the rule that `describe` described, as tensors without memory where its class can do that.

    Raises:
        ValueError: As `build_rule`.
    """
    try:
        with torch.device("meta"):
            return build_rule(description).state_dict()
    except ValueError:  # it may look at values, of which there are none there
        return build_rule(description).state_dict()


def check_names(content: Any, kinds: tuple[type, ...]) -> None:
    """Refuse hyperparameters that name what is not known here: to look it up would mean to import and run it.

    Args:
        content: Plain types, nested, as a checkpoint holds them.
        kinds: Of which the classes that may be named are; they must be imported already. Besides, functions of
            `torch.nn.functional` may be.

    Raises:
        ValueError: There is another name, or that of a file.
    """
    if isinstance(content, str):
        if (set(content) & set("./\\") or Path(content).exists()) and not _is_known(content, kinds):
            raise ValueError(f"{brief(content)} is not known here")
    elif isinstance(content, dict):
        for key, value in content.items():
            check_names(value, kinds)
            if not isinstance(key, str):
                raise ValueError(f"{brief(key)} is no name of an argument")
    elif isinstance(content, list | tuple):
        for value in content:
            check_names(value, kinds)
    elif not (content is None or isinstance(content, bool | int | float)):
        raise ValueError(f"{brief(content)} is no plain value")


def _is_known(path: str, kinds: tuple[type, ...]) -> bool:
    module, _, name = path.rpartition(".")
    found = vars(sys.modules[module]).get(name) if module in sys.modules else None
    if isinstance(found, type):
        return issubclass(found, kinds)
    return inspect.isfunction(found) and found.__module__ == nn.functional.__name__


def subclasses_of(cls: type[T]) -> Iterator[type[T]]:
    """All classes that derive from one, as far as they are imported."""
    for sub in cls.__subclasses__():
        yield sub
        yield from subclasses_of(sub)
