"""What ``fpn-engine train`` shows while it runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fpn_engine.cli.console import stderr


class TrainingDisplay:
    """A progress bar with the losses while stderr is a terminal, else a line from time to time; scores as they come."""

    def __init__(self, steps: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("loss {task.fields[loss]} rate {task.fields[rate]}"),
        )
        console = stderr()
        self._steps = steps
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("training", total=steps, loss="-", rate="-")
        self._print: Callable[[str], None] = self._progress.console.print

    def __enter__(self) -> TrainingDisplay:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def update(self, progress: Any) -> None:
        from fpn_export.training.validation import main_figure

        loss = f"{progress.losses['loss']:.3f}"
        self._progress.update(self._task, completed=progress.step, loss=loss, rate=f"{progress.rate:.2g}")
        if progress.score is not None:
            name, figure = main_figure(progress.score)
            self._print(f"step {progress.step}: {name} {figure:.3f}")
        elif self._progress.disable and progress.step % max(1, self._steps // 50) == 0:
            self._print(f"step {progress.step}/{self._steps}: loss {loss}, {progress.seconds / 60:.1f} min")
