"""States of many parameters side by side in one tensor, so that a rule updates all of them in one call.

Each parameter has its own part, a view, under `STATE` among its states; whoever replaces that, as by loading, or moves
the parameter to another device is found out, and the states are brought together anew.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from lightning_l2l.rules.base import UpdateRule

#: Where an optimizer's state of a parameter has that of the rule.
STATE = "rule_state"
#: An optimizer's states by parameter, made where they are asked for.
States = MutableMapping[Tensor, dict[str, Any]]


@dataclass(eq=False)
class Segment:
    """Parameters whose states lie side by side in one tensor: a rule's that got their first gradient together.

    Attributes:
        rule: Whose state it is.
        params: In the order of their states.
        offsets: Of each one's coordinates, and the number of all at the end.
        state: `[rule.state_size, coordinates]`.
        views: Each one's part of it, which is its rule_state.
    """

    rule: UpdateRule
    params: list[Tensor]
    offsets: list[int]
    state: Tensor
    views: list[Tensor]


def lay_out(
    segments: Sequence[Segment],
    params: Iterable[Tensor],
    ordered: Iterable[Tensor],
    states: States,
    rule_of: Callable[[Tensor], UpdateRule],
) -> list[Segment]:
    """Make the state of those that have none, and bring states that lie apart into one tensor.

    Args:
        segments: As they were.
        params: Those that need a state now.
        ordered: All that there are, in the order in which they shall lie.
        states: Changed in place.
        rule_of: The rule that updates a parameter.

    Returns:
        The segments as they are now; those that are still in order are the same ones.
    """
    placed = {p: view for segment in segments for p, view in zip(segment.params, segment.views, strict=True)}
    loose = {p for p in params if p not in placed}
    loose |= {p for p, view in placed.items() if states.get(p, {}).get(STATE) is not view or p.device != view.device}
    if not loose:
        return list(segments)
    whole = [segment for segment in segments if loose.isdisjoint(segment.params)]
    loose.update(p for segment in segments if segment not in whole for p in segment.params)
    parts: dict[tuple[UpdateRule, torch.device], list[Tensor]] = {}
    for p in ordered:
        if p in loose:
            parts.setdefault((rule_of(p), p.device), []).append(p)
    return [*whole, *(_join(rule, alike, states, device) for (rule, device), alike in parts.items())]


def runs(segments: Iterable[Segment], present: Container[Tensor]) -> Iterator[tuple[Segment, int, int]]:
    """Neighbours that are all present: segment, first, last (exclusive)."""
    for segment in segments:
        for found, run in groupby(range(len(segment.params)), lambda i: segment.params[i] in present):  # noqa: B023
            if found:
                neighbours = list(run)
                yield segment, neighbours[0], neighbours[-1] + 1


def _join(rule: UpdateRule, params: list[Tensor], states: States, device: torch.device) -> Segment:
    parameter = next(rule.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    sizes = [p.numel() for p in params]
    if any(STATE in states[p] for p in params):
        new = [rule.init_state(n, device=device, dtype=dtype) for n in sizes]
        old = [states[p].get(STATE, s) for p, s in zip(params, new, strict=True)]
        state = torch.cat([s.to(device, dtype) for s in old], 1)
    else:
        state = rule.init_state(sum(sizes), device=device, dtype=dtype)
    views = list(torch.split(state, sizes, 1))
    for p, view in zip(params, views, strict=True):
        states[p][STATE] = view
    return Segment(rule, params, [0, *accumulate(sizes)], state, views)
