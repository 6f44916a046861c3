"""What `import lightning_l2l` gives, and how little of it an optimizer takes."""

import importlib.metadata
import statistics
import subprocess
import sys
import time

import pytest

import lightning_l2l

IMPORT = "from lightning_l2l import LearnedOptimizer, load_rule"
#: For training rules, the command line, figures and logs; packages as they are imported.
NOT_FOR_AN_OPTIMIZER = {
    "jsonargparse", "lightning", "lightning_fabric", "matplotlib", "pytorch_lightning", "rich", "tensorboard",
    "torchmetrics", "torchvision",
}  # fmt: skip
STEP = """
import torch
model = torch.nn.Linear(2, 1)
optimizer = LearnedOptimizer(model.parameters(), "mnist")
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert optimizer.state
"""


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("code", [IMPORT, IMPORT + STEP], ids=["import", "step"])
def test_an_optimizer_imports_nothing_that_only_training_a_rule_takes(code):
    imported = set(python(f"{code}\nimport sys\nprint(*sys.modules)").split())
    assert not NOT_FOR_AN_OPTIMIZER & {name.partition(".")[0] for name in imported}
    ours = {name.split(".")[1] for name in imported if name.startswith("lightning_l2l.")}
    assert ours == {"arguments", "optim", "rules"}


def test_the_package_itself_imports_nothing_of_what_it_has():
    assert python("import sys, lightning_l2l\nprint('torch' in sys.modules)").strip() == "False"


@pytest.mark.parametrize("name", lightning_l2l.__all__)
def test_every_public_name_is_there(name):
    found = getattr(lightning_l2l, name)
    assert name == "__version__" or found.__name__ == name


def test_public_names_are_listed_once_and_found_by_dir():
    assert len(set(lightning_l2l.__all__)) == len(lightning_l2l.__all__)
    assert set(lightning_l2l.__all__) <= set(dir(lightning_l2l))
    names = python("import lightning_l2l\nprint(*dir(lightning_l2l))").split()  # before any has been used
    assert set(lightning_l2l.__all__) <= set(names) and "__doc__" in names


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="module 'lightning_l2l' has no attribute 'LearnedOptimiser'"):
        _ = lightning_l2l.LearnedOptimiser


def test_the_version_is_that_of_the_distribution():
    assert lightning_l2l.__version__ == importlib.metadata.version("lightning-l2l")


@pytest.mark.benchmark
def test_import_time(benchmark, capsys):
    """Beside `import torch`, in fresh interpreters, in turn."""
    torch_alone = []

    def import_torch():
        start = time.perf_counter()
        python("import torch")
        torch_alone.append(time.perf_counter() - start)

    benchmark.pedantic(lambda: python(IMPORT), setup=import_torch, rounds=9, warmup_rounds=1)
    ours, other = benchmark.stats.stats.median, statistics.median(torch_alone[1:])
    with capsys.disabled():
        print(f"\nimport: {ours:.2f} s, {ours / other:.3f} x that of torch ({other:.2f} s)")
