"""Lanes: several runners that take turns, so that one's kernels fill what another's leave idle."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

from fpn_engine.tasks import Group, Pending, Runner, Task


class Lanes:
    """Runners with streams, buffers and graphs of their own; groups go to them in turn."""

    def __init__(self, runners: Sequence[Runner]) -> None:
        self.runners = list(runners)
        self.depth = sum(runner.depth for runner in runners)
        self._turn = count()  # next() is one step for any number of threads

    def submit(self, group: Group, task: Task) -> Pending:
        return self.runners[next(self._turn) % len(self.runners)].submit(group, task)

    def warm(self, group: Group, task: Task) -> None:
        for runner in self.runners:
            runner.warm(group, task)
