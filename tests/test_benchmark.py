"""What meta-training and a trained rule cost: `pytest -m benchmark tests/test_benchmark.py`.

One step of LearnedOptimizer stands beside one of Adam and beside the rule's matrix products alone, by torch, for
models of 15 thousand to 10 million parameters.

One meta-epoch: 100 inner steps in 5 truncations of 20, an Adam step of the meta-parameters after each, float32,
2 threads, the data in memory, beside plain autograd: in turn with it, and always from the same meta-parameters. (M)
is the MNIST MLP, one task of 15,910 coordinates with log-and-sign; (Q) is 128 quadratics of 10 dimensions. The
reference does the same work the plain way: `nn.LSTMCell`, autograd through the unroll, gradients of the optimizee
detached.
"""

import copy
import math
import statistics
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_l2l import EvolutionStrategies, LearnedOptimizer, MetaOptimizer, main
from lightning_l2l.meta.episode import Episode
from lightning_l2l.meta.unroll import Unroll
from lightning_l2l.rules import CoordinatewiseLSTM, NormalizedMLP
from lightning_l2l.rules.base import CPU_BLOCK, blocks
from lightning_l2l.tasks import MLP, NetworkTask, Quadratic

pytestmark = pytest.mark.benchmark


def mnist_like():
    g = torch.Generator().manual_seed(0)
    inputs = torch.randint(0, 256, (1, 101, 128, 28, 28), dtype=torch.uint8, generator=g)
    targets = torch.randint(0, 10, (1, 101, 128), dtype=torch.uint8, generator=g)
    return {"inputs": inputs, "targets": targets, "seed": torch.tensor([0])}


def quadratics():
    g = torch.Generator().manual_seed(0)
    W, y = torch.randn(128, 10, 10, generator=g), torch.randn(128, 10, generator=g)
    return {"W": W, "y": y, "seed": torch.arange(128)}


PROBLEMS = {
    "M": (lambda: NetworkTask(MLP()), lambda: CoordinatewiseLSTM(), mnist_like),
    "Q": (lambda: Quadratic(10), lambda: CoordinatewiseLSTM(preprocessing="identity"), quadratics),
}


def ours(problem):
    task, rule, data = (make() for make in PROBLEMS[problem])
    unroll, first = Unroll(task, rule), copy.deepcopy(rule.state_dict())

    def meta_epoch():
        rule.load_state_dict(first)
        meta_optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
        episode = unroll.start(data)
        for _ in range(5):
            meta_optimizer.zero_grad()
            unroll.run(episode, 20).meta_loss.backward()
            meta_optimizer.step()

    return meta_epoch


class PlainLSTM(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.features = features
        self.first, self.second, self.readout = nn.LSTMCell(features, 20), nn.LSTMCell(20, 20), nn.Linear(20, 1)

    def preprocess(self, gradient):
        if self.features == 1:
            return gradient[:, None]
        size = gradient.abs()
        large = size >= math.exp(-10)
        magnitude = torch.where(large, size.clamp_min(1e-30).log() / 10, -1.0)
        return torch.stack([magnitude, torch.where(large, gradient.sign(), math.exp(10) * gradient)], 1)

    def forward(self, gradient, state):
        a = self.first(self.preprocess(gradient), state[0])
        b = self.second(a[0], state[1])
        return 0.1 * self.readout(b[0])[:, 0], (a, b)


def plain_mlp(data):
    images, labels = data["inputs"][0].flatten(2) / 255, data["targets"][0].long()

    def loss(theta, t):
        w1, b1, w2, b2 = theta.split([15680, 20, 200, 10])
        hidden = torch.sigmoid(functional.linear(images[t], w1.view(20, 784), b1))
        return functional.cross_entropy(functional.linear(hidden, w2.view(10, 20), b2), labels[t])

    return loss, 15910, 1


def plain_quadratics(data):
    W, y = data["W"], data["y"]

    def loss(theta, t):
        return ((torch.bmm(W, theta.view(128, 10, 1))[..., 0] - y) ** 2).sum()

    return loss, 1280, 128


def reference(problem):
    loss, size, num_tasks = (plain_mlp if problem == "M" else plain_quadratics)(PROBLEMS[problem][2]())
    rule = PlainLSTM(2 if problem == "M" else 1)
    initial, start = copy.deepcopy(rule.state_dict()), 0.1 * torch.randn(size)

    def meta_epoch():
        rule.load_state_dict(initial)
        meta_optimizer = torch.optim.Adam(rule.parameters(), lr=1e-3)
        theta = start
        state = tuple((torch.zeros(size, 20), torch.zeros(size, 20)) for _ in range(2))
        for first in range(0, 100, 20):
            meta_loss = 0.0
            for t in range(first, first + 20):
                at = theta.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(loss(at, t), at)
                update, state = rule(gradient, state)
                theta = theta + update
                meta_loss = meta_loss + loss(theta, t + 1) / num_tasks
            meta_optimizer.zero_grad()
            meta_loss.backward()
            meta_optimizer.step()
            theta, state = theta.detach(), tuple((h.detach(), c.detach()) for h, c in state)

    return meta_epoch


def in_turn(others):
    """For `setup` of a benchmark: before each round a run of each other, so that all share what the machine does."""
    seconds = {name: [] for name in others}

    def run_the_others():
        for name, run in others.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    return run_the_others, seconds


@pytest.mark.parametrize("problem", PROBLEMS)
def test_meta_epoch(benchmark, problem, capsys):
    torch.set_num_threads(2)
    torch.manual_seed(0)
    plain = reference(problem)
    plain()
    setup, seconds = in_turn({"reference": plain})
    benchmark.pedantic(ours(problem), setup=setup, rounds=8 if problem == "M" else 20, warmup_rounds=1)
    found, other = benchmark.stats.stats.median, statistics.median(seconds["reference"])
    with capsys.disabled():
        print(f"\n({problem}) {found:.3f} s, {found / other:.3f} x the reference ({other:.3f} s)")


@pytest.mark.parametrize("orthogonalize", [False, True], ids=["plain", "orthogonalized"])
def test_particles_side_by_side(benchmark, orthogonalize, capsys):
    """Evolution strategies: 16 pairs on an MLP 64-32-10 with batches of 64, beside each particle by itself."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    inputs, targets = torch.randn(16, 51, 64, 64, generator=g), torch.randint(0, 10, (16, 51, 64), generator=g)
    batch = {"inputs": inputs, "targets": targets, "seed": torch.arange(16)}
    task, rule = NetworkTask(MLP(64, 32)), NormalizedMLP(orthogonalize=orthogonalize)
    unroll = Unroll(task, rule, EvolutionStrategies())

    def alone():
        for task_of_pair in range(16):
            one = {name: values[task_of_pair : task_of_pair + 1] for name, values in batch.items()}
            for _ in range(2):
                episode = Episode.start(task, rule, one, 50)
                (part,) = episode.parts
                for _ in range(50):
                    update = rule.step_(part.gradient.view(-1), part.state, episode.seen_by(part))
                    part.theta.add_(update.view(part.theta.shape))
                    episode.step += 1
                    episode.evaluate([part.gradient])

    setup, others = in_turn({"alone": alone})
    benchmark.group = "50 inner steps of 32 particles"
    together = lambda: unroll.run(unroll.start(batch, num_steps=50), 50).meta_loss.backward()  # noqa: E731
    benchmark.pedantic(together, setup=setup, rounds=5, warmup_rounds=1)
    seconds = {"together": benchmark.stats.stats.median, "alone": statistics.median(others["alone"])}
    told = ", ".join(f"{name} {32 * 50 / value:.0f}" for name, value in seconds.items())
    with capsys.disabled():
        print(f"\ninner steps of a particle a second: {told}; {seconds['alone'] / seconds['together']:.1f} times")


RUNS = {
    "M": ["--config=configs/mnist.yaml", "--trainer.max_epochs=1"],
    "Q": ["--trainer.max_epochs=10"],
}


@pytest.mark.parametrize("problem", RUNS)
def test_share_of_all_but_meta_training(benchmark, problem, mnist_root, tmp_path, monkeypatch, capsys):
    """Of `fit` after tuning: data, validation, logging, checkpoints and what Lightning does about the episodes."""
    seconds = dict.fromkeys(("training_step", "log"), 0.0)

    def timed(name):
        function = getattr(MetaOptimizer, name)

        def run(self, *args, **options):
            start = time.perf_counter()
            try:
                return function(self, *args, **options)
            finally:
                inside = name == "training_step" or self.trainer.training
                seconds[name] += inside * (time.perf_counter() - start)

        monkeypatch.setattr(MetaOptimizer, name, run)

    for name in seconds:
        timed(name)
    clock = {}
    for name in ("on_train_start", "on_train_end"):
        monkeypatch.setattr(MetaOptimizer, name, lambda self, name=name: clock.update({name: time.perf_counter()}))
    torch.set_num_threads(2)
    flags = [f"--data.root={mnist_root}"] if problem == "M" else []
    flags += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    benchmark.pedantic(lambda: main(["fit", *RUNS[problem], *flags, "--trainer.accelerator=cpu"]), rounds=1)
    total = clock["on_train_end"] - clock["on_train_start"]
    episodes = seconds["training_step"] - seconds["log"]
    with capsys.disabled():
        share = 1 - episodes / total
        print(f"\n({problem}) {total:.1f} s after tuning, {100 * share:.1f} % of it not in episodes")


MODELS = {
    15_910: lambda: MLP(),
    1_001_000: lambda: nn.Linear(1000, 1000),
    10_010_000: lambda: nn.Sequential(*(nn.Linear(1000, 1000) for _ in range(10))),
}


def parameters_with_gradients(size, matrices=False):
    params = list(MODELS[size]().parameters())
    assert sum(p.numel() for p in params) == size
    params = [p for p in params if p.dim() == 2 or not matrices]
    for p in params:
        p.grad = 0.1 * torch.randn_like(p)
    return params


def stepper(make, size, matrices=False):
    """A step of an optimizer, and the bytes of its state a parameter."""
    optimizer = make(parameters_with_gradients(size, matrices))
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    return optimizer.step, sum(v.numel() * v.element_size() for v in state) / size


def products(size):
    """The rule's products and nothing else, in blocks of the size that suits them."""
    parts = [part.stop - part.start for part in blocks(size, CPU_BLOCK)]
    weights = [torch.randn(80, 23), torch.randn(80, 41), torch.randn(1, 21)]
    inputs = [torch.randn(w.shape[1], parts[0]) for w in weights]
    outputs = [torch.empty(len(w), parts[0]) for w in weights]

    def multiply():
        for _ in parts:
            for w, x, out in zip(weights, inputs, outputs, strict=True):
                torch.mm(w, x, out=out)

    return multiply


@pytest.mark.parametrize("size", MODELS)
def test_optimizer_step(benchmark, size, capsys):
    torch.set_num_threads(2)
    learned, learned_bytes = stepper(lambda params: LearnedOptimizer(params, CoordinatewiseLSTM()), size)
    adam, adam_bytes = stepper(torch.optim.Adam, size)
    setup, others = in_turn({"adam": adam, "products": products(size)})
    benchmark.group = "a step of LearnedOptimizer"
    rounds = max(9, min(200, 30 * 10**6 // size))
    benchmark.pedantic(learned, setup=setup, rounds=rounds, warmup_rounds=1)
    micro = {name: statistics.median(seconds) / size * 1e6 for name, seconds in others.items()}
    micro["learned"] = benchmark.stats.stats.median / size * 1e6
    with capsys.disabled():
        told = ", ".join(f"{name} {value:.4f}" for name, value in micro.items())
        print(
            f"\n{size:,} parameters: microseconds a parameter: {told}; learned / products "
            f"{micro['learned'] / micro['products']:.2f}; bytes of state a parameter: adam {adam_bytes:.0f}, "
            f"learned {learned_bytes:.0f}"
        )


@pytest.mark.parametrize("size", [size for size in MODELS if size > 10**6])
@pytest.mark.parametrize("orthogonalize", [False, True], ids=["plain", "orthogonalized"])
def test_step_of_rules_that_see_tensors(benchmark, orthogonalize, size, capsys):
    """Beside Adam and the LSTM; where matrices are orthogonalised, on these alone and beside Muon."""
    torch.set_num_threads(2)

    def normalized(**options):
        rule = NormalizedMLP(orthogonalize=orthogonalize, **options)
        return lambda params: LearnedOptimizer(params, rule, num_steps=1000)

    makers = {"adam": lambda params: torch.optim.Adam(params, foreach=True), "unlearned": normalized(hidden_size=0)}
    makers["general"] = normalized(hidden_size=0, sizing=0, mixing=True)
    if orthogonalize:
        makers["muon"] = torch.optim.Muon
    else:
        makers["lstm"] = lambda params: LearnedOptimizer(params, CoordinatewiseLSTM())
    learned, learned_bytes = stepper(normalized(), size, orthogonalize)
    setup, others = in_turn({name: stepper(make, size, orthogonalize)[0] for name, make in makers.items()})
    benchmark.group = "a step of NormalizedMLP"
    rounds = max(1, 3 * 10**6 // size) if orthogonalize else max(9, min(100, 10**8 // size))
    benchmark.pedantic(learned, setup=setup, rounds=rounds)
    ns = {name: statistics.median(seconds) / size * 1e9 for name, seconds in others.items()}
    ns["learned"] = benchmark.stats.stats.median / size * 1e9
    beside = "muon" if orthogonalize else "adam"
    with capsys.disabled():
        told = ", ".join(f"{name} {value:.1f}" for name, value in ns.items())
        ours = ("unlearned", "general", "learned")
        ratios = ", ".join(f"{name} / {beside} {ns[name] / ns[beside]:.2f}" for name in ours)
        print(
            f"\n{size:,} parameters: ns a parameter: {told}; {ratios}; {learned_bytes:.0f} bytes of state a parameter"
        )
