"""The compiled pointwise part of the LSTM kernel, where there is a C compiler; nothing depends on it.

The source is `fused.c`; it is compiled once for a machine, in about a second, into the user's cache folder, and
takes the place of some ten operator calls of torch. Without a compiler, on another device or in another dtype
torch's operators do the same. LIGHTNING_L2L_FUSED=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("fused.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def fused_for(like: Tensor) -> Any:
    """The library with `cell_forward` and `cell_backward` for tensors like this one, or None."""
    return _library() if like.is_cpu and like.dtype == torch.float32 else None


@cache
def _library() -> Any:
    if os.environ.get("LIGHTNING_L2L_FUSED", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        # Bound to torch's own OpenMP, already loaded, so that its number of threads holds here too.
        pointer = ctypes.c_void_p
        library.cell_forward.argtypes = [ctypes.c_long, *[pointer] * 5]
        library.cell_backward.argtypes = [ctypes.c_long, *[pointer] * 4]
        library.cell_forward.restype = library.cell_backward.restype = None
        return library
    except (OSError, subprocess.SubprocessError, AttributeError):
        return None


def _compiled() -> Path:
    """The compiled library, from the cache or made now; OSError or SubprocessError where that cannot be."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise FileNotFoundError("no C compiler")
    identity = (SOURCE.read_text(), compiler, *FLAGS, *platform.uname(), _processor())
    name = hashlib.sha256("\0".join(identity).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_l2l"
    library = folder / f"fused-{name}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:  # beside its place, so that moving it is atomic
            made = Path(scratch) / "fused.so"
            command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
            subprocess.run(command, check=True, capture_output=True, timeout=60)
            os.replace(made, library)
    return library


def _processor() -> str:
    """What `-march=native` depends on: a cache folder may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "model name", "Features"))}))
