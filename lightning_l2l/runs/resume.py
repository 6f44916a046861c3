"""Which run a command goes on with, and from which checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lightning_l2l.runs.checkpoints import LAST, PREVIOUS
from lightning_l2l.runs.folder import LOCK
from lightning_l2l.runs.interrupt import ResumeCheckpoint

#: What `--ckpt_path` has for the newest checkpoint.
NEWEST = "last"
_CHECKPOINTS = f"checkpoints/{LAST}"


def newest_last(root: Path, beside: Iterable[Path] = ()) -> Path:
    """The last.ckpt that was written most recently.

    Args:
        root: Folder below which runs are, as `lightning_logs/version_N`, or one level deeper, where a logger had them
            put, with a configuration that names this folder.
        beside: Other folders that runs may be in, as `version_N`: those of loggers.

    Raises:
        FileNotFoundError: There is none.
    """
    paths = {*root.glob(f"*/version_*/{_CHECKPOINTS}"), *(p for one in beside for p in one.glob(f"*/{_CHECKPOINTS}"))}
    paths |= {path for path in root.glob(f"*/*/version_*/{_CHECKPOINTS}") if _root_of(path) == root.resolve()}
    found = sorted(paths, key=lambda path: path.stat().st_mtime)
    if not found:
        places = ", ".join(dict.fromkeys(repr(str(place.resolve())) for place in (root, *beside)))
        raise FileNotFoundError(
            f"--ckpt_path last: no {_CHECKPOINTS} in any run under {places}; give the path of "
            "the checkpoint, or the --trainer.default_root_dir (and the --trainer.logger) of the run that wrote it"
        )
    return found[-1]


def _root_of(path: Path) -> Path | None:
    """The `--trainer.default_root_dir` of the run that wrote a checkpoint, as far as its configuration tells."""
    try:
        config = yaml.safe_load((path.parent.parent / "config.yaml").read_text(encoding="utf-8"))
        return Path(config["trainer"]["default_root_dir"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def run_of(path: Path, checkpoint: dict[str, Any]) -> Path | None:
    """The folder of the run that a checkpoint is to be gone on with in; None: a new one."""
    folder = path.resolve().parent.parent
    if path.name in (LAST, PREVIOUS) and path.parent.name == "checkpoints":
        # Where somebody has chosen the folder of the checkpoints, the one above is not the run's.
        return folder if folder.name.startswith("version_") or (folder / LOCK).is_file() else None
    if path.name.startswith("hpc_ckpt_"):
        return next((one.parent for one in folders_in(checkpoint, ResumeCheckpoint.__qualname__)), None)
    return None


def folders_in(checkpoint: dict[str, Any], callback: str = "") -> list[Path]:
    """Where the run of a checkpoint has put its checkpoints, as those of its callbacks say whose names begin so."""
    callbacks = [state for key, state in checkpoint["callbacks"].items() if key.startswith(callback)]
    return [Path(state["dirpath"]).resolve() for state in callbacks if state.get("dirpath")]


def requeued(root: Path) -> str | None:
    """The checkpoint that Lightning wrote when Slurm announced the end of a job, which then starts anew."""
    found = {int(p.stem.split("_")[-1]): p for p in root.glob("hpc_ckpt_*.ckpt") if p.stem.split("_")[-1].isdecimal()}
    return str(found[max(found)]) if found and SLURMEnvironment.detect() else None


def check_resumable(path: Path, checkpoint: dict[str, Any]) -> None:
    """Refuse a checkpoint that has a rule and lacks what Lightning goes on with.

    Raises:
        ValueError: It is one of those.
    """
    kinds = {"epoch": int, "global_step": int, "loops": dict, "callbacks": dict, "optimizer_states": list}
    kinds |= {"lr_schedulers": list, "pytorch-lightning_version": str}
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if wrong:
        raise ValueError(
            f"{str(path)!r} holds a rule, but nothing that `fit` could go on with ({', '.join(wrong)}); use `test`, "
            "or give a checkpoint that `fit` wrote"
        )
