"""The data of the tasks: one batch holds everything that one episode of `num_tasks` tasks needs."""

from lightning_l2l.data.digits import write_digits
from lightning_l2l.data.episodes import EpisodeDataModule
from lightning_l2l.data.minibatches import Minibatches, Pool
from lightning_l2l.data.mnist import MNISTDataModule
from lightning_l2l.data.quadratic import QuadraticDataModule

__all__ = ["EpisodeDataModule", "MNISTDataModule", "Minibatches", "Pool", "QuadraticDataModule", "write_digits"]
