"""Optimizers that look at whole tensors: tasks that lie side by side go as each does alone."""

import sys

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_l2l.evaluation.apart import COORDINATEWISE, Apart, MuonAndAdamW
from lightning_l2l.evaluation.baselines import BASELINES, MORE, Baseline, find_baselines, tune
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.tasks import MLP, ConvNet, NetworkTask
from optimizers import gradients, parameters

CPU, NUM_STEPS, NUM_TASKS = torch.device("cpu"), 8, 3
TASK = NetworkTask(MLP(5, 4, out_features=3))


class Shared(Optimizer):
    """Divides by the norm of all gradients together."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        params = self.param_groups[0]["params"]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        for p in params:
            p.sub_(self.param_groups[0]["lr"] * p.grad / norm)


NAMED = [*MORE, Baseline("shared", Shared)]


def batch(num_tasks=NUM_TASKS, side=None):
    g = torch.Generator().manual_seed(2)
    features = (5,) if side is None else (3, side, side)
    inputs = torch.randn(num_tasks, NUM_STEPS + 1, 8, *features, generator=g)
    targets = torch.randint(0, 3, (num_tasks, NUM_STEPS + 1, 8), generator=g, dtype=torch.uint8)
    return {"inputs": inputs, "targets": targets, "seed": torch.arange(num_tasks)}


@pytest.mark.parametrize("baseline", NAMED, ids=lambda baseline: baseline.name)
@pytest.mark.parametrize("net", ["mlp", "convolutions"])
def test_tasks_share_nothing(baseline, net):
    task, given = TASK, batch()
    if net == "convolutions":
        module = ConvNet(image_size=4, channels=2, num_convs=1, hidden_size=3, out_features=3, batch_norm=False)
        task, given = NetworkTask(module), batch(side=4)
    make = baseline.at(0.03, NUM_STEPS)
    together = rollout(make, task, given, NUM_STEPS, CPU).losses
    assert bool((together[-1] != together[0]).all())
    for k in range(NUM_TASKS):
        alone = rollout(make, task, {name: one[k : k + 1] for name, one in given.items()}, NUM_STEPS, CPU).losses
        torch.testing.assert_close(together[:, k], alone[:, 0], rtol=1e-4, atol=1e-5)


def test_side_by_side_they_would_share_much():
    given = batch()
    apart, shared = (
        rollout(Baseline("shared", Shared, apart=apart).at(0.1), TASK, given, NUM_STEPS, CPU).losses
        for apart in (None, False)
    )
    assert not torch.allclose(apart[-1], shared[-1], rtol=1e-3)


def test_those_of_pytorch_that_are_coordinatewise_go_the_same_way_apart():
    for optimizer in COORDINATEWISE:
        a, b = (
            rollout(Baseline("own", optimizer, apart=apart).at(0.01), TASK, batch(), 4, CPU).losses
            for apart in (True, None)
        )
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_muon_is_torchs_for_matrices_and_adamw_for_the_rest():
    shapes = [(4, 3), (4,), (2, 3, 2, 2)]
    params, others = parameters(shapes=shapes), parameters(shapes=shapes)
    flat = nn.Parameter(others[2].detach().view(2, -1))
    muon = torch.optim.Muon([others[0], flat], lr=0.02, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([others[1]], lr=0.02, weight_decay=0.0)
    optimizer = MuonAndAdamW(params, lr=0.02)
    for step in gradients(params, 3):
        for p, other, gradient in zip(params, others, step, strict=True):
            p.grad, other.grad = gradient.clone(), gradient.clone()
        flat.grad = others[2].grad.view(2, -1)
        for one in (optimizer, muon, adamw):
            one.step()
    wanted = [others[0], others[1], flat.view(2, 3, 2, 2)]
    for p, other in zip(params, wanted, strict=True):
        torch.testing.assert_close(p, other, rtol=0, atol=0)


def test_a_decay_ends_at_the_last_step_and_needs_their_number():
    for decay, half in (("cosine", 0.5), ("linear", 0.5)):
        rates = []

        def noting(params, lr, rates=rates):
            optimizer = torch.optim.SGD(params, lr=lr)
            optimizer.register_step_pre_hook(lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
            return optimizer

        baseline = Baseline("noting", noting, decay=decay, apart=False)
        rollout(baseline.at(0.1, NUM_STEPS), TASK, batch(), NUM_STEPS, CPU)
        assert rates[0] == 0.1 and rates[NUM_STEPS // 2] == pytest.approx(0.1 * half) and 0 < rates[-1] < 0.02
    with pytest.raises(ValueError, match="decay=cosine; give num_steps"):
        Baseline("own", torch.optim.SGD, decay="cosine").at(0.1)
    with pytest.raises(ValueError, match="and a schedule; leave one out"):
        Baseline("own", torch.optim.SGD, decay="cosine", schedule=lambda optimizer: None)
    with pytest.raises(ValueError, match="decay='step' is unknown"):
        Baseline("own", torch.optim.SGD, decay="step")


def test_a_cosine_is_tuned_with_each_rate_as_a_whole_run():
    (cosine,) = find_baselines(["adamw_cosine"])
    tuned = tune(cosine, TASK, [batch()], NUM_STEPS, CPU, max_widenings=0)
    for lr, loss in tuned.tried.items():
        run = rollout(cosine.at(lr, NUM_STEPS), TASK, batch(), NUM_STEPS, CPU)
        assert float(run.losses[-1].mean()) == pytest.approx(loss)


def test_what_schedulefree_is_judged_by_is_its_average():
    """Its losses are those of the parameters that one would keep, not those at which gradients are taken."""
    (free,) = find_baselines(["schedulefree"])
    kept = []

    def make(named):
        optimizer = free.at(0.1)(named)
        kept.append((optimizer, [p for _, p in named]))
        return optimizer

    given = batch()
    found = rollout(make, TASK, given, NUM_STEPS, CPU)
    ((optimizer, leaves),) = kept
    assert isinstance(optimizer, Apart)
    names = list(dict(MLP(5, 4, out_features=3).named_parameters()))
    last = TASK.loss(dict(zip(names, leaves, strict=True)), given, NUM_STEPS).detach()  # left as they are to be used
    torch.testing.assert_close(found.losses[-1], last)
    optimizer.mode(training=True)
    assert not torch.allclose(TASK.loss(dict(zip(names, leaves, strict=True)), given, NUM_STEPS), last)


@pytest.mark.parametrize("name", ["prodigy", "schedulefree"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    for package in ("prodigyopt", "schedulefree"):
        monkeypatch.setitem(sys.modules, package, None)
    (baseline,) = find_baselines([name])
    with pytest.raises(ValueError, match=r"pip install 'lightning_l2l\[baselines\]'"):
        rollout(baseline.at(1.0, NUM_STEPS), TASK, batch(), NUM_STEPS, CPU)


def test_those_by_name_are_not_among_the_defaults():
    assert not {b.name for b in MORE} & {b.name for b in BASELINES}
