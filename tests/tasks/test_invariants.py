"""What every task promises, whichever it is."""

import copy

import pytest
import torch
from torch import nn

from lightning_l2l.tasks import (
    MLP,
    Autoencoder,
    ConvexTerm,
    Lasso,
    LogisticRegression,
    Mixture,
    NetworkTask,
    Quadratic,
    RandomScaling,
    Rastrigin,
    Rosenbrock,
    Transformer,
    init_from_seeds,
)

NUM_STEPS, ROWS = 2, 6


def quadratic():
    return Quadratic(dim=4), lambda B, g: {
        "W": torch.randn(B, 4, 4, generator=g),
        "y": torch.randn(B, 4, generator=g),
    }


def generated(task):
    def batch(B, g):
        samples = [task.sample(g) for _ in range(B)]
        return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}

    return task, batch


def sequences():
    def batch(B, g):
        tokens = torch.randint(5, (B, NUM_STEPS + 2, ROWS, 5), generator=g)
        inputs, targets = tokens[..., :-1], tokens[..., 1:].to(torch.uint8)
        names = ("inputs", "targets", "unseen_inputs", "unseen_targets")
        return dict(zip(names, (inputs[:, 1:], targets[:, 1:], inputs[:, 0], targets[:, 0]), strict=True))

    return NetworkTask(Transformer(5, 4, 2, 2, 4)), batch


def member(*tasks):
    """That of an episode of the last of them."""
    mixture = Mixture([task for task, _ in tasks])
    return mixture.of_episode({"member": torch.tensor([len(tasks) - 1])}), tasks[-1][1]


def network(module, shape=(5,), num_classes=3, **kwargs):
    def batch(B, g):
        return {
            "inputs": torch.randn(B, NUM_STEPS + 1, ROWS, *shape, generator=g),
            "targets": torch.randint(num_classes, (B, NUM_STEPS + 1, ROWS), generator=g).to(torch.uint8),
            "unseen_inputs": torch.randn(B, 2 * ROWS, *shape, generator=g),
            "unseen_targets": torch.randint(num_classes, (B, 2 * ROWS), generator=g).to(torch.uint8),
            "seed": torch.arange(B) + 11,
        }

    return NetworkTask(module, **kwargs), batch


def made_of(transform, case, **options):
    task, batch = case
    return transform(task, **options), lambda B, g: {**batch(B, g), "seed": torch.arange(B) + 100}


def convnet():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 2 * 2, 3),
        nn.BatchNorm1d(3),
    )


CASES = {
    "quadratic": quadratic,
    "quadratic-noise": lambda: made_of(lambda task: Quadratic(task.dim, noise=0.3), quadratic()),
    "rosenbrock": lambda: generated(Rosenbrock(dim=4)),
    "rastrigin": lambda: generated(Rastrigin(dim=4, random_amplitude=True)),
    "logistic-regression": lambda: generated(LogisticRegression(num_features=3, num_examples=7)),
    "lasso": lambda: generated(Lasso(num_features=5)),
    "transformer": sequences,
    "autoencoder": lambda: network(Autoencoder(6, 4), (2, 3), loss_fn=nn.functional.mse_loss, reconstruct=True),
    "mlp": lambda: network(MLP(5, 4, 2, 3)),
    "mlp-gaussian": lambda: network(MLP(5, 4, 1, 3), init_scale=0.3),
    "mlp-factory": lambda: network(lambda: MLP(5, 4, 1, 3)),
    "cross-entropy-class": lambda: network(MLP(5, 4, 1, 3), loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1)),
    "batch-norm": lambda: network(convnet(), shape=(2, 4, 4)),
    "dropout": lambda: network(nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))),
    "random-scaling": lambda: made_of(RandomScaling, quadratic()),
    "random-scaling-of-a-tensor": lambda: made_of(RandomScaling, network(MLP(5, 4, 1, 3)), unit="tensor"),
    "random-scaling-batch-norm": lambda: made_of(RandomScaling, network(convnet(), shape=(2, 4, 4)), bound=1.0),
    "convex-term": lambda: made_of(ConvexTerm, quadratic(), dim=3),
    "member-of-a-mixture": lambda: member(network(MLP(5, 4, 1, 3)), generated(Rosenbrock(dim=3))),
    "both": lambda: made_of(RandomScaling, made_of(ConvexTerm, network(MLP(5, 4, 1, 3)), dim=3), bound=0.5),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def start(task, num_tasks, dtype=None):
    return init_from_seeds(task, torch.arange(num_tasks) + 100, dtype=dtype)


def test_shapes_and_dtypes(case):
    task, make = case
    params, buffers = start(task, 3)
    assert params
    for tensor in params.values():
        assert tensor.shape[0] == 3 and tensor.dtype == torch.float32 and not tensor.requires_grad
    assert all(tensor.shape[0] == 3 for tensor in buffers.values())
    assert params.keys().isdisjoint(buffers)
    losses = task.loss(params, make(3, torch.Generator()), 0)
    assert losses.shape == (3,) and losses.dtype == torch.float32 and losses.isfinite().all()
    for figure in task.unseen(params | buffers, make(3, torch.Generator())).values():
        assert figure.shape == (3,) and figure.dtype == torch.float32 and figure.isfinite().all()


def test_start_depends_on_its_own_seed_only(case):
    task, _ = case
    seeds = torch.tensor([5, 2**40 + 5, -3, 5])
    params, buffers = init_from_seeds(task, seeds)
    for k in range(4):
        alone, alone_buffers = init_from_seeds(task, seeds[k : k + 1])
        assert all(torch.equal(alone[name][0], params[name][k]) for name in params)
        assert all(torch.equal(alone_buffers[name][0], buffers[name][k]) for name in buffers)
    first = next(iter(params.values()))
    assert torch.equal(first[0], first[3])
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_copies_drawn_from_one_generator_differ(case):
    task, _ = case
    first = next(iter(task.init_params(2, torch.Generator().manual_seed(0)).values()))
    assert not torch.equal(first[0], first[1])


def test_global_rng_is_untouched(case):
    task, make = case
    before = torch.get_rng_state()
    params, buffers = start(task, 2)
    task.loss(params | buffers, make(2, torch.Generator()), 0)
    task.unseen(params | buffers, make(2, torch.Generator()))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    again, _ = start(task, 2)
    assert all(torch.equal(again[name], params[name]) for name in params)


def test_nothing_but_buffers_changes_in_place(case):
    task, make = case
    params, buffers = start(task, 2)
    batch = make(2, torch.Generator())
    kept_params, kept_buffers, kept_batch = copy.deepcopy((params, buffers, batch))
    module = copy.deepcopy(getattr(task, "module", None))
    task.loss(params, batch, 1)  # no buffers given: what is written to them is dropped
    assert all(torch.equal(buffers[name], kept_buffers[name]) for name in buffers)
    task.loss(params | buffers, batch, 1)
    assert all(torch.equal(params[name], kept_params[name]) for name in params)
    assert all(torch.equal(batch[name], kept_batch[name]) for name in batch)
    if isinstance(module, nn.Module):
        assert all(
            torch.equal(old, new)
            for old, new in zip(module.state_dict().values(), task.module.state_dict().values(), strict=True)
        )
    assert all(torch.equal(value, kept_buffers[name]) for name, value in task.init_buffers(2).items())


def test_nothing_changes_on_unseen_data(case):
    task, make = case
    params, buffers = start(task, 2)
    batch = make(2, torch.Generator())
    before, loss = copy.deepcopy((params, buffers, batch)), task.loss(params, batch, 0)
    values = {name: tensor.requires_grad_() for name, tensor in params.items()}
    figures = [task.unseen(values | buffers, batch) for _ in range(2)]
    for name, figure in figures[0].items():
        assert torch.equal(figure, figures[1][name]) and not figure.requires_grad
    for old, new in zip(before, (params, buffers, batch), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert torch.equal(task.loss(params, batch, 0), loss)  # in training mode, as before


def test_tasks_do_not_see_each_others_unseen_data(case):
    task, make = case
    params, buffers = start(task, 3)
    batch, merged = make(3, torch.Generator()), params | buffers
    for name, figure in task.unseen(merged, batch).items():
        for k in range(3):
            one, part = ({n: t[k : k + 1] for n, t in tensors.items()} for tensors in (merged, batch))
            torch.testing.assert_close(task.unseen(one, part)[name], figure[k : k + 1])


def test_loss_is_repeatable_and_the_same_with_and_without_buffers(case):
    task, make = case
    params, buffers = start(task, 2)
    batch = make(2, torch.Generator())
    first = task.loss(params, batch, 1)
    assert torch.equal(first, task.loss(params, batch, 1))
    assert torch.equal(first, task.loss(params | buffers, batch, 1))


def test_for_the_length_of_an_episode_it_is_the_same_task(case):
    task, make = case
    batch = make(3, torch.Generator())
    bound = task.of_episode(batch)
    for name, tensors in zip(("parameters", "buffers"), zip(start(task, 3), start(bound, 3), strict=True), strict=True):
        assert all(torch.equal(tensors[0][k], tensors[1][k]) for k in tensors[0]), name
    params, _ = start(task, 3)
    for step in range(2):
        assert torch.equal(bound.loss(params, batch, step), task.loss(params, batch, step))
    assert all(
        torch.equal(figure, bound.unseen(params, batch)[name]) for name, figure in task.unseen(params, batch).items()
    )


def test_tasks_do_not_see_each_other(case):
    task, make = case
    if getattr(task, "_random", False):
        pytest.skip("the masks depend on which tasks share a batch")
    params, buffers = start(task, 3, torch.float64)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in make(3, torch.Generator()).items()}
    together = task.loss(params | buffers, batch, 1)
    for k in range(3):  # and B = 1 takes the path without vmap
        one = {name: tensor[k : k + 1].clone() for name, tensor in (params | init(task, 3)).items()}
        alone = task.loss(one, {name: tensor[k : k + 1] for name, tensor in batch.items()}, 1)
        torch.testing.assert_close(alone, together[k : k + 1])
        for name in buffers:
            torch.testing.assert_close(one[name][0], buffers[name][k])


def init(task, num_tasks):
    return {k: v.double() if v.is_floating_point() else v for k, v in task.init_buffers(num_tasks).items()}


@pytest.mark.parametrize("num_tasks", [1, 2])
def test_gradient_and_second_derivative_against_finite_differences(case, num_tasks):
    task, make = case
    params, buffers = start(task, num_tasks, torch.float64)
    batch = make(num_tasks, torch.Generator().manual_seed(3))
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    names = list(params)
    values = [params[name].requires_grad_() for name in names]

    def loss(*tensors):
        return task.loss(dict(zip(names, tensors, strict=True)), batch, 1)

    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)
    # two steps in one graph, buffers written in between
    merged = dict(zip(names, values, strict=True)) | buffers
    total = sum(task.loss(merged, batch, step).sum() for step in range(2))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(total, values))
    assert not any(buffer.requires_grad for buffer in buffers.values())


def test_a_copied_task_is_independent(case):
    task, make = case
    twin = copy.deepcopy(task)
    params, _ = start(task, 2)
    batch = make(2, torch.Generator())
    assert torch.equal(twin.loss(params, batch, 0), task.loss(params, batch, 0))
    assert not any(isinstance(part, nn.Parameter) for part in vars(task).values())
    assert not isinstance(task, nn.Module)
