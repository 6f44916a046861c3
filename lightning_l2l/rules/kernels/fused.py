"""The kernels, compiled, where there is a C compiler; nothing depends on it. Here is the LSTM's.

The sources are `SOURCES`; they are compiled once for a machine, in some seconds, into the user's cache folder
(compiled.py). Without a compiler, of which a warning tells, on another device or in another dtype torch's operators do
the same (lstm_kernel.py, normalized.py). LIGHTNING_L2L_FUSED=0 in the environment turns it off.
"""

from __future__ import annotations

import ctypes
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.rules.base import RuleUnroll, Seen
from lightning_l2l.rules.kernels.compiled import NotCompiled, load_compiled

SOURCES = tuple(Path(__file__).with_name(name) for name in ("fused.c", "normalized.c", "vectors.h"))
#: Running means of the gradient that a rule with moments may have.
MOST_MEANS = 8
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")


def fused_for(*like: Tensor) -> Any:
    """The library for tensors like these, or None."""
    return _library() if all(one.is_cpu and one.dtype == torch.float32 for one in like) else None


class FusedRule(ctypes.Structure):
    """A rule's numbers, as `Rule` in fused.c has them."""

    _fields_ = (
        *(
            (name, ctypes.c_long)
            for name in ("hidden", "layers", "kind", "means", "time", "warmup", "decay", "horizon", "waits")
        ),
        *((name, ctypes.c_float) for name in ("p", "e_to_p")),
        ("gain1", ctypes.c_float * MOST_MEANS),
        *((name, ctypes.c_float) for name in ("gain2", "eps", "scale")),
    )

    @classmethod
    def of(
        cls, kind: str, hidden: int, layers: int, scale: float, gain1: Sequence[float] = (), /, **numbers: float
    ) -> FusedRule:
        """Hidden units, layers and factor on the update of a rule of this `kind`, which is among `KINDS`.

        All need `waits`, whether coordinates wait for a gradient other than 0; "log_and_sign" needs its `p`; "moments"
        needs `gain1`, 1 - beta of each mean, `gain2`, `eps`, `time`, and `warmup`, `decay` and `horizon`, 0 for none.
        """
        if "p" in numbers:
            numbers["e_to_p"] = math.exp(numbers["p"])
        rule = cls(hidden=hidden, layers=layers, kind=KINDS.index(kind), means=len(gain1), scale=scale, **numbers)
        rule.gain1[: len(gain1)] = list(gain1)
        return rule

    @property
    def of_gradient(self) -> int:
        """Rows that the lowest layer reads of a gradient."""
        return (1, 2, self.hidden)[self.kind]

    @property
    def features(self) -> int:
        """Rows that are made of a gradient."""
        return (1, 2, self.means + 1 + self.time)[self.kind]


#: What a rule sees of a gradient: itself, appendix A, or its moments, by an input layer and with a tanh at the end.
KINDS = ("identity", "log_and_sign", "moments")


class FusedLSTM:
    """The compiled kernel and an LSTM rule's weights, copied in the order in which it uses them.

    Args:
        library: What `fused_for` gave.
        rule: Its numbers.
        weights: Of each layer, lowest first, weight_ih `[4 H, in]`, weight_hh `[4 H, H]` and bias `[4 H]`; of the
            readout, weight `[1, H]` and bias `[1]`; of the input layer, where there is one, weight `[H, features]`
            and bias `[H]`.
        back: Whether `gradients` will be wanted.
    """

    def __init__(self, library: Any, rule: FusedRule, weights: Sequence[Tensor], *, back: bool = False) -> None:
        self.library, self.rule, self.at = library, rule, ctypes.byref(rule)
        given = [weight.detach().contiguous() for weight in weights]
        self.weights = given[0].new_empty(library.lstm_packed_size(self.at, back))
        pointers = (ctypes.c_void_p * len(given))(*(weight.data_ptr() for weight in given))
        library.lstm_pack(self.at, back, pointers, self.weights.data_ptr())

    def step_(self, gradient: Tensor, state: Tensor) -> Tensor:
        """One inner step, the state changed in place.

        Args:
            gradient: `[num_coordinates]`, contiguous.
            state: `[state_size, num_coordinates]`, rows (h, c) a layer, then those of the moments; only columns must
                be adjacent.

        Returns:
            The update `[num_coordinates]`.
        """
        threads, update = torch.get_num_threads(), torch.empty_like(gradient)
        scratch = gradient.new_empty(self.library.lstm_scratch(self.at, threads))
        tensors = (self.weights, gradient, state, update)
        where = (*(tensor.data_ptr() for tensor in tensors), threads, scratch.data_ptr())
        self.library.lstm_step(self.at, len(gradient), state.stride(0), *where)
        return update

    def gradients(
        self, gradients: Tensor, weights: Sequence[float], state: Tensor, beside: Tensor | None = None
    ) -> list[Tensor]:
        """As `RuleUnroll.gradients`, for a truncation that began with `state`; in the order of the weights.

        Args:
            gradients: `[num_steps + 1, num_coordinates]`, contiguous.
            weights: `num_steps` of them.
            state: As in `step_`.
            beside: None, or `[num_steps, num_coordinates]`, contiguous.
        """
        threads, num_steps, of_losses = torch.get_num_threads(), len(weights), gradients.new_tensor(weights)
        scratch = gradients.new_empty(self.library.lstm_gradient_scratch(self.at, num_steps, threads))
        parts = gradients.new_zeros(threads, self.library.lstm_gradient_size(self.at), dtype=torch.float64)
        tensors = (self.weights, gradients, of_losses, beside, state, parts)
        where = (*(None if t is None else t.data_ptr() for t in tensors), threads, scratch.data_ptr())
        self.library.lstm_gradients(self.at, gradients.shape[1], state.stride(0), num_steps, *where)
        return self._unpack(parts.sum(0).to(gradients.dtype))

    def _unpack(self, total: Tensor) -> list[Tensor]:
        """From a row for each unit and gate (i, f, o, g), of what is below, the unit's own layer and the bias."""
        hidden = self.rule.hidden
        found: list[Tensor] = []
        for layer in range(self.rule.layers):
            below = hidden if layer else self.rule.of_gradient
            own, total = total.tensor_split([4 * hidden * (below + hidden + 1)])
            i, f, o, g = own.view(hidden, 4, -1).unbind(1)
            found += torch.cat([i, f, g, o]).tensor_split([below, below + hidden], 1)
            found[-1] = found[-1][:, 0]
        readout, total = total.tensor_split([hidden + 1])
        found += [readout[None, :hidden], readout[hidden:]]
        if len(total):
            bias, weight = total.view(hidden, 1 + self.rule.features).tensor_split([1], 1)
            found += [weight, bias[:, 0]]
        return found


class FusedUnroll(RuleUnroll):
    """The compiled kernel: nothing is kept of an inner step; the backward pass has the buffers of one tile a thread.

    Args:
        pack: Gives the kernel with the rule's weights as they are when it is called.
        first: Buffer for the state at the beginning, `[state_size, num_coordinates]`.
        num_steps: Inner steps of a truncation.
    """

    def __init__(self, pack: Callable[[], FusedLSTM], first: Tensor, num_steps: int) -> None:
        self.pack, self.first, self.num_steps = pack, first, num_steps
        self.count = 0

    def begin(self, state: Tensor, seen: Seen | None = None) -> None:
        """See `RuleUnroll.begin`."""
        self.fused = self.pack()
        self.first.copy_(state)
        self.count = 0

    def step(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        """See `RuleUnroll.step`."""
        self.count += 1
        return self.fused.step_(gradient, state)

    def gradients(self, gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> list[Tensor]:
        """See `RuleUnroll.gradients`."""
        check_count(self.count, self.num_steps)
        return self.fused.gradients(gradients, weights, self.first, beside)


def check_count(count: int, num_steps: int) -> None:
    """Refuse to end a truncation before its last inner step.

    Raises:
        RuntimeError: It has not been made.
    """
    if count != num_steps:
        raise RuntimeError(f"{count} of {num_steps} inner steps were made; make all before gradients()")


@cache
def _library() -> Any:
    if os.environ.get("LIGHTNING_L2L_FUSED", "1") == "0":
        return None
    try:
        library, problem = load_compiled(SOURCES, FLAGS)
    except NotCompiled as error:
        warnings.warn(
            f"the rules' kernels are not compiled, and without it a step takes 3 to 6 times as long: {error}; or set "
            "LIGHTNING_L2L_FUSED=0 to go on like this without a warning",
            RuntimeWarning,
            stacklevel=3,  # the rule, which asks `fused_for`
        )
        return None
    if problem is not None:
        warnings.warn(
            f"the rules' kernels were compiled, and have to be again the next time: {problem}",
            RuntimeWarning,
            stacklevel=3,
        )
    # Bound to torch's own OpenMP, already loaded, so that its number of threads holds here too.
    size, pointer, yes = ctypes.c_long, ctypes.c_void_p, ctypes.c_int
    rule = ctypes.POINTER(FusedRule)
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "lstm_packed_size": (size, [rule, yes]),
        "lstm_pack": (None, [rule, yes, pointer, pointer]),
        "lstm_scratch": (size, [rule, size]),
        "lstm_step": (None, [rule, size, size, *[pointer] * 4, size, pointer]),
        "lstm_gradient_size": (size, [rule]),
        "lstm_gradient_scratch": (size, [rule, size, size]),
        "lstm_gradients": (None, [rule, size, size, size, *[pointer] * 6, size, pointer]),
        "normalized_scratch": (size, [pointer, pointer, size]),
        "normalized_direction": (None, [pointer, pointer, size, pointer]),
        "normalized_update": (None, [pointer, size, pointer, pointer, size, pointer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library
