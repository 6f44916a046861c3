"""Update rules: gradient, state -> update, state."""

from lightning_l2l.rules.base import RuleUnroll, UpdateRule
from lightning_l2l.rules.lstm import CoordinatewiseLSTM

__all__ = ["CoordinatewiseLSTM", "RuleUnroll", "UpdateRule"]
