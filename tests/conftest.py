"""Fixtures that the tests of several folders use."""

import gzip
import os
import sys

import hypothesis
import numpy as np
import pytest
import torch

from lightning_l2l.data import write_digits
from optimizers import MAKERS

if "PYTEST_XDIST_WORKER" in os.environ:  # with the others' threads, two-thread products wait for cores
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
    torch.set_num_threads(1)

# The same examples in every run, and few of them: `--hypothesis-profile campaign` looks further.
hypothesis.settings.register_profile("repeatable", max_examples=50, derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("campaign", max_examples=3000, deadline=None, print_blob=True)
hypothesis.settings.load_profile("repeatable")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


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
def mnist_root(tmp_path_factory):
    """Root of a stand-in for MNIST that can be learned; not to be written to."""
    root = tmp_path_factory.mktemp("mnist")
    write_digits(root)
    return root


@pytest.fixture
def in_tmp_path(tmp_path, monkeypatch):
    """A folder of the test's own to work in, as an untouched command line would."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])  # LightningCLI minds arguments beside main's own
    return tmp_path


@pytest.fixture(params=MAKERS, ids=lambda make: make.__name__)
def make(request):
    """Makes an optimizer of parameters and options: a LearnedOptimizer, whatever its rule, or Adam."""
    return request.param
