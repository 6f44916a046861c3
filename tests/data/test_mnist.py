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
    return inputs[..., 0, 0].int() * 256 + inputs[..., 0, 1].int()


@pytest.fixture
def marked_root(tmp_path, write_mnist):
    """600 training images with the numbers 0 to 599, 200 test images with the numbers 600 to 799."""
    return write_mnist(tmp_path, marked(600, 0), labels(600), marked(200, 600), labels(200))


def ready(root, **kwargs):
    data = MNISTDataModule(root, **dict(num_tasks=2, batch_size=8, num_steps=4, download=False) | kwargs)
    data.prepare_data()
    data.setup()
    return data


def test_batch(mnist_root):
    batch = next(iter(ready(mnist_root).train_dataloader()))
    assert {name: (values.dtype, tuple(values.shape)) for name, values in batch.items()} == {
        "inputs": (torch.uint8, (2, 5, 8, 28, 28)),
        "targets": (torch.uint8, (2, 5, 8)),
        "seed": (torch.int64, (2,)),
    }


def test_stages_have_no_image_in_common(marked_root):
    data = ready(marked_root, num_steps=60, num_val_tasks=2, num_test_tasks=2, episodes_per_epoch=1)
    loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
    seen = {stage: set(marks(next(iter(loader))["inputs"]).flatten().tolist()) for stage, loader in loaders.items()}
    # 61 minibatches of 8 images cannot use all of the 550 training images, two tasks nearly can.
    assert seen["train"] <= set(range(550)) and len(seen["train"]) > 500
    assert seen["val"] == set(range(550, 600))
    assert seen["test"] == set(range(600, 800))


def test_images_keep_their_labels(marked_root):
    batch = next(iter(ready(marked_root).train_dataloader()))
    assert torch.equal(batch["targets"], (marks(batch["inputs"]) % 10).byte())


def test_draws_without_replacement(marked_root):
    # 50 validation images make 6 minibatches of 8; then a fresh permutation begins.
    drawn = marks(next(iter(ready(marked_root, num_steps=13).val_dataloader()))["inputs"][0])
    assert drawn.shape == (14, 8)
    for permutation in (drawn[:6], drawn[6:12], drawn[12:]):
        assert len(permutation.unique()) == permutation.numel()
    assert not torch.equal(drawn[:6], drawn[6:12])


def test_tasks_are_reproducible_and_differ(marked_root):
    first, second = (ready(marked_root, episodes_per_epoch=2).train_dataloader() for _ in range(2))
    pairs = list(zip(first, second, strict=True))
    assert all(torch.equal(a["inputs"], b["inputs"]) for a, b in pairs)
    tasks = torch.cat([marks(a["inputs"]) for a, _ in pairs])
    assert len(tasks.unique(dim=0)) == 4


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # depends on the cores of this machine
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # Python 3.12
def test_tasks_do_not_depend_on_workers(mnist_root):
    loaders = [ready(mnist_root, num_workers=n, num_val_tasks=5).val_dataloader() for n in (0, 2)]
    for a, b in zip(*loaders, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_dataset_can_be_pickled(mnist_root):
    dataset = ready(mnist_root).val_dataloader().dataset
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[(0, 3)]["inputs"], dataset[(0, 3)]["inputs"])


def test_unpacked_files_in_a_read_only_root(tmp_path, write_mnist):
    root = write_mnist(tmp_path, marked(24, 0), labels(24), marked(8, 24), labels(8))
    folder = idx.raw_folder(root)
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    os.chmod(folder, 0o555)
    try:
        data = ready(root, batch_size=2, download=True)
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


@pytest.mark.parametrize(("stage", "batch_size", "available"), [("val", 51, 50), ("test", 201, 200)])
def test_too_few_images(tmp_path, write_mnist, stage, batch_size, available):
    num_train = 600 if stage == "val" else 12 * 300
    root = write_mnist(tmp_path, marked(num_train, 0), labels(num_train), marked(200, 0), labels(200))
    with pytest.raises(ValueError, match=f"batch_size={batch_size} .* {stage} .*; use batch_size={available} or"):
        ready(root, batch_size=batch_size)


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


def test_bad_batch_size():
    with pytest.raises(ValueError, match="batch_size=0 is not an integer of 1 or more"):
        MNISTDataModule(batch_size=0)
