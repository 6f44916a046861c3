"""What the tests of optimizers share.

Rules to run, optimizers made of them and Adam beside them, parameters, and gradients that are drawn beforehand, so that
parameters do not influence each other.
"""

import copy
import io
import pickle

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, NormalizedMLP, RNNprop
from lightning_l2l.rules import UpdateRule
from lightning_l2l.rules.inputs import INPUTS

SHAPES = [(3, 4), (), (0,), (5,), (1, 2, 17)]

# ---- rules ----


class Momentum(UpdateRule):
    """A rule without meta-parameters."""

    state_size = 1

    def forward(self, gradient, state):
        velocity = 0.9 * state[0] + gradient
        return -0.1 * velocity, velocity[None]


class LearnedMomentum(UpdateRule):
    """The smallest rule of one's own that can be trained: heavy-ball momentum with learned coefficients."""

    state_size = 1

    def __init__(self):
        super().__init__()
        self.log_lr, self.decay = nn.Parameter(torch.tensor(-3.0)), nn.Parameter(torch.tensor(0.5))

    def forward(self, gradient, state):
        velocity = self.decay * state[0] + gradient
        return -self.log_lr.exp() * velocity, velocity[None]


LSTMS = {
    "paper": lambda: CoordinatewiseLSTM(),
    "raw": lambda: CoordinatewiseLSTM(preprocessing="identity", output_scale=1.0),
    "one-layer": lambda: CoordinatewiseLSTM(hidden_size=3, num_layers=1, p=5.0),
    "three-layers": lambda: CoordinatewiseLSTM(hidden_size=5, num_layers=3, output_scale=-0.3, forget_bias=1.0),
    "one-unit": lambda: CoordinatewiseLSTM(hidden_size=1, num_layers=4),
    "rnnprop": lambda: RNNprop(),
    "rnnprop-one-layer": lambda: RNNprop(hidden_size=3, num_layers=1, beta1=0.5, beta2=0.9, output_scale=-0.5),
    "rnnprop-one-unit": lambda: RNNprop(hidden_size=1, num_layers=3, beta1=0.0),
    "rnnprop-means-and-time": lambda: RNNprop(hidden_size=3, beta1=[0.0, 0.9, 0.99], beta2=0.999, time=True),
    "rnnprop-decay": lambda: RNNprop(hidden_size=4, decay=2),
    "rnnprop-horizon-and-warmup": lambda: RNNprop(hidden_size=4, horizon=2, warmup=3),
}


def possible(rule, state):
    """A state drawn at random, made one that there can be: means of squares and sums of weights are not negative."""
    if isinstance(rule, RNNprop):
        first = 2 * rule.hidden_size * rule.num_layers + rule.input.in_features - 1 - rule.time  # past the means
        state[first:] = state[first:].abs().clamp(max=1)
    return state


# ---- optimizers: the fixture `make` goes through MAKERS ----


def learned(params, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LearnedOptimizer(params, CoordinatewiseLSTM(hidden_size=4), **options)


#: Always at the rate 1, so that a parameter does not mind when it gets its gradients. With the time: test_tensors.py.
UNTIMED = {"schedule": "constant", "step_size": 1.0, "warmup": 0}


def unlearned(params, **options):
    return LearnedOptimizer(params, NormalizedMLP(hidden_size=0, **UNTIMED), **options)


def normalized(params, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rule = NormalizedMLP(hidden_size=3, inputs=list(INPUTS), **UNTIMED)
        nn.init.normal_(rule.readout.weight)
    return LearnedOptimizer(params, rule, **options)


def own(params, **options):
    return LearnedOptimizer(params, Momentum(), **options)


def adam(params, **options):
    return torch.optim.AdamW(params, **{"lr": 0.05, "weight_decay": 0.0, **options})  # AdamW: its decay is decoupled


MAKERS = [learned, unlearned, normalized, own, adam]


def through_a_file(content):
    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def brought_back(way, make, params, optimizer):
    """Parameters and optimizer once more, by another way each time."""
    if way == "deepcopy":
        return copy.deepcopy((params, optimizer))
    if way == "pickle":
        return pickle.loads(pickle.dumps((params, optimizer)))
    twins = clones(params)
    twin = make(twins)
    if way == "distributed":
        state = through_a_file(get_optimizer_state_dict(nn.ParameterList(params), optimizer))
        set_optimizer_state_dict(nn.ParameterList(twins), twin, state)
    else:
        state = optimizer.state_dict()
        twin.load_state_dict(through_a_file(state) if way == "file" else copy.deepcopy(state))
    return twins, twin


# ---- parameters and gradients ----


def normal(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def parameters(dtype=torch.float32, shapes=SHAPES):
    return [nn.Parameter(normal(*shape, seed=k, dtype=dtype)) for k, shape in enumerate(shapes)]


def gradients(params, steps, seed=100):
    return [
        [normal(*p.shape, seed=seed + 31 * t + k, dtype=p.dtype).to(p.device) for k, p in enumerate(params)]
        for t in range(steps)
    ]


def feed(optimizer, params, given):
    """Inner steps with given gradients, None for none."""
    for step in given:
        for p, gradient in zip(params, step, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def values(params):
    return [p.detach().clone() for p in params]


def clones(params):
    return [nn.Parameter(p) for p in values(params)]


def assert_same(found, wanted, exact=True):
    """The same number of tensors, the same dtypes and, unless not `exact`, exactly the same values."""
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-7)
