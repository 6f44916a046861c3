"""Whatever a batch holds: a task gives its losses, or says in one line what does not fit."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from hostile import result_of
from lightning_l2l import MLP, CoordinatewiseLSTM, NetworkTask, Quadratic, Task
from lightning_l2l.commands.errors import find_foreseen
from lightning_l2l.evaluation.baselines import BASELINES
from lightning_l2l.evaluation.rollout import rollout
from lightning_l2l.meta.unroll import Unroll

STEPS = 3
CPU = torch.device("cpu")
SEED = torch.arange(2)
W, Y = torch.randn(2, 3, 3), torch.randn(2, 3)
FLOATS, BYTES = torch.rand(2, STEPS + 1, 5, 4), torch.randint(256, (2, STEPS + 1, 5, 4)).byte()
LABELS = torch.randint(6, (2, STEPS + 1, 5))
UNSEEN = {"unseen_inputs": BYTES[:, 0], "unseen_targets": LABELS[:, 0].byte()}
DROPOUT = nn.Sequential(nn.Linear(4, 6), nn.Dropout())
TARGETS = {"targets": LABELS, "seed": SEED}
LINEAR = NetworkTask(nn.Linear(4, 1), nn.functional.mse_loss)
CASES = {
    "quadratic": (Quadratic(3), {"W": W, "y": Y, "seed": SEED}),
    "floats": (NetworkTask(MLP(4, 3, 1, 6)), {"inputs": FLOATS, **TARGETS}),
    "bytes": (NetworkTask(MLP(4, 3, 1, 6)), {"inputs": BYTES, **TARGETS, "targets": LABELS.byte(), **UNSEEN}),
    "dropout": (NetworkTask(DROPOUT), {"inputs": BYTES, **TARGETS, "targets": LABELS.byte()}),
    "one task": (NetworkTask(MLP(4, 3, 1, 6)), {"inputs": FLOATS[:1], "targets": LABELS[:1], "seed": SEED[:1]}),
    "regression": (LINEAR, {"inputs": FLOATS, **TARGETS, "targets": FLOATS[..., :1]}),
}
DTYPES = [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.cfloat]


def to_dtype(dtype):
    return lambda x: x.to(dtype)


def to_shape(shape):
    return lambda x: torch.ones(shape).to(x.dtype)


def narrowed(dim, size):
    return lambda x: x.narrow(dim % x.dim(), 0, min(size, x.shape[dim % x.dim()]))


def filled(value):
    return lambda x: torch.full_like(x, value) if x.is_floating_point() else x + 7


CHANGES = st.one_of(
    st.builds(to_dtype, st.sampled_from(DTYPES)),
    st.builds(to_shape, st.lists(st.integers(0, 5), max_size=5)),
    st.builds(narrowed, st.integers(0, 4), st.integers(0, 2)),
    st.builds(filled, st.sampled_from([torch.nan, torch.inf, 1e30, -1e30])),
    st.sampled_from([lambda x: None, lambda x: x.tolist(), lambda x: x[..., None], lambda x: x.numpy()]),
    st.sampled_from([lambda x: x.to_sparse(), lambda x: "text", lambda x: x.to("meta")]),
)


def episode_by_unroll(task, batch):
    unroll = Unroll(task, CoordinatewiseLSTM(hidden_size=2))
    truncation = unroll.run(unroll.start(batch), STEPS)
    truncation.meta_loss.backward()
    return truncation.losses


def episode_by_rollout(task, batch):
    return rollout(BASELINES[2].at(0.1), task, batch, STEPS, CPU).losses


EPISODES = [episode_by_unroll, episode_by_rollout]


@pytest.mark.parametrize("episode", EPISODES)
@pytest.mark.parametrize("case", CASES)
def test_good_batches_run(case, episode):
    task, batch = CASES[case]
    assert episode(task, batch).shape[1] == len(batch["seed"])


@given(
    case=st.sampled_from(list(CASES)),
    name=st.sampled_from(["W", "y", "seed", "inputs", "targets", "unseen_inputs", "unseen_targets"]),
    change=CHANGES,
    episode=st.sampled_from(EPISODES),
)
@example(case="dropout", name="targets", change=lambda x: x[..., None], episode=episode_by_unroll)
@example(case="floats", name="targets", change=lambda x: x[..., None], episode=episode_by_unroll)
@example(case="regression", name="targets", change=lambda x: x[..., None], episode=episode_by_unroll)
@example(case="bytes", name="unseen_inputs", change=lambda x: x[..., :-1], episode=episode_by_rollout)
def test_any_batch_gives_losses_or_one_line(case, name, change, episode):
    task, batch = CASES[case]
    if name in batch:
        changed = {**batch, name: change(batch[name])}
        losses = result_of(episode, task, changed)
        assert losses is None or losses.shape[1:] == (len(changed["seed"]),)


def without(name):
    return lambda batch: {k: v for k, v in batch.items() if k != name}


def having(**entries):
    return lambda batch: {**batch, **entries}


@pytest.mark.parametrize("episode", EPISODES)
@pytest.mark.parametrize(
    "case, change, told",
    [
        ("quadratic", without("W"), "the batch has no 'W', it has 'y', 'seed'; give the task the data"),
        ("quadratic", without("seed"), "the batch has no 'seed'"),
        (
            "quadratic",
            having(W=W.double()),
            r"W is \[2, 3, 3\] float64 on cpu, y \[2, 3\] float32 .* dtype and device",
        ),
        ("quadratic", having(y=[1.0]), "'y' of the batch is no tensor but a list"),
        ("quadratic", having(seed=SEED.double()), "seeds are .* float64; give one seed per task, an int64 tensor"),
        ("quadratic", having(seed=SEED[:0]), r"seeds are \[0\] int64"),
        ("quadratic", lambda batch: None, "a batch is no tensor but a NoneType; give a dictionary of tensors"),
        ("quadratic", lambda batch: W, r"a batch is \[2, 3, 3\] float32; give a dictionary of tensors"),
        ("quadratic", lambda batch: {}, "the batch has no 'seed', it has nothing"),
        ("floats", without("targets"), "the batch has no 'targets'"),
        (
            "floats",
            having(inputs=FLOATS[:, :2]),
            "the batch has 2 minibatches .* num_steps",
        ),
        ("floats", having(inputs=FLOATS[:1]), "one entry of 'seed' for each task"),
        ("floats", having(inputs=FLOATS[..., :3]), r"MLP and its loss do not take inputs \[2, 4, 5, 3\] float32"),
        ("floats", having(targets=LABELS + 9), "do not take .* out of bounds"),
        ("floats", having(inputs=FLOATS[:, :, :0], targets=LABELS[:, :, :0]), "the loss is not finite at the start"),
    ],
)
def test_what_does_not_fit_is_named(case, change, told, episode):
    task, batch = CASES[case]
    with pytest.raises(ValueError, match=told) as caught:
        episode(task, change(batch))
    assert find_foreseen(caught.value) is caught.value


class Faulty(nn.Linear):
    def forward(self, inputs):
        return super().forward(inputs[:, :2])


def test_a_mistake_in_somebodys_own_module_keeps_its_traceback():
    task, (_, batch) = NetworkTask(Faulty(4, 6)), CASES["floats"]
    with pytest.raises(RuntimeError) as caught:
        episode_by_unroll(task, batch)
    assert find_foreseen(caught.value) is None


class NoTensor(Quadratic):
    def loss(self, params, batch, step):
        return 1.0


class Integers(Quadratic):
    def loss(self, params, batch, step):
        return torch.ones(2, dtype=torch.int64)


@pytest.mark.parametrize("task, told", [(NoTensor(3), "no tensor but a float"), (Integers(3), "[2] int64")])
def test_a_task_whose_losses_are_none_is_told(task: Task, told):
    assert result_of(episode_by_rollout, task, CASES["quadratic"][1]) is None
    assert f"Task.loss returned {told}" in result_of.told
