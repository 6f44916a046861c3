import gzip
import os
import pickle

import numpy as np
import pytest
import torch

from lightning_l2l.data import MNISTDataModule, idx


def labels(n):
    return (np.arange(n) % 10).astype(np.uint8)


def marked(n, first):
    """Images that hold their own number, from `first`, in the first two pixels."""
    images = np.zeros((n, 28, 28), np.uint8)
    images[:, 0, 0], images[:, 0, 1] = np.divmod(np.arange(first, first + n), 256)
    return images


def marks(inputs):
    inputs = inputs[:]
    return inputs[..., 0, 0].int() * 256 + inputs[..., 0, 1].int()


@pytest.fixture
def marked_root(tmp_path, write_mnist):
    """600 training images with the numbers 0 to 599, 200 test images with the numbers 600 to 799."""
    return write_mnist(tmp_path, marked(600, 0), labels(600), marked(200, 600), labels(200))


def ready(root, **kwargs):
    defaults = dict(num_tasks=2, batch_size=8, num_steps=4, download=False, num_unseen=12)
    data = MNISTDataModule(root, **defaults | kwargs)
    data.prepare_data()
    data.setup()
    return data


TRAINED_ON = {
    "inputs": (torch.uint8, (2, 5, 8, 28, 28)),
    "targets": (torch.uint8, (2, 5, 8)),
    "seed": (torch.int64, (2,)),
}
UNSEEN = {"unseen_inputs": (torch.uint8, (2, 12, 28, 28)), "unseen_targets": (torch.uint8, (2, 12))}


@pytest.mark.parametrize(
    ("stage", "num_unseen", "expected"),
    [
        ("train", 12, TRAINED_ON),
        ("val", 12, TRAINED_ON | UNSEEN),
        ("test", 12, TRAINED_ON | UNSEEN),
        ("val", 0, TRAINED_ON),
        ("test", 0, TRAINED_ON),
    ],
)
def test_batch(mnist_root, stage, num_unseen, expected):
    batch = next(iter(getattr(ready(mnist_root, num_unseen=num_unseen), f"{stage}_dataloader")()))
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == expected


def test_stages_have_no_image_in_common(marked_root):
    data = ready(marked_root, num_steps=60, num_val_tasks=2, num_test_tasks=2, episodes_per_epoch=1)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    batches = {stage: next(iter(loader)) for stage, loader in loaders.items()}
    seen = {stage: set(marks(batch["inputs"]).flatten().tolist()) for stage, batch in batches.items()}
    unseen = {stage: set(marks(batches[stage]["unseen_inputs"]).flatten().tolist()) for stage in ("val", "test")}
    # 61 minibatches of 8 images cannot use all of the 500 training images, two tasks nearly can.
    assert seen["train"] <= set(range(500)) and len(seen["train"]) > 480
    assert seen["val"] | unseen["val"] == set(range(500, 600))
    assert seen["test"] | unseen["test"] == set(range(600, 800))


@pytest.mark.parametrize("stage", ["val", "test"])
def test_unseen_images_are_in_no_minibatch_of_their_task(marked_root, stage):
    # 100 or 200 images less 12 make 11 or 23 minibatches of 8: 61 need several permutations.
    data = ready(marked_root, num_steps=60, num_val_tasks=3, num_test_tasks=3, num_tasks=3)
    batch = next(iter(getattr(data, f"{stage}_dataloader")()))
    numbers = marks(batch["unseen_inputs"])
    assert torch.equal(batch["unseen_targets"], (numbers % 10).byte())
    assert len({tuple(task.tolist()) for task in numbers}) == 3
    total = {"val": 100, "test": 200}[stage]
    for unseen, seen in zip(numbers, marks(batch["inputs"]), strict=True):
        assert len(unseen.unique()) == 12
        assert len(seen.unique()) == total - 12 and not torch.isin(seen, unseen).any()


def test_training_uses_every_image(marked_root):
    data = ready(marked_root, num_steps=150, num_tasks=1, num_unseen=50)
    assert len(marks(next(iter(data.train_dataloader()))["inputs"]).unique()) == 500


def test_images_keep_their_labels(marked_root):
    batch = next(iter(ready(marked_root).train_dataloader()))
    assert torch.equal(batch["targets"][:], (marks(batch["inputs"]) % 10).byte())


def test_draws_without_replacement(marked_root):
    # 100 validation images less 50 make 6 minibatches of 8; then a fresh permutation begins.
    drawn = marks(next(iter(ready(marked_root, num_steps=13, num_unseen=50).val_dataloader()))["inputs"][0])
    assert drawn.shape == (14, 8)
    for permutation in (drawn[:6], drawn[6:12], drawn[12:]):
        assert len(permutation.unique()) == permutation.numel()
    assert not torch.equal(drawn[:6], drawn[6:12])


def test_tasks_are_reproducible_and_differ(marked_root):
    first, second = (ready(marked_root, episodes_per_epoch=2).train_dataloader() for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    assert all(torch.equal(a["inputs"][:], b["inputs"][:]) for a, b in pairs)
    tasks = torch.cat([marks(a["inputs"]) for a, _ in pairs])
    assert len(tasks.unique(dim=0)) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # depends on the cores of this machine
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_tasks_do_not_depend_on_workers(mnist_root):
    loaders = [ready(mnist_root, num_workers=n, num_val_tasks=5).val_dataloader() for n in (0, 2)]
    for a, b in zip(*loaders, strict=True):
        assert all(torch.equal(a[name][:], b[name][:]) for name in a)


def test_dataset_can_be_pickled(mnist_root):
    dataset = ready(mnist_root).val_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(0, 3)]["inputs"][:], dataset[(0, 3)]["inputs"][:])


def test_unpacked_files_in_a_read_only_root(tmp_path, write_mnist):
    root = write_mnist(tmp_path, marked(24, 0), labels(24), marked(8, 24), labels(8))
    folder = idx.raw_folder(root)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    os.chmod(folder, 0o555)
    try:
        data = ready(root, batch_size=2, download=True, num_unseen=2)
    finally:
        os.chmod(folder, 0o755)
    assert len(next(iter(data.test_dataloader()))["seed"]) == 2


def test_constructor_touches_nothing(tmp_path):
    MNISTDataModule(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MNIST/raw has no train-images-idx3-ubyte.*download=True"):
        ready(tmp_path)


def test_sample_before_setup(mnist_root):
    loader = MNISTDataModule(mnist_root, num_steps=2).train_dataloader()
    with pytest.raises(RuntimeError, match=r"call prepare_data\(\) and setup\(\) first"):
        next(iter(loader))


@pytest.mark.parametrize(
    ("batch_size", "num_unseen", "message"),
    [
        (101, 0, r"batch_size=101 needs 101 val images, but .*raw has 100; use batch_size=100 or fewer$"),
        (9, 92, r"batch_size=9 and num_unseen=92 need 101 val images, .* has 100; use num_unseen=91 or fewer$"),
        (101, 1, r"and num_unseen=1 need 102 val images, .*; use batch_size=100 or fewer, and num_unseen=0$"),
        (501, 0, r"batch_size=501 needs 501 train images, but .* has 500; use batch_size=500 or fewer$"),
    ],
)
def test_too_few_images(marked_root, batch_size, num_unseen, message):
    with pytest.raises(ValueError, match=message):
        ready(marked_root, batch_size=batch_size, num_unseen=num_unseen)


@pytest.mark.parametrize(("num_test", "remedy"), [(19, "use num_unseen=11 or fewer"), (0, "put the full data set")])
def test_too_few_test_images(tmp_path, write_mnist, num_test, remedy):
    root = write_mnist(tmp_path, marked(600, 0), labels(600), marked(num_test, 0), labels(num_test))
    with pytest.raises(ValueError, match=f"test images, but .* has {num_test}; {remedy}"):
        ready(root)


def test_exactly_enough_images(marked_root):
    batch = next(iter(ready(marked_root, batch_size=8, num_unseen=92).val_dataloader()))
    for unseen, seen in zip(marks(batch["unseen_inputs"]), marks(batch["inputs"]), strict=True):
        assert torch.equal(torch.cat([unseen, seen[-1]]).sort().values, torch.arange(500, 600, dtype=torch.int32))


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (marked(600, 0)[:, :, :27], labels(600), r"train-images.* of \(28, 27\) pixels, expected \(28, 28\)"),
        (marked(600, 0), labels(599), "train-labels.* has 599 labels, expected 600"),
        (marked(600, 0), labels(600) + 1, "train-labels.* has the label 10, expected 0 to 9"),
    ],
)
def test_wrong_content(tmp_path, write_mnist, images, targets, message):
    root = write_mnist(tmp_path, images, targets, marked(200, 0), labels(200))
    with pytest.raises(ValueError, match=f"{message}.*; delete it and download it again"):
        ready(root)


def test_bad_num_unseen():
    with pytest.raises(ValueError, match="num_unseen=-1 is not an integer of 0 or more"):
        MNISTDataModule(num_unseen=-1)


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size=0 is not an integer of 1 or more"):
        MNISTDataModule(batch_size=0)


def test_images_of_another_size_are_means_over_areas(tmp_path, write_mnist):
    images = np.random.default_rng(0).integers(0, 256, (600, 28, 28)).astype(np.uint8)
    root = write_mnist(tmp_path, images, labels(600), images[:200], labels(200))
    small, whole = (ready(root, image_size=size).train_dataloader() for size in (14, None))
    for ours, given in zip(small, whole, strict=True):
        blocks = given["inputs"][:].float().unflatten(-1, (14, 2)).unflatten(-3, (14, 2)).mean((-1, -3))
        assert ours["inputs"].shape == (2, 5, 8, 14, 14)
        assert (ours["inputs"][:].float() - blocks).abs().max() <= 0.5
        assert torch.equal(ours["targets"][:], given["targets"][:])
        break
    eight = next(iter(ready(root, image_size=8).test_dataloader()))
    assert eight["inputs"].shape[3:] == eight["unseen_inputs"].shape[2:] == (8, 8)


@pytest.mark.parametrize(
    ("size", "message"), [(29, "image_size=29 exceeds the 28 pixels of an image"), (0, "image_size=0")]
)
def test_bad_image_size(mnist_root, size, message):
    with pytest.raises(ValueError, match=message):
        ready(mnist_root, image_size=size)
