"""An inner step of NormalizedMLP by the compiled kernel, `normalized.c`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.rules.inputs import INPUTS, NUM_TIMES
from lightning_l2l.rules.kernels.fused import MOST_MEANS

#: What the MLP may see, in the kernel's order.
_ORDER = (
    *("gradient", "clipped", "theta", "square", "inverse", "ratio", "means", "mean_ratios", "factored"),
    *("factored_means", "rows", "columns", "inverse_rows", "inverse_columns"),
)
_MOST_INPUTS = 6 + 8 * MOST_MEANS


class _Weights(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "hidden_bias", "second", "second_bias")),
        *((name, ctypes.c_void_p) for name in ("readout", "readout_bias", "places", "times")),
        *((name, ctypes.c_long) for name in ("columns", "each")),
    )


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "hidden_bias", "readout", "readout_bias", "moments")),
        *((name, ctypes.c_long) for name in ("exists", "units", "mixes")),
        ("bound", ctypes.c_float),
    )


class NormalizedNumbers(ctypes.Structure):
    """A rule's numbers, as `Rule` in normalized.c has them."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("hidden", "means", "times", "factors")),
        ("gain1", ctypes.c_float * MOST_MEANS),
        *((name, ctypes.c_float) for name in ("gain2", "eps", "largest", "clip")),
        ("weights", _Weights),
        ("sizes", _Sizes),
    )

    def size_by(self, weights: Sequence[Tensor], moments: Tensor, bound: float, each: bool) -> None:
        """Hold on to what gives the size of a tensor's update.

        Args:
            weights: Of its layers, one or two, weight and bias each, contiguous; of every task, if `each`.
            moments: What `TensorSize.of_moment` gives, contiguous.
            bound: On the logarithm of the factor.
            each: Whether every task has weights of its own.
        """
        self.kept_sizes = (*weights, moments)
        self.weights.each = each
        at = [one.data_ptr() for one in self.kept_sizes]
        linear = len(weights) == 2
        units, mixes = 0 if linear else weights[0].shape[-2], weights[-1].shape[-1] - 2
        self.sizes = _Sizes(*([0, 0] if linear else []), *at, 1, units, mixes, bound)

    def keep(self, weights: Sequence[Tensor], places: Tensor, times: Tensor) -> None:
        """Hold on to the MLP.

        Args:
            weights: Of its three layers, weight and bias each, contiguous; of every task, if they begin with that
                dimension.
            places: See `places_of`.
            times: The moment, `[num_tasks, 2]`, contiguous.
        """
        self.kept = (*weights, places, times)
        self.weights = _Weights(*(one.data_ptr() for one in self.kept), weights[0].shape[-1], weights[0].dim() > 2)


class _Tensor(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_long) for name in ("tasks", "size", "rows", "columns")),
        *((name, ctypes.c_void_p) for name in ("gradient", "theta", "state", "vector")),
        ("width", ctypes.c_long),
        ("shape", ctypes.c_float * 3),
        *((name, ctypes.c_void_p) for name in ("direction", "sums")),
    )


class NormalizedStep:
    """The compiled kernel on one tensor of each task: the running means are brought to this step, in place.

    Args:
        library: What `fused_for` gave.
        rule: The rule's numbers.
        matrix: Rows and columns of the tensor; None: it is no matrix.
        tensors: Gradient and theta `[num_tasks, *shape]`, the running means `[means + 1, num_tasks, *shape]` and the
            rule's state of the tensor `[num_tasks, vector_size]`, float32 and contiguous.
        shape: What `TensorSize.of_shape` gives; nothing, where sizes are not learned.

    Attributes:
        direction: In the shape of the gradient.
    """

    def __init__(
        self,
        library: Any,
        rule: NormalizedNumbers,
        matrix: tuple[int, int] | None,
        tensors: Sequence[Tensor],
        shape: Sequence[float],
    ) -> None:
        self.library, self.kept, self.threads = library, tensors, torch.get_num_threads()
        gradient = tensors[0]
        self.direction = torch.empty_like(gradient)
        self.sums = torch.empty(len(gradient), 3, dtype=torch.float64)
        sides = matrix if matrix and rule.factors else (0, 0)
        at = [tensor.data_ptr() for tensor in (*tensors, self.direction, self.sums)]
        size, given = gradient.numel() // len(gradient), (ctypes.c_float * 3)(*shape)
        self.tensor = _Tensor(len(gradient), size, *sides, *at[:4], tensors[3].shape[1], given, *at[4:])
        where = ctypes.byref(rule), ctypes.byref(self.tensor), self.threads
        scratch = torch.empty(library.normalized_scratch(*where), dtype=torch.uint8)
        library.normalized_direction(*where, scratch.data_ptr())

    def update_(self, rate: Tensor, *, normalize: bool, changed: Tensor | None = None) -> Tensor:
        """From the direction to the update.

        Args:
            rate: Of each task, `[num_tasks]`.
            normalize: Whether the direction is divided by its root mean square over coordinates that have moved.
            changed: What takes the place of the direction, contiguous, in its shape.

        Returns:
            The update, in the shape of the gradient.
        """
        scratch = squares = None
        if changed is not None:
            self.direction, self.tensor.direction = changed, changed.data_ptr()
            squares = self.kept[2][-1].data_ptr()
            scratch = torch.empty(2 * len(rate) + changed.numel() // 1024, dtype=torch.float64)
        rate = rate.contiguous()
        where = (squares, rate.data_ptr(), self.threads, None if scratch is None else scratch.data_ptr())
        self.library.normalized_update(ctypes.byref(self.tensor), normalize, *where)
        return self.direction


def places_of(seen: Sequence[str], num_means: int, timed: bool) -> Tensor:
    """Of each input that the kernel makes the column of the first layer, -1 where the MLP does not see it.

    Args:
        seen: Names in the order of the layer's columns.
        num_means: Running means of the gradient.
        timed: Whether the moment comes after them.
    """
    columns, at = {}, 0
    for name in seen:
        columns[name] = at
        at += INPUTS[name].count(num_means)
    places = [
        columns[name] + k if name in columns else -1 for name in _ORDER for k in range(INPUTS[name].count(num_means))
    ]
    places += [-1] * (_MOST_INPUTS - len(places))
    return torch.tensor([*places, *range(at, at + NUM_TIMES * timed)])
