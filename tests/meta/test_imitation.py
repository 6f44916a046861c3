import math
from functools import partial

import pytest
import torch

from lightning_l2l import (
    MLP,
    EvolutionStrategies,
    FirstOrder,
    Imitation,
    NetworkTask,
    NormalizedMLP,
    Quadratic,
    UpdateRule,
)
from lightning_l2l.evaluation.apart import MuonAndAdamW
from lightning_l2l.meta.hyperparameters import as_of_now, describe_imitation
from lightning_l2l.meta.imitation import Lessons
from lightning_l2l.meta.unroll import Unroll


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weight": -1.0}, "imitation weight=-1.0 is not 0 or more; use 0 for none"),
        ({"weight": float("nan")}, "imitation weight=nan is not 0 or more"),
        ({"weight": 1.0, "epochs": 0}, "epochs=0 is not an integer of 1 or more"),
        ({"weight": 1.0, "teacher": "adam"}, "teacher='adam' cannot be called; give a class, such as torch.optim.Adam"),
        ({"weight": 1.0, "schedule": 3}, "schedule=3 cannot be called"),
        (
            {"weight": 1.0, "schedule": torch.optim.lr_scheduler.LinearLR, "cosine": True},
            "two schedules for one teacher",
        ),
        ({"weight": 1.0, "cosine": 1}, "cosine=1"),
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
        "cosine": False,
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


SHAPES = [torch.Size(shape) for shape in ((4, 3), (4,), (2, 3, 2, 2))]


def gradients(num_steps, num_tasks=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(num_steps, num_tasks, sum(math.prod(shape) for shape in SHAPES), generator=g)


@pytest.mark.parametrize("teacher", [MuonAndAdamW, torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
@pytest.mark.parametrize("cosine", [True, False])
def test_a_teacher_teaches_what_it_would_do_to_each_model(teacher, cosine):
    if teacher is MuonAndAdamW and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    given, num_steps = gradients(5), 5
    lessons = Lessons(Imitation(1.0, partial(teacher, lr=0.1), cosine=cosine), 1.0, given[0], SHAPES, num_steps)
    taught = [lessons.taught(gradient).clone() for gradient in given]
    for k in range(3):
        params = [torch.zeros(shape, requires_grad=True) for shape in SHAPES]
        optimizer = teacher(params, lr=0.1)
        for t, gradient in enumerate(given):
            for group in optimizer.param_groups:
                group["lr"] = 0.1 * ((1 + math.cos(math.pi * t / num_steps)) / 2 if cosine else 1)
            before = torch.cat([p.detach().flatten() for p in params])
            parts = torch.split(gradient[k], [p.numel() for p in params])
            for p, own in zip(params, parts, strict=True):
                p.grad = own.view(p.shape).clone()
            optimizer.step()
            after = torch.cat([p.detach().flatten() for p in params])
            torch.testing.assert_close(taught[t][k], after - before, rtol=1e-4, atol=1e-6)


def test_a_teacher_with_a_cosine_has_to_know_the_number_of_steps():
    with pytest.raises(ValueError, match="has to know num_steps"):
        Lessons(Imitation(1.0, partial(torch.optim.SGD, lr=0.1), cosine=True), 1.0, gradients(1)[0], SHAPES, None)


class Descent(UpdateRule):
    """Gradient descent with a learning rate that is learned."""

    state_size = 0

    def __init__(self):
        super().__init__()
        self.lr = torch.nn.Parameter(torch.tensor(0.02))

    def forward(self, gradient, state):
        return -self.lr * gradient, state


def test_evolution_strategies_have_the_gradient_of_the_loss_of_an_imitation():
    """Of one step, over 400 pairs: there it is 2 (lr - 0.1) / 0.01, whatever the gradients."""
    g = torch.Generator().manual_seed(0)
    batch = {"W": torch.randn(400, 3, 3, generator=g), "y": torch.randn(400, 3, generator=g), "seed": torch.arange(400)}
    rule = Descent()
    for estimator in (FirstOrder(), EvolutionStrategies(std=0.003)):
        unroll = Unroll(Quadratic(3), rule, estimator, Imitation(3.0, partial(torch.optim.SGD, lr=0.1)))
        rule.zero_grad()
        truncation = unroll.run(unroll.start(batch), 1, [0.0])
        truncation.meta_loss.backward()
        assert float(truncation.imitation_loss) == pytest.approx(0.64, rel=0.01)  # (0.02 - 0.1)^2 / 0.1^2
        assert float(rule.lr.grad) == pytest.approx(3 * -16, rel=1e-4 if isinstance(estimator, FirstOrder) else 0.25)


@pytest.mark.parametrize("estimator", [FirstOrder, partial(EvolutionStrategies, std=0.03)])
def test_a_rule_that_sees_tensors_learns_from_muon(estimator):
    """By imitation alone: how far NormalizedMLP, four times as large at first, misses Muon with a cosine."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    rule = NormalizedMLP(hidden_size=0, sizing=0, warmup=0, step_size=0.04)
    teacher = Imitation(1.0, partial(MuonAndAdamW, lr=0.05), cosine=True)  # of matrices, 0.2 x lr
    unroll = Unroll(NetworkTask(MLP(5, 8, out_features=3)), rule, estimator(), teacher)
    optimizer, missed = torch.optim.Adam(rule.parameters(), lr=0.05), []
    g = torch.Generator().manual_seed(0)
    for k in range(14):
        inputs, targets = torch.randn(4, 11, 8, 5, generator=g), torch.randint(0, 3, (4, 11, 8), generator=g)
        episode = unroll.start({"inputs": inputs, "targets": targets, "seed": torch.arange(4) + 4 * k}, 0, 10)
        optimizer.zero_grad()
        truncation = unroll.run(episode, 10, [0.0] * 10)
        truncation.meta_loss.backward()
        optimizer.step()
        missed.append(float(truncation.imitation_loss))
    assert sum(missed[-3:]) < 0.8 * sum(missed[:3])
