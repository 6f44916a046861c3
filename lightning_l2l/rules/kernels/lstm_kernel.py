"""The coordinatewise LSTM unrolled by hand: one inner step, and the backward pass over all of them.

Autograd would keep some forty tensors a step and pay an operator call and a trip to memory for each. Here the
LSTM is written in the form that costs least, features by rows and coordinates by columns:

* One product a layer and step. Every layer's inputs (its own h, a row of ones for the bias, the h below it) lie
  in adjacent rows of one buffer, so nothing is concatenated. For that, layer l (counted from 0) reads buffer
  s + l at step s and writes its h to the next one: buffer k is a wave that holds layer l at step k - l.
* No call of tanh, which costs six times what sigmoid does: tanh x = 2 sigmoid(2x) - 1. So sigmoid is evaluated
  once on the rows (i, f, o, g) of a layer together, with twice the weights for g; and with c' = 2c a cell is

      c'_t = f c'_{t-1} + 2 i g        h_t = o tau,  tau = tanh(c'_t / 2) = 2 sigmoid(c'_t) - 1

* Backwards a wave needs the wave after it and nothing else, so all layers of a wave share each pointwise call.
  The gradients of all weights of a layer, bias and readout included, are one product.
* A coordinate that waits for its first gradient has zeros in place of the ones, of x and of the cotangent. Then all
  that a layer reads is 0: its h and cell stay 0, and it adds nothing to any gradient.

Blocks of coordinates are independent of each other, so each is walked through with its buffers in the cache. On a CPU
with a C compiler `fused` does all of this in its own way, with the same results up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def _padded(rows: int) -> int:
    """The next multiple of 8: a product with that many rows is a third faster."""
    return -(-rows // 8) * 8


class LSTMShape(NamedTuple):
    """Sizes that fix the layout of the buffers. Layers are counted from 0, the lowest."""

    input_size: int
    hidden_size: int
    num_layers: int

    def row(self, layer: int) -> int:
        """First row of a layer's h in an input buffer; layer -1 is the input x."""
        return (self.num_layers - 1 - layer) * (self.hidden_size + 1)

    def fan_in(self, layer: int) -> int:
        """Rows that a layer reads: its own h, the ones, and what is below."""
        return self.hidden_size + 1 + (self.hidden_size if layer else self.input_size)

    @property
    def num_rows(self) -> int:
        """Rows of an input buffer, so many that every layer finds its own padded."""
        return max(self.row(layer) + _padded(self.fan_in(layer)) for layer in range(self.num_layers))

    def floats_kept(self, num_steps: int) -> int:
        """Numbers kept for one coordinate over so many inner steps until the backward pass."""
        waves = num_steps + self.num_layers - 1
        return (waves + 1) * self.num_rows + (6 * waves + 1) * self.hidden_size * self.num_layers

    def zero_gradients(self, like: Tensor) -> list[Tensor]:
        """What `Block.backward` adds to: a layer's `[1 + 4 H, padded fan_in]`; the top one's row 0 is the readout's."""
        rows = 1 + 4 * self.hidden_size
        return [like.new_zeros(rows, _padded(self.fan_in(layer))) for layer in range(self.num_layers)]


class PackedWeights(NamedTuple):
    """Weights in the kernel's order and scales; see the module's docstring."""

    forward: list[Tensor]  # a layer: [4 H, fan_in], rows (i, f, o, g)
    top: Tensor  # [2 H, 1 + 4 H], or [H, 1 + 4 H] for one layer: top layer's gradients -> of the h below, of its own h
    own: list[Tensor]  # a layer: [H, 4 H], gradients of the gates -> of its own h
    below: list[Tensor]  # a layer: [fan_in - H - 1, 4 H], gradients of the gates -> of what is below
    readout: Tensor  # [1, H + 1]


def _swap_gates(weight: Tensor) -> Tensor:
    """Between torch's order of gates (i, f, g, o) and the kernel's (i, f, o, g), either way."""
    i, f, third, fourth = weight.chunk(4)
    return torch.cat([i, f, fourth, third])


def _gate_scale(weight: Tensor, i: float, f: float, o: float, g: float) -> Tensor:
    """A factor for each gate, as a column that multiplies `weight` `[4 H, ...]`."""
    return weight.new_tensor([i, f, o, g]).repeat_interleave(len(weight) // 4)[:, None]


def pack(
    shape: LSTMShape,
    layers: Sequence[tuple[Tensor, Tensor, Tensor]],
    readout: tuple[Tensor, Tensor],
    output_scale: float,
) -> PackedWeights:
    """Bring the weights of an LSTM into the kernel's form.

    Args:
        shape: Sizes of the LSTM.
        layers: For each layer, lowest first, (weight_ih `[4 H, in]`, weight_hh `[4 H, H]`, bias `[4 H]`), gates
            in torch's order (i, f, g, o).
        readout: Weight `[1, H]` and bias `[1]` of the linear readout.
        output_scale: Factor on the readout.
    """
    h = shape.hidden_size
    out = output_scale * torch.cat([readout[0], readout[1][:, None]], 1)
    forward, own, below = [], [], []
    for weight_ih, weight_hh, bias in layers:
        full = _swap_gates(torch.cat([weight_hh, bias[:, None], weight_ih], 1))
        forward.append(full * _gate_scale(full, 1, 1, 1, 2))
        back = (full * _gate_scale(full, 2, 1, 1, 2)).t().contiguous()  # the 2 of 2 i g
        own.append(back[:h])
        below.append(back[h + 1 :])
    top = torch.cat([out[:, :h].t(), own[-1]], 1)
    if shape.num_layers > 1:  # an update does not reach the h below
        top = torch.cat([torch.cat([top.new_zeros(h, 1), below[-1]], 1), top])
    return PackedWeights(forward, top, own, below, out)


def unpack_gradients(
    shape: LSTMShape, gradients: Sequence[Tensor], output_scale: float
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Gradients of the weights given to `pack`, from what `Block.backward` gathered."""
    h = shape.hidden_size
    layers = []
    for layer, gradient in enumerate(gradients):
        full = gradient[1:, : shape.fan_in(layer)]
        full = _swap_gates(full * _gate_scale(full, 2, 1, 1, 2))
        layers.append((full[:, h + 1 :], full[:, :h], full[:, h]))
    last = output_scale * gradients[-1][:1]
    return layers, (last[:, :h], last[:, h])


def step_in_place(shape: LSTMShape, weights: PackedWeights, x: Tensor, state: Tensor, moving: Tensor) -> Tensor:
    """One inner step and nothing kept: x `[input_size, size]`, state `[2 H num_layers, size]` -> update `[size]`.

    Where `moving` `[size]` is False, the cells have to be 0; they stay so, and the update is 0.
    """
    h, twice = shape.hidden_size, 2.0 * moving.to(x.dtype)
    gates = x.new_empty(4 * h, x.shape[1])
    i, f, o, g = gates.chunk(4)
    for weight, (hidden, cell) in zip(weights.forward, torch.unflatten(state, 0, (-1, 2, h)), strict=True):
        torch.addmm(weight[:, h : h + 1], weight[:, :h], hidden, out=gates)
        gates.addmm_(weight[:, h + 1 :], x).sigmoid_()
        cell.mul_(f).addcmul_(i, g.sub_(0.5).mul_(twice))
        tau = torch.mul(cell, 2.0, out=g).sigmoid_().mul_(2.0).sub_(1.0)
        x = torch.mul(o, tau, out=hidden)
    return torch.addmm(weights.readout[:, h:], weights.readout[:, :h], x)[0].mul_(moving)


class Scratch:
    """Buffers that blocks of `size` coordinates share, written and read within one step."""

    def __init__(self, shape: LSTMShape, size: int, *, like: Tensor) -> None:
        h, layers = shape.hidden_size, shape.num_layers
        self.minus_one = like.new_tensor(-1.0)  # a Python number would be made a tensor anew at every call
        self.gates = like.new_empty(4 * h, size)
        self.inner = like.new_empty(layers, h, size)
        self.d_cell = like.new_empty(layers, h, size)
        # rows of a layer: gradient of the readout (top layer) | of i, f, o, g | of the cell, for the wave before
        rows = like.new_empty(layers, 1 + 5 * h, size)
        self.d_readout, self.d_top = rows[-1, :1], rows[-1, : 1 + 4 * h]
        self.d_layers = list(rows[:, 1 : 1 + 4 * h].unbind())
        parts = torch.unflatten(rows[:, 1:], 1, (5, h))
        self.d_i, self.d_f, self.d_o, self.d_g, self.d_carry = parts.unbind(1)
        self.d_sigmoids, self.d_g_carry = parts[:, :3], parts[:, 3:]
        self.d_hidden = like.new_empty(layers, h, size)
        self.d_hidden_top_two = self.d_hidden[-2:].flatten(0, 1)


class _Cell(NamedTuple):
    """One layer at one step: views made once, for a view costs as much as a small product."""

    inputs: Tensor  # [fan_in, size]
    gates: Tensor  # [4 H, size], with the parts i, f, o, g below
    i: Tensor
    f: Tensor
    o: Tensor
    g: Tensor
    tau: Tensor
    cell_before: Tensor
    cell: Tensor
    hidden: Tensor


class _Wave(NamedTuple):
    """All layers at one wave, for the backward pass."""

    inputs_t: list[Tensor]  # a layer: [size, padded fan_in]
    sigmoids: Tensor  # [num_layers, 3, H, size], i, f, o
    i_f: Tensor  # [num_layers, 2, H, size]
    o: Tensor  # [num_layers, H, size], as all that follow
    g: Tensor
    tau: Tensor
    cell_before: Tensor


class Block:
    """`size` coordinates over `num_steps` inner steps: what is kept for the backward pass.

    Args:
        shape: Sizes of the LSTM.
        size: Coordinates in this block.
        num_steps: Inner steps.
        scratch: Shared buffers of exactly this size.
        like: A tensor with the dtype and device wanted.
    """

    def __init__(self, shape: LSTMShape, size: int, num_steps: int, scratch: Scratch, *, like: Tensor) -> None:
        h, layers = shape.hidden_size, shape.num_layers
        self.shape, self.num_steps, self.scratch = shape, num_steps, scratch
        waves = num_steps + layers - 1
        inputs = like.new_zeros(waves + 1, shape.num_rows, size)
        gates = like.new_empty(waves, layers, 5, h, size)
        cells = like.new_empty(waves + 1, layers, h, size)
        for layer in range(layers):
            inputs[:, shape.row(layer) + h] = 1.0
            # A layer does not take part in the first and last waves: zeros there keep its gradients zero.
            for wave in (*range(layer), *range(num_steps + layer, waves)):
                gates[wave, layer] = 0.0
                cells[wave, layer] = 0.0
        # The ones of all layers at a step: a wave and a layer on is always so many rows on.
        rows, ones, on = inputs.flatten(0, 1), shape.row(0) + h, shape.num_rows - h - 1
        starts = [s * shape.num_rows + ones for s in range(num_steps)]
        self.ones = [rows[start : start + (layers - 1) * on + 1 : on] for start in starts]
        self.moved = inputs[:num_steps, ones]
        self.x = [inputs[s, shape.row(-1) : shape.row(-1) + shape.input_size] for s in range(num_steps)]
        self.hidden = [
            [inputs[s + layer, shape.row(layer) : shape.row(layer) + h] for layer in range(layers)]
            for s in range(num_steps + 1)
        ]
        self.cells = [[cells[s + layer, layer] for layer in range(layers)] for s in range(num_steps + 1)]
        self.readout = [inputs[s + layers, : h + 1] for s in range(num_steps)]
        self.steps = [[self._cell(inputs, gates, s, layer) for layer in range(layers)] for s in range(num_steps)]
        self.waves = [self._wave(inputs[k], kept, cells[k]) for k, kept in enumerate(gates)]

    def _cell(self, inputs: Tensor, gates: Tensor, step: int, layer: int) -> _Cell:
        first, kept = self.shape.row(layer), gates[step + layer, layer]
        i, f, o, g, tau = kept.unbind()
        return _Cell(
            inputs[step + layer, first : first + self.shape.fan_in(layer)],
            kept[:4].flatten(0, 1),
            *(i, f, o, g, tau),
            self.cells[step][layer],
            self.cells[step + 1][layer],
            self.hidden[step + 1][layer],
        )

    def _wave(self, inputs: Tensor, kept: Tensor, cell_before: Tensor) -> _Wave:
        reads = [(self.shape.row(k), _padded(self.shape.fan_in(k))) for k in range(self.shape.num_layers)]
        o, g, tau = kept[:, 2:].unbind(1)
        return _Wave([inputs[a : a + n].t() for a, n in reads], kept[:, :3], kept[:, :2], o, g, tau, cell_before)

    def load(self, state: Tensor) -> None:
        """Start from `state` `[2 H num_layers, size]`, rows (h, c) a layer."""
        parts = torch.unflatten(state, 0, (self.shape.num_layers, 2, self.shape.hidden_size))
        for part, hidden, cell in zip(parts, self.hidden[0], self.cells[0], strict=True):
            hidden.copy_(part[0])
            torch.mul(part[1], 2.0, out=cell)

    def store(self, step: int, state: Tensor) -> None:
        """Write the state after `step` inner steps to `state` `[2 H num_layers, size]`."""
        parts = torch.unflatten(state, 0, (self.shape.num_layers, 2, self.shape.hidden_size))
        for part, hidden, cell in zip(parts, self.hidden[step], self.cells[step], strict=True):
            part[0].copy_(hidden)
            torch.mul(cell, 0.5, out=part[1])

    def forward(self, step: int, x: Tensor, moving: Tensor, weights: PackedWeights, update: Tensor | None) -> None:
        """Inner step `step`: from x `[input_size, size]` to `update` `[1, size]` (None: not needed).

        Where `moving` `[size]` is False, h and cells have to be 0; they stay so, and the update is 0.
        """
        gates, minus_one = self.scratch.gates, self.scratch.minus_one
        torch.mul(x, moving, out=self.x[step])
        self.ones[step].copy_(moving)
        self.readout[step][-1].copy_(moving)  # the ones of the next step, which may be more
        for weight, v in zip(weights.forward, self.steps[step], strict=True):
            torch.mm(weight, v.inputs, out=gates)
            torch.sigmoid(gates, out=v.gates)
            torch.add(minus_one, v.g, alpha=2.0, out=v.g)
            torch.mul(v.f, v.cell_before, out=v.cell)
            v.cell.addcmul_(v.i, v.g, value=2.0)
            torch.sigmoid(v.cell, out=v.tau)
            torch.add(minus_one, v.tau, alpha=2.0, out=v.tau)
            torch.mul(v.o, v.tau, out=v.hidden)
        if update is not None:
            torch.mm(weights.readout, self.readout[step], out=update)

    def backward(self, cotangents: Tensor, weights: PackedWeights, gradients: Sequence[Tensor]) -> None:
        """Add the gradient of sum(cotangents * updates) to `gradients`.

        Args:
            cotangents: `[num_steps, size]`.
            weights: Those of the forward pass.
            gradients: As `LSTMShape.zero_gradients` makes them and `unpack_gradients` reads them.
        """
        s, h, top = self.scratch, self.shape.hidden_size, self.shape.num_layers - 1
        cotangents = cotangents.where(self.moved != 0, 0.0)
        s.d_hidden.zero_()
        s.d_carry.zero_()
        torch.mm(weights.readout[:, :h].t(), cotangents[-1:], out=s.d_hidden[top])
        gradients[top][:1, : h + 1].addmm_(cotangents[-1:], self.readout[-1].t())
        without_readout = [gradient[1:] for gradient in gradients]
        for wave in range(len(self.waves) - 1, -1, -1):
            v = self.waves[wave]
            self._pointwise_backward(v)
            before = wave - top - 1  # the top layer's step before this wave's: its update is read out here
            s.d_readout.copy_(cotangents[before]) if before >= 0 else s.d_readout.zero_()
            gradients[top].addmm_(s.d_top, v.inputs_t[top])
            torch.mm(weights.top, s.d_top, out=s.d_hidden_top_two)
            for layer in range(top - 1, -1, -1):
                without_readout[layer].addmm_(s.d_layers[layer], v.inputs_t[layer])
                s.d_hidden[layer].addmm_(weights.own[layer], s.d_layers[layer])
                if layer:
                    torch.mm(weights.below[layer], s.d_layers[layer], out=s.d_hidden[layer - 1])

    def _pointwise_backward(self, v: _Wave) -> None:
        s = self.scratch
        torch.mul(s.d_hidden, v.tau, out=s.d_o)
        torch.mul(s.d_hidden, v.o, out=s.inner)
        _tanh_backward(s.inner, v.tau, grad_input=s.inner)
        torch.add(s.d_carry, s.inner, alpha=0.5, out=s.d_cell)
        torch.mul(s.d_cell, v.g, out=s.d_i)
        torch.mul(s.d_cell, v.cell_before, out=s.d_f)
        torch.mul(s.d_cell.unsqueeze(1), v.i_f, out=s.d_g_carry)
        _sigmoid_backward(s.d_sigmoids, v.sigmoids, grad_input=s.d_sigmoids)
        _tanh_backward(s.d_g, v.g, grad_input=s.d_g)
