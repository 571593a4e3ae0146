"""``fpn-engine demo``: a generated scene, what the bundled model finds in it, and a page that shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fpn_engine.cli.console import emit, note
from fpn_engine.cli.plans import introduce, plan_of_model

FOLDER = Path("fpn-engine-demo")


def demo(
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Which scene.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the result.")] = FOLDER,
) -> None:
    """Generate a scene, detect in it with the model that comes along, and write a page that shows what was found.

    Works offline. The folder gets scene.png, detections.png and index.html; only those of an earlier demo are replaced.
    """
    from fpn_engine.engine import Engine
    from fpn_engine.named import BUNDLED
    from fpn_engine.plan import read_plan
    from fpn_export.demo import DemoFolder, demonstrate

    folder = DemoFolder(output)
    plan = plan_of_model(BUNDLED)
    shown = demonstrate(Engine.load(plan), read_plan(plan).manifest.runtime, seed, folder)
    introduce(BUNDLED, plan)
    found, there = shown.comparison.found, len(shown.comparison.pairs)
    wrong = len(shown.comparison.spurious)
    note(
        f"found {found} of {there} objects, {wrong} {'box' if wrong == 1 else 'boxes'} of none, "
        f"{shown.seconds * 1000:.0f} ms"
    )
    for path in (folder.scene, folder.picture, folder.page):
        emit(str(path))
