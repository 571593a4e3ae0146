"""``fpn-engine scenes``: generated pictures with annotations, to train and test on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpn_engine.cli.console import counting, note

FEW = 64  # scenes for which another process is not worth its start


def scenes(
    folder: Annotated[Path, typer.Argument(help="Where to write images/ and annotations.json.", show_default=False)],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 100,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Another seed gives other scenes.")] = 0,
    height: Annotated[int, typer.Option(min=32, help="Pixels.")] = 480,
    width: Annotated[int, typer.Option(min=32, help="Pixels.")] = 640,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that draw; default: one per core for many.", show_default=False)
    ] = None,
) -> None:
    """Generate scenes: textured shapes of ten classes, 8 to 400 pixels large, as PNG files and COCO annotations.

    The same seed gives the same scenes on every machine.
    """
    from fpn_engine.doctor.machine import Machine
    from fpn_export.scenes import write_coco

    processes = min(Machine().cores, max(1, count // FEW)) if workers is None else workers
    with counting("drawing", count) as advance:
        path = write_coco(folder, seed, count, (height, width), on_image=advance, processes=processes)
    note(f"{path}: {count} {'scene' if count == 1 else 'scenes'} of seed {seed}")
