import itertools
import pickle
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import BatchSampler

from lightning_l2l.data import EpisodeDataModule, QuadraticDataModule
from lightning_l2l.data.episodes import task_seed
from lightning_l2l.data.loading import EpisodeSampler

pytestmark = [
    # Lightning 2.6 meets torch 2.10: https://github.com/Lightning-AI/pytorch-lightning/issues/21326
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),
    # Both depend on the number of cores of the machine that runs the tests.
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    # Python 3.12 warns of every fork with threads about: https://github.com/python/cpython/issues/100228
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


def quadratics(**kwargs):
    sizes = dict(num_tasks=2, dim=2, episodes_per_epoch=3, num_val_tasks=4, num_test_tasks=3)
    return QuadraticDataModule(**sizes | kwargs)


def batches(loader, epoch=0):
    loader.sampler.set_epoch(epoch)
    return list(loader)


def assert_same(first, second):
    assert len(first) == len(second) > 0
    for a, b in zip(first, second, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_task_seed_is_pinned():
    # Another hash would silently change every task of every published result.
    assert task_seed(0, "train", 0, 0) == 6578950792936650312


def test_task_seed_differs_in_every_coordinate():
    coordinates = itertools.product(range(3), ("train", "val", "train/start"), range(12), range(12))
    seeds = [task_seed(*c) for c in coordinates]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_task_seed_refuses_negative_seed():
    with pytest.raises(ValueError, match="seed=-1 is not an integer of 0 or more"):
        task_seed(-1, "train", 0, 0)


@pytest.mark.parametrize("num_replicas", [1, 2, 3])
def test_sampler_shares_each_batch_among_ranks(num_replicas):
    samplers = [EpisodeSampler(12, num_replicas=num_replicas, rank=rank) for rank in range(num_replicas)]
    parts = [list(BatchSampler(sampler, batch_size=2, drop_last=False)) for sampler in samplers]
    width = 2 * num_replicas
    for j, batch in enumerate(zip(*parts, strict=True)):
        assert sorted(itertools.chain(*batch)) == [(0, index) for index in range(j * width, (j + 1) * width)]


def test_sampler_epoch():
    moving, fixed = EpisodeSampler(2), EpisodeSampler(2, fixed=True)
    for sampler in (moving, fixed):
        sampler.set_epoch(5)
    assert list(moving) == [(5, 0), (5, 1)]
    assert list(fixed) == [(0, 0), (0, 1)]


def test_sampler_leaves_out_what_is_done():
    sampler = EpisodeSampler(8, num_done=lambda: 3, num_replicas=2, rank=1)
    assert list(sampler) == [(0, 7)]
    assert len(sampler) == 4  # the length is that of an epoch: the Trainer counts from the batch it stopped at


@pytest.mark.parametrize(("num_tasks", "allowed"), [(7, "6 or 9"), (2, "3")])
def test_sampler_refuses_uneven_shares(num_tasks, allowed):
    with pytest.raises(ValueError, match=f"{num_tasks} tasks cannot .* 3 processes; use {allowed} tasks"):
        EpisodeSampler(num_tasks, num_replicas=3, rank=0)


@pytest.mark.parametrize("stage", ["train", "val", "test", "predict"])
def test_tasks_do_not_depend_on_workers(stage):
    loaders = [getattr(quadratics(num_workers=n), f"{stage}_dataloader")() for n in (0, 2)]
    for epoch in (0, 1, 0):  # the workers outlive the epochs
        assert_same(*(batches(loader, epoch) for loader in loaders))


def test_tasks_do_not_depend_on_ranks():
    one = batches(quadratics(num_tasks=4).train_dataloader(), epoch=1)
    parts = []
    for rank in range(2):
        loader = quadratics(num_tasks=2).train_dataloader()
        total = 12  # 3 batches of 2 tasks on 2 processes
        sampler = EpisodeSampler(total, num_replicas=2, rank=rank)
        loader.batch_sampler.sampler = sampler
        sampler.set_epoch(1)
        parts.append(list(loader))
    for batch, *halves in zip(one, *parts, strict=True):
        for name in batch:
            interleaved = torch.stack([half[name] for half in halves], dim=1).flatten(0, 1)
            assert torch.equal(interleaved, batch[name])


def test_epochs_stages_and_seeds_differ():
    data, other = quadratics(), quadratics(seed=1)
    seen = [batches(data.train_dataloader(), epoch=epoch) for epoch in range(2)]
    seen += [
        batches(data.val_dataloader()),
        batches(data.test_dataloader()),
        batches(other.train_dataloader()),
    ]
    for name in ("y", "seed"):
        tasks = torch.cat([batch[name] for part in seen for batch in part])
        assert len(tasks.unique(dim=0)) == len(tasks) == 6 + 6 + 4 + 3 + 6


@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_evaluation_tasks_are_the_same_in_every_epoch(stage):
    loader = getattr(quadratics(), f"{stage}_dataloader")()
    assert_same(batches(loader, epoch=0), batches(loader, epoch=7))


def test_sizes_of_batches():
    data = quadratics(eval_tasks=3)
    assert [len(batch["seed"]) for batch in data.train_dataloader()] == [2, 2, 2]
    assert [len(batch["seed"]) for batch in data.val_dataloader()] == [3, 1]
    assert [len(batch["seed"]) for batch in data.test_dataloader()] == [3]
    assert [len(batch["seed"]) for batch in quadratics().test_dataloader()] == [2, 1]


@pytest.mark.parametrize(
    "name", ["num_tasks", "num_steps", "episodes_per_epoch", "num_val_tasks", "num_test_tasks", "eval_tasks"]
)
@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_bad_sizes(name, value):
    with pytest.raises(ValueError, match=f"^{name}={value} is not an integer of 1 or more; set {name}=1$"):
        quadratics(**{name: value})


@pytest.mark.parametrize("name", ["seed", "num_workers"])
def test_negative_numbers(name):
    with pytest.raises(ValueError, match=f"^{name}=-1 is not an integer of 0 or more"):
        quadratics(**{name: -1})


class Steps(EpisodeDataModule):
    """Data with one number per step."""

    def sample(self, stage, generator):
        return {"x": torch.rand(self.num_steps, generator=generator)}


def test_num_steps_come_from_the_module_unless_given():
    data, given = Steps(num_tasks=2), Steps(num_tasks=2, num_steps=3)
    for steps in (5, 7):  # one data module may serve several modules
        for d in (data, given):
            d.trainer = SimpleNamespace(lightning_module=SimpleNamespace(num_steps=steps), training=False)
            d.setup("fit")
        assert next(iter(data.train_dataloader()))["x"].shape == (2, steps)
        assert next(iter(given.train_dataloader()))["x"].shape == (2, 3)


def test_num_steps_unknown():
    with pytest.raises(ValueError, match=r"Steps has num_steps=None .* such as num_steps=100"):
        Steps(num_tasks=2).setup()
    data = Steps(num_tasks=2)
    data.trainer = SimpleNamespace(lightning_module=object())
    with pytest.raises(ValueError, match="num_steps=None"):
        data.setup("fit")


def test_workers_get_no_trainer():
    data = quadratics()
    data.trainer = SimpleNamespace(model=lambda: None)  # a lambda cannot be pickled
    dataset = pickle.loads(pickle.dumps(data.val_dataloader().dataset))
    assert dataset.data.trainer is None
    assert_same([dataset[(0, 1)]], [data.val_dataloader().dataset[(0, 1)]])


class Recorder(LightningModule):
    """Learns one number, writes down the tasks it has seen, and fails at `fail_at`."""

    def __init__(self, automatic=True, fail_at=None):
        super().__init__()
        self.automatic_optimization = automatic
        self.fail_at = fail_at
        self.mean = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def loss(self, batch):
        return (self.mean - batch["y"]).square().mean()

    def training_step(self, batch, batch_idx):
        if len(self.seen) == self.fail_at:
            raise KeyError("stop")
        self.seen.append((self.current_epoch, batch_idx, *batch["seed"].tolist()))
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(Callback):
    """Saves a checkpoint after a batch, given by its number over all epochs, or when training fails."""

    def __init__(self, path, after=None):
        self.path = path
        self.after = after

    def on_train_batch_end(self, trainer, module, *_):
        if len(module.seen) == self.after:
            trainer.save_checkpoint(self.path)

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.path)


def trainer(**kwargs):
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    return Trainer(accelerator="cpu", max_epochs=3, **off, **kwargs)


def fit(callbacks=(), ckpt_path=None, automatic=True, fail_at=None, num_workers=0, **kwargs):
    module = Recorder(automatic, fail_at)
    data = quadratics(num_workers=num_workers)
    trainer(callbacks=list(callbacks), **kwargs).fit(module, data, ckpt_path=ckpt_path)
    return module


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.parametrize("after", [1, 5, 6])  # in the first epoch, in the second, at its end
def test_resumed_run_goes_on_with_the_next_batch(tmp_path, automatic, num_workers, after):
    path = tmp_path / "middle.ckpt"
    kwargs = dict(automatic=automatic, num_workers=num_workers)
    whole = fit([Save(path, after)], **kwargs)
    torch.load(path, weights_only=True)
    rest = fit(ckpt_path=path, **kwargs)
    assert len(whole.seen) == len(set(whole.seen)) == 9
    assert rest.seen == whole.seen[after:]
    assert torch.equal(rest.mean, whole.mean)


def test_resumed_run_with_validation_within_the_epoch(tmp_path):
    whole = fit([Save(tmp_path / "middle.ckpt", 5)], val_check_interval=1)
    rest = fit(ckpt_path=tmp_path / "middle.ckpt", val_check_interval=1)
    assert rest.seen == whole.seen[5:]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resumed_run_repeats_the_episode_that_failed(tmp_path, num_workers):
    path = tmp_path / "failed.ckpt"
    whole = fit(num_workers=num_workers)
    with pytest.raises(KeyError, match="stop"):
        fit([Save(path)], fail_at=4, num_workers=num_workers)
    rest = fit(ckpt_path=path, num_workers=num_workers)
    assert rest.seen == whole.seen[4:]
    assert torch.equal(rest.mean, whole.mean)


def test_train_dataloader_is_whole_after_fit():
    data = quadratics()
    trainer().fit(Recorder(), data)
    assert_same(batches(data.train_dataloader()), batches(quadratics().train_dataloader()))


def test_predict_keeps_the_order():
    assert_same(trainer().predict(Recorder(), quadratics()), list(quadratics().test_dataloader()))


def test_overfit_batches_repeats_the_first_tasks():
    module = Recorder()
    with pytest.warns(UserWarning, match="You requested to overfit"):
        trainer(overfit_batches=1).fit(module, quadratics())
    first = next(iter(quadratics().train_dataloader()))["seed"].tolist()
    assert [tuple(first)] * 3 == [seen[2:] for seen in module.seen]
