import csv
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_l2l import CIFAR10DataModule, main
from lightning_l2l.data import Minibatches, cifar10_files
from lightning_l2l.data.cifar10_files import CLASSES

NUM_TRAIN, NUM_TEST = 600, 200


def marked(numbers):
    """Images `[n, 3, 32, 32]` that hold their own number in the first pixel's red and green."""
    images = np.zeros((len(numbers), 3, 32, 32), np.uint8)
    images[:, 0, 0, 0], images[:, 1, 0, 0] = np.divmod(numbers, 256)
    return images


def marks(inputs):
    inputs = inputs[:]
    return inputs[..., 0, 0, 0].int() * 256 + inputs[..., 1, 0, 0].int()


def write_binary(root):
    """Binary files: training images with the numbers 0 to 599, test images from 600 to 799, label = number % 10."""
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    batches = [*np.split(np.arange(NUM_TRAIN), 5), np.arange(NUM_TRAIN, NUM_TRAIN + NUM_TEST)]
    names = [name for names in cifar10_files.BATCHES.values() for name in names]
    for name, numbers in zip(names, batches, strict=True):
        labels = (numbers % 10).astype(np.uint8)[:, None]
        (folder / name).write_bytes(np.concatenate([labels, marked(numbers).reshape(len(numbers), -1)], 1).tobytes())
    return root


def write_folders(root):
    """The same images as files, in folders of their class."""
    for part, numbers in (("train", range(NUM_TRAIN)), ("test", range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))):
        for name in CLASSES:
            (root / part / name).mkdir(parents=True)
        for number, image in zip(numbers, marked(np.array(numbers)), strict=True):
            path = root / part / CLASSES[number % 10] / f"{number:04}.png"
            Image.fromarray(image.transpose(1, 2, 0)).save(path, compress_level=1)
    return root


@pytest.fixture(scope="module")
def binary(tmp_path_factory):
    return write_binary(tmp_path_factory.mktemp("binary"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("folders") / "cifar10").parent


@pytest.fixture(params=["binary", "folders"])
def root(request):
    return request.getfixturevalue(request.param)


def ready(root, **kwargs):
    defaults = dict(num_tasks=2, batch_size=8, num_steps=4, download=False, num_unseen=12)
    data = CIFAR10DataModule(root, **defaults | kwargs)
    data.prepare_data()
    data.setup()
    return data


def first(data, stage):
    return next(iter(getattr(data, f"{stage}_dataloader")()))


TRAINED_ON = {
    "inputs": (torch.uint8, (2, 5, 8, 3, 32, 32)),
    "targets": (torch.uint8, (2, 5, 8)),
    "seed": (torch.int64, (2,)),
}
UNSEEN = {"unseen_inputs": (torch.uint8, (2, 12, 3, 32, 32)), "unseen_targets": (torch.uint8, (2, 12))}
FEWER = {"classes": ["cat", "dog"], "num_unseen": 12}


@pytest.mark.parametrize("options", [{}, FEWER, {**FEWER, "train_classes": [0, 1, 2, 4]}])
@pytest.mark.parametrize(
    ("stage", "expected"), [("train", TRAINED_ON), ("val", TRAINED_ON | UNSEEN), ("test", TRAINED_ON | UNSEEN)]
)
def test_batch(root, stage, expected, options):
    batch = first(ready(root, **options), stage)
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == expected
    assert isinstance(batch["inputs"], Minibatches)


def test_stages_have_no_image_in_common_and_leave_none_out(root):
    data = ready(root, num_steps=60, num_val_tasks=2, num_test_tasks=2, episodes_per_epoch=1, num_tasks=8)
    batches = {stage: first(data, stage) for stage in ("train", "val", "test")}
    seen = {stage: set(marks(batch["inputs"]).flatten().tolist()) for stage, batch in batches.items()}
    for stage in ("val", "test"):
        seen[stage] |= set(marks(batches[stage]["unseen_inputs"]).flatten().tolist())
    assert [len(numbers) for numbers in seen.values()] == [500, 100, 200]
    assert seen["train"] | seen["val"] == set(range(600)) and seen["test"] == set(range(600, 800))


def test_of_binary_files_the_last_sixth_is_for_validation(binary):
    batch = first(ready(binary, num_steps=60), "val")
    assert marks(batch["inputs"]).min() == 500


def test_image_folders_are_shuffled_before_validation_images_are_taken(folders):
    batch = first(ready(folders, num_steps=60, num_unseen=0), "val")
    assert len(batch["targets"][0].unique()) == 10
    numbers = marks(batch["inputs"][0]).unique()
    other = marks(first(ready(folders, num_steps=60, num_unseen=0, seed=5), "val")["inputs"][0]).unique()
    assert torch.equal(numbers, other)  # whatever the seed: a rule is never tested on what another was trained on


@pytest.mark.parametrize("stage", ["train", "val", "test"])
def test_images_keep_their_labels(root, stage):
    batch = first(ready(root), stage)
    assert torch.equal(batch["targets"][:], (marks(batch["inputs"]) % 10).byte())
    if stage != "train":
        assert torch.equal(batch["unseen_targets"], (marks(batch["unseen_inputs"]) % 10).byte())


@pytest.mark.parametrize("stage", ["train", "val", "test"])
@pytest.mark.parametrize(
    ("classes", "wanted"), [([7, "cat", 5, 0], [7, 3, 5, 0]), (list(reversed(CLASSES)), list(range(9, -1, -1)))]
)
def test_targets_are_numbered_in_the_order_given(root, stage, classes, wanted):
    batch = first(ready(root, classes=classes, num_steps=30), stage)
    wanted = torch.tensor(wanted)
    assert torch.equal(wanted[batch["targets"][:].long()], marks(batch["inputs"]) % 10)
    assert len(batch["targets"][:].unique()) == len(classes)
    if stage != "train":
        assert torch.equal(wanted[batch["unseen_targets"].long()], marks(batch["unseen_inputs"]) % 10)


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize("options", [{}, {"classes": [1, 4, 8]}])
def test_unseen_images_are_in_no_minibatch_of_their_task(root, stage, options):
    data = ready(root, num_steps=60, num_val_tasks=3, num_test_tasks=3, num_tasks=3, **options)
    batch = first(data, stage)
    numbers = marks(batch["unseen_inputs"])
    assert len({tuple(task.tolist()) for task in numbers}) == 3
    for unseen, seen in zip(numbers, marks(batch["inputs"]), strict=True):
        assert len(unseen.unique()) == 12 and not torch.isin(seen, unseen).any()


def test_held_out_labels(root):
    """LSTM-sub of the paper: meta-trained on other labels than those it is tested on."""
    data = ready(root, classes=[0, 1, 2, 3, 4], train_classes=["dog", "frog", "horse", "ship", "truck"], num_steps=20)
    assert sorted((marks(first(data, "train")["inputs"]) % 10).unique().tolist()) == [5, 6, 7, 8, 9]
    for stage in ("val", "test"):
        assert sorted((marks(first(data, stage)["inputs"]) % 10).unique().tolist()) == [0, 1, 2, 3, 4]
    for stage, shift in (("train", 5), ("test", 0)):
        batch = first(data, stage)
        assert torch.equal(batch["targets"][:], (marks(batch["inputs"]) % 10 - shift).byte())


def test_training_tasks_draw_their_labels(root):
    options = dict(classes=[0, 1], train_classes=[2, 3, 4, 5, 6, 7, 8, 9], num_tasks=12, episodes_per_epoch=2)
    data = ready(root, num_steps=20, **options)
    drawn = []
    for batch in data.train_dataloader():
        for targets, numbers in zip(batch["targets"], marks(batch["inputs"]), strict=True):
            labels = [(numbers[targets == target] % 10).unique().tolist() for target in (0, 1)]
            assert all(len(label) == 1 for label in labels) and labels[0] != labels[1]
            drawn.append((labels[0][0], labels[1][0]))
    assert len(set(drawn)) > 12 and {label for pair in drawn for label in pair} == set(range(2, 10))
    assert any(a > b for a, b in drawn)  # numbered in the order drawn, not in that of the labels
    again = ready(root, num_steps=20, **options)
    for one, two in zip(data.train_dataloader(), again.train_dataloader(), strict=True):
        assert all(torch.equal(one[name][:], two[name][:]) for name in one)


def test_training_that_draws_labels_uses_every_image_of_them_without_replacement(root):
    data = ready(root, classes=[0, 1, 2], train_classes=[0, 1, 2, 3], num_tasks=1, num_steps=60, batch_size=10)
    (numbers,) = marks(first(data, "train")["inputs"])
    labels = (numbers % 10).unique()
    available = (marks(data._pools["train"][0].examples) % 10).unsqueeze(1).eq(labels).sum()
    per_permutation = int(available) // 10
    start = numbers[:per_permutation].flatten()
    assert len(labels) == 3 and len(start.unique()) == len(start)
    assert len(numbers.unique()) == available


def test_all_labels_by_default_are_those_of_mnist_in_kind(root):
    for data in (ready(root), ready(root, classes=list(range(10)), train_classes=list(CLASSES))):
        for stage in ("train", "val"):
            batch = first(data, stage)
            assert isinstance(batch["targets"], Minibatches)
            assert torch.equal(batch["targets"][:], (marks(batch["inputs"]) % 10).byte())


def test_tasks_are_reproducible_and_differ(root):
    one, two = (ready(root, episodes_per_epoch=2).train_dataloader() for _ in range(2))
    pairs = list(zip(one, two, strict=True))
    assert all(torch.equal(a["inputs"][:], b["inputs"][:]) for a, b in pairs)
    assert len(torch.cat([marks(a["inputs"]) for a, _ in pairs]).unique(dim=0)) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # depends on the cores of this machine
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_tasks_do_not_depend_on_workers(binary):
    options = dict(classes=[0, 1], train_classes=[2, 3, 4], episodes_per_epoch=2)
    loaders = [ready(binary, num_workers=n, **options).train_dataloader() for n in (0, 2)]
    for a, b in zip(*loaders, strict=True):
        assert all(torch.equal(a[name][:], b[name][:]) for name in a)


def test_dataset_can_be_pickled(binary):
    dataset = ready(binary).val_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(0, 3)]["inputs"][:], dataset[(0, 3)]["inputs"][:])


# ---- where the images are ----


def test_binary_files_come_before_image_folders(binary, tmp_path):
    for name in CLASSES:
        (tmp_path / "train" / name).mkdir(parents=True)
    (tmp_path / "cifar-10-batches-bin").symlink_to(binary / "cifar-10-batches-bin")
    data = ready(tmp_path)
    assert data.folder() == tmp_path / "cifar-10-batches-bin" and len(data._pools["test"][1].examples) == 200


def test_folders_directly_in_root(folders):
    data = ready(folders / "cifar10", download=True)  # and nothing is downloaded
    assert data.folder() == folders / "cifar10" and len(data._pools["test"][1].examples) == 200


def test_no_images(tmp_path):
    told = r"has neither cifar-10-batches-bin/data_batch_1.bin nor folders of images, .*or set download=True$"
    with pytest.raises(FileNotFoundError, match=told):
        ready(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["data_batch_4.bin", "test_batch.bin"])
def test_a_file_missing(tmp_path, name):
    write_binary(tmp_path)
    (tmp_path / "cifar-10-batches-bin" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"batches-bin has no {name}; put it there, or set download=True$"):
        ready(tmp_path)


def test_prepare_data_downloads_what_is_missing(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(cifar10_files, "download", asked.append)
    CIFAR10DataModule(tmp_path, download=False).prepare_data()
    assert asked == []
    CIFAR10DataModule(tmp_path).prepare_data()
    assert asked == [tmp_path]
    (tmp_path / "train/cat").mkdir(parents=True)
    CIFAR10DataModule(tmp_path).prepare_data()
    assert asked == [tmp_path]
    write_binary(tmp_path)
    (tmp_path / "cifar-10-batches-bin/test_batch.bin").unlink()
    CIFAR10DataModule(tmp_path).prepare_data()
    assert asked == [tmp_path, tmp_path]


def test_the_archive_that_is_downloaded_is_the_published_one():
    assert cifar10_files.CHECKSUM == "c32a1d4ab5d03f1284b67883e8d87530"
    (mirror,) = cifar10_files.MIRRORS
    assert mirror + cifar10_files.ARCHIVE == "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"


def test_constructor_touches_nothing(tmp_path):
    CIFAR10DataModule(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_sample_before_setup(binary):
    data = CIFAR10DataModule(binary, num_steps=2, classes=[0, 1], train_classes=[0, 1, 2])
    for loader in (data.train_dataloader(), data.val_dataloader()):
        with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
            next(iter(loader))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 101, "num_unseen": 0}, r"needs 101 val images, but .*bin has 100; use batch_size=100 or"),
        (
            {"batch_size": 9, "num_unseen": 12, "classes": ["cat", 5]},
            r"need 21 val images of the labels \[3, 5\], but .*bin has 20; use num_unseen=11 or fewer$",
        ),
        (
            {"batch_size": 101, "num_unseen": 0, "classes": [0, 1], "train_classes": [7, 8, 9]},
            r"needs 101 train images of any 2 of the labels \[7, 8, 9\], but .*bin has 100; use batch_size=100 or",
        ),
    ],
)
def test_too_few_images(binary, options, message):
    with pytest.raises(ValueError, match=message):
        ready(binary, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"classes": [0, 10]},
            ValueError,
            r"classes=\[0, 10\] has 10, which is no label; use 0 to 9, or airplane, aut",
        ),
        ({"classes": [0, "plane"]}, ValueError, r"has 'plane', which is no label; use 0 to 9, or airplane"),
        ({"classes": [0, True]}, ValueError, r"has True, which is no label"),
        ({"classes": [0, 1.0]}, ValueError, r"has 1.0, which is no label"),
        ({"classes": [3, "cat"]}, ValueError, r"classes=\[3, 'cat'\] has cat, label 3, twice; give it once$"),
        ({"classes": [3]}, ValueError, r"classes=\[3\] has too few labels to tell apart; give at least 2, or None"),
        ({"classes": []}, ValueError, r"classes=\[\] has too few labels"),
        ({"classes": "cat"}, TypeError, r"classes='cat' is a str; give a list of labels, such as \[0, 1, 2\]$"),
        ({"train_classes": 3}, TypeError, r"train_classes=3 is a int; give a list of labels"),
        (
            {"classes": [0, 1, 2], "train_classes": [3, 4]},
            ValueError,
            r"train_classes=\[3, 4\] are 2 labels and classes=\[0, 1, 2\] are 3; give train_classes at least as many",
        ),
        ({"train_classes": [3, 4]}, ValueError, r"train_classes=\[3, 4\] are 2 labels and classes=None are 10; give"),
    ],
)
def test_bad_labels(options, error, message):
    with pytest.raises(error, match=message) as caught:
        CIFAR10DataModule(**options)
    assert "\n" not in str(caught.value)


# ---- the command line ----

FLAGS = [
    "--data=CIFAR10DataModule",
    "--data.batch_size=8",
    "--data.num_tasks=2",
    "--data.num_val_tasks=2",
    "--data.num_test_tasks=2",
    "--data.num_unseen=4",
    "--data.episodes_per_epoch=2",
    "--model.task=NetworkTask",
    "--model.task.module=MLP",
    "--model.task.module.in_features=3072",
    "--model.task.module.hidden_size=2",
    "--model.num_steps=4",
    "--model.unroll_length=2",
    "--model.rule.hidden_size=3",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--trainer.log_every_n_steps=1",
]


def test_command_line(binary, in_tmp_path):
    flags = [f"--data.root={binary}", "--data.classes=[cat,5]", "--data.train_classes=[0,1,2]", "--data.download=false"]
    main(["fit", *FLAGS, *flags])
    run = Path("lightning_logs/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    assert saved["classes"] == ["cat", 5] and saved["train_classes"] == [0, 1, 2]
    main(["test", "--config", str(run / "config.yaml"), f"--ckpt_path={run / 'checkpoints/best.ckpt'}"])
    (table,) = Path().rglob("comparison.csv")
    with table.open() as file:
        assert len(list(csv.DictReader(file))) >= 5


def test_labels_in_yaml(binary, in_tmp_path):
    config = {"class_path": "lightning_l2l.CIFAR10DataModule", "init_args": {"classes": [0, 10]}}
    Path("labels.yaml").write_text(yaml.safe_dump({"data": config}))
    with pytest.raises(ValueError, match=r"classes=\[0, 10\] has 10, which is no label"):
        main(["fit", "--config", "labels.yaml"])
