"""What is optimised: tasks, the networks they train, and the starting points of episodes."""

from lightning_l2l.tasks.base import Task, check_losses, init_from_seeds
from lightning_l2l.tasks.convnet import ConvNet
from lightning_l2l.tasks.mlp import MLP
from lightning_l2l.tasks.network import NetworkTask
from lightning_l2l.tasks.quadratic import Quadratic
from lightning_l2l.tasks.transforms import ConvexTerm, RandomScaling

__all__ = [
    "MLP",
    "ConvNet",
    "ConvexTerm",
    "NetworkTask",
    "Quadratic",
    "RandomScaling",
    "Task",
    "check_losses",
    "init_from_seeds",
]
