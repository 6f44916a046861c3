"""The LSTM kernel, compiled, where there is a C compiler; nothing depends on it.

The source is `fused.c`; it is compiled once for a machine, in about two seconds, into the user's cache folder.
Without a compiler, on another device or in another dtype torch's operators do the same (lstm_kernel.py).
LIGHTNING_L2L_FUSED=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
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
    """The compiled kernel and an LSTM rule's weights, copied in the order in which it uses them.

    Args:
        library: What `fused_for` gave.
        sizes: Hidden units H, layers.
        p: The p of `log_and_sign`; 0 where the rule sees the gradient itself.
        weights: Of each layer, lowest first, weight_ih `[4 H, in]`, weight_hh `[4 H, H]` and bias `[4 H]`; of the
            readout, weight `[1, H]` and bias `[1]`.
        scale: Factor on the readout.
        back: Whether `gradients` will be wanted.
    """

    def __init__(
        self,
        library: Any,
        sizes: tuple[int, int],
        p: float,
        weights: Sequence[Tensor],
        scale: float,
        *,
        back: bool = False,
    ) -> None:
        self.library, self.scale = library, scale
        self.sizes = (*sizes, p)
        self.rule = (*self.sizes, math.exp(p))
        given = [weight.detach().contiguous() for weight in weights]
        self.weights = given[0].new_empty(library.lstm_packed_size(*self.sizes, back))
        pointers = (ctypes.c_void_p * len(given))(*(weight.data_ptr() for weight in given))
        library.lstm_pack(*self.sizes, back, pointers, scale, self.weights.data_ptr())

    def step_(self, gradient: Tensor, state: Tensor) -> Tensor:
        """One inner step, the state changed in place.

        Args:
            gradient: `[num_coordinates]`, contiguous.
            state: `[2 * H * layers, num_coordinates]`, rows (h, c) a layer; only columns must be adjacent.

        Returns:
            The update `[num_coordinates]`.
        """
        threads, update = torch.get_num_threads(), torch.empty_like(gradient)
        scratch = gradient.new_empty(self.library.lstm_scratch(*self.sizes, threads))
        where = (gradient.data_ptr(), state.data_ptr(), update.data_ptr(), threads, scratch.data_ptr())
        self.library.lstm_step(len(gradient), state.stride(0), *self.rule, self.weights.data_ptr(), *where)
        return update

    def gradients(self, gradients: Tensor, weights: Sequence[float], state: Tensor) -> list[Tensor]:
        """As `RuleUnroll.gradients`, for a truncation that began with `state`; in the order of the weights.

        Args:
            gradients: `[num_steps + 1, num_coordinates]`, contiguous.
            weights: `num_steps` of them.
            state: As in `step_`.
        """
        threads, num_steps, of_losses = torch.get_num_threads(), len(weights), gradients.new_tensor(weights)
        scratch = gradients.new_empty(self.library.lstm_gradient_scratch(*self.sizes, num_steps, threads))
        parts = gradients.new_zeros(threads, self.library.lstm_gradient_size(*self.sizes), dtype=torch.float64)
        tensors = (self.weights, gradients, of_losses, state, parts)
        arguments = (gradients.shape[1], state.stride(0), *self.rule, num_steps, self.scale)
        where = (*(tensor.data_ptr() for tensor in tensors), threads, scratch.data_ptr())
        self.library.lstm_gradients(*arguments, *where)
        return self._unpack(parts.sum(0).to(gradients.dtype))

    def _unpack(self, total: Tensor) -> list[Tensor]:
        """From a row for each unit and gate (i, f, o, g), of what is below, the unit's own layer and the bias."""
        hidden, num_layers, p = self.sizes
        features = 2 if p else 1
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
        size, real, pointer, yes = ctypes.c_long, ctypes.c_float, ctypes.c_void_p, ctypes.c_int
        sizes = [size, size, real]
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "lstm_packed_size": (size, [*sizes, yes]),
            "lstm_pack": (None, [*sizes, yes, pointer, real, pointer]),
            "lstm_scratch": (size, [*sizes, size]),
            "lstm_step": (None, [size, size, *sizes, real, *[pointer] * 4, size, pointer]),
            "lstm_gradient_size": (size, sizes),
            "lstm_gradient_scratch": (size, [*sizes, size, size]),
            "lstm_gradients": (None, [size, size, *sizes, real, size, real, *[pointer] * 5, size, pointer]),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
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
