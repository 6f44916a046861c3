"""Objects as plain types and back: what checkpoints hold in place of pickled classes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_l2l.rules.base import UpdateRule

PLAIN = (bool, int, float, str, type(None))


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
        {'class_path': 'lightning_l2l.tasks.quadratic.Quadratic', 'init_args': {'dim': 3}}
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


def _path(named: Any) -> str:
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: Any) -> Any:
    if isinstance(value, PLAIN):
        return value
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
    for known in _subclasses(UpdateRule):  # type: ignore[type-abstract]
        if _path(known) == path:
            try:
                return known(**description["init_args"])
            except (TypeError, KeyError) as error:
                raise ValueError(f"{path} cannot be built from {description}: {error}") from error
    raise ValueError(f"update rule {path!r} is not known; import the module that defines it first")


def _subclasses(cls: type[UpdateRule]) -> Iterator[type[UpdateRule]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)
