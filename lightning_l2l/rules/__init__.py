"""Update rules: gradient, state -> update, state."""

from lightning_l2l.rules.base import RuleUnroll, UpdateRule
from lightning_l2l.rules.groups import RuleGroups
from lightning_l2l.rules.lstm import CoordinatewiseLSTM
from lightning_l2l.rules.rnnprop import RNNprop

__all__ = ["CoordinatewiseLSTM", "RNNprop", "RuleGroups", "RuleUnroll", "UpdateRule"]
