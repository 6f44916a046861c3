"""What is found out about a network; what a task makes of it is in test_network.py."""

import pytest
import torch
from torch import nn

from lightning_l2l.tasks.modules import (
    check_reset,
    has_convolutions,
    has_random_layers,
    reset_parameters,
    takes_vmap,
    tensor_slots,
)


def filled(module):
    """All trained parameters are 7."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(7)
    return module


def test_slots_are_all_places_of_a_tensor():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2, affine=False))
    module[1].weight = module[0].weight
    names = ["2.running_var", "0.bias", "0.weight", "2.running_mean", "2.num_batches_tracked"]
    slots = tensor_slots(module, names)
    assert sorted(index for _, _, index in slots) == [0, 1, 2, 2, 3, 4]  # the tied weight has two places
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    assert all(owner[key] is tensors[names[index]] for owner, key, index in slots)
    for owner, key, index in slots:
        owner[key] = torch.full((2, 2), float(index))
    assert [module[k].weight[0, 0].item() for k in (0, 1)] == [2, 2]
    assert (module[2].running_var[0, 0], module[0].bias[0, 0]) == (0, 1)


class Noting(nn.Module):
    def __init__(self, name, notes, *children):
        super().__init__()
        self.name, self.notes, self.below = name, notes, nn.ModuleList(children)
        self.weight = nn.Parameter(torch.zeros(1))

    def reset_parameters(self):
        self.notes.append(self.name)


def test_children_are_reset_first_in_their_order():
    notes = []
    reset_parameters(Noting("a", notes, Noting("b", notes, Noting("c", notes)), Noting("d", notes)))
    assert notes == ["c", "b", "d", "a"]


@pytest.mark.parametrize("build", [lambda: nn.Linear(3, 2), lambda: nn.MultiheadAttention(4, 2)])  # _reset_parameters
def test_a_reset_is_what_the_constructor_does(build):
    module = filled(build())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        wanted = build().state_dict()
        torch.manual_seed(3)
        reset_parameters(module)
    assert all(torch.equal(value, wanted[name]) for name, value in module.state_dict().items())


def test_what_is_frozen_is_not_reset_but_buffers_of_what_is_without_parameters_are():
    module = filled(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2, affine=False)))
    module[0].requires_grad_(False)
    for layer in module:
        layer.running_mean.fill_(7)
    reset_parameters(module)
    assert [layer.running_mean[0].item() for layer in module] == [7, 0, 0]
    assert [layer.weight[0].item() for layer in module[:2]] == [7, 1]


def test_a_parameter_that_no_reset_sets_is_named_and_a_frozen_one_may_be():
    module = nn.Sequential(nn.Linear(2, 2), Noting("a", [], nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"parameter '1\.weight' of Noting cannot be initialised anew: .* init_scale="):
        check_reset(module)
    module[1].weight.requires_grad_(False).fill_(7)
    check_reset(module)
    assert module[1].weight.item() == 7
    assert all(value.isfinite().all() for value in module.parameters())


@pytest.mark.parametrize(
    ("layer", "random"),
    [
        (nn.Dropout(0.0), False), (nn.Dropout2d(0.1), True), (nn.RReLU(), True), (nn.ReLU(), False),
        (nn.LSTM(4, 4, 2, dropout=0.1), True), (nn.LSTM(4, 4), False), (nn.FractionalMaxPool2d(2, 3), True),
        (nn.MultiheadAttention(4, 2, 0.1), True),
    ],
)  # fmt: skip
def test_random_layers_are_found(layer, random):
    assert has_random_layers(nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))) is random


@pytest.mark.parametrize(
    ("layer", "side_by_side"),
    [
        (nn.GRU(4, 4), False), (nn.BatchNorm1d(4, momentum=None), False), (nn.BatchNorm1d(4), True),
        (nn.BatchNorm1d(4, momentum=None, track_running_stats=False), True), (nn.Conv1d(4, 4, 1), True),
    ],
)  # fmt: skip
def test_layers_that_cannot_run_side_by_side_are_found(layer, side_by_side):
    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(layer))
    assert takes_vmap(module) is side_by_side
    assert has_convolutions(module) is isinstance(layer, nn.Conv1d)
