"""Rules as small files of plain numbers, and those that come with the package.

A rule file is a NumPy archive (`.npz`): its weights by name, and under "rule" the JSON of what `describe` says of it.
It is read without pickle, so nothing in it can be executed.

A shipped rule is such a file in the folder `shipped`, with a card beside it that says how it was trained, what it
reaches, and its checksum.
"""

from __future__ import annotations

import io
import json
import os
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]

from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.describe import build_rule, describe

SUFFIX = ".npz"
_DESCRIPTION = "rule"
_SHIPPED = Path(__file__).parent / "shipped"


def save_rule(rule: UpdateRule, path: Path) -> None:
    """Write a rule file.

    Args:
        rule: Whose weights.
        path: Where, with the suffix `.npz`; an existing file is replaced.

    Raises:
        ValueError: Another suffix.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"{str(path)!r} has not the suffix of a rule file; use {path.with_suffix(SUFFIX).name!r}")
    arrays: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in rule.state_dict().items()}
    arrays[_DESCRIPTION] = np.array(json.dumps(describe(rule)))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        np.savez(unfinished, **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def read_rule(path: Path) -> UpdateRule:
    """The rule in a rule file, in evaluation mode.

    Raises:
        ValueError: The file is damaged, no rule file, or its weights do not fit the rule that it describes.
    """
    return _read_rule(path.read_bytes(), path)


def _read_rule(content: bytes, path: Path) -> UpdateRule:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        description = json.loads(str(arrays.pop(_DESCRIPTION)))
        weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise ValueError(
            f"{str(path)!r} cannot be read as a rule file (damaged, or with pickled objects in it), give another "
            f"one: {reason(error)}"
        ) from error
    return fill_rule(description, weights, path)


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fill_rule(description: dict[str, Any], weights: dict[str, torch.Tensor], path: Path) -> UpdateRule:
    """Build the rule that is described, with these weights, in evaluation mode.

    Args:
        description: As `describe` gives it.
        weights: As in `state_dict`.
        path: Where they come from, for the error.

    Raises:
        ValueError: They do not fit each other.
    """
    rule = build_rule(description)
    try:
        rule.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"the weights in {str(path)!r} do not fit the rule it describes ({description}): it is damaged"
        ) from error
    return rule.eval().requires_grad_(False)


def shipped_rules() -> list[str]:
    """Names of the rules that come with the package.

    Example:
        >>> shipped_rules()
        ['mnist', 'quadratic']
    """
    return sorted(path.stem for path in _SHIPPED.glob(f"*{SUFFIX}"))


def card(name: str) -> dict[str, Any]:
    """The card of a shipped rule: how it was trained, its checksum, and the table of what it reaches.

    Raises:
        ValueError: There is no such rule.
    """
    if name not in shipped_rules():
        raise ValueError(f"no shipped rule is called {name!r}; use one of {', '.join(shipped_rules())}")
    found: dict[str, Any] = yaml.safe_load((_SHIPPED / f"{name}.yaml").read_text(encoding="utf-8"))
    return found


def read_shipped(name: str) -> UpdateRule:
    """A shipped rule, its checksum verified, in evaluation mode.

    Raises:
        ValueError: There is no such rule, or its file is not the one that its card is about.
    """
    expected, path = card(name)["sha256"], _SHIPPED / f"{name}{SUFFIX}"
    content = path.read_bytes()
    found = sha256(content).hexdigest()
    if found != expected:
        raise ValueError(
            f"the shipped rule {name!r} is damaged (sha256 {found}, its card says {expected}); install "
            "lightning_l2l anew"
        )
    return _read_rule(content, path)
