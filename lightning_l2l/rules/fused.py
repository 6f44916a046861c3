"""The LSTM kernel, compiled, where there is a C compiler; nothing depends on it.

The source is `fused.c`; it is compiled once for a machine, in about two seconds, into the user's cache folder.
Without a compiler, on another device or in another dtype torch's operators do the same (lstm_kernel.py).
LIGHTNING_L2L_FUSED=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("fused.c")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def fused_for(*like: Tensor) -> Any:
    """The library for tensors like these, or None."""
    return _library() if all(one.is_cpu and one.dtype == torch.float32 for one in like) else None


class FusedLSTM:
    """The compiled kernel and an LSTM rule's weights.

    Args:
        library: What `fused_for` gave.
        sizes: Hidden units H, layers, features.
        weights: Of each layer, lowest first, weight_ih `[4 H, in]`, weight_hh `[4 H, H]` and bias `[4 H]`; of the
            readout, weight `[1, H]` and bias `[1]`.
        scale: Factor on the readout.
    """

    def __init__(self, library: Any, sizes: tuple[int, int, int], weights: Sequence[Tensor], scale: float) -> None:
        self.library, self.sizes, self.scale = library, sizes, scale
        self.weights = [weight.contiguous() for weight in weights]
        self.pointers = (ctypes.c_void_p * len(weights))(*(weight.data_ptr() for weight in self.weights))

    def step_(self, x: Tensor, state: Tensor) -> Tensor:
        """One inner step, the state changed in place.

        Args:
            x: Features `[features, num_coordinates]`, contiguous.
            state: `[2 * H * layers, num_coordinates]`, rows (h, c) a layer; only columns must be adjacent.

        Returns:
            The update `[num_coordinates]`.
        """
        threads, update = torch.get_num_threads(), x.new_empty(x.shape[1])
        scratch = x.new_empty(self.library.lstm_scratch(*self.sizes, threads))
        where = (x.data_ptr(), state.data_ptr(), update.data_ptr(), threads, scratch.data_ptr())
        self.library.lstm_step(x.shape[1], state.stride(0), *self.sizes, self.pointers, self.scale, *where)
        return update

    def gradients(self, x: Tensor, state: Tensor, cotangents: Tensor) -> list[Tensor]:
        """Gradient of sum(cotangents * updates) over a truncation, the features counted as constants.

        Args:
            x: Features of all inner steps, `[num_steps, features, num_coordinates]`, contiguous.
            state: Before the first of them, as in `step_`.
            cotangents: `[num_steps, num_coordinates]`, contiguous.

        Returns:
            In the order of `weights`.
        """
        (num_steps, size), threads = cotangents.shape, torch.get_num_threads()
        scratch = x.new_empty(self.library.lstm_gradient_scratch(*self.sizes, num_steps, threads))
        parts = x.new_zeros(threads, self.library.lstm_gradient_size(*self.sizes), dtype=torch.float64)
        where = (x.data_ptr(), state.data_ptr(), cotangents.data_ptr(), parts.data_ptr(), threads, scratch.data_ptr())
        arguments = (size, state.stride(0), *self.sizes, num_steps, self.pointers, self.scale, *where)
        self.library.lstm_gradients(*arguments)
        return self._unpack(parts.sum(0).to(x.dtype))

    def _unpack(self, total: Tensor) -> list[Tensor]:
        """From a row for each unit and gate (i, f, o, g), of what is below, the unit's own layer and the bias."""
        hidden, num_layers, features = self.sizes
        found: list[Tensor] = []
        for layer in range(num_layers):
            below = hidden if layer else features
            own, total = total.tensor_split([4 * hidden * (below + hidden + 1)])
            i, f, o, g = own.view(hidden, 4, -1).unbind(1)
            found += torch.cat([i, f, g, o]).tensor_split([below, below + hidden], 1)
            found[-1] = found[-1][:, 0]
        return [*found, total[None, :hidden], total[hidden:]]


@cache
def _library() -> Any:
    if os.environ.get("LIGHTNING_L2L_FUSED", "1") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_compiled()))
        # Bound to torch's own OpenMP, already loaded, so that its number of threads holds here too.
        pointer, size, scale = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
        library.lstm_step.argtypes = [*[size] * 5, pointer, scale, *[pointer] * 3, size, pointer]
        library.lstm_gradients.argtypes = [*[size] * 6, pointer, scale, *[pointer] * 4, size, pointer]
        library.lstm_step.restype = library.lstm_gradients.restype = None
        for name, arguments in (("lstm_scratch", 4), ("lstm_gradient_scratch", 5), ("lstm_gradient_size", 3)):
            function = getattr(library, name)
            function.argtypes, function.restype = [size] * arguments, size
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
