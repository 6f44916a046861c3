"""The compiled parts of the LSTM kernel, where there is a C compiler; nothing depends on them.

The source is `fused.c`; it is compiled once for a machine, in about a second, into the user's cache folder. It has the
pointwise part of a cell, in place of some ten operator calls of torch, and a whole inner step without meta-training.
Without a compiler, on another device or in another dtype torch's operators do the same. LIGHTNING_L2L_FUSED=0 in the
environment turns it off.
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
    """The library for tensors like this one, or None."""
    return _library() if like.is_cpu and like.dtype == torch.float32 else None


def lstm_step(
    library: Any, shape: tuple[int, int, int], weights: list[Tensor], scale: float, x: Tensor, state: Tensor
) -> Tensor:
    """One inner step of an LSTM, its state changed in place.

    Args:
        library: What `fused_for` gave.
        shape: Hidden units, layers, features.
        weights: weight_ih, weight_hh and bias of each layer, weight and bias of the readout; contiguous.
        scale: Factor on the readout.
        x: Features `[features, num_coordinates]`, contiguous.
        state: `[2 * hidden * layers, num_coordinates]`, rows (h, c) a layer; only columns must be adjacent.

    Returns:
        The update `[num_coordinates]`.
    """
    threads, update = torch.get_num_threads(), x.new_empty(x.shape[1])
    scratch = x.new_empty(library.lstm_scratch(*shape, threads))
    pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in weights))
    where = (pointers, scale, x.data_ptr(), state.data_ptr(), update.data_ptr(), threads, scratch.data_ptr())
    library.lstm_step(x.shape[1], state.stride(0), *shape, *where)
    return update


@cache
def _library() -> Any:
    if os.environ.get("LIGHTNING_L2L_FUSED", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        # Bound to torch's own OpenMP, already loaded, so that its number of threads holds here too.
        pointer, size = ctypes.c_void_p, ctypes.c_long
        library.cell_forward.argtypes = [size, *[pointer] * 5]
        library.cell_backward.argtypes = [size, *[pointer] * 4]
        library.lstm_step.argtypes = [*[size] * 5, pointer, ctypes.c_float, *[pointer] * 3, size, pointer]
        library.lstm_scratch.argtypes, library.lstm_scratch.restype = [size] * 4, size
        library.cell_forward.restype = library.cell_backward.restype = library.lstm_step.restype = None
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
