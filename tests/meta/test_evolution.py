import copy
import math

import pytest
import torch
from torch import nn

from commandline import TINY_FIT, mnist
from lightning_l2l import EvolutionStrategies, SecondOrder, UpdateRule, main
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules import CoordinatewiseLSTM, NormalizedMLP, RNNprop, RuleGroups
from lightning_l2l.rules.base import Seen
from lightning_l2l.tasks import MLP, NetworkTask, Quadratic
from lightning_l2l.tasks.minibatches import Minibatches, Pool


def stirred(rule, std=0.3):
    torch.manual_seed(0)
    for parameter in rule.parameters():
        nn.init.normal_(parameter, std=std)
    return rule


RULES = {
    "lstm": lambda: CoordinatewiseLSTM(hidden_size=3),
    "rnnprop": lambda: RNNprop(hidden_size=3),
    "mlp": lambda: NormalizedMLP(),
    "mlp-plain": lambda: NormalizedMLP(hidden_size=5, orthogonalize=False, normalize=False, step_size=0.02),
    "mlp-sizes": lambda: NormalizedMLP(inputs=["ratio", "columns", "theta"], sizing=3, orthogonalize=False),
    "sizes": lambda: NormalizedMLP(hidden_size=0, sizing=0),
    "mixing": lambda: NormalizedMLP(hidden_size=0, sizing=0, mixing=True),
}


@pytest.fixture(params=RULES)
def rule(request):
    return stirred(RULES[request.param]())


def quadratics(num_tasks, first=0, dim=3):
    seeds = torch.arange(first, first + num_tasks)
    made = [torch.randn(dim, dim + 1, generator=torch.Generator().manual_seed(1000 + int(seed))) for seed in seeds]
    drawn = torch.stack(made)
    return {"W": drawn[..., :dim].contiguous(), "y": drawn[..., dim].contiguous(), "seed": seeds}


def flat(rule):
    return torch.cat([p.grad.flatten() for p in rule.parameters()])


def meta_gradient(rule, estimator, batch, num_steps=6, unroll_length=3, task=None, log_loss=False):
    """Over a whole episode, without an outer step."""
    unroll = Unroll(task or Quadratic(3), rule, estimator, log_loss=log_loss)
    episode = unroll.start(batch, num_steps=num_steps)
    rule.zero_grad()
    truncations = [unroll.run(episode, unroll_length) for _ in range(num_steps // unroll_length)]
    for truncation in truncations:
        truncation.meta_loss.backward()
    return flat(rule), truncations


# ---- each task by meta-parameters of its own ----


@pytest.mark.parametrize("compiled", [True, False])
def test_each_task_goes_as_it_would_alone(rule, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr("lightning_l2l.rules.normalized.fused_for", lambda *like: None)
    shapes, num_tasks = [(4, 3), (4,), (2, 3, 2, 2), (9, 40)], 3
    size = sum(map(math.prod, shapes))
    rules = [copy.deepcopy(rule) for _ in range(num_tasks)]
    for k, one in enumerate(rules):
        for parameter in one.parameters():
            parameter.data += 0.1 * k * torch.randn_like(parameter)
    named = [dict(one.named_parameters()) for one in rules]
    weights = {name: torch.stack([one[name].detach() for one in named]) for name in named[0]}
    theta = torch.randn(num_tasks, size)
    alone = [theta[k : k + 1].clone() for k in range(num_tasks)]
    state = rule.init_states(num_tasks, shapes)
    states = [rule.init_states(1, shapes) for _ in rules]
    for step in range(4):
        gradient = torch.randn(num_tasks, size)
        seen = Seen(theta, shapes, step, 9)
        theta += rule.step_each_(weights, gradient.view(-1), state, seen).view_as(theta)
        for k, one in enumerate(rules):
            given = (Seen(alone[k], shapes, step, 9),) if isinstance(rule, NormalizedMLP) else ()
            alone[k] += one.step_(gradient[k], states[k], *given)
    torch.testing.assert_close(theta, torch.cat(alone), rtol=2e-5, atol=2e-5)


# ---- what is estimated ----


class HeavyBall(UpdateRule):
    """Two meta-parameters, and a meta-loss that is smooth in them."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.decay, self.log_lr = nn.Parameter(torch.tensor(0.6)), nn.Parameter(torch.tensor(-4.0))

    def forward(self, gradient, state):
        velocity = self.decay * state[0] + gradient
        return -self.log_lr.exp() * velocity, velocity.unsqueeze(0)


@pytest.mark.parametrize("lasts, log_loss", [("truncation", False), ("episode", False), ("truncation", True)])
def test_its_expectation_is_the_exact_gradient_over_the_whole_episode(lasts, log_loss):
    """Second order over all six steps at once; ES over three truncations of two.

    Means of 100 batches of 200 pairs, or of 8. Of a normal distribution, 4.5 standard errors are exceeded by 7 of a
    million; a bias of the smoothing is of the order of std^2 = 1e-4 of the gradient.
    """
    rule, differences, sizes = HeavyBall(), [], []
    for k in range(100):
        batch = quadratics(200, first=200 * k)
        if log_loss:  # a logarithm of each task's own loss, which is not what second order has of several tasks
            batch = quadratics(8, first=200 * k)
            alone = [{name: values[i : i + 1] for name, values in batch.items()} for i in range(8)]
            exact = torch.stack([meta_gradient(rule, SecondOrder(), one, 6, 6, log_loss=True)[0] for one in alone])
            exact = exact.mean(0)
        else:
            exact, _ = meta_gradient(rule, SecondOrder(), batch, 6, 6)
        found, _ = meta_gradient(rule, EvolutionStrategies(lasts=lasts, largest=None), batch, 6, 2, log_loss=log_loss)
        differences.append(found - exact)
        sizes.append(exact.abs())
    of_batches = torch.stack(differences)
    standard_error = of_batches.std(0) / math.sqrt(len(of_batches))
    assert (of_batches.mean(0).abs() < 4.5 * standard_error).all()
    assert (standard_error < 0.3 * torch.stack(sizes).mean(0)).all(), "the test could not tell"


def test_of_the_last_truncation_alone_it_has_the_part_of_the_first_perturbation():
    """What a truncated gradient leaves out: the last loss depends on the meta-parameters at the first step."""
    rule, found, exact = HeavyBall(), [], []
    for k in range(50):
        batch = quadratics(200, first=200 * k)
        _, truncations = meta_gradient(rule, EvolutionStrategies(largest=None), batch, 6, 2)
        rule.zero_grad()
        truncations[-1].meta_loss.backward()
        found.append(flat(rule))
        unroll = Unroll(Quadratic(3), rule, SecondOrder())
        rule.zero_grad()
        unroll.run(unroll.start(batch), 6, [0.0] * 4 + [1.0] * 2).meta_loss.backward()
        exact.append(flat(rule))
    difference = torch.stack(found) - torch.stack(exact)
    assert (difference.mean(0).abs() < 4.5 * difference.std(0) / math.sqrt(50)).all()


def test_the_sign_alone_has_the_direction():
    rule, batch = HeavyBall(), quadratics(400)
    value, _ = meta_gradient(rule, EvolutionStrategies(), batch, 6, 6)
    sign, _ = meta_gradient(rule, EvolutionStrategies(sign=True), batch, 6, 6)
    assert value[1] < 0 and sign[1] < 0  # a larger learning rate
    scaled = {**batch, "W": 100 * batch["W"], "y": 100 * batch["y"]}
    assert meta_gradient(rule, EvolutionStrategies(sign=True), scaled, 6, 6)[0].norm() < 10 * sign.norm()


def test_the_sign_counts_as_much_as_the_weights_of_its_truncation():
    rule, batch = HeavyBall(), quadratics(40)
    found = []
    for weights in ([1.0] * 3, [3.0, 0.0, 0.0], [0.5] * 3):
        unroll = Unroll(Quadratic(3), rule, EvolutionStrategies(sign=True))
        rule.zero_grad()
        unroll.run(unroll.start(batch), 3, weights).meta_loss.backward()
        found.append(flat(rule))
    torch.testing.assert_close(found[0], 2 * found[2])
    assert 0.2 < float(found[1].norm() / found[0].norm()) < 5


def test_a_difference_counts_as_its_bound_at_most():
    rule, batch = HeavyBall(), quadratics(200)
    free, _ = meta_gradient(rule, EvolutionStrategies(), batch, 6, 6)
    loose, _ = meta_gradient(rule, EvolutionStrategies(bound=1e6), batch, 6, 6)
    assert torch.equal(free, loose)
    tight, _ = meta_gradient(rule, EvolutionStrategies(bound=1e-9), batch, 6, 6)
    sign, _ = meta_gradient(rule, EvolutionStrategies(sign=True), batch, 6, 6)
    # every difference counts as the bound: 6 steps of weight 1 of it, in place of 2 std
    torch.testing.assert_close(tight / (6 * 1e-9), sign / (2 * 0.01), rtol=1e-3, atol=1e-3)


# ---- pairs ----


def test_tasks_of_two_processes_are_those_of_one(rule):
    whole, _ = meta_gradient(rule, EvolutionStrategies(), quadratics(6))
    halves = [meta_gradient(rule, EvolutionStrategies(), quadratics(3, first))[0] for first in (0, 3)]
    torch.testing.assert_close(torch.stack(halves).mean(0), whole, rtol=1e-3, atol=1e-3 * float(whole.abs().max()))


@pytest.mark.parametrize("lasts, repeats", [("truncation", False), ("episode", True)])
def test_perturbations_are_drawn_anew_as_long_as_they_last(lasts, repeats):
    rule = HeavyBall()
    unroll = Unroll(Quadratic(3), rule, EvolutionStrategies(lasts=lasts))
    episode = unroll.start(quadratics(5))
    totals = []
    for _ in range(2):
        unroll.run(episode, 3)
        totals.append(episode.beside.total.clone())
    assert torch.equal(*totals) == repeats
    assert len({tuple(row.tolist()) for row in totals[0]}) == 5  # each task its own
    again = unroll.start(quadratics(5))
    unroll.run(again, 3)
    assert torch.equal(again.beside.total, totals[0])


def test_a_pair_has_one_start_and_the_same_minibatches():
    g = torch.Generator().manual_seed(2)
    inputs = torch.randn(3, 7, 8, 5, generator=g)
    batch = {"inputs": inputs, "targets": torch.randint(0, 3, (3, 7, 8), generator=g), "seed": torch.arange(3)}
    rule = stirred(NormalizedMLP())
    unroll = Unroll(NetworkTask(MLP(5, 4, out_features=3)), rule, EvolutionStrategies(std=1e-12))
    episode = unroll.start(batch, num_steps=6)
    truncation = unroll.run(episode, 6)
    for part in episode.parts:
        torch.testing.assert_close(part.theta[:3], part.theta[3:])
        assert not torch.allclose(part.theta[0], part.theta[1])
    assert truncation.losses.shape == (6, 3)


def test_minibatches_that_are_cut_out_of_a_pool_are_those_of_a_tensor():
    g = torch.Generator().manual_seed(2)
    pool, order = Pool(torch.randn(40, 5, generator=g)), torch.randint(0, 40, (3, 7, 8), generator=g, dtype=torch.int32)
    rest = {"targets": torch.randint(0, 3, (3, 7, 8), generator=g), "seed": torch.arange(3)}
    rule, task = stirred(NormalizedMLP()), NetworkTask(MLP(5, 4, out_features=3))
    drawn = Minibatches(pool, order)
    found = [
        meta_gradient(rule, EvolutionStrategies(), {"inputs": inputs, **rest}, task=task)[0]
        for inputs in (drawn, drawn[:])
    ]
    assert torch.equal(*found)


def test_groups_of_rules_are_perturbed_together():
    lstm, other = CoordinatewiseLSTM(hidden_size=3), NormalizedMLP(hidden_size=3)
    rule = stirred(RuleGroups({"*weight": other, "!*weight": lstm}))
    g = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(3, 7, 8, 5, generator=g), torch.randint(0, 3, (3, 7, 8), generator=g)
    batch = {"inputs": inputs, "targets": targets, "seed": torch.arange(3)}
    task = NetworkTask(MLP(5, 4, out_features=3))
    found, _ = meta_gradient(rule, EvolutionStrategies(), batch, task=task)
    assert found.isfinite().all()
    assert all(p.grad.any() for p in rule.parameters())


# ---- particles that diverge ----


class Doubling(UpdateRule):
    """Diverges, to inf and nan, where its meta-parameter is above 0."""

    state_size = 0

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.0))

    def forward(self, gradient, state):
        return torch.where(self.gain > 0, 1e18 * gradient, -1e-3 * gradient), state


@pytest.mark.parametrize("log_loss", [False, True])
def test_a_particle_that_diverges_counts_as_its_bound(log_loss):
    rule = Doubling()
    found, (truncation,) = meta_gradient(rule, EvolutionStrategies(), quadratics(8), 6, 6, log_loss=log_loss)
    assert found.isfinite().all()
    assert float(found) > 0  # downhill is where it does not diverge
    assert truncation.meta_loss.isfinite()
    assert not truncation.losses.isfinite().all()  # the figures say what happened
    found, _ = meta_gradient(rule, EvolutionStrategies(largest=None), quadratics(8), 6, 6, log_loss=log_loss)
    assert not found.isfinite().all()


@pytest.mark.parametrize(
    "options, told",
    [
        ({"std": 0.0}, "std=0.0"),
        ({"std": math.nan}, "std=nan"),
        ({"lasts": "forever"}, "lasts='forever'"),
        ({"sign": 1}, "sign=1"),
        ({"largest": -1.0}, "largest=-1.0"),
        ({"bound": 0.0}, "bound=0.0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, told):
    with pytest.raises((ValueError, TypeError), match=told):
        EvolutionStrategies(**options)


# ---- meta-training ----


def test_it_trains():
    """From a learning rate that is ten times too small."""
    rule = HeavyBall()
    before = rule.log_lr.item()
    unroll = Unroll(Quadratic(3), rule, EvolutionStrategies(std=0.05), log_loss=True)
    outer, losses = torch.optim.Adam(rule.parameters(), lr=0.05), []
    for k in range(60):
        episode = unroll.start(quadratics(16, first=16 * k))
        for _ in range(2):
            outer.zero_grad()
            truncation = unroll.run(episode, 5)
            truncation.meta_loss.backward()
            outer.step()
        losses.append(float(truncation.losses[-1].mean()))
    assert rule.log_lr.item() > before + 1
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_it_trains_on_images(in_tmp_path, mnist_root):
    """By the command line: batches of another make."""
    flags = ["--model.meta_gradient=EvolutionStrategies", "--model.log_loss=true", "--curves.baselines=[]"]
    main(
        [
            "fit",
            *mnist(mnist_root, *flags),
            "--data.num_tasks=2",
            "--data.episodes_per_epoch=1",
            "--trainer.max_epochs=1",
        ]
    )
    assert list(in_tmp_path.rglob("last.ckpt"))


def test_a_run_of_it_goes_on_bit_for_bit(in_tmp_path):
    flags = ["--model.meta_gradient=EvolutionStrategies", "--model.meta_gradient.std=0.02", "--model.anneal=false"]
    rule = ["--model.rule=lightning_l2l.NormalizedMLP"]
    main(["fit", *rule, *TINY_FIT, *flags, "--trainer.max_epochs=3"])
    main(["fit", *rule, *TINY_FIT, *flags, "--trainer.max_epochs=2"])
    main(["fit", *rule, *TINY_FIT, *flags, "--trainer.max_epochs=3", "--ckpt_path=last"])
    whole, again = (torch.load(path)["state_dict"] for path in sorted(in_tmp_path.rglob("last.ckpt")))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
