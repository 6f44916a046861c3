"""Episodes of a mixture: of which member, whoever shares the work, and a rule meta-trained on them."""

import pickle
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from lightning_l2l import (
    GeneratedDataModule,
    Lasso,
    Mixture,
    MixtureDataModule,
    MNISTDataModule,
    NetworkTask,
    Quadratic,
    QuadraticDataModule,
    RandomScaling,
    Rosenbrock,
    SequenceDataModule,
    main,
)
from lightning_l2l.data import episodes
from lightning_l2l.data.loading import EpisodeSampler
from lightning_l2l.meta.meta_optimizer import MetaOptimizer

pytestmark = [
    # Lightning 2.6 meets torch 2.10: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Python 3.12 warns of every fork with threads about: https://github.com/python/cpython/issues/100228
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]

TASKS = [Quadratic(2), Rosenbrock(3), Lasso(4)]
ENTRIES = [{"W", "y"}, {"shift"}, {"A", "b"}]


def mixture(**options):
    sizes = {"num_tasks": 4, "episodes_per_epoch": 30, "num_val_tasks": 12, "num_test_tasks": 12}
    return MixtureDataModule([GeneratedDataModule(task) for task in TASKS], **sizes | options)


def members(loader, epoch=0):
    """The member of each batch, which is the same for all of its tasks and whose entries are there."""
    loader.sampler.set_epoch(epoch)
    found = []
    for batch in loader:
        (member,) = batch["member"].unique().tolist()
        assert batch["member"].dtype == torch.int64 and batch.keys() == ENTRIES[member] | {"seed", "member"}
        found.append(member)
    return found


def bound(data, task=None, **options):
    module = SimpleNamespace(**{"num_steps": 3, **({} if task is None else {"task": task}), **options})
    data.trainer = SimpleNamespace(lightning_module=module, training=False)
    data.setup("fit")
    return data


# ---- which member ----


def test_an_episode_is_of_one_member_drawn_anew():
    first, second = (members(mixture().train_dataloader(), epoch) for epoch in range(2))
    assert first == members(mixture().train_dataloader(), 0) != second  # repeatable, and another order in each epoch
    assert first != members(mixture(seed=1).train_dataloader())
    assert set(first) == set(second) == {0, 1, 2}


@pytest.mark.parametrize("weights, shares", [(None, (1 / 3, 1 / 3, 1 / 3)), ([2, 0.5, 7.5], (0.2, 0.05, 0.75))])
def test_members_are_drawn_as_often_as_their_weights_say(weights, shares):
    data = mixture(weights=weights, num_tasks=1, episodes_per_epoch=2000)
    counts = Counter(members(data.train_dataloader()))
    assert [counts[k] / 2000 for k in range(3)] == pytest.approx(shares, abs=0.04)


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_in_evaluation_they_take_turns(stage):
    loader = getattr(mixture(weights=[100, 1, 1], eval_tasks=3), f"{stage}_dataloader")()
    assert members(loader, 0) == members(loader, 7) == [0, 1, 2, 0]


def test_a_member_has_the_data_that_it_has_by_itself():
    data = mixture()
    alone = [QuadraticDataModule(num_tasks=4, dim=2), *(GeneratedDataModule(task, num_tasks=4) for task in TASKS[1:])]
    loaders = [data.train_dataloader(), *(one.train_dataloader() for one in alone)]
    for batch, *others in zip(*loaders, strict=False):
        wanted = others[batch["member"][0]]
        assert all(torch.equal(batch[name], values) for name, values in wanted.items())


def test_a_task_alone_is_of_a_member_that_its_generator_draws():
    drawn = [int(mixture().sample("train", torch.Generator().manual_seed(k))["member"]) for k in range(40)]
    assert set(drawn) == {0, 1, 2}


@pytest.mark.parametrize("stage", ["train", "val"])
def test_members_and_tasks_do_not_depend_on_ranks(stage, monkeypatch):
    one = list(getattr(mixture(num_tasks=4), f"{stage}_dataloader")())
    monkeypatch.setattr(episodes, "num_processes", lambda: 2)
    parts = []
    for rank in range(2):
        loader = getattr(mixture(num_tasks=2), f"{stage}_dataloader")()
        loader.batch_sampler.sampler = EpisodeSampler(
            len(loader.dataset), fixed=stage == "val", num_replicas=2, rank=rank
        )
        parts.append(list(loader))
    assert {int(batch["member"][0]) for batch in one} == {0, 1, 2}
    for batch, *halves in zip(one, *parts, strict=True):
        for name in batch:
            interleaved = torch.stack([half[name] for half in halves], dim=1).flatten(0, 1)
            assert torch.equal(interleaved, batch[name])


def test_members_do_not_depend_on_workers():
    loaders = [mixture(num_workers=n, episodes_per_epoch=6).train_dataloader() for n in (0, 2)]
    assert members(loaders[0], 1) == members(loaders[1], 1)


# ---- setting up ----


def test_a_member_takes_the_task_at_its_place_and_the_number_of_steps():
    data = MixtureDataModule([GeneratedDataModule(), SequenceDataModule(), GeneratedDataModule(Lasso(7))], num_tasks=1)
    task = Mixture([Rosenbrock(5), NetworkTask(torch.nn.Linear(2, 2)), Lasso(2)])
    for given in (task, RandomScaling(task)):
        bound(data, given)
        assert data.needs_num_steps and data.num_steps == 3
        samples = [member.sample("train", torch.Generator()) for member in data.members]
        assert [len(samples[0]["shift"]), len(samples[1]["inputs"]), samples[2]["A"].shape[1]] == [5, 4, 7]


def test_steps_that_are_given_hold_for_all_members():
    data = MixtureDataModule([SequenceDataModule()], num_tasks=1, num_steps=5)
    data.setup()
    assert len(data.members[0].sample("train", torch.Generator())["inputs"]) == 6
    with pytest.raises(ValueError, match="MixtureDataModule has num_steps=None"):
        MixtureDataModule([SequenceDataModule()]).setup()
    mixture().setup()  # no member needs them


def test_members_are_prepared(tmp_path, monkeypatch):
    prepared = []
    monkeypatch.setattr(MNISTDataModule, "prepare_data", lambda self: prepared.append(self))
    data = MixtureDataModule([QuadraticDataModule(), MNISTDataModule(tmp_path)])
    data.prepare_data()
    assert prepared == data.members[1:]


def test_workers_get_no_trainer():
    data = bound(mixture(), Mixture(TASKS), some_function=lambda: None)
    copied = pickle.loads(pickle.dumps(data))
    assert copied.trainer is None and all(member.trainer is None for member in copied.members)


@pytest.mark.parametrize(
    "task, told",
    [
        (Quadratic(), "MixtureDataModule is the data of a Mixture, and the task is 'Quadratic'; give the module the"),
        (Mixture([Quadratic()]), "the Mixture has 1 tasks and MixtureDataModule 3 members; give each task its data"),
    ],
)
def test_tasks_that_do_not_go_with_the_members(task, told):
    with pytest.raises(ValueError, match=told):
        bound(mixture(), task)


@pytest.mark.parametrize(
    "options, told",
    [
        (
            {"num_val_tasks": 12, "eval_tasks": 6},
            "12 in batches of eval_tasks=6 are 2, .* 3 members .* eval_tasks=4 or",
        ),
        ({"num_val_tasks": 2}, "num_val_tasks=2 .* are 1, and .*; use num_val_tasks=3 or more"),
    ],
)
def test_in_evaluation_every_member_has_its_share(options, told):
    with pytest.raises(ValueError, match=told):
        mixture(**options).val_dataloader()


@pytest.mark.parametrize(
    "make, told",
    [
        (lambda: MixtureDataModule([]), r"members=\[\] are none"),
        (lambda: MixtureDataModule(QuadraticDataModule()), "members=.* give a list of data modules"),
        (lambda: MixtureDataModule([Quadratic()]), "members=.* is a Quadratic; give data modules of episodes"),
        (lambda: MixtureDataModule([mixture()]), "members has a MixtureDataModule"),
        (lambda: mixture(weights=[1, 2]), r"weights=\[1, 2\] are not a positive number for each of 3 members"),
        (lambda: mixture(weights=[1, 2, 0]), "weights"),
        (lambda: mixture(weights="abc"), "weights='abc'"),
        (lambda: mixture(num_tasks=0), "num_tasks=0"),
    ],
)
def test_bad_arguments(make, told):
    with pytest.raises((ValueError, TypeError), match=told):
        make()


# ---- through the command line ----


def recipe(root):
    quadratic = {"class_path": "Quadratic", "init_args": {"dim": 3}}
    network = {"class_path": "MLP", "init_args": {"hidden_size": 2}}
    tasks = [{"class_path": "NetworkTask", "init_args": {"module": network}}, quadratic, {"class_path": "Rosenbrock"}]
    mnist = {"root": str(root), "batch_size": 4, "download": False, "num_unseen": 8}
    data = [
        {"class_path": "MNISTDataModule", "init_args": mnist},
        {"class_path": "QuadraticDataModule", "init_args": {"dim": 3}},
        {"class_path": "GeneratedDataModule"},
    ]
    task = {"class_path": "Mixture", "init_args": {"tasks": tasks}}
    sizes = {"num_tasks": 2, "episodes_per_epoch": 6, "num_val_tasks": 6, "num_test_tasks": 8}
    sizes |= {"eval_tasks": 2, "weights": [1, 1, 2]}
    return {
        "model": {
            "task": task,
            "train_task": {"class_path": "RandomScaling", "init_args": {"task": task, "bound": 0.5}},
            "rule": {"class_path": "RNNprop", "init_args": {"hidden_size": 3}},
            "num_steps": 4,
            "unroll_length": 2,
            "anneal": False,
        },
        "data": {"class_path": "MixtureDataModule", "init_args": {"members": data, **sizes}},
        "curves": {"baselines": ["adam"]},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
        },
    }


def last(root):
    return torch.load(Path(root, "lightning_logs/version_0/checkpoints/last.ckpt"), weights_only=True)


def test_a_rule_is_meta_trained_on_a_mixture_goes_on_bit_for_bit_and_is_tested(mnist_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    Path("mixture.yaml").write_text(yaml.safe_dump(recipe(mnist_root)))
    seen = []
    step = MetaOptimizer.training_step

    def recorded(self, batch, batch_idx):
        seen.append((self.current_epoch, batch_idx, int(batch["member"][0])))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(MetaOptimizer, "training_step", recorded)
    fit = ["fit", "--config", "mixture.yaml"]
    main([*fit, "--trainer.max_epochs=2", "--trainer.default_root_dir=whole"])
    whole = seen.copy()
    main([*fit, "--trainer.default_root_dir=parts"])
    main([*fit, "--trainer.default_root_dir=parts", "--trainer.max_epochs=2", "--ckpt_path=last"])
    assert {member for _, _, member in whole} == {0, 1, 2} and len(whole) == 12
    assert seen[12:] == whole
    ends = [last(root) for root in ("whole", "parts")]
    assert ends[0]["global_step"] == ends[1]["global_step"] == 24
    for name, weight in ends[0]["state_dict"].items():
        assert weight.isfinite().all() and torch.equal(weight, ends[1]["state_dict"][name])
    described = ends[0]["hyper_parameters"]["task"]["init_args"]["tasks"]
    assert [one["class_path"].split(".")[-1] for one in described] == ["NetworkTask", "Quadratic", "Rosenbrock"]

    without_model = {key: value for key, value in recipe(mnist_root).items() if key != "model"}
    Path("data.yaml").write_text(yaml.safe_dump(without_model))  # the checkpoint says what the mixture is of
    main(["test", "--config", "data.yaml", "--ckpt_path=whole/lightning_logs/version_0/checkpoints/last.ckpt"])
    (table,) = Path().rglob("comparison.csv")
    assert "learned" in table.read_text() and "adam" in table.read_text()


def test_a_generated_task_needs_no_second_spelling(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    flags = "--trainer.accelerator=cpu --trainer.enable_progress_bar=false --trainer.max_epochs=1 --model.num_steps=5"
    sizes = "--data.num_tasks=2 --data.num_val_tasks=2 --data.eval_tasks=2 --data.episodes_per_epoch=2"
    task = "--model.task=Rosenbrock --model.task.dim=3 --data=GeneratedDataModule"
    main(
        ["fit", *task.split(), *flags.split(), *sizes.split(), "--curves.baselines=[]", "--trainer.log_every_n_steps=1"]
    )
    config = yaml.safe_load(next(Path().rglob("config.yaml")).read_text())
    assert config["data"]["class_path"].endswith("GeneratedDataModule") and config["data"]["init_args"]["task"] is None


def test_the_root_is_that_of_all_members_that_have_one(mnist_root):
    members = [MNISTDataModule("nowhere", download=False, num_unseen=0, batch_size=4), QuadraticDataModule()]
    data = MixtureDataModule(members, root=mnist_root, num_tasks=2, num_steps=3, episodes_per_epoch=8)
    data.prepare_data()
    data.setup()
    assert {int(batch["member"][0]) for batch in data.train_dataloader()} == {0, 1}
    with pytest.raises(FileNotFoundError, match="nowhere"):
        MixtureDataModule([MNISTDataModule("nowhere", download=False)], num_steps=3).setup()
