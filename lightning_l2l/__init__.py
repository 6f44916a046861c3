"""Learning to learn by gradient descent by gradient descent, on PyTorch Lightning.

Each name is imported when it is first used, so that who wants an optimizer alone need not wait for Lightning.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_l2l.commands.main import main
    from lightning_l2l.data import (
        CIFAR10DataModule,
        DatasetDataModule,
        EpisodeDataModule,
        GeneratedDataModule,
        MixtureDataModule,
        MNISTDataModule,
        QuadraticDataModule,
        SequenceDataModule,
    )
    from lightning_l2l.evaluation.learning_curves import LearningCurves
    from lightning_l2l.evaluation.proposals import UpdateProposals
    from lightning_l2l.meta.curriculum import Curriculum
    from lightning_l2l.meta.evolution import EvolutionStrategies
    from lightning_l2l.meta.first_order import FirstOrder
    from lightning_l2l.meta.imitation import Imitation
    from lightning_l2l.meta.meta_optimizer import MetaOptimizer
    from lightning_l2l.meta.second_order import SecondOrder
    from lightning_l2l.optim import LearnedOptimizer
    from lightning_l2l.rules import CoordinatewiseLSTM, NormalizedMLP, RNNprop, RuleGroups, TensorRule, UpdateRule
    from lightning_l2l.rules.files import load_rule
    from lightning_l2l.tasks import (
        MLP,
        Autoencoder,
        ConvexTerm,
        ConvNet,
        GeneratedTask,
        Lasso,
        LogisticRegression,
        Mixture,
        NetworkTask,
        Quadratic,
        RandomScaling,
        Rastrigin,
        Rosenbrock,
        Task,
        Transformer,
    )

__version__ = "0.1.0"

#: Where the public names are, by module.
_HOMES = {
    "commands.main": ("main",),
    "data": (
        "CIFAR10DataModule",
        "DatasetDataModule",
        "EpisodeDataModule",
        "GeneratedDataModule",
        "MNISTDataModule",
        "MixtureDataModule",
        "QuadraticDataModule",
        "SequenceDataModule",
    ),
    "evaluation.learning_curves": ("LearningCurves",),
    "evaluation.proposals": ("UpdateProposals",),
    "meta.curriculum": ("Curriculum",),
    "meta.evolution": ("EvolutionStrategies",),
    "meta.first_order": ("FirstOrder",),
    "meta.imitation": ("Imitation",),
    "meta.meta_optimizer": ("MetaOptimizer",),
    "meta.second_order": ("SecondOrder",),
    "optim": ("LearnedOptimizer",),
    "rules": ("CoordinatewiseLSTM", "NormalizedMLP", "RNNprop", "RuleGroups", "TensorRule", "UpdateRule"),
    "rules.files": ("load_rule",),
    "tasks": (
        "MLP",
        "Autoencoder",
        "ConvNet",
        "ConvexTerm",
        "GeneratedTask",
        "Lasso",
        "LogisticRegression",
        "Mixture",
        "NetworkTask",
        "Quadratic",
        "RandomScaling",
        "Rastrigin",
        "Rosenbrock",
        "Task",
        "Transformer",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "MLP",
    "Autoencoder",
    "CIFAR10DataModule",
    "ConvNet",
    "ConvexTerm",
    "CoordinatewiseLSTM",
    "Curriculum",
    "DatasetDataModule",
    "EpisodeDataModule",
    "EvolutionStrategies",
    "FirstOrder",
    "GeneratedDataModule",
    "GeneratedTask",
    "Imitation",
    "Lasso",
    "LearnedOptimizer",
    "LearningCurves",
    "LogisticRegression",
    "MNISTDataModule",
    "MetaOptimizer",
    "Mixture",
    "MixtureDataModule",
    "NetworkTask",
    "NormalizedMLP",
    "Quadratic",
    "QuadraticDataModule",
    "RNNprop",
    "RandomScaling",
    "Rastrigin",
    "Rosenbrock",
    "RuleGroups",
    "SecondOrder",
    "SequenceDataModule",
    "Task",
    "TensorRule",
    "Transformer",
    "UpdateProposals",
    "UpdateRule",
    "__version__",
    "load_rule",
    "main",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = found  # the next time it is found without this function
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
