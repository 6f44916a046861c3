"""The paper's optimizer: a small LSTM, one copy of its state for every coordinate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_l2l.arguments import brief, check_at_least, check_choice, check_fits_memory, check_flag, is_number
from lightning_l2l.rules.base import Memory, RuleUnroll, Seen, UpdateRule, block_size, blocks, cotangents
from lightning_l2l.rules.kernels.fused import FusedLSTM, FusedRule, FusedUnroll, check_count, fused_for
from lightning_l2l.rules.kernels.lstm_kernel import Block, LSTMShape, Scratch, pack, step_in_place, unpack_gradients
from lightning_l2l.rules.preprocessing import PREPROCESSING

_MOST_LAYERS = 1000


def check_sizes(hidden_size: Any, num_layers: Any) -> None:
    """Refuse sizes of a stack of LSTM layers that there cannot be.

    Raises:
        ValueError: One is below 1, or they need more memory than there is.
    """
    check_at_least(1, hidden_size=hidden_size)
    check_at_least(1, _MOST_LAYERS, num_layers=num_layers)
    check_fits_memory(32 * num_layers * hidden_size**2, hidden_size=hidden_size, num_layers=num_layers)


def check_output_scale(output_scale: Any) -> None:
    """Refuse a factor on the update with which there is none.

    Raises:
        ValueError: It is zero, or no finite number.
    """
    if not is_number(output_scale) or output_scale == 0:
        raise ValueError(
            f"output_scale={brief(output_scale)} gives no update; use a finite number other than 0, such as 0.1"
        )


def register_layers(rule: nn.Module, input_size: int, hidden_size: int, num_layers: int) -> None:
    """Give a rule the weights of a stack of LSTM layers, named as `torch.nn.LSTM` names them, with one bias a layer."""
    for layer in range(num_layers):
        fan_in = hidden_size if layer else input_size
        rule.register_parameter(f"weight_ih_l{layer}", nn.Parameter(torch.empty(4 * hidden_size, fan_in)))
        rule.register_parameter(f"weight_hh_l{layer}", nn.Parameter(torch.empty(4 * hidden_size, hidden_size)))
        rule.register_parameter(f"bias_l{layer}", nn.Parameter(torch.empty(4 * hidden_size)))


def draw_uniform(rule: nn.Module, hidden_size: int) -> None:
    """Draw all parameters within 1 / sqrt(hidden_size), as `torch.nn.LSTM` does."""
    bound = 1 / math.sqrt(hidden_size)
    for parameter in rule.parameters():
        nn.init.uniform_(parameter, -bound, bound)


def layers_of(rule: nn.Module, num_layers: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(weight_ih, weight_hh, bias) of each layer, lowest first; gates in torch's order (i, f, g, o)."""
    names = ("weight_ih", "weight_hh", "bias")
    return [tuple(getattr(rule, f"{name}_l{layer}") for name in names) for layer in range(num_layers)]


def run_layers(
    layers: Sequence[tuple[Tensor, Tensor, Tensor]], x: Tensor, state: Tensor, moving: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the layers: inputs `[features, n]`, rows (h, c) a layer -> the highest h `[hidden, n]`, next rows.

    Where `moving` `[n]` is False, cells that are 0 stay so.
    """
    after = []
    parts = torch.unflatten(state, 0, (len(layers), 2, -1))
    for (weight_ih, weight_hh, bias), (h, c) in zip(layers, parts, strict=True):
        i, f, g, o = (weight_ih @ x + weight_hh @ h + bias[:, None]).chunk(4)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * (torch.tanh(g) * moving)
        x = torch.sigmoid(o) * torch.tanh(c)
        after += [x, c]
    return x, torch.cat(after)


class CoordinatewiseLSTM(UpdateRule):
    r"""An LSTM whose weights all coordinates share and whose state each has for itself.

    .. math:: g_t = s\,(w^\top h_t + b), \qquad h_t = \mathrm{LSTM}(\mathrm{preprocess}(\nabla f_t), h_{t-1})

    A coordinate whose gradient has never been anything but zero is not moved: that of a token not seen yet, of padding,
    of a weight that was pruned at the start. For by its biases an LSTM answers to zeros, too.

    State: `[2 * hidden_size * num_layers, num_coordinates]`, rows (h, c) of the lowest layer first.

    Args:
        hidden_size: Hidden units a layer, at least 1.
        num_layers: Layers, at least 1.
        preprocessing: "log_and_sign" (appendix A of the paper) or "identity".
        p: The p of appendix A, in (0, 87]; not used by "identity".
        output_scale: s, the factor on the readout; not zero.
        forget_bias: What the forget gates' bias starts at.
        wait_for_gradient: Whether a coordinate stays where it is, and its state zero, until its first gradient other
            than 0. If not, it goes where the biases take it, as in the paper.

    Raises:
        ValueError: A size below 1 or one that needs more memory than there is, an unknown preprocessing, another
            argument out of range.

    Example:
        >>> rule = CoordinatewiseLSTM(hidden_size=4)
        >>> update, state = rule(torch.randn(7), rule.init_state(7))
        >>> update.shape, state.shape
        (torch.Size([7]), torch.Size([16, 7]))

    References:
        Andrychowicz et al., Learning to learn by gradient descent by gradient descent,
        https://arxiv.org/abs/1606.04474, 2016.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        num_layers: int = 2,
        preprocessing: Literal["log_and_sign", "identity"] = "log_and_sign",
        p: float = 10.0,
        output_scale: float = 0.1,
        forget_bias: float = 0.0,
        wait_for_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(hidden_size, num_layers)
        check_flag(wait_for_gradient=wait_for_gradient)
        check_choice(PREPROCESSING, preprocessing=preprocessing)
        if not is_number(p) or not 0 < p <= 87:
            raise ValueError(
                f"p={brief(p)} is out of range; use a number above 0 and up to 87 (e^p must be finite); 10 in the paper"
            )
        check_output_scale(output_scale)
        if not is_number(forget_bias):
            raise ValueError(f"forget_bias={brief(forget_bias)} is out of range; use a finite number, such as 1.0")
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.preprocessing = preprocessing
        self.p = p
        self.output_scale = output_scale
        self.forget_bias = forget_bias
        self.wait_for_gradient = wait_for_gradient
        self._preprocess, self._input_size = PREPROCESSING[preprocessing]
        register_layers(self, self._input_size, hidden_size, num_layers)
        self.readout = nn.Linear(hidden_size, 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the meta-parameters anew: uniform within 1 / sqrt(hidden_size), as `torch.nn.LSTM` does."""
        draw_uniform(self, self.hidden_size)
        with torch.no_grad():
            for _, _, bias in self.layers():
                bias[self.hidden_size : 2 * self.hidden_size] = self.forget_bias

    def layers(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(weight_ih, weight_hh, bias) of each layer, lowest first; gates in torch's order (i, f, g, o)."""
        return layers_of(self, self.num_layers)

    @property
    def state_size(self) -> int:
        """Numbers of state a coordinate: h and c of every layer."""
        return 2 * self.hidden_size * self.num_layers

    @property
    def shape(self) -> LSTMShape:
        """Sizes as the kernel wants them."""
        return LSTMShape(self._input_size, self.hidden_size, self.num_layers)

    def preprocess(self, gradient: Tensor) -> Tensor:
        """Features of a gradient, `[num_coordinates]` -> `[features, num_coordinates]`."""
        return self._preprocess(gradient, self.p)

    def forward(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `UpdateRule.forward`."""
        moving = self.moving(gradient, state)
        h, after = run_layers(self.layers(), self.preprocess(gradient), state, moving)
        return torch.where(moving, self.output_scale * self.readout(h.t())[:, 0], 0.0), after

    def moving(self, gradient: Tensor, state: Tensor) -> Tensor:
        """Which coordinates move in an inner step: `[num_coordinates]`, bool.

        A cell is 0 until its first step, and no LSTM leaves all of them at 0.
        """
        if not self.wait_for_gradient:
            return torch.ones_like(gradient, dtype=torch.bool)
        cells = torch.unflatten(state.detach(), 0, (self.num_layers, 2, self.hidden_size))[:, 1]
        return (gradient != 0) | (cells.abs().sum((0, 1)) != 0)  # any() takes four times as long

    def fused(self, library: Any, *, back: bool = False) -> FusedLSTM:
        """The compiled kernel with this rule's weights as they are now; `back` for the backward pass too."""
        weights = [weight for layer in self.layers() for weight in layer]
        weights += [self.readout.weight, self.readout.bias]
        numbers: dict[str, float] = {"waits": self.wait_for_gradient}
        if self.preprocessing == "log_and_sign":
            numbers["p"] = self.p
        rule = FusedRule.of(self.preprocessing, self.hidden_size, self.num_layers, self.output_scale, **numbers)
        return FusedLSTM(library, rule, weights, back=back)

    @torch.no_grad()
    def step_(self, gradient: Tensor, state: Tensor) -> Tensor:
        """See `UpdateRule.step_`; compiled where it can be."""
        library = fused_for(self.readout.weight, gradient, state)
        if library and state.stride(1) == 1:
            return self.fused(library).step_(gradient.contiguous(), state)
        packed = pack(self.shape, self.layers(), (self.readout.weight, self.readout.bias), self.output_scale)
        update = torch.empty_like(gradient)
        for part in blocks(len(gradient), block_size(gradient)):
            x, moving = self.preprocess(gradient[part]), self.moving(gradient[part], state[:, part])
            update[part] = step_in_place(self.shape, packed, x, state[:, part], moving)
        return update

    def unroller(
        self,
        num_coordinates: int,
        num_steps: int,
        *,
        memory: Memory = "auto",
        budget: int = 2**30,
        block: int | None = None,
    ) -> RuleUnroll:
        """See `UpdateRule.unroller`; the backward pass is written by hand.

        Compiled it computes activations again tile by tile in the cache, whatever `memory` says: that is no slower
        than to keep them.
        """
        library = fused_for(self.readout.weight)
        if library:
            return FusedUnroll(lambda: self.fused(library, back=True), self.init_state(num_coordinates), num_steps)
        if memory == "auto":
            kept = num_coordinates * self.shape.floats_kept(num_steps) * self.readout.weight.element_size()
            memory = "fast" if kept <= budget else "flat"
        return _LSTMUnroll(self, num_coordinates, num_steps, flat=memory == "flat", block=block)


class _LSTMUnroll(RuleUnroll):
    """`lstm_kernel` over blocks of coordinates.

    Flat: nothing is kept of an inner step; the backward pass has the buffers of one block at a time.
    """

    def __init__(
        self, rule: CoordinatewiseLSTM, num_coordinates: int, num_steps: int, *, flat: bool, block: int | None
    ) -> None:
        like = rule.readout.weight.detach()
        self.rule, self.flat, self.num_steps, self.shape, self.like = rule, flat, num_steps, rule.shape, like
        self.parts = list(blocks(num_coordinates, block or block_size(like)))
        self.update = like.new_empty(1, num_coordinates)
        self.moving = torch.empty_like(self.update[0], dtype=torch.bool)
        self.updates = [self.update[:, part] for part in self.parts]
        self.scratch: dict[int, Scratch] = {}
        self.shared: dict[int, Block] = {}
        if flat:
            self.first = rule.init_state(num_coordinates, device=like.device, dtype=like.dtype)
        else:
            self.kept = [self._block(part.stop - part.start) for part in self.parts]

    def _block(self, size: int) -> Block:
        if size not in self.scratch:
            self.scratch[size] = Scratch(self.shape, size, like=self.like)
        return Block(self.shape, size, self.num_steps, self.scratch[size], like=self.like)

    def _shared(self, size: int) -> Block:
        if size not in self.shared:
            self.shared[size] = self._block(size)
        return self.shared[size]

    def _moved(self, state: Tensor) -> Tensor:
        """Coordinates that move without a gradient, too."""
        return self.rule.moving(torch.zeros_like(state[0]), state)

    @torch.no_grad()
    def begin(self, state: Tensor, seen: Seen | None = None) -> None:
        rule = self.rule
        self.weights = pack(self.shape, rule.layers(), (rule.readout.weight, rule.readout.bias), rule.output_scale)
        self.count = 0
        for part in self.parts:
            self.moving[part] = self._moved(state[:, part])
        if self.flat:
            self.first.copy_(state)
            return
        for part, block in zip(self.parts, self.kept, strict=True):
            block.load(state[:, part])

    @torch.no_grad()
    def step(self, gradient: Tensor, state: Tensor, seen: Seen | None = None) -> Tensor:
        x = self.rule.preprocess(gradient)
        self.moving |= gradient != 0
        if self.flat:
            for part, update in zip(self.parts, self.updates, strict=True):
                update[0] = step_in_place(self.shape, self.weights, x[:, part], state[:, part], self.moving[part])
        else:
            for part, update, block in zip(self.parts, self.updates, self.kept, strict=True):
                block.forward(self.count, x[:, part], self.moving[part], self.weights, update)
        self.count += 1
        if not self.flat and self.count == self.num_steps:
            for part, block in zip(self.parts, self.kept, strict=True):
                block.store(self.count, state[:, part])
        return self.update[0]

    @torch.no_grad()
    def gradients(self, gradients: Tensor, weights: Sequence[float], beside: Tensor | None = None) -> list[Tensor]:
        check_count(self.count, self.num_steps)
        total = self.shape.zero_gradients(self.like)
        for index, part in enumerate(self.parts):
            if self.flat:
                block = self._shared(part.stop - part.start)
                block.load(self.first[:, part])
                moving = self._moved(self.first[:, part])
                for step, gradient in enumerate(gradients[:-1, part]):
                    moving |= gradient != 0
                    block.forward(step, self.rule.preprocess(gradient), moving, self.weights, None)
            else:
                block = self.kept[index]
            of_updates = cotangents(gradients[:, part], weights, None if beside is None else beside[:, part])
            block.backward(of_updates, self.weights, total)
        layers, readout = unpack_gradients(self.shape, total, self.rule.output_scale)
        return [*(gradient for layer in layers for gradient in layer), *readout]
