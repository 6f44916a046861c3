"""Fixtures that the tests of several folders use."""

import gzip

import numpy as np
import pytest


def write_idx(path, values):
    """Writes a uint8 array as a packed IDX file."""
    header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + values.tobytes(), compresslevel=1))


@pytest.fixture(scope="session")
def write_mnist():
    """A function that writes the four files of an MNIST-like data set and returns its root."""

    def write(root, train_images, train_labels, test_images, test_labels):
        raw = root / "MNIST" / "raw"
        raw.mkdir(parents=True)
        write_idx(raw / "train-images-idx3-ubyte.gz", train_images)
        write_idx(raw / "train-labels-idx1-ubyte.gz", train_labels)
        write_idx(raw / "t10k-images-idx3-ubyte.gz", test_images)
        write_idx(raw / "t10k-labels-idx1-ubyte.gz", test_labels)
        return root

    return write


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory, write_mnist):
    """Root of a stand-in for MNIST that can be learned: 10 prototypes with noise, 600 and 200 images."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (10, 28, 28))
    train_labels, test_labels = (rng.integers(0, 10, n).astype(np.uint8) for n in (600, 200))
    train_images, test_images = (
        np.clip(prototypes[labels] + rng.normal(0, 30, (len(labels), 28, 28)), 0, 255).astype(np.uint8)
        for labels in (train_labels, test_labels)
    )
    root = tmp_path_factory.mktemp("mnist")
    return write_mnist(root, train_images, train_labels, test_images, test_labels)
