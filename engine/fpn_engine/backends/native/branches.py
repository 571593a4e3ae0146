"""Branches: where a program ends in pieces that do not wait for each other, as the levels of a pyramid do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fpn_engine.backends.native.ops import Op

LEAST_SHARE = 0.02  # of a program's cost that must be aside: to part and to meet again takes time too


@dataclass(frozen=True, slots=True)
class Branches:
    """The operations from ``fork`` on fall apart; the costliest piece stays, those ``aside`` may run beside it."""

    fork: int
    aside: frozenset[int]


def find_branches(ops: Sequence[Op], costs: Sequence[float]) -> Branches | None:
    """The end of a program of which most can run beside its costliest piece; None if all of it hangs together.

    Args: costs: of each operation, in any unit.
    """
    best, most = None, 0.0
    for fork in reversed(range(len(ops))):
        pieces = _split(ops, fork)
        spent = {piece: sum(costs[i] for i in members) for piece, members in pieces.items()}
        chief = max(spent, key=spent.__getitem__)
        if (beside := sum(spent.values()) - spent[chief]) >= most > 0 or beside > most:
            aside = [i for piece, members in pieces.items() if piece != chief for i in members]
            best, most = Branches(fork, frozenset(aside)), beside
    return best if most >= LEAST_SHARE * sum(costs) else None


def _split(ops: Sequence[Op], fork: int) -> dict[int, list[int]]:
    """Pieces of the operations from ``fork`` on, each under one of its members."""
    makers = {op.output: i for i, op in enumerate(ops) if i >= fork}
    parents = {i: i for i in range(fork, len(ops))}

    def root(i: int) -> int:
        while parents[i] != i:
            i = parents[i]
        return i

    for i in parents:
        for name in ops[i].inputs:
            if name in makers:
                parents[root(makers[name])] = root(i)
    pieces: dict[int, list[int]] = {}
    for i in parents:
        pieces.setdefault(root(i), []).append(i)
    return pieces
