"""Update rules: gradient, state -> update, state."""

from lightning_l2l.rules.base import RuleUnroll, UpdateRule
from lightning_l2l.rules.groups import RuleGroups
from lightning_l2l.rules.lstm import CoordinatewiseLSTM
from lightning_l2l.rules.normalized import NormalizedMLP
from lightning_l2l.rules.rnnprop import RNNprop
from lightning_l2l.rules.tensors import TensorRule

__all__ = ["CoordinatewiseLSTM", "NormalizedMLP", "RNNprop", "RuleGroups", "RuleUnroll", "TensorRule", "UpdateRule"]
