from functools import partial

import pytest
import torch

from lightning_l2l import Imitation
from lightning_l2l.meta.hyperparameters import as_of_now, describe_imitation


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": -1.0}, "imitation weight=-1.0 is not 0 or more; use 0 for none"),
        ({"weight": float("nan")}, "imitation weight=nan is not 0 or more"),
        ({"weight": 1.0, "epochs": 0}, "epochs=0 is not an integer of 1 or more"),
        ({"weight": 1.0, "teacher": "adam"}, "teacher='adam' cannot be called; give a class, such as torch.optim.Adam"),
        ({"weight": 1.0, "schedule": 3}, "schedule=3 cannot be called"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Imitation(**arguments)


def test_the_weight_falls_evenly_over_its_epochs():
    assert [Imitation(3.0).weight_at(epoch) for epoch in (0, 9)] == [3.0, 3.0]
    assert [Imitation(3.0, epochs=3).weight_at(epoch) for epoch in range(5)] == pytest.approx([3.0, 2.0, 1.0, 0.0, 0.0])


def test_a_checkpoint_says_whom_it_imitates_where_that_can_be_said():
    falling = partial(torch.optim.lr_scheduler.LinearLR, end_factor=0.1, total_iters=9)
    said = describe_imitation(Imitation(2.0, partial(torch.optim.SGD, lr=0.1), falling, 4))
    assert said == {
        "weight": 2.0,
        "teacher": {"class_path": "torch.optim.sgd.SGD", "init_args": {"lr": 0.1}},
        "schedule": {
            "class_path": "torch.optim.lr_scheduler.LinearLR",
            "init_args": {"end_factor": 0.1, "total_iters": 9},
        },
        "epochs": 4,
    }
    assert describe_imitation(Imitation(2.0, lambda params: torch.optim.SGD(params, lr=0.1))) is None


def test_hyperparameters_of_before_are_read_as_those_of_now():
    of_before = {"num_steps": 6, "second_derivatives": False, "memory": "flat", "memory_budget": 7, "imitation": 0.0}
    assert as_of_now({**of_before, "imitation_epochs": None}) == {
        "num_steps": 6,
        "meta_gradient": {
            "class_path": "lightning_l2l.meta.first_order.FirstOrder",
            "init_args": {"memory": "flat", "memory_budget": 7, "block": None},
        },
        "imitation": None,
    }
    with pytest.raises(ValueError, match=r"imitates a teacher \(imitation=2.0\), but does not say whom"):
        as_of_now({**of_before, "imitation": 2.0})
    of_now = {"num_steps": 6, "imitation": {"weight": 1.0}}
    assert as_of_now(of_now) == of_now
