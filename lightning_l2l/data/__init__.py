"""The data of the tasks: one batch holds everything that one episode of `num_tasks` tasks needs."""

from lightning_l2l.data.episodes import EpisodeDataModule
from lightning_l2l.data.mnist import MNISTDataModule
from lightning_l2l.data.quadratic import QuadraticDataModule

__all__ = ["EpisodeDataModule", "MNISTDataModule", "QuadraticDataModule"]
