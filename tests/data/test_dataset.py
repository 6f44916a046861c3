"""Data sets of one's own: what they hold, how they are split, and runs on them from Python and from YAML."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from PIL import Image
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from lightning_l2l import MetaOptimizer, NetworkTask, RNNprop, main
from lightning_l2l.commands.errors import find_foreseen
from lightning_l2l.data import DatasetDataModule


class Pairs(Dataset):
    """Examples made by a function of their number."""

    def __init__(self, make, total=100):
        self.make, self.total, self.read = make, total, []

    def __len__(self):
        return self.total

    def __getitem__(self, index):
        self.read.append(index)
        return self.make(index)


def numbered(index):
    """An example that holds its own number."""
    return torch.tensor([index, -index], dtype=torch.float32), index % 3


def numbers(total=100, first=0):
    inputs, targets = zip(*map(numbered, range(first, first + total)), strict=True)
    return TensorDataset(torch.stack(inputs), torch.tensor(targets))


def ready(dataset, **options):
    sizes = dict(num_tasks=2, batch_size=4, num_steps=5, num_val_tasks=3, num_test_tasks=3, eval_tasks=3)
    data = DatasetDataModule(dataset, **sizes | options)
    data.setup()
    return data


def first(data, stage="train"):
    return next(iter(getattr(data, f"{stage}_dataloader")()))


def pool(data, stage="train"):
    return [one.examples for one in data._pools[stage]]


def marks(inputs):
    return set(inputs[:][..., 0].flatten().int().tolist())


def as_array(value):
    return value.detach().numpy() if isinstance(value, torch.Tensor) else np.array(value)


# ---- what is read ----

MADE = {
    "tensors": (numbered, torch.float32, [2], torch.uint8, []),
    "arrays": (lambda i: (np.full((3, 2), i)[::-1], np.int64(i % 3)), torch.int64, [3, 2], torch.uint8, []),
    "read-only pixels": (lambda i: (np.frombuffer(bytes([i, 1]), np.uint8), 0), torch.uint8, [2], torch.uint8, []),
    "lists": (lambda i: [torch.zeros(2), i], torch.float32, [2], torch.uint8, []),
    "truth values": (lambda i: (torch.zeros(2), i > 5), torch.float32, [2], torch.uint8, []),
    "many classes": (lambda i: (torch.zeros(2), 200 + i), torch.float32, [2], torch.int64, []),
    "classes left out": (lambda i: (torch.zeros(2), i - 1), torch.float32, [2], torch.int64, []),
    "unsigned": (lambda i: (torch.zeros(2), np.uint16(i)), torch.float32, [2], torch.uint8, []),
    "regression": (lambda i: (torch.zeros(2), i / 8), torch.float32, [2], torch.float32, []),
    "of many numbers": (
        lambda i: (torch.zeros(2).double(), torch.full((3,), i / 7)),
        torch.float64,
        [2],
        torch.float32,
        [3],
    ),
    "tokens": (lambda i: (torch.full((4,), i), torch.full((4,), i)), torch.int64, [4], torch.uint8, [4]),
    "numbers": (lambda i: (float(i), float(i)), torch.float32, [], torch.float32, []),
    "with a graph": (lambda i: (torch.ones(2, requires_grad=True) * i, 0), torch.float32, [2], torch.uint8, []),
}


@pytest.mark.parametrize("kind", MADE)
def test_examples_of_all_kinds(kind):
    make, dtype, shape, of_targets, target_shape = MADE[kind]
    data = ready(Pairs(make))
    batch = first(data, "val")
    found = {name: (values.dtype, list(values.shape)) for name, values in batch.items() if name != "seed"}
    assert found == {
        "inputs": (dtype, [3, 6, 4, *shape]),
        "targets": (of_targets, [3, 6, 4, *target_shape]),
        "unseen_inputs": (dtype, [3, 7, *shape]),
        "unseen_targets": (of_targets, [3, 7, *target_shape]),
    }
    places = torch.randperm(100, generator=torch.Generator().manual_seed(0)).argsort()[:70]
    for rows, values in zip(pool(data), zip(*(make(place) for place in places.tolist()), strict=True), strict=True):
        assert np.array_equal(rows.numpy(), np.stack([as_array(value) for value in values]))


@pytest.mark.parametrize("wrap", [lambda d: Subset(d, range(100)), lambda d: ConcatDataset([d]), lambda d: d])
def test_tensors_are_taken_whole_and_give_the_same(wrap):
    by_one, whole = ready(Pairs(numbered)), ready(wrap(numbers()))
    for stage in ("train", "val", "test"):
        assert all(torch.equal(a, b) for a, b in zip(pool(by_one, stage), pool(whole, stage), strict=True))


def test_a_tensor_dataset_of_another_way_to_get_examples_is_asked_for_them():
    class Doubled(TensorDataset):
        def __getitem__(self, index):
            inputs, target = super().__getitem__(index)
            return 2 * inputs, target

    assert torch.equal(pool(ready(Doubled(*numbers().tensors)))[0], 2 * pool(ready(numbers()))[0])


def test_every_example_is_read_once():
    dataset = Pairs(numbered)
    data = ready(dataset)
    for stage in ("train", "val", "test"):
        first(data, stage)
    data.setup()
    assert dataset.read == list(range(100))


def test_random_examples_are_the_same_in_every_process_and_leave_the_random_numbers_alone():
    dataset = Pairs(lambda i: (torch.rand(2), 0))
    torch.manual_seed(3)
    before = torch.get_rng_state()
    data = ready(dataset)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert torch.equal(pool(ready(dataset))[0], pool(data)[0])
    assert len(pool(data)[0].unique()) == 140


# ---- how it is split ----


@pytest.mark.parametrize(
    ("sizes", "counts"),
    [
        ({}, (70, 15, 15)),
        ({"val_size": 0.25, "test_size": 10}, (65, 25, 10)),
        ({"val_size": 7, "test_size": 0.5}, (43, 7, 50)),
        ({"test_dataset": numbers(20, 100)}, (85, 15, 20)),
        ({"test_dataset": Pairs(lambda i: numbered(100 + i), 20), "val_size": 40}, (60, 40, 20)),
    ],
)
def test_stages_have_no_example_in_common(sizes, counts):
    data = ready(numbers(), **sizes)
    parts = {stage: marks(pool(data, stage)[0]) for stage in ("train", "val", "test")}
    assert tuple(map(len, parts.values())) == counts
    assert set.union(*parts.values()) == set(range(sum(counts)))
    for stage, marked in parts.items():
        batch = first(data, stage)
        assert marks(batch["inputs"]) <= marked
        assert torch.equal(batch["targets"][:], (batch["inputs"][:][..., 0] % 3).byte())
        if stage != "train":
            assert marks(batch["unseen_inputs"]) <= marked
            for task in range(3):
                assert not marks(batch["unseen_inputs"][task]) & marks(batch["inputs"][task])


def test_the_split_depends_on_its_own_seed_alone():
    same, other = ready(numbers(), seed=1), ready(numbers(), split_seed=1)
    want = ready(numbers())
    assert torch.equal(pool(same, "test")[0], pool(want, "test")[0])
    assert marks(pool(other, "test")[0]) != marks(pool(want, "test")[0])
    assert not torch.equal(first(same)["inputs"][:], first(want)["inputs"][:])


def test_tasks_are_reproducible_and_differ():
    one, two = (first(ready(numbers())) for _ in range(2))
    assert torch.equal(one["inputs"][:], two["inputs"][:]) and torch.equal(one["seed"], two["seed"])
    assert not torch.equal(one["inputs"][0], one["inputs"][1])


@pytest.mark.parametrize(
    ("total", "num_unseen", "found"), [(30, None, 7), (10**4, None, 1000), (60, 3, 3), (60, 0, None)]
)
def test_how_many_are_set_aside(total, num_unseen, found):
    batch = first(ready(numbers(total), num_unseen=num_unseen, val_size=0.5, test_size=8), "val")
    assert (len(batch["unseen_targets"][0]) if found else batch.get("unseen_targets")) == found


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # depends on the cores of this machine
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_tasks_do_not_depend_on_workers():
    loaders = [ready(numbers(), num_workers=n).val_dataloader() for n in (0, 2)]
    for a, b in zip(*loaders, strict=True):
        assert all(torch.equal(a[name][:], b[name][:]) for name in a)


def test_episodes_can_be_pickled():
    episodes = ready(numbers()).val_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(episodes))[(0, 1)]["inputs"][:], episodes[(0, 1)]["inputs"][:])


# ---- what is refused ----


class Stream(IterableDataset):
    def __iter__(self):
        return iter([])


class Endless(Dataset):
    def __getitem__(self, index):
        return numbered(index)


def odd(value, at=7):
    return Pairs(lambda index: value if index == at else numbered(index))


INPUT = "example 7 of dataset has an input "
REFUSED = {
    "no data set": (
        lambda: ready([numbered(0)]),
        r"dataset=\[.*\] is a list; give a torch.utils.data.Dataset of \(inp",
    ),
    "a class": (lambda: ready(Pairs), r"dataset=.*Pairs.* is the class Pairs; give a torch.utils.data.Dataset"),
    "a stream": (lambda: ready(Stream()), "dataset is a Stream, which has no number of examples or no example by its"),
    "without end": (lambda: ready(Endless()), "dataset is a Endless, which has no number of examples"),
    "a stream for the test": (lambda: ready(numbers(), test_dataset=Stream()), "^test_dataset is a Stream"),
    "empty": (lambda: ready(TensorDataset(torch.zeros(0))), "dataset is a TensorDataset without examples; give one"),
    "empty test": (lambda: ready(numbers(), test_dataset=Pairs(numbered, 0)), "test_dataset is a Pairs without exam"),
    "two tests": (
        lambda: ready(numbers(), test_dataset=numbers(), test_size=3),
        "test_size=3 takes .* give one of the",
    ),
    "other shape": (
        lambda: ready(odd((torch.zeros(3), 0))),
        rf"{INPUT}\[3\] float32, and example 0 one \[2\] float32; gi",
    ),
    "other dtype": (
        lambda: ready(odd((torch.zeros(2).int(), 0))),
        rf"{INPUT}\[2\] int32, and example 0 one \[2\] float32",
    ),
    "other target": (
        lambda: ready(odd((torch.zeros(2), 1.5))),
        r"has a target \[\] float32, and example 0 one \[\] int64",
    ),
    "dictionary": (
        lambda: ready(odd({"x": 1})),
        r"example 7 of dataset is a dict; give a torch.utils.data.Dataset of \(",
    ),
    "three": (lambda: ready(odd((1, 2, 3))), "example 7 of dataset is a tuple of 3; give a"),
    "inputs alone": (lambda: ready(TensorDataset(torch.zeros(100, 2))), "example 0 of dataset is a tuple of 1; give a"),
    "an image": (
        lambda: ready(odd((Image.new("L", (2, 2)), 0))),
        f"{INPUT}that is a Image; give the Dataset a transform to",
    ),
    "text": (lambda: ready(odd(("cat", 0))), f"{INPUT}that is a str; give the Dataset a transform"),
    "array of texts": (
        lambda: ready(odd((np.array(["cat"]), 0))),
        f"{INPUT}that is a ndarray; give the Dataset a trans",
    ),
    "list in a pair": (lambda: ready(odd(([1.0, 2.0], 0))), f"{INPUT}that is a list; give the Dataset a transform"),
    "sparse": (lambda: ready(odd((torch.eye(2).to_sparse(), 0))), rf"{INPUT}\[2, 2\] float32 sparse; give the Dataset"),
    "no target": (lambda: ready(odd((torch.zeros(2), None))), "has a target that is a NoneType; give"),
    "share": (lambda: ready(numbers(), val_size=1.0), "^val_size=1.0 is neither a share between 0 and 1 nor a number"),
    "no test": (lambda: ready(numbers(), test_size=0), "^test_size=0 is neither .*; use test_size=0.15$"),
    "truth": (lambda: ready(numbers(), val_size=True), "^val_size=True is neither"),
    "all": (
        lambda: ready(numbers(), val_size=60, test_size=0.4),
        "val_size=60 and test_size=0.4 leave none of the 100 exa",
    ),
    "too few": (
        lambda: ready(numbers(), batch_size=16),
        "needs 16 val examples, but dataset, a TensorDataset split by val_size=0.15 and test_size=0.15, has 15",
    ),
    "too many unseen": (
        lambda: ready(numbers(), num_unseen=12),
        r"need 16 val examples, .* use num_unseen=11 or fewer$",
    ),
    "too few for the test": (
        lambda: ready(numbers(), test_dataset=numbers(3)),
        "test examples, but test_dataset, a TensorDataset, has 3; use batch_size=3",
    ),
    "test of another shape": (
        lambda: ready(numbers(), test_dataset=TensorDataset(torch.zeros(50, 3), torch.zeros(50, 2))),
        r"inputs of test_dataset are \[3\] float32, and those of dataset \[2\] float32; give",
    ),
    "split_seed": (lambda: ready(numbers(), split_seed=-1), "split_seed=-1 is not an integer of 0 or more"),
    "too large": (
        lambda: ready(Pairs(lambda i: (torch.zeros(1).expand(10**12), 0))),
        "dataset='Pairs' need 4e.* GB of memory, and",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, told = REFUSED[kind]
    with pytest.raises((TypeError, ValueError), match=told) as caught:
        make()
    assert find_foreseen(caught.value) is caught.value and "\n" not in str(caught.value)


def test_too_few_examples_are_refused_before_they_are_read():
    dataset = Pairs(numbered)
    with pytest.raises(ValueError, match="batch_size=200 needs 200 train examples"):
        ready(dataset, batch_size=200)
    assert dataset.read == []


# ---- runs ----


def train(task, dataset, folder):
    data = DatasetDataModule(dataset, batch_size=4, num_tasks=2, episodes_per_epoch=2, num_val_tasks=2)
    model = MetaOptimizer(task, RNNprop(hidden_size=3), num_steps=4, unroll_length=2)
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(max_epochs=1, inference_mode=False, accelerator="cpu", default_root_dir=folder, **off)
    start = {name: value.clone() for name, value in model.rule.state_dict().items()}
    trainer.fit(model, data)
    assert any(not torch.equal(value, start[name]) for name, value in model.rule.state_dict().items())
    return trainer.callback_metrics


def test_a_rule_is_meta_trained_on_classes(tmp_path):
    found = train(NetworkTask(nn.Linear(2, 3)), numbers(), tmp_path)
    assert 0 <= found["val/unseen_accuracy"] <= 1 and found["val/final_loss"].isfinite()


def test_a_rule_is_meta_trained_on_a_regression(tmp_path):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 2, generator=generator)
    dataset = TensorDataset(inputs, inputs.sum(1, keepdim=True))
    found = train(NetworkTask(nn.Linear(2, 1), loss_fn=nn.functional.mse_loss), dataset, tmp_path)
    assert found["val/unseen_loss"].isfinite() and "val/unseen_accuracy" not in found


MINE = """
import torch
from torch import nn
from torch.utils.data import Dataset


class Spirals(Dataset):
    def __init__(self, num_examples: int = 200, turns: float = 1.0):
        self.labels = torch.arange(num_examples) % 2
        angle = 6.28 * turns * torch.linspace(0, 1, num_examples) + torch.pi * self.labels
        self.points = torch.stack([angle.cos(), angle.sin()], 1) * torch.linspace(0, 1, num_examples)[:, None]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.points[index], self.labels[index]


class Net(nn.Sequential):
    def __init__(self, width: int = 4):
        super().__init__(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 2))
"""

YAML = """
model:
  task: {class_path: lightning_l2l.NetworkTask, init_args: {module: {class_path: mine.Net, init_args: {width: 3}}}}
  rule: {class_path: lightning_l2l.RNNprop, init_args: {hidden_size: 3}}
  num_steps: 4
  unroll_length: 2
data:
  class_path: lightning_l2l.data.DatasetDataModule
  init_args:
    dataset: {class_path: mine.Spirals, init_args: {turns: 1.5}}
    batch_size: 8
    num_tasks: 2
    episodes_per_epoch: 2
    num_val_tasks: 2
    num_test_tasks: 2
    eval_tasks: 2
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
curves: {baselines: []}
"""


@pytest.fixture
def in_tmp_path(in_tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(in_tmp_path)  # as `python -m` has it
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    Path("mine.py").write_text(MINE)
    Path("mine.yaml").write_text(YAML)
    yield
    sys.modules.pop("mine", None)


@pytest.mark.usefixtures("in_tmp_path")
def test_yaml_names_a_data_set_and_a_network_of_ones_own():
    main(["fit", "--config", "mine.yaml", "--data.val_size=0.2"])
    saved = Path("lightning_logs/version_0/config.yaml")
    arguments = yaml.safe_load(saved.read_text())["data"]["init_args"]
    assert arguments["dataset"] == {"class_path": "mine.Spirals", "init_args": {"num_examples": 200, "turns": 1.5}}
    assert (arguments["val_size"], arguments["test_size"], arguments["seed"]) == (0.2, None, 0)
    main(["test", "--config", str(saved), "--ckpt_path", "last"])
    (table,) = Path().rglob("comparison.csv")
    assert "learned" in table.read_text()


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--data.dataset.turn=2", "Option 'turn' is not accepted; "),
        ("--data.val_sise=2", "Option 'val_sise' is not accepted; did you mean val_size?"),
        ("--data.dataset=mine.Net", "mine.Net does not correspond to a subclass of Dataset"),
    ],
)
def test_mistakes_on_the_command_line(flag, told, capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--config", "mine.yaml", flag])
    assert told in capsys.readouterr().err
