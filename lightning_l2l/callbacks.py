"""Placeholder while this file is being written."""

from lightning.pytorch import Callback


class LearningCurves(Callback):
    """Placeholder."""
