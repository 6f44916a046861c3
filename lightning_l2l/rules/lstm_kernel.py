"""The coordinatewise LSTM unrolled by hand: one inner step, and the backward pass over all of them.

Autograd would keep some forty tensors a step and pay an operator call and a trip to memory for each. Here the
LSTM is written in the form that costs least, features by rows and coordinates by columns:

* One product a layer and step. Every layer's inputs (its own h, a row of ones for the bias, the h below it) lie
  in adjacent rows of one buffer, so nothing is concatenated. For that, layer l (counted from 0) reads buffer
  s + l at step s and writes its h to the next one: buffer k is a wave that holds layer l at step k - l.
* No tanh: tanh x = 2 sigmoid(2x) - 1. With c' = 2c, h' = h / 2 and the gate g = sigmoid(2 z_g), an LSTM cell is

      c'_t = f c'_{t-1} + 4 i (g - 1/2)        h'_t = o (sigmoid(c'_t) - 1/2)

  and the factors go into the weights. sigmoid is evaluated once on the rows (i, f, o, g) of a layer together.
* Backwards a wave needs the wave after it and nothing else, so all layers of a wave share each call, and two
  products are left: one for the gradient of every weight, bias and readout included, one for the h of the wave
  before.

Blocks of coordinates are independent of each other, so each is walked through with its buffers in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input


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
        """Rows of an input buffer, padded with zeros to a multiple of 8: the products are a third faster."""
        return -(-(self.row(-1) + self.input_size) // 8) * 8

    @property
    def gate_rows(self) -> int:
        """Rows of all gates of all layers."""
        return 4 * self.hidden_size * self.num_layers

    def floats_per_step(self) -> int:
        """Numbers kept for one coordinate and one inner step until the backward pass."""
        return self.num_rows + 6 * self.hidden_size * self.num_layers


class PackedWeights(NamedTuple):
    """Weights in the kernel's order, signs and scales; see the module's docstring."""

    forward: list[Tensor]  # a layer: [4 H, fan_in], rows (i, f, o, g)
    backward: Tensor  # [num_layers H, 1 + gate_rows], gradient of readout and gates -> of the h of the wave before
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
    h, top = shape.hidden_size, shape.num_layers - 1
    forward = []
    backward = readout[0].new_zeros(shape.num_layers, h, 1 + shape.gate_rows)
    blocks = torch.unflatten(backward[..., 1:], 2, (4, shape.num_layers, h))  # [to layer, h, gate, from layer, h]
    for layer, (weight_ih, weight_hh, bias) in enumerate(layers):
        under = 2 * weight_ih if layer else weight_ih  # h' = h / 2
        full = _swap_gates(torch.cat([2 * weight_hh, bias[:, None], under], 1))
        full = full * _gate_scale(full, 1, 1, 1, 2)
        forward.append(full.contiguous())
        back = torch.unflatten((full * _gate_scale(full, 4, 1, 1, 4)).t(), 1, (4, h))
        blocks[layer, :, :, layer] = back[:h]
        if layer:
            blocks[layer - 1, :, :, layer] = back[h + 1 :]
    out = output_scale * torch.cat([2 * readout[0], readout[1][:, None]], 1)
    backward[top, :, 0] = out[0, :h]
    return PackedWeights(forward, backward.flatten(0, 1), out)


def unpack_gradients(
    shape: LSTMShape, gradient: Tensor, output_scale: float
) -> tuple[list[tuple[Tensor, Tensor, Tensor]], tuple[Tensor, Tensor]]:
    """Gradients of the weights given to `pack`, from what `Block.backward` gathered."""
    h, top = shape.hidden_size, shape.num_layers - 1
    by_layer = torch.unflatten(gradient[1:], 0, (4, shape.num_layers, h))
    layers = []
    for layer in range(shape.num_layers):
        first = shape.row(layer)
        full = by_layer[:, layer, :, first : first + shape.fan_in(layer)].flatten(0, 1)
        full = _swap_gates(full * _gate_scale(full, 4, 1, 1, 8))
        under = full[:, h + 1 :]
        layers.append((2 * under if layer else under, 2 * full[:, :h], full[:, h]))
    last = gradient[:1, shape.row(top) :] * output_scale
    return layers, (2 * last[:, :h], last[:, h])


class Scratch:
    """Buffers that blocks of `size` coordinates share, written and read within one step."""

    def __init__(self, shape: LSTMShape, size: int, *, like: Tensor) -> None:
        h, layers = shape.hidden_size, shape.num_layers
        self.half = like.new_tensor(0.5)  # a Python number would be made a tensor anew at every call
        self.gates = like.new_empty(4 * h, size)
        self.centred = like.new_empty(h, size)
        self.halves = like.new_empty(2, layers, h, size)  # g - 1/2, sigmoid(c') - 1/2
        self.inner = like.new_empty(layers, h, size)
        self.d_cell = like.new_empty(layers, h, size)
        # rows: gradient of the readout | of the gates i, f, o, g | of the cell that goes to the wave before
        self.d_rows = like.new_empty(1 + 5 * layers * h, size)
        self.d_readout = self.d_rows[:1]
        self.d_joint = self.d_rows[: 1 + 4 * layers * h]
        parts = torch.unflatten(self.d_rows[1:], 0, (5, layers, h))
        self.d_gates, self.d_i, self.d_f, self.d_o = parts[:4], parts[0], parts[1], parts[2]
        self.d_g_carry, self.d_carry = parts[3:], parts[4]
        self.d_hidden = like.new_empty(layers, h, size)
        self.d_hidden_rows = self.d_hidden.view(layers * h, size)


class _Cell(NamedTuple):
    """One layer at one step: views made once, for a view costs as much as a small product."""

    inputs: Tensor  # [fan_in, size]
    gates: Tensor  # [4, H, size], with the parts i, f, o, g below
    i: Tensor
    f: Tensor
    o: Tensor
    g: Tensor
    sigma: Tensor  # sigmoid(c')
    cell_before: Tensor
    cell: Tensor
    hidden: Tensor


class _Wave(NamedTuple):
    """All layers at one wave, for the backward pass."""

    inputs_t: Tensor  # [size, num_rows]
    gates: Tensor  # [4, num_layers, H, size]
    i_f: Tensor
    o: Tensor
    g_sigma: Tensor
    sigma: Tensor
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
        gates = like.new_empty(waves, 5, layers, h, size)
        cells = like.new_empty(waves + 1, layers, h, size)
        for layer in range(layers):
            inputs[:, shape.row(layer) + h] = 1.0
            # A layer does not take part in the first and last waves: zeros there keep its gradients zero.
            for wave in (*range(layer), *range(num_steps + layer, waves)):
                gates[wave, :, layer] = 0.0
                cells[wave, layer] = 0.0
        self.x = [inputs[s, shape.row(-1) : shape.row(-1) + shape.input_size] for s in range(num_steps)]
        self.hidden = [
            [inputs[s + layer, shape.row(layer) : shape.row(layer) + h] for layer in range(layers)]
            for s in range(num_steps + 1)
        ]
        self.cells = [[cells[s + layer, layer] for layer in range(layers)] for s in range(num_steps + 1)]
        self.readout = [inputs[s + layers, : h + 1] for s in range(num_steps)]
        self.steps = [[self._cell(inputs, gates, s, layer) for layer in range(layers)] for s in range(num_steps)]
        self.waves = [
            _Wave(inputs[k].t(), kept[:4], kept[:2], kept[2], kept[3:], kept[4], cells[k])
            for k, kept in enumerate(gates)
        ]

    def _cell(self, inputs: Tensor, gates: Tensor, step: int, layer: int) -> _Cell:
        first = self.shape.row(layer)
        i, f, o, g, sigma = gates[step + layer, :, layer].unbind()
        return _Cell(
            inputs[step + layer, first : first + self.shape.fan_in(layer)],
            gates[step + layer, :4, layer],
            *(i, f, o, g, sigma),
            self.cells[step][layer],
            self.cells[step + 1][layer],
            self.hidden[step + 1][layer],
        )

    def load(self, state: Tensor) -> None:
        """Start from `state` `[2 H num_layers, size]`, rows (h, c) a layer, the LSTM's own h and c."""
        parts = torch.unflatten(state, 0, (self.shape.num_layers, 2, self.shape.hidden_size))
        for part, hidden, cell in zip(parts, self.hidden[0], self.cells[0], strict=True):
            torch.mul(part[0], 0.5, out=hidden)
            torch.mul(part[1], 2.0, out=cell)

    def store(self, step: int, state: Tensor) -> None:
        """Write the state after `step` inner steps to `state` `[2 H num_layers, size]`."""
        parts = torch.unflatten(state, 0, (self.shape.num_layers, 2, self.shape.hidden_size))
        for part, hidden, cell in zip(parts, self.hidden[step], self.cells[step], strict=True):
            torch.mul(hidden, 2.0, out=part[0])
            torch.mul(cell, 0.5, out=part[1])

    def forward(self, step: int, x: Tensor, weights: PackedWeights, update: Tensor | None) -> None:
        """Inner step `step`: from x `[input_size, size]` to `update` `[1, size]` (None: not needed)."""
        gates, centred, half = self.scratch.gates, self.scratch.centred, self.scratch.half
        gates_by_kind = gates.view(4, self.shape.hidden_size, -1)
        self.x[step].copy_(x)
        for weight, v in zip(weights.forward, self.steps[step], strict=True):
            torch.mm(weight, v.inputs, out=gates)
            torch.sigmoid(gates_by_kind, out=v.gates)
            torch.sub(v.g, half, out=centred)
            torch.mul(v.f, v.cell_before, out=v.cell)
            v.cell.addcmul_(v.i, centred, value=4.0)
            torch.sigmoid(v.cell, out=v.sigma)
            torch.sub(v.sigma, half, out=centred)
            torch.mul(v.o, centred, out=v.hidden)
        if update is not None:
            torch.mm(weights.readout, self.readout[step], out=update)

    def backward(self, cotangents: Tensor, weights: PackedWeights, gradient: Tensor) -> None:
        """Add the gradient of sum(cotangents * updates) to `gradient`.

        Args:
            cotangents: `[num_steps, size]`.
            weights: Those of the forward pass.
            gradient: `[1 + gate_rows, num_rows]`; row 0 is the readout's. `unpack_gradients` reads it.
        """
        s, top = self.scratch, self.shape.num_layers - 1
        centred_g, centred_sigma = s.halves
        s.d_hidden.zero_()
        torch.mm(weights.readout[:, : self.shape.hidden_size].t(), cotangents[-1:], out=s.d_hidden[top])
        gradient[:1, : self.shape.hidden_size + 1].addmm_(cotangents[-1:], self.readout[-1].t())
        s.d_carry.zero_()
        for wave in range(len(self.waves) - 1, -1, -1):
            v = self.waves[wave]
            before = wave - top - 1  # the top layer's step before this wave's: its update is read out here
            s.d_readout.copy_(cotangents[before]) if before >= 0 else s.d_readout.zero_()
            torch.sub(v.g_sigma, s.half, out=s.halves)
            torch.mul(s.d_hidden, centred_sigma, out=s.d_o)
            torch.mul(s.d_hidden, v.o, out=s.inner)
            _sigmoid_backward(s.inner, v.sigma, grad_input=s.inner)
            torch.add(s.d_carry, s.inner, out=s.d_cell)
            torch.mul(s.d_cell, centred_g, out=s.d_i)
            torch.mul(s.d_cell, v.cell_before, out=s.d_f)
            torch.mul(s.d_cell, v.i_f, out=s.d_g_carry)
            _sigmoid_backward(s.d_gates, v.gates, grad_input=s.d_gates)
            gradient.addmm_(s.d_joint, v.inputs_t)
            if wave:
                torch.mm(weights.backward, s.d_joint, out=s.d_hidden_rows)
