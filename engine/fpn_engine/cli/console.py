"""What the subcommands print with: people read stderr and tables, machines read stdout."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fpn_engine.errors import FpnEngineError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

FILE_WIDTH = 1000  # columns of a table that goes to a file or pipe, where nothing is cut off or folded


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, soft_wrap=True)


def note(message: str) -> None:
    """One line for people."""
    print(message, file=sys.stderr, flush=True)


def suggest(*words: object) -> None:
    """The command of ours that usually comes next, to be copied into a shell."""
    note(f"next: {shlex.join(['fpn-engine', *map(str, words)])}")


def fail(message: str, code: int = 1) -> NoReturn:
    """End with one sentence."""
    note(f"fpn-engine: {' '.join(message.split())}")
    sys.exit(code)


def emit(document: str) -> None:
    """The result for machines, on stdout."""
    with _writing_stdout():
        print(document, flush=True)


def show(*results: RenderableType) -> None:
    """The result for people, on stdout."""
    from rich.console import Console

    console = Console(highlight=False)
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    with _writing_stdout():
        for result in results:
            console.print(result)
        sys.stdout.flush()


def refuse_folder(path: Path) -> None:
    """Raise if ``path`` exists and is no regular file; a missing file is for whoever reads it to report."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise FpnEngineError(f"{path} is not a file")


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


@contextlib.contextmanager
def downloading(title: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar in bytes while stderr is a terminal; call what it yields with those that are here and in all."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = stderr()
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def _writing_stdout() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise FpnEngineError(f"cannot write to stdout: {error.strerror or error}; free some space") from None
