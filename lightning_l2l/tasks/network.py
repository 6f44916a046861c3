"""Training a neural network, any ``nn.Module``, on minibatches."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_l2l.arguments import brief, check_callable, check_flag, check_type, is_number
from lightning_l2l.tasks.base import Task, mix_seed
from lightning_l2l.tasks.batches import check_fit, check_minibatches, get_entries
from lightning_l2l.tasks.modules import (
    check_reset,
    has_convolutions,
    has_random_layers,
    reset_parameters,
    takes_vmap,
    tensor_slots,
)
from lightning_l2l.tasks.seeding import global_rng, seeded

_UNSEEN_STREAM = 1 << 32  # of random numbers; those below are the start's, 0, and the steps', 1 + step
_LABELS = (torch.int64, torch.int32, torch.int16, torch.int8)  # uint8 labels have become int64


class NetworkTask(Task):
    """Minimise a network's minibatch loss: f_k(theta_k) at step t is the loss on minibatch t of task k.

    The copies of the network, one per task, are evaluated side by side by ``torch.func.vmap`` (one after the
    other if it has a layer that does not allow that, such as a recurrent one, or, on a CPU, a convolution, with which
    that is faster). The module is used as it is
    and never changed. It runs in training mode: batch norm normalises with the minibatch, and each copy has
    running statistics of its own, among the buffers. Tied parameters stay tied. Parameters that do not
    require a gradient are not trained: they keep the module's values, as buffers.

    Args:
        module: The network, or a callable without arguments that builds one.
        loss_fn: Maps (output, target) to a scalar; a function or a module.
        init_scale: Standard deviation of the i.i.d. Gaussian from which every parameter starts, positive.
            ``None`` starts each copy the way the network does by itself: a callable is called anew; in a
            module the ``reset_parameters`` or ``_reset_parameters`` methods are run anew, children first.
        stochastic: Whether a forward pass draws random numbers; ``None`` looks for torch's own random layers.
            Say ``True`` for a module that calls a random function itself. The noise is a function of the
            first task's seed and of the step: repeatable, different for each copy, and dependent on which
            tasks share a batch.
        reconstruct: Whether the target of an input is the input itself, whatever targets the batch has; for an
            `Autoencoder`.

    Raises:
        ValueError: If ``init_scale`` is not positive, ``reconstruct`` goes with cross entropy, or if the module has
            nothing to train, has uninitialised (lazy) parameters, or has parameters that no method of it initialises
            anew.
        TypeError: If an argument is of another type.

    Example:
        >>> task = NetworkTask(nn.Linear(3, 2))
        >>> params = task.init_params(4, torch.Generator().manual_seed(0))
        >>> params["weight"].shape
        torch.Size([4, 2, 3])
        >>> batch = {"inputs": torch.zeros(4, 11, 8, 3), "targets": torch.zeros(4, 11, 8, dtype=torch.uint8)}
        >>> task.loss(params, batch, step=10).shape
        torch.Size([4])
    """

    def __init__(
        self,
        module: nn.Module | Callable[[], nn.Module],
        loss_fn: nn.Module | Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy,
        init_scale: float | None = None,
        stochastic: bool | None = None,
        reconstruct: bool = False,
    ) -> None:
        check_callable("an nn.Module, or a function that builds one", module=module)
        check_callable("a function of (output, target), such as torch.nn.functional.cross_entropy", loss_fn=loss_fn)
        if stochastic is not None:
            check_flag(stochastic=stochastic)
        check_flag(reconstruct=reconstruct)
        if reconstruct and loss_fn is nn.functional.cross_entropy:
            raise ValueError(
                "reconstruct=True has inputs in place of classes as targets, of which cross_entropy is no loss; give "
                "loss_fn=torch.nn.functional.mse_loss"
            )
        if init_scale is not None and not (is_number(init_scale) and init_scale > 0):
            raise ValueError(f"init_scale={brief(init_scale)} must be positive, or None for the module's own start")
        self.module = module
        self.loss_fn = loss_fn
        self.init_scale = init_scale
        self.stochastic = stochastic
        self.reconstruct = reconstruct
        self._of_targets = "inputs" if reconstruct else "targets"  # entry of a batch

        # A private copy. Its own values do not matter: it runs with the optimizee's tensors in their place.
        with global_rng(torch.Generator()), torch.device("cpu"):
            built = module if isinstance(module, nn.Module) else module()
            check_type(nn.Module, "an nn.Module, or a function without arguments that builds one", module=built)
            template = copy.deepcopy(built).cpu().train()
            named = dict(template.named_parameters())
            frozen = {name: value.detach().clone() for name, value in named.items() if not value.requires_grad}
            self._names = [name for name in named if name not in frozen]
            if not self._names or any(is_lazy(value) for value in named.values()):
                problem = "uninitialised (lazy) parameters" if self._names else "no parameters to train"
                raise ValueError(f"{type(template).__name__} has {problem}; give a network ready for training")
            if isinstance(module, nn.Module) and init_scale is None:
                check_reset(template)  # also resets the buffers, so that copies start with fresh statistics
        self._template = template
        self._buffers = frozen | {name: buffer.clone() for name, buffer in template.named_buffers()}
        self._slots = tensor_slots(template, [*self._names, *self._buffers])
        self._random = has_random_layers(template) if stochastic is None else stochastic
        self._one_by_one = not takes_vmap(template)
        self._has_convolutions = has_convolutions(template)

    def init_params(self, num_tasks: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Draw the parameters ``[num_tasks, ...]``, one copy after the other.

        With ``init_scale=None`` the generator takes the place of torch's global one while a copy initialises
        itself, so the first copy is what the constructor gives after ``torch.manual_seed``.
        """
        copies = [self._init_copy(generator) for _ in range(num_tasks)]
        return {name: torch.stack([params[name] for params in copies]) for name in self._names}

    def init_buffers(self, num_tasks: int) -> dict[str, Tensor]:
        """The module's buffers and its frozen parameters, ``[num_tasks, ...]``."""
        return {name: value.expand(num_tasks, *value.shape).clone() for name, value in self._buffers.items()}

    def loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        """Evaluate each copy on its minibatch ``step``.

        Args:
            params: Parameters ``[num_tasks, ...]``, with or without the buffers; see ``Task.loss``.
            batch: ``inputs`` ``[num_tasks, num_steps + 1, n, ...]``, ``targets``
                ``[num_tasks, num_steps + 1, n]`` and, for a stochastic network, ``seed`` ``[num_tasks]``.
                Only minibatch ``step`` is brought to the parameters' device and floating type; there uint8
                inputs are divided by 255 and uint8 targets become int64.
            step: Number of the minibatch, from 0.

        Returns:
            The losses ``[num_tasks]``.

        Raises:
            ValueError: If the network is stochastic and the batch has no seed, or network and data do not fit.
        """
        try:
            return self._loss(params, batch, step)
        except Exception as error:
            inputs, targets = check_minibatches(batch, len(params[self._names[0]]), step, self._of_targets)
            check_fit(error, self._template, inputs, targets)
            raise

    def _loss(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor], step: int) -> Tensor:
        inputs = batch["inputs"].select(1, step)
        targets = inputs if self.reconstruct else batch["targets"].select(1, step)
        num_tasks, labels = len(inputs), targets.dtype == torch.uint8 and not self.reconstruct
        if not num_tasks == len(targets) == len(params[self._names[0]]):
            raise ValueError(f"inputs and targets of {num_tasks} and {len(targets)} tasks do not fit the parameters")
        tensors, inputs, targets = self._prepare(params, inputs, targets)
        with self._noise(batch, 1 + step, inputs.device):
            if num_tasks == 1:  # vmap would cost as much as a small network itself
                one = [tensor.squeeze(0) for tensor in tensors]
                return self._copy_loss(one, inputs.squeeze(0), targets.squeeze(0)).unsqueeze(0)
            # Side by side, convolutions become grouped ones, which take twice the time on a CPU.
            if self._one_by_one or (self._has_convolutions and inputs.is_cpu):
                return torch.stack([self._copy_loss(*copy) for copy in _copies(tensors, inputs, targets)])
            # "error": a random function that nobody told us about is refused, not left unrepeatable.
            randomness = "different" if self._random else "error"
            if labels and self.loss_fn is nn.functional.cross_entropy:
                outputs = torch.func.vmap(self._forward, randomness=randomness)(tensors, inputs)
                # vmap takes cross_entropy apart into a dozen operators; over all copies' rows it is one call.
                # No row can be ignore_index, since its label was a uint8: the mean is over all of them.
                rows = nn.functional.cross_entropy(outputs.flatten(0, 1), targets.flatten(0, 1), reduction="none")
                return rows.view(num_tasks, -1).mean(1)
            losses: Tensor = torch.func.vmap(self._copy_loss, randomness=randomness)(tensors, inputs, targets)
            return losses

    @torch.no_grad()
    def unseen(self, params: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluate each copy, in evaluation mode, on the examples that its task has set aside.

        Without dropout, that is, and with each copy's running statistics for batch norm, where the buffers are
        merged into ``params``.

        Args:
            params: Parameters ``[num_tasks, ...]``, with or without the buffers; neither is changed.
            batch: ``unseen_inputs`` ``[num_tasks, n, ...]`` and ``unseen_targets`` ``[num_tasks, n]``, treated
                as ``loss`` does ``inputs`` and ``targets``; and ``seed`` as there.

        Returns:
            ``"loss"``, ``[num_tasks]``, and, where targets ``[n, ...]`` are integers and outputs are
            ``[n, classes, ...]``, ``"accuracy"``, ``[num_tasks]``: the share of targets, in [0, 1], whose class has
            the largest output. Nothing where the batch has no unseen examples.

        Raises:
            ValueError: If the network is stochastic and the batch has no seed, or network and data do not fit.
        """
        of_targets = f"unseen_{self._of_targets}"
        if "unseen_inputs" not in batch or of_targets not in batch:
            return {}
        kept = {name: params[name].clone() for name in self._buffers if name in params}
        data = get_entries(batch, "unseen_inputs", of_targets)
        if not len(data[0]) == len(data[1]) == len(params[self._names[0]]):
            raise ValueError(f"'unseen_inputs' and {of_targets!r} are of {len(data[0])} and {len(data[1])} tasks")
        tensors, inputs, targets = self._prepare({**params, **kept}, *data)
        self._template.eval()
        try:
            with self._noise(batch, _UNSEEN_STREAM, inputs.device):
                # One after the other: in this mode some layers have kernels for which vmap has no rule.
                figures = [self._copy_figures(*copy) for copy in _copies(tensors, inputs, targets)]
        except Exception as error:
            check_fit(error, self._template, *data)
            raise
        finally:
            self._template.train()
        return {name: torch.stack([copy[name] for copy in figures]) for name in figures[0]}

    def _prepare(
        self, params: Mapping[str, Tensor], inputs: Tensor, targets: Tensor
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All tensors of the network, in the order of the slots' indices, and the data in the form it takes."""
        like = params[self._names[0]]
        if inputs.dtype == torch.uint8:
            inputs = inputs.to(like.device).to(like.dtype).div_(255)
        inputs = _match(inputs, like)
        labels = targets.dtype == torch.uint8
        if self.reconstruct:
            targets = inputs
        else:
            targets = targets.to(like.device, torch.int64) if labels else _match(targets, like)
        if not self._buffers.keys() <= params.keys():
            initial = {name: _match(value, like) for name, value in self.init_buffers(len(like)).items()}
            params = {**initial, **params}
        return [params[name] for name in (*self._names, *self._buffers)], inputs, targets

    def _noise(self, batch: Mapping[str, Tensor], stream: int, device: torch.device) -> AbstractContextManager[None]:
        """Where a stochastic network draws its random numbers: from a stream of the first task's seed."""
        if not self._random:
            return nullcontext()
        if "seed" not in batch:
            raise ValueError(
                "the network draws random numbers (dropout, for one) and the batch has no 'seed' [num_tasks] to "
                "draw them from; add it to the data, or remove the random layers"
            )
        return seeded(device, mix_seed(int(batch["seed"][0]), stream))

    def _copy_loss(self, tensors: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self.loss_fn(self._forward(tensors, inputs), targets)
        return loss

    def _copy_figures(self, tensors: Sequence[Tensor], inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        outputs = self._forward(tensors, inputs)
        figures = {"loss": self.loss_fn(outputs, targets)}
        classes = outputs.dim() == targets.dim() + 1 and outputs.shape[1] > 1
        if targets.dtype in _LABELS and classes and outputs[:, 0].shape == targets.shape:
            figures["accuracy"] = (outputs.argmax(1) == targets).to(outputs.dtype).mean()
        return figures

    def _forward(self, tensors: Sequence[Tensor], inputs: Tensor) -> Tensor:
        """Run one copy: ``torch.func.functional_call``, with the search for names done once and for all."""
        previous = [owner[name] for owner, name, _ in self._slots]
        try:
            for owner, name, index in self._slots:
                owner[name] = tensors[index]
            output: Tensor = self._template(inputs)
            for owner, name, index in self._slots:
                if owner[name] is not tensors[index]:  # a buffer that forward replaced: written back
                    tensors[index].copy_(owner[name].detach())
            return output
        finally:
            for (owner, name, _), tensor in zip(self._slots, previous, strict=True):
                owner[name] = tensor

    def _init_copy(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.init_scale is not None:
            named = dict(self._template.named_parameters())
            start = {name: torch.empty_like(named[name], requires_grad=False) for name in self._names}
            for value in start.values():
                value.normal_(0, self.init_scale, generator=generator)
            return start
        with global_rng(generator), torch.device("cpu"):
            if isinstance(self.module, nn.Module):
                reset_parameters(self._template)
                named = dict(self._template.named_parameters())
            else:
                named = dict(self.module().named_parameters())
        return {name: named[name].detach().clone() for name in self._names}


def _copies(tensors: Sequence[Tensor], *data: Tensor) -> Iterator[tuple[Any, ...]]:
    """Taken apart: for each copy its list of tensors and its part of each of ``data``."""
    return zip(zip(*[tensor.unbind(0) for tensor in tensors], strict=True), *data, strict=True)


def _match(tensor: Tensor, like: Tensor) -> Tensor:
    """Move to the device of ``like`` and, where it is floating-point, to its dtype."""
    return tensor.to(like.device, like.dtype if tensor.is_floating_point() else None)
