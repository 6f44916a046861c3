"""The grids of tasks on which `python -m lightning_l2l map` runs a rule."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml  # type: ignore[import-untyped]

#: Adam as those have it who tune nothing, beside the tuned optimizers; see `comparison.Baseline`.
DEFAULT_ADAM = "adam_default"
_DEFAULT = f"{{name: {DEFAULT_ADAM}, optimizer: torch.optim.Adam, lr: 0.001}}"
_FLAG = "--curves.baselines="
_ALL = ("adam", "rmsprop", "sgd", "nag", "adamw")
#: For networks, where tuning takes hours, without those that are hardly ever the best of these.
_THREE = ("adam", "rmsprop", "nag")


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

    def where(self, down: str, across: str) -> dict[str, str]:
        """What tells a cell from all others in `map.csv`."""
        return {"grid": self.name, self.down.name: down, self.across.name: across}

    def cells(self) -> Iterator[tuple[dict[str, str], list[str]]]:
        """Each cell: `where` it is, and its flags of `test`."""
        for down, flags in self.down.values.items():
            for across, more in self.across.values.items():
                yield self.where(down, across), [*self.flags, *flags, *more]


def _beside(names: Sequence[str]) -> str:
    """The flag of `test` that compares with baselines, and with Adam at its default learning rate."""
    return f"{_FLAG}[{', '.join(names)}, {_DEFAULT}]"


def tuned(flags: Sequence[str]) -> list[str]:
    """Names of the baselines that a cell with these flags has tuned; the last flag counts."""
    given = [flag.removeprefix(_FLAG) for flag in flags if flag.startswith(_FLAG)]
    return [baseline for baseline in yaml.safe_load(given[-1]) if isinstance(baseline, str)]


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


def pages(root: Path, *, small: bool = False, baselines: Sequence[str] = ()) -> list[Page]:
    """The map's grids.

    Args:
        root: Folder of the data sets.
        small: Fewer cells, steps and tasks: to see whether everything runs.
        baselines: Names of built-in ones, tuned in every cell; none: Adam, RMSprop and NAG in the cells with networks,
            SGD and AdamW as well in all others and on CIFAR-10 with ten classes.
    """
    some, few, many = (
        (_tasks(2, 8), _tasks(2, 8), _tasks(16, 32)) if small else (_tasks(8, 16), _tasks(4, 8), _tasks(64, 128))
    )
    every, three = _beside(baselines or _ALL), _beside(baselines or _THREE)
    network = [three, *_network("MLP"), *_images("MNIST", root), "--model.final_steps=10"]
    quadratics = [every, "--model.task=lightning_l2l.Quadratic", "--data=lightning_l2l.QuadraticDataModule", *many]
    layer = "model.task.module"
    activations, depths = ["sigmoid", "tanh", "relu", "elu", "gelu"], ["1", "2", "3"]
    widths, scales = ["5", "20", "80"], ["null", "0.03", "0.1", "0.3", "1.0"]
    horizons, batches, dims = ["100", "300", "1000", "3000", "10000"], ["32", "128"], ["2", "10", "50"]
    if small:
        activations, depths, widths, scales = activations[:3], depths[:1], widths[:2], scales[:1]
        horizons, batches, dims = ["20", "40"], ["32"], dims[:2]
    dimension = Axis("dimension", {dim: [f"--model.task.dim={dim}", f"--data.dim={dim}"] for dim in dims})
    steps = Axis.of("inner steps", "model.num_steps", *horizons)
    classes = {str(k): _classes(k, every if k == 10 else three) for k in ([2] if small else [10, 5, 2])}
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
            [three, "--model.final_steps=10"],
            Axis.of("inner steps", "model.num_steps", *horizons[:2] if small else ["100", "1000"]),
            Axis("optimizee", _suite(root, every, small=small)),
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
            Axis("classes", classes),
        ),
    ]


def _classes(number: int, baselines: str) -> list[str]:
    return [baselines, f"--data.classes={list(range(number))}", f"--model.task.module.out_features={number}"]


def _suite(root: Path, every: str, *, small: bool) -> dict[str, list[str]]:
    """Small optimizees of many kinds: none of them is one that a shipped rule is meta-trained on.

    Chosen before a rule was run on them.
    """
    many, some, few = (_tasks(4, 8),) * 2 + (_tasks(2, 2),) if small else (_tasks(64, 128), _tasks(8, 16), _tasks(4, 8))
    generated = [every, "--data=lightning_l2l.GeneratedDataModule", *many]
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
