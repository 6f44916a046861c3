"""`python -m lightning_l2l export`: the rule of a run as a small file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_l2l.commands.errors import PROG, OneLineParser
from lightning_l2l.rules.base import UpdateRule
from lightning_l2l.rules.describe import describe, signature_of
from lightning_l2l.rules.files import fill_rule, load_rule, save_rule
from lightning_l2l.runs.resume import NEWEST, newest_last


def export(
    ckpt_path: str,
    output: Path,
    init_args: dict[str, Any] | None = None,
    average_with: list[str] | None = None,
) -> None:
    """Write the rule of a checkpoint to a file of some 20 kB that `load_rule` reads.

    Args:
        ckpt_path: A checkpoint, the name of a shipped rule, or "last" for the newest run under this folder.
        output: Where to, with the suffix .npz; an existing file is replaced.
        init_args: Arguments of the rule that are to be others, such as {decay: 1000}; its weights have to fit them.
        average_with: Checkpoints of other runs, [a.ckpt, b.ckpt]: the mean of all their meta-parameters is written.
            For runs from one start with other seeds, whose mean has less of their noise.

    Raises:
        ValueError: Rules to average differ in more than their meta-parameters.

    References:
        Wortsman et al., Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time, https://arxiv.org/abs/2203.05482, 2022.
    """
    paths = [str(newest_last(Path())) if ckpt_path == NEWEST else ckpt_path, *(average_with or [])]
    rules = {path: load_rule(path) for path in paths}
    rule = _mean(rules) if average_with else rules[paths[0]]
    if init_args:
        described = describe(rule)
        described["init_args"] |= init_args
        rule = fill_rule(described, rule.state_dict(), f"{ckpt_path!r} with {init_args}")
    save_rule(rule, output)
    print(f"{output}: {signature_of(rule)}, {output.stat().st_size / 1000:.0f} kB")
    print(f'Use it: LearnedOptimizer(model.parameters(), "{output}")')


def _mean(rules: Mapping[str, UpdateRule]) -> UpdateRule:
    """The rule whose meta-parameters are the means of theirs."""
    (first, rule), *others = rules.items()
    for name, other in others:
        if describe(other) != describe(rule):
            raise ValueError(
                f"{first!r} is {signature_of(rule)}, and {name!r} is {signature_of(other)}: there is no mean of the "
                "two; average runs of one configuration"
            )
    parameters = [dict(one.named_parameters()) for one in rules.values()]
    means = {name: torch.stack([one[name] for one in parameters]).mean(0) for name in parameters[0]}
    return fill_rule(describe(rule), rule.state_dict() | means, f"the mean of {', '.join(map(repr, rules))}")


def main(args: list[str]) -> None:
    """Export what the command line says."""
    description = "Write the rule of a checkpoint to a file of some 20 kB, to load or to mail; it cannot hold code."
    parser = OneLineParser(prog=f"{PROG} export", description=description)
    parser.add_function_arguments(export, as_group=False)
    parser.add_import()
    given = parser.instantiate(parser.parse_args(args)).as_dict()
    given.pop("import")
    export(**given)
