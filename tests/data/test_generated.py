"""Data that the task draws."""

from types import SimpleNamespace

import pytest
import torch

from lightning_l2l import (
    ConvexTerm,
    GeneratedDataModule,
    Lasso,
    Mixture,
    MixtureDataModule,
    NetworkTask,
    Quadratic,
    QuadraticDataModule,
    RandomScaling,
    Rosenbrock,
)
from lightning_l2l.data.episodes import task_seed


def bound(data, task):
    module = SimpleNamespace(num_steps=3) if task is None else SimpleNamespace(num_steps=3, task=task)
    data.trainer = SimpleNamespace(lightning_module=module, training=False)
    data.setup("fit")
    return data


def test_a_task_is_drawn_by_its_seed_alone():
    batch = next(iter(GeneratedDataModule(Lasso(3), num_tasks=2, seed=4).train_dataloader()))
    for k in range(2):
        alone = Lasso(3).sample(torch.Generator().manual_seed(task_seed(4, "train", 0, k)))
        assert all(torch.equal(batch[name][k], alone[name]) for name in ("A", "b"))


def test_the_quadratics_are_those_of_old():
    """Entry by entry: W first, then y, from a generator seeded for the task."""
    batch = next(iter(QuadraticDataModule(num_tasks=2, dim=3, seed=4).val_dataloader()))
    for k in range(2):
        generator = torch.Generator().manual_seed(task_seed(4, "val", 0, k))
        assert torch.equal(batch["W"][k], torch.randn(3, 3, generator=generator))
        assert torch.equal(batch["y"][k], torch.randn(3, generator=generator))


@pytest.mark.parametrize("wrap", [lambda t: t, RandomScaling, ConvexTerm, lambda t: RandomScaling(ConvexTerm(t))])
def test_the_task_is_that_of_the_module_unless_given(wrap):
    data, given = GeneratedDataModule(num_tasks=2), GeneratedDataModule(Rosenbrock(5), num_tasks=2)
    for dim in (3, 4):  # one data module may serve several modules
        for one, wanted in ((data, dim), (given, 5)):
            batch = next(iter(bound(one, wrap(Rosenbrock(dim))).train_dataloader()))
            assert batch["shift"].shape == (2, wanted)


@pytest.mark.parametrize(
    "task, told",
    [
        (None, "there is no module that has one"),
        (NetworkTask(torch.nn.Linear(2, 2)), "data of NetworkTask is not drawn"),
        (Mixture([Quadratic()]), "data of Mixture is not drawn"),
    ],
)
def test_a_task_that_draws_nothing(task, told):
    with pytest.raises(ValueError, match=f"draws the data of the trained module's task, and {told}; give it a task"):
        bound(GeneratedDataModule(), task)


def test_before_setup():
    with pytest.raises(RuntimeError, match="the task is not known yet; call setup"):
        next(iter(GeneratedDataModule().train_dataloader()))
    with pytest.raises(ValueError, match="there is no module that has one"):
        GeneratedDataModule().setup()


def test_a_task_that_is_none():
    with pytest.raises(TypeError, match=r"task=.* is a NetworkTask; give a task whose data is drawn, such as Rosenbr"):
        GeneratedDataModule(NetworkTask(torch.nn.Linear(2, 2)))
    with pytest.raises(TypeError, match="task='Rosenbrock'"):
        GeneratedDataModule("Rosenbrock")


def test_it_is_imported_from_everywhere():
    import lightning_l2l.data
    import lightning_l2l.tasks

    for name in ("GeneratedDataModule", "MixtureDataModule", "SequenceDataModule"):
        assert getattr(lightning_l2l, name) is getattr(lightning_l2l.data, name)
    for name in "Autoencoder Lasso LogisticRegression Mixture Rastrigin Rosenbrock Transformer GeneratedTask".split():
        assert getattr(lightning_l2l, name) is getattr(lightning_l2l.tasks, name)
    assert MixtureDataModule.__name__ in lightning_l2l.data.__all__
