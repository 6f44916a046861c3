"""Learning to learn by gradient descent by gradient descent, on PyTorch Lightning."""

from lightning_l2l.cli import main
from lightning_l2l.data import (
    CIFAR10DataModule,
    GeneratedDataModule,
    MixtureDataModule,
    MNISTDataModule,
    QuadraticDataModule,
    SequenceDataModule,
)
from lightning_l2l.meta_optimizer import MetaOptimizer
from lightning_l2l.optim import LearnedOptimizer
from lightning_l2l.rule_files import load_rule
from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop, RuleGroups, UpdateRule
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

__all__ = [
    "MLP",
    "Autoencoder",
    "CIFAR10DataModule",
    "ConvNet",
    "ConvexTerm",
    "CoordinatewiseLSTM",
    "GeneratedDataModule",
    "GeneratedTask",
    "Lasso",
    "LearnedOptimizer",
    "LogisticRegression",
    "MNISTDataModule",
    "MetaOptimizer",
    "Mixture",
    "MixtureDataModule",
    "NetworkTask",
    "Quadratic",
    "QuadraticDataModule",
    "RNNprop",
    "RandomScaling",
    "Rastrigin",
    "Rosenbrock",
    "RuleGroups",
    "SequenceDataModule",
    "Task",
    "Transformer",
    "UpdateRule",
    "load_rule",
    "main",
]
