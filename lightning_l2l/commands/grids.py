"""The grids of tasks on which `python -m lightning_l2l map` runs a rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Adam as those have it who tune nothing, beside the tuned optimizers; see `comparison.Baseline`.
DEFAULT_ADAM = "adam_default"
_DEFAULT = f"{{name: {DEFAULT_ADAM}, optimizer: torch.optim.Adam, lr: 0.001}}"
_ALL = f"--curves.baselines=[adam, rmsprop, sgd, nag, adamw, {_DEFAULT}]"
#: For networks, where tuning takes hours, without those that are hardly ever the best of these.
_THREE = f"--curves.baselines=[adam, rmsprop, nag, {_DEFAULT}]"


@dataclass(frozen=True)
class Axis:
    """One property of a task.

    Attributes:
        name: As it is shown.
        values: Value, as it is shown -> flags of `test` that set it.
    """

    name: str
    values: Mapping[str, Sequence[str]]

    @classmethod
    def of(cls, name: str, field: str, *values: str) -> Axis:
        """That of a single field of the configuration."""
        return cls(name, {value: [f"--{field}={value}"] for value in values})


@dataclass(frozen=True)
class Page:
    """A grid of two properties.

    Attributes:
        name: As it is shown.
        flags: Of `test`, for all cells.
        across: Property by columns.
        down: Property by rows.
    """

    name: str
    flags: Sequence[str]
    across: Axis
    down: Axis


def _tasks(num_val: int, num_test: int) -> list[str]:
    return [
        f"--data.num_val_tasks={num_val}",
        f"--data.num_test_tasks={num_test}",
        f"--data.eval_tasks={max(num_val, num_test)}",
    ]


def _network(name: str, *flags: str) -> list[str]:
    """A network and arguments of its constructor."""
    module = "--model.task.module"
    return [
        "--model.task=lightning_l2l.NetworkTask",
        f"{module}=lightning_l2l.{name}",
        *(f"{module}.{f}" for f in flags),
    ]


def _images(name: str, root: Path) -> list[str]:
    """A data module of images, none of which it sets aside."""
    return [f"--data=lightning_l2l.{name}DataModule", f"--data.root={root}", "--data.num_unseen=0"]


def pages(root: Path, *, small: bool = False) -> list[Page]:
    """The map's grids.

    Args:
        root: Folder of the data sets.
        small: Fewer cells, steps and tasks: to see whether everything runs.
    """
    some, few, many = (
        (_tasks(2, 8), _tasks(2, 8), _tasks(16, 32)) if small else (_tasks(8, 16), _tasks(4, 8), _tasks(64, 128))
    )
    network = [_THREE, *_network("MLP"), *_images("MNIST", root), "--model.final_steps=10"]
    quadratics = [_ALL, "--model.task=lightning_l2l.Quadratic", "--data=lightning_l2l.QuadraticDataModule", *many]
    layer = "model.task.module"
    activations, depths = ["sigmoid", "tanh", "relu", "elu", "gelu"], ["1", "2", "3"]
    widths, scales = ["5", "20", "80"], ["null", "0.03", "0.1", "0.3", "1.0"]
    horizons, batches, dims = ["100", "300", "1000", "3000", "10000"], ["32", "128"], ["2", "10", "50"]
    if small:
        activations, depths, widths, scales = activations[:3], depths[:1], widths[:2], scales[:1]
        horizons, batches, dims = ["20", "40"], ["32"], dims[:2]
    dimension = Axis("dimension", {dim: [f"--model.task.dim={dim}", f"--data.dim={dim}"] for dim in dims})
    steps = Axis.of("inner steps", "model.num_steps", *horizons)
    short = [*network, *some, "--model.num_steps=20"] if small else [*network, *some]
    return [
        Page(
            "MLP on MNIST: activation and hidden layers",
            short,
            Axis.of("activation", f"{layer}.activation", *activations),
            Axis.of("hidden layers", f"{layer}.num_layers", *depths),
        ),
        Page(
            "MLP on MNIST: initial scale and hidden units",
            short,
            Axis.of("standard deviation of the start (null: PyTorch's)", "model.task.init_scale", *scales),
            Axis.of("hidden units", f"{layer}.hidden_size", *widths),
        ),
        Page(
            "MLP on MNIST: inner steps and batch size",
            [*network, *few],
            Axis.of("inner steps", "model.num_steps", *horizons[:: 1 if small else 2]),
            Axis.of("batch", "data.batch_size", *batches),
        ),
        Page("Quadratics: inner steps and dimension", quadratics, steps, dimension),
        Page(
            "Suite: optimizees and inner steps",
            [_THREE, "--model.final_steps=10"],
            Axis.of("inner steps", "model.num_steps", *horizons[:2] if small else ["100", "1000"]),
            Axis("optimizee", _suite(root, small=small)),
        ),
        Page(
            "ConvNet on CIFAR-10: classes and inner steps",
            [
                *_network("ConvNet", f"channels={2 if small else 8}"),
                *_images("CIFAR10", root),
                "--model.final_steps=10",
                *(_tasks(2, 2) if small else _tasks(2, 8)),
            ],
            Axis.of("inner steps", "model.num_steps", *(["20"] if small else ["100", "1000"])),
            Axis("classes", {number: _classes(int(number)) for number in (["2"] if small else ["10", "5", "2"])}),
        ),
    ]


def _classes(number: int) -> list[str]:
    baselines = _ALL if number == 10 else _THREE
    return [baselines, f"--data.classes={list(range(number))}", f"--model.task.module.out_features={number}"]


def _suite(root: Path, *, small: bool) -> dict[str, list[str]]:
    """Small optimizees of many kinds: none of them is one that a shipped rule is meta-trained on.

    Chosen before a rule was run on them.
    """
    many, some, few = (_tasks(4, 8),) * 2 + (_tasks(2, 2),) if small else (_tasks(64, 128), _tasks(8, 16), _tasks(4, 8))
    generated = [_ALL, "--data=lightning_l2l.GeneratedDataModule", *many]
    mnist = [*_images("MNIST", root), *some]
    sequences = ["--data=lightning_l2l.SequenceDataModule", "--data.vocab_size=8", "--data.num_unseen=0", *some]
    cifar10 = [*_images("CIFAR10", root), "--data.batch_size=32", *few]

    def task(name: str, *flags: str) -> list[str]:
        return [f"--model.task=lightning_l2l.{name}", *(f"--model.task.{flag}" for flag in flags)]

    found = {
        "Rosenbrock, 2": [*task("Rosenbrock", "dim=2"), *generated],
        "Rosenbrock, 10": [*task("Rosenbrock", "dim=10"), *generated],
        "Lasso, 50 features": [*task("Lasso", "num_features=50", "num_measurements=25"), *generated],
        "logistic regression, 50 features": [*task("LogisticRegression", "num_features=50"), *generated],
        "MLP, ReLU, batch 32": [*_network("MLP", "activation=relu"), *mnist, "--data.batch_size=32"],
        "MLP, tanh, 2 layers of 40": [
            *_network("MLP", "activation=tanh", "num_layers=2", "hidden_size=40"),
            *mnist,
        ],
        "MLP, GELU, 3 layers": [*_network("MLP", "activation=gelu", "num_layers=3"), *mnist],
        "MLP, ELU, Gaussian start": [*_network("MLP", "activation=elu"), "--model.task.init_scale=0.1", *mnist],
        "softmax regression": [*_network("MLP", "num_layers=0"), *mnist],
        "autoencoder": [
            *_network("Autoencoder", "hidden_size=16"),
            "--model.task.loss_fn=torch.nn.functional.mse_loss",
            "--model.task.reconstruct=true",
            *mnist,
            "--data.batch_size=32",
        ],
        "transformer": [*_network("Transformer", "vocab_size=8", "hidden_size=8"), *sequences, "--data.order=1"],
        "transformer, 2 layers": [
            *_network("Transformer", "vocab_size=8", "hidden_size=16", "num_layers=2"),
            *sequences,
            "--data.order=2",
        ],
        "ConvNet": [*_network("ConvNet", "channels=4", "batch_norm=false"), *cifar10],
        "ConvNet, batch norm": [*_network("ConvNet", "channels=4"), *cifar10],
    }
    return {name: found[name] for name in list(found)[:: 5 if small else 1]}
