"""Several rules side by side, each for the parameters whose names match its pattern."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from lightning_l2l.arguments import brief, check_type
from lightning_l2l.rules.base import UpdateRule

_NOT = "!"


class RuleGroups(UpdateRule):
    """One rule for some parameters, another for others: meta-trained together, saved and used as one.

    The paper's CIFAR-10 optimizer has one LSTM for the convolutions and another for the fully connected layers. A rule
    in a group keeps its own meta-parameters and its own state. Since parameters are told apart by their names,
    `LearnedOptimizer` wants them named: `LearnedOptimizer(model.named_parameters(), rule)`.

    Args:
        rules: Rule by pattern, as in a shell: `*` stands for any text, `?` for any letter, `[ab]` for one of them;
            a `!` at the beginning turns a pattern into its contrary. Every name has to match exactly one.

    Raises:
        ValueError: There is no rule, or no text for a pattern.
        TypeError: It is no dictionary, or a rule is none or is a group itself.

    Example:
        >>> from lightning_l2l import CoordinatewiseLSTM
        >>> rule = RuleGroups({"conv*": CoordinatewiseLSTM(hidden_size=4), "!conv*": CoordinatewiseLSTM(hidden_size=8)})
        >>> [(one.hidden_size, names) for one, names in rule.by_name(["conv.weight", "fc.weight", "conv.bias"])]
        [(4, ['conv.weight', 'conv.bias']), (8, ['fc.weight'])]

    References:
        Andrychowicz et al., Learning to learn by gradient descent by gradient descent, section 3.3,
        https://arxiv.org/abs/1606.04474, 2016.
    """

    def __init__(self, rules: dict[str, UpdateRule]) -> None:
        super().__init__()
        check_type(Mapping, "rules by pattern, such as {'conv*': ..., '!conv*': ...}", rules=rules)
        if not rules:
            raise ValueError("rules={} has no rule; give one by pattern, such as {'*': CoordinatewiseLSTM()}")
        for pattern, rule in rules.items():
            if not isinstance(pattern, str) or not pattern.removeprefix(_NOT):
                raise ValueError(f"rules has the pattern {brief(pattern)}; use a text such as 'conv*'")
            if not isinstance(rule, UpdateRule) or isinstance(rule, RuleGroups):
                raise TypeError(f"rules[{brief(pattern)}]={brief(rule)} is not one rule; give CoordinatewiseLSTM()")
        self.rules = dict(rules)
        self.members = nn.ModuleList(self.rules.values())  # patterns have dots, which no module's name may have

    def by_name(self, names: Iterable[str | None]) -> list[tuple[UpdateRule, list[Any]]]:
        """See `UpdateRule.by_name`.

        Raises:
            ValueError: A parameter has no name, or one that matches no pattern or several.
        """
        found: dict[UpdateRule, list[str]] = {rule: [] for rule in self.rules.values()}
        for name in names:
            if name is None:
                raise ValueError(
                    "a rule with groups tells parameters apart by their names, and there are none; give "
                    "model.named_parameters() in place of model.parameters()"
                )
            matching = [pattern for pattern in self.rules if _matches(name, pattern)]
            if len(matching) != 1:
                told = f"{', '.join(map(repr, matching))} at once" if matching else f"none of {', '.join(self.rules)}"
                remedy = "let one of them leave it out" if matching else "add a pattern for it"
                raise ValueError(f"the parameter {name!r} matches {told}, and each needs exactly one rule; {remedy}")
            found[self.rules[matching[0]]].append(name)
        return [(rule, named) for rule, named in found.items() if named]

    @property
    def state_size(self) -> int:
        """Not defined: each of the rules has its own.

        Raises:
            TypeError: Always.
        """
        raise TypeError("RuleGroups has no state_size; ask the rules that by_name gives")

    def forward(self, gradient: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Not defined: what to do with a gradient depends on whose it is.

        Raises:
            TypeError: Always.
        """
        raise TypeError("RuleGroups updates nothing by itself; ask the rules that by_name gives")


def rules_of(rule: UpdateRule, groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, UpdateRule]:
    """Which rule updates each parameter of an optimizer's groups: a matter of its name.

    Raises:
        ValueError: As `RuleGroups.by_name`.
    """
    of_name: dict[Any, list[Tensor]] = {}
    for group in groups:
        for name, p in zip(group.get("param_names", [None] * len(group["params"])), group["params"], strict=True):
            of_name.setdefault(name, []).append(p)
    return {p: one for one, names in rule.by_name(of_name) for name in names for p in of_name[name]}


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith(_NOT):
        return not fnmatchcase(name, pattern.removeprefix(_NOT))
    return fnmatchcase(name, pattern)
