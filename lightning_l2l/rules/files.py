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
import re
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]

from lightning_l2l.arguments import brief, check_type
from lightning_l2l.rules import RuleGroups, UpdateRule
from lightning_l2l.rules.describe import build_rule, describe, outline, signature_of

SUFFIX = ".npz"
_DESCRIPTION = "rule"
_SHIPPED = Path(__file__).parents[1] / "shipped"
#: Times that a file may grow when it is unpacked, should somebody have packed it.
_MOST_UNPACKED = 10
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")  # colours in torch's messages


def load_rule(source: str | Path | Mapping[str, Any], rule: UpdateRule | None = None) -> UpdateRule:
    """A trained rule, in evaluation mode.

    No file can execute code: rule files are read without pickle, all others with `weights_only=True`.

    Args:
        source: Name of a shipped rule, such as "general" (see `shipped_rules`); path of a rule file (`.npz`), of a
            Lightning checkpoint of `MetaOptimizer`, or of a state_dict; or what such a checkpoint or state_dict holds,
            loaded already.
        rule: With a bare state_dict only, which does not say what it belongs to: a rule of that class with the
            arguments it was trained with. It is left as it is.

    Raises:
        FileNotFoundError: There is neither a shipped rule nor a file of this name.
        ValueError: It holds no rule, is damaged, or holds a rule of another size.

    Example:
        >>> load_rule("mnist").hidden_size
        20
    """
    if isinstance(source, Mapping):
        return _from_checkpoint(source, "this state_dict", rule)
    check_type((str, Path), "the name of a shipped rule, or a path", source=source)
    if rule is not None:
        check_type(UpdateRule, "a rule, such as CoordinatewiseLSTM()", rule=rule)
    path = Path(source)
    if str(source) in shipped_rules():
        return read_shipped(str(source))
    if path.suffix == SUFFIX and _is_file(path):
        return read_rule(path)
    return _from_checkpoint(_read(path), repr(str(path)), rule)


def start_from(source: str, rule: UpdateRule) -> None:
    """Give a rule, or each of a `RuleGroups`, the weights of another.

    Args:
        source: Where the other is, as `load_rule` takes it.
        rule: Whose weights are to be those.

    Raises:
        FileNotFoundError: There is no rule.
        ValueError: Its weights do not fit.
    """
    given = load_rule(source)
    own = rule.rules.values() if isinstance(rule, RuleGroups) and not isinstance(given, RuleGroups) else [rule]
    for one in own:
        try:
            one.load_state_dict(given.state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"start={brief(source)} has {signature_of(given)}, whose weights do not fit {signature_of(one)}; give "
                "the rule the same sizes, or leave start out"
            ) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of `MetaOptimizer`, read without executing anything in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, has code in it, or is no checkpoint of a rule.
    """
    checkpoint = _read(path)
    if not _is_checkpoint(checkpoint):
        raise ValueError(f"{str(path)!r} is no checkpoint of a MetaOptimizer: it holds no rule")
    found: dict[str, Any] = checkpoint
    return found


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the system allows
        return False


def _read(path: Path) -> Any:
    if not _is_file(path):
        raise FileNotFoundError(
            f"no rule at {brief(str(path), 200)}; give the path of a checkpoint that `fit` wrote, or the name of a "
            f"shipped rule: {', '.join(shipped_rules())}"
        )
    try:
        with warnings.catch_warnings():  # of torch.load, about what is in the file
            warnings.simplefilter("ignore")
            with path.open("rb") as file:
                _check_archive(file)
                return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes torch.load raise
        raise ValueError(
            f"{str(path)!r} cannot be read as a checkpoint (damaged, or with code in it), give another one: "
            f"{reason(error)}"
        ) from error


def _check_archive(file: BinaryIO) -> None:
    """Refuse an archive that would unpack to far more, since `fit` and `export` pack nothing, or is damaged."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not zipfile.is_zipfile(file):
        file.seek(0)
        return
    with zipfile.ZipFile(file) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MOST_UNPACKED * size:
            raise ValueError(f"unpacked it would have {unpacked} bytes, and it has {size}")
        if (damaged := archive.testzip()) is not None:  # torch looks at no checksum
            raise ValueError(f"the checksum of {damaged!r} in it is wrong")
    file.seek(0)


def _is_checkpoint(content: Any) -> bool:
    try:
        weights = {k: v for k, v in content["state_dict"].items() if k.startswith("rule.")}
        return _is_state_dict(weights) and "rule" in content["hyper_parameters"]
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def _from_checkpoint(content: Any, name: str, rule: UpdateRule | None) -> UpdateRule:
    if _is_checkpoint(content):
        return fill_rule(content["hyper_parameters"]["rule"], _of_the_rule(content["state_dict"]), name)
    if not isinstance(content, Mapping) or not _is_state_dict(content):
        raise ValueError(f"{name} is neither a checkpoint of a MetaOptimizer nor a state_dict: it holds no rule")
    if rule is None:
        raise ValueError(
            f"{name} has weights but does not say of which rule; give load_rule(..., rule=CoordinatewiseLSTM(...)) "
            "with the arguments that it was trained with"
        )
    return fill_rule(describe(rule), _of_the_rule(content), name)


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items())


def _of_the_rule(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a MetaOptimizer's rule, or all where it is a rule's own state_dict."""
    found = {k.removeprefix("rule."): v for k, v in state_dict.items() if k.startswith("rule.")}
    return found or dict(state_dict)


def save_rule(rule: UpdateRule, path: Path) -> None:
    """Write a rule file.

    Args:
        rule: Whose weights.
        path: Where, with the suffix `.npz`; an existing file is replaced.

    Raises:
        ValueError: Another suffix, or a folder.
        FileNotFoundError: There is no such folder.
        RuntimeError: The file cannot be written.
    """
    if path.suffix != SUFFIX:
        raise ValueError(f"{str(path)!r} has not the suffix of a rule file; use {path.with_suffix(SUFFIX).name!r}")
    with suppress(OSError):  # a name longer than the system allows: writing will tell
        if path.is_dir():
            raise ValueError(f"{str(path)!r} is a folder; give the name of a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {str(path.parent)!r} to write {path.name!r} to; make it first")
    arrays: dict[str, Any] = {name: value.detach().cpu().numpy() for name, value in rule.state_dict().items()}
    arrays[_DESCRIPTION] = np.array(json.dumps(describe(rule)))
    unfinished = path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")
    try:
        np.savez(unfinished, **arrays)
        unfinished.replace(path)
    except OSError as error:
        raise RuntimeError(
            f"{str(path)!r} cannot be written ({error.strerror}); choose another place, or see to permissions and space"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def read_rule(path: Path) -> UpdateRule:
    """The rule in a rule file, in evaluation mode.

    Raises:
        ValueError: The file is damaged, no rule file, or its weights do not fit the rule that it describes.
    """
    try:
        content = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise ValueError(f"{str(path)!r} cannot be read, give another file: {reason(error)}") from error
    return _read_rule(content, path)


def _read_rule(content: bytes, path: Path) -> UpdateRule:
    try:
        with warnings.catch_warnings():  # of NumPy, about what is in the file
            warnings.simplefilter("ignore")
            _check_archive(io.BytesIO(content))
            with np.load(io.BytesIO(content), allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            description = json.loads(str(arrays.pop(_DESCRIPTION)))
            weights = {name: torch.from_numpy(array) for name, array in arrays.items()}
    except Exception as error:  # whatever a damaged file makes NumPy raise
        raise ValueError(
            f"{str(path)!r} cannot be read as a rule file (damaged, or with pickled objects in it), give another "
            f"one: {reason(error)}"
        ) from error
    return fill_rule(description, weights, repr(str(path)))


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    if str(error).startswith("Weights only load failed"):  # and then torch says how to load it all the same
        return "it holds more than weights and plain values"
    lines = str(error).strip().splitlines()
    return _ESCAPES.sub("", lines[0]).strip()[:300] if lines else type(error).__name__


def fill_rule(description: dict[str, Any], weights: dict[str, torch.Tensor], name: str) -> UpdateRule:
    """Build the rule that is described, with these weights, in evaluation mode.

    Args:
        description: As `describe` gives it.
        weights: As in `state_dict`.
        name: Where they come from, for the error.

    Raises:
        ValueError: They do not fit each other.
    """
    try:
        wanted = outline(description)
    except ValueError as error:
        raise ValueError(f"{name} describes a rule that there is not: {error}") from error
    fitting = weights.keys() == wanted.keys() and all(
        (w.shape, w.layout, w.is_floating_point(), w.is_meta)
        == (wanted[k].shape, torch.strided, wanted[k].is_floating_point(), False)
        for k, w in weights.items()
    )
    if not fitting:
        raise ValueError(
            f"the weights in {name} do not fit the rule they are for ({brief(description, 300)}): damaged, or of "
            "another size"
        )
    if not all(bool(w.isfinite().all()) for w in weights.values()):
        raise ValueError(f"the weights in {name} are not all finite: damaged, or of a rule that diverged; give another")
    rule = build_rule(description)
    rule.load_state_dict(weights)
    return rule.eval().requires_grad_(False)


def shipped_rules() -> list[str]:
    """Names of the rules that come with the package.

    Example:
        >>> shipped_rules()
        ['cifar10', 'cifar10_sub', 'general', 'mnist', 'quadratic', 'rnnprop', 'unlearned']
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
