import hashlib
import os

import numpy as np
import pytest
import torch
from torch import nn

from lightning_l2l.data import MNISTDataModule, idx, write_digits

NAMES = sorted(idx.CHECKSUMS)


def read(root):
    """Training images and labels, test images and labels."""
    files = (f"{prefix}-{kind}-ubyte" for prefix in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
    return [idx.read_idx(idx.raw_folder(root) / name, 3 if "images" in name else 1) for name in files]


@pytest.fixture(scope="module")
def digits(mnist_root):
    return read(mnist_root)


def test_files_and_shapes(tmp_path):
    write_digits(tmp_path, num_train=1203, num_test=7)
    assert sorted(path.name for path in idx.raw_folder(tmp_path).iterdir()) == NAMES
    assert [path.name for path in (tmp_path / "MNIST").iterdir()] == ["raw"]
    shapes = [values.shape for values in read(tmp_path)]
    assert shapes == [(1203, 28, 28), (1203,), (7, 28, 28), (7,)]


def test_a_function_of_the_seed(tmp_path):
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        write_digits(tmp_path / name, num_train=60, num_test=20, seed=seed)
    folders = (idx.raw_folder(tmp_path / name) for name in ("one", "same", "other"))
    one, same, other = ([(folder / name).read_bytes() for name in NAMES] for folder in folders)
    assert one == same
    assert all(a != b for a, b in zip(one, other, strict=True))


def test_the_same_on_every_machine(tmp_path):
    # Found with numpy 1.26.4 and 2.4.6, with and without AVX instructions.
    write_digits(tmp_path, num_train=100, num_test=10)
    content = b"".join((idx.raw_folder(tmp_path) / name).read_bytes() for name in NAMES)
    assert hashlib.md5(content).hexdigest() == "89ba6cc78daf35d7ca31af1e31c70616"


def test_no_image_twice(digits):
    images = np.concatenate([digits[0], digits[2]]).reshape(-1, 784)
    assert len({image.tobytes() for image in images}) == len(images)


def test_classes_are_equally_frequent_and_in_random_order(digits):
    for labels in digits[1], digits[3]:
        assert (np.bincount(labels, minlength=10) == len(labels) // 10).all()
        assert len(np.unique(labels[:50])) > 5 and (np.diff(labels[:1000].astype(int)) != 1).sum() > 700
    # The validation images, the last sixth, have all classes too.
    assert np.bincount(digits[1][-1200:], minlength=10).min() > 80


def test_pixels_look_like_those_of_mnist(digits):
    pixels = digits[0] / 255
    assert 0.11 < pixels.mean() < 0.15 and 0.28 < pixels.std() < 0.33  # MNIST: 0.131 and 0.308
    assert 0.75 < (pixels == 0).mean() < 0.85  # MNIST: 0.81
    assert (pixels[:, 10:18, 10:18].max((1, 2)) > 0.5).mean() > 0.95  # in the middle
    assert pixels[:, [0, -1]].mean() < 0.03 and pixels[:, :, [0, -1]].mean() < 0.03  # hardly at the borders


def test_as_hard_for_a_small_network_as_mnist(digits):
    train, targets, test, test_targets = (torch.tensor(values) for values in digits)
    train, test = train.flatten(1) / 255, test.flatten(1) / 255
    # No pixel tells a class from the others: mean of the rates of hits in the class and outside it.
    on = torch.stack([(train[targets == k] > 0.5).float().mean(0) for k in range(10)])
    outside = (on.sum(0) - on) / 9
    assert 0.5 + (on - outside).abs().max() / 2 < 0.82  # MNIST: 0.82
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(784, 20), nn.Sigmoid(), nn.Linear(20, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(100):
        rows = torch.randint(len(train), (128,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(train[rows]), targets[rows].long()).backward()
        optimizer.step()
    with torch.no_grad():
        outputs = net(test)
    loss = nn.functional.cross_entropy(outputs, test_targets.long()).item()
    accuracy = (outputs.argmax(1) == test_targets).float().mean().item()
    assert 0.1 < loss < 0.6 and 0.8 < accuracy < 0.98  # MNIST: 0.33 and 0.91


def test_the_data_module_reads_them_by_default(mnist_root):
    data = MNISTDataModule(mnist_root, num_steps=3)  # download=True: nothing is missing
    data.prepare_data()
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["inputs"].shape == (1, 4, 128, 28, 28)


@pytest.mark.parametrize("name", [NAMES[0], f"{NAMES[3]}.gz"])
def test_nothing_is_overwritten(tmp_path, name):
    folder = idx.raw_folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / name).write_bytes(b"real")
    with pytest.raises(FileExistsError, match=rf"MNIST/raw has {name} already.*another root, or delete"):
        write_digits(tmp_path)
    assert [path.name for path in folder.iterdir()] == [name] and (folder / name).read_bytes() == b"real"


def test_an_empty_folder_is_filled(tmp_path):
    idx.raw_folder(tmp_path).mkdir(parents=True)
    write_digits(tmp_path, num_train=10, num_test=10)
    assert len(read(tmp_path)[1]) == 10


def test_all_files_or_none(tmp_path, monkeypatch):
    write = idx.write_idx

    def fail_at_labels(path, values):
        if values.ndim == 1:
            raise OSError("no space left")
        write(path, values)

    monkeypatch.setattr(idx, "write_idx", fail_at_labels)
    with pytest.raises(OSError, match="no space left"):
        write_digits(tmp_path, num_train=10, num_test=10)
    assert os.listdir(tmp_path / "MNIST") == []


@pytest.mark.parametrize("sizes", [{"num_train": 0}, {"num_test": -1}, {"seed": -1}])
def test_bad_sizes(tmp_path, sizes):
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name}=.* is not an integer of"):
        write_digits(tmp_path, **sizes)
    assert not (tmp_path / "MNIST").exists()
