"""The data of the tasks: one batch holds everything that one episode of `num_tasks` tasks needs."""

from lightning_l2l.data.cifar10 import CIFAR10DataModule
from lightning_l2l.data.dataset import DatasetDataModule
from lightning_l2l.data.digits import write_digits
from lightning_l2l.data.episodes import EpisodeDataModule
from lightning_l2l.data.generated import GeneratedDataModule
from lightning_l2l.data.images import ImageDataModule
from lightning_l2l.data.mixture import MixtureDataModule
from lightning_l2l.data.mnist import MNISTDataModule
from lightning_l2l.data.pools import PoolDataModule
from lightning_l2l.data.quadratic import QuadraticDataModule
from lightning_l2l.data.sequences import SequenceDataModule
from lightning_l2l.tasks.minibatches import Minibatches, Pool

__all__ = [
    "CIFAR10DataModule",
    "DatasetDataModule",
    "EpisodeDataModule",
    "GeneratedDataModule",
    "ImageDataModule",
    "MNISTDataModule",
    "Minibatches",
    "MixtureDataModule",
    "Pool",
    "PoolDataModule",
    "QuadraticDataModule",
    "SequenceDataModule",
    "write_digits",
]
