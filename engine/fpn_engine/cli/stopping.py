"""Stopping long work at a good place."""

from __future__ import annotations

import signal
from typing import Any

from fpn_engine.cli.console import note


class StopRequest:
    """Ctrl-C and SIGTERM ask the run to end after the update at hand; a second one ends it at once."""

    def __init__(self) -> None:
        self.exit_code = 0
        self._before: dict[int, Any] = {}

    def __call__(self) -> bool:
        return self.exit_code != 0

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.exit_code = 128 + number
        signal.signal(number, self._before[number])
        note("stopping after this step; once more stops at once")
