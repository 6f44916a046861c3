"""Learning to learn by gradient descent by gradient descent, on PyTorch Lightning."""

from lightning_l2l.cli import main
from lightning_l2l.data import CIFAR10DataModule, MNISTDataModule, QuadraticDataModule
from lightning_l2l.meta_optimizer import MetaOptimizer
from lightning_l2l.optim import LearnedOptimizer
from lightning_l2l.rule_files import load_rule
from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop, RuleGroups, UpdateRule
from lightning_l2l.tasks import MLP, ConvexTerm, ConvNet, NetworkTask, Quadratic, RandomScaling, Task

__all__ = [
    "MLP",
    "CIFAR10DataModule",
    "ConvNet",
    "ConvexTerm",
    "CoordinatewiseLSTM",
    "LearnedOptimizer",
    "MNISTDataModule",
    "MetaOptimizer",
    "NetworkTask",
    "Quadratic",
    "QuadraticDataModule",
    "RNNprop",
    "RandomScaling",
    "RuleGroups",
    "Task",
    "UpdateRule",
    "load_rule",
    "main",
]
