"""What is optimised: tasks, the networks they train, and the starting points of episodes."""

from lightning_l2l.tasks.base import GeneratedTask, Task, check_losses, init_from_seeds
from lightning_l2l.tasks.convnet import ConvNet
from lightning_l2l.tasks.landscapes import Rastrigin, Rosenbrock
from lightning_l2l.tasks.mlp import MLP, Autoencoder
from lightning_l2l.tasks.network import NetworkTask
from lightning_l2l.tasks.quadratic import Quadratic
from lightning_l2l.tasks.regression import Lasso, LogisticRegression
from lightning_l2l.tasks.transformer import Transformer
from lightning_l2l.tasks.transforms import ConvexTerm, Mixture, RandomScaling

__all__ = [
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
    "check_losses",
    "init_from_seeds",
]
