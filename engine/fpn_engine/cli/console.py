"""What the subcommands print with: people read stderr, machines read stdout."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """One line for people."""
    print(message, file=sys.stderr, flush=True)


def fail(message: str, code: int = 1) -> NoReturn:
    """End with one sentence."""
    note(f"fpn-engine: {' '.join(message.split())}")
    sys.exit(code)


@contextlib.contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Show the step at hand beside a spinner while stderr is a terminal."""
    console = stderr()
    with console.status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


@contextlib.contextmanager
def counting(title: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar with rate and time left while stderr is a terminal; call what it yields once per image."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = stderr()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
