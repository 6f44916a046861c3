"""What a network is made of: where its tensors are, how it begins anew, and which layers want other treatment."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd


def tensor_slots(module: nn.Module, names: Sequence[str]) -> list[tuple[dict[str, Any], str, int]]:
    """Every place where the module keeps a parameter or buffer: (dictionary, key, index into names).

    A tied parameter has several places and one name.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    index = {id(tensors[name]): number for number, name in enumerate(names)}
    owners: list[dict[str, Any]] = []
    for submodule in module.modules():
        owners += [submodule._parameters, submodule._buffers]
    return [(owner, key, index[id(value)]) for owner in owners for key, value in owner.items() if value is not None]


def reset_parameters(module: nn.Module) -> None:
    """Run the initialisers of the module and all below it, in the order of their construction."""
    for child in module.children():
        reset_parameters(child)
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        return  # frozen, hence kept with its statistics
    reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
    if reset is not None:
        reset()


def check_reset(module: nn.Module) -> None:
    """Reset a module, and refuse it where a parameter depends on what was there before.

    Raises:
        ValueError: If one does.
    """
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():
            value.fill_(math.nan)
    reset_parameters(module)
    for name, value in module.named_parameters():
        if name in trained and bool(value.isnan().any()):
            path, _, _ = name.rpartition(".")
            owner = module.get_submodule(path)
            raise ValueError(
                f"parameter {name!r} of {type(owner).__name__} cannot be initialised anew: no "
                "reset_parameters sets it; give init_scale=..., or pass a callable that builds the module"
            )


def has_random_layers(module: nn.Module) -> bool:
    """Whether there is one of torch's own layers that draw random numbers."""
    for layer in module.modules():
        if isinstance(layer, _DropoutNd) and layer.p > 0:
            return True
        if isinstance(layer, nn.MultiheadAttention | nn.RNNBase) and layer.dropout > 0:
            return True
        if isinstance(layer, nn.RReLU | nn.FractionalMaxPool2d | nn.FractionalMaxPool3d):
            return True
    return False


def takes_vmap(module: nn.Module) -> bool:
    """Whether copies can run side by side, by ``torch.func.vmap``."""
    for layer in module.modules():
        if isinstance(layer, nn.RNNBase):
            return False  # vmap has no rule for their kernels
        if isinstance(layer, _BatchNorm) and layer.momentum is None and layer.track_running_stats:
            return False  # a cumulative average: forward reads the number of batches as a Python number
    return True


def has_convolutions(module: nn.Module) -> bool:
    """Whether there is a convolution, of which copies side by side are slow on a CPU."""
    return any(isinstance(layer, _ConvNd) for layer in module.modules())
