"""Progress: what TensorRT's builder reports of its phases, as one line for people."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Phases:
    """Phases within phases; several threads may report.

    Args: say: gets the outermost phase and how much of it is done, "Building engine 40 %".
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._active: dict[str, list[Any]] = {}  # name to [parent, steps, steps done]
        self._shown = 0.0
        self.failure: BaseException | None = None

    def start(self, name: str, parent: str | None, steps: int) -> None:
        self._update(lambda: self._active.__setitem__(name, [parent, steps, 0]))

    def complete(self, name: str, step: int) -> bool:
        """Note a step; False asks TensorRT to stop, after Ctrl-C or an error in ``say``."""

        def note() -> None:
            if name in self._active:
                self._active[name][2] = step + 1

        self._update(note)
        return self.failure is None

    def finish(self, name: str) -> None:
        self._update(lambda: self._active.pop(name, None))

    def _update(self, change: Callable[[], object]) -> None:
        try:
            with self._lock:
                change()
                line = self._line()
            if line:
                self._say(line)
        except BaseException as error:  # nothing may pass through TensorRT's own frames; the builder raises it after
            self.failure = error

    def _line(self) -> str:
        roots = [name for name, (parent, *_) in self._active.items() if parent not in self._active]
        if not roots:
            self._shown = 0.0
            return ""
        # An inner phase ends before the step that it was: what was said stays.
        self._shown = max(self._shown, self._share(roots[0]))
        return f"{roots[0]} {int(100 * self._shown)} %"

    def _share(self, name: str) -> float:
        """What part of a phase is done: its own steps, and of the step at hand what its inner phases have done."""
        _, steps, done = self._active[name]
        inner = [self._share(other) for other, (parent, *_) in self._active.items() if parent == name]
        return min(1.0, (done + (max(inner) if inner and done < steps else 0.0)) / max(1, steps))


def make_monitor(trt: Any, phases: Phases) -> Any:
    """TensorRT's progress monitor for ``phases``."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.complete(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
