"""``fpn-engine bench``: how fast a plan is on this machine."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpn_engine.cli.console import emit, note, show
from fpn_engine.cli.options import BatchOption, DeviceOption, ModelOption, ThreadsOption
from fpn_engine.cli.plans import choose_plan
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import refuse_replacing

if TYPE_CHECKING:
    from rich.console import RenderableType

    from fpn_engine.plan import Plan
    from fpn_engine.profiling import Pixels

MOST_IMAGES = 16  # that are kept in memory
MOST_ROUNDS = 1_000_000
SCENES_SEED = 20_170_421  # pictures to time on where none are given


def bench(
    plan: Annotated[
        Path | None, typer.Argument(metavar="PLAN", help="Default: as fpn-engine infer.", show_default=False)
    ] = None,
    model: ModelOption = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Time on these pictures, the first 16 that can be read; else on drawn scenes."
        ),
    ] = None,
    batch: BatchOption = 1,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_ROUNDS, help="Calls to time; default what fits into --seconds, 5 at least."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to measure.")] = 5.0,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Time each stage too, and say what the rest takes.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write one call as a Chrome trace (JSON), for Perfetto.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Everything, as JSON on stdout.")] = False,
) -> None:
    """Time a plan from pixels in memory to detections: the middle, and what a fifth stays below and above.

    --profile shows beside each stage of a detector's native plan, but in int8, its floor: the least time for its
    products and bytes, at the rates that this machine reaches on large matrices and copies. It counts convolutions
    without Winograd's savings and as many proposals as there may be; with fewer, a stage can be quicker.

    Figures hold for these pictures on this machine as busy as it is now.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; the profiler talks to stderr
    from fpn_engine.engine import Engine
    from fpn_engine.load_options import LoadOptions
    from fpn_engine.named import BUNDLED
    from fpn_engine.plan import read_plan
    from fpn_engine.profiling import time_engine, time_stages, write_trace
    from fpn_engine.provenance import describe_machine
    from fpn_engine.sources import list_images

    path = choose_plan(plan, model, default=BUNDLED)
    refuse_replacing(trace, "--trace", [path, *(list_images([images]) if images else [])])
    loaded = read_plan(path)
    if not loaded.manifest.spec.has_rpn:
        raise FpnEngineError("a Fast R-CNN detects among given proposals, which bench has none of; time another plan")
    options: LoadOptions = {"batch_size": batch, "threads": threads, "device": device}
    engine = Engine.from_plan(loaded, **options)
    pictures, what = _read(images) if images else _draw()
    batches = _fill(pictures, batch)
    spread = time_engine(engine, batches, rounds=rounds, seconds=seconds)
    manifest = loaded.manifest
    facts: dict[str, Any] = {
        "plan": str(path),
        "backend": manifest.backend,
        "precision": manifest.precision,
        "runs on": str(engine.device),
        "pictures": what,
        "batch": batch,
        "milliseconds": spread.to_dict(),
        "images per second": float(f"{1e3 * batch / spread.median:.4g}"),
    }
    if profile or trace:
        one_by_one: LoadOptions = {**options, "graphs": False}
        eager = Engine.from_plan(loaded, **one_by_one) if engine.device.type == "cuda" else engine
        if profile:
            facts["stages, milliseconds"] = _round(time_stages(eager, batches[0]))
            facts |= _find_floors(loaded, batches[0], engine.device.type)
        if trace:
            write_trace(eager, batches[0], trace)
            note(f"trace: {trace}")
    facts["machine"] = describe_machine()
    if json:
        emit(json_module.dumps(facts, indent=1))
    else:
        show(*_tables(facts))


def _find_floors(plan: Plan, images: Sequence[Pixels], device: str) -> dict[str, Any]:
    """The least time of each stage, and the rates that it follows from; nothing where it is not known."""
    from fpn_engine.batching import make_batches
    from fpn_engine.buckets import Buckets
    from fpn_engine.floors import count_floors, has_floors
    from fpn_engine.roofline import measure_peaks

    manifest = plan.manifest
    if not has_floors(manifest):
        return {}
    spec = manifest.spec
    computed = "fp32" if device == "cpu" and manifest.precision == "fp16" else manifest.precision
    peaks = measure_peaks(device, computed)
    shapes = [(image.shape[0], image.shape[1]) for image in images]
    batches = make_batches(shapes, spec, len(images), Buckets(None, spec.size_divisor))
    return {"floors, milliseconds": _round(count_floors(plan, batches, peaks)), "peaks": peaks.to_dict()}


def _round(milliseconds: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{spent:.4g}") for name, spent in milliseconds.items()}


def _read(folder: Path) -> tuple[list[Pixels], str]:
    from fpn_engine.images import to_array
    from fpn_engine.sources import list_images

    pictures = []
    for path in list_images([folder]):
        try:
            pictures.append(to_array(path))
        except FpnEngineError as error:
            note(f"fpn-engine: {error}")
        if len(pictures) == MOST_IMAGES:
            break
    if not pictures:
        raise FpnEngineError(f"no picture in {folder} can be read")
    return pictures, f"{len(pictures)} of {folder}"


def _draw() -> tuple[list[Pixels], str]:
    from fpn_export.scenes import make_scene

    pictures = [make_scene(SCENES_SEED, index).image for index in range(4)]
    height, width = pictures[0].shape[:2]
    return pictures, f"{len(pictures)} drawn scenes, {height} x {width}"


def _fill(pictures: Sequence[Pixels], batch: int) -> list[list[Pixels]]:
    """Every picture in turn, as many batches as there are pictures."""
    endless = (pictures[index % len(pictures)] for index in range(batch * len(pictures)))
    return [list(islice(endless, batch)) for _ in pictures]


def _tables(facts: dict[str, Any]) -> list[RenderableType]:
    from rich.table import Table

    from fpn_engine.profiling import WHOLE

    times = facts["milliseconds"]
    head = Table("", "", show_header=False, box=None, padding=(0, 2, 0, 0))
    head.add_row("plan", f"{facts['plan']}: {facts['backend']} {facts['precision']} on {facts['runs on']}")
    head.add_row("machine", facts["machine"]["device"])
    head.add_row("pictures", f"{facts['pictures']}, {facts['batch']} at once")
    spread = f"a fifth below {_text(times['p20'])}, a fifth above {_text(times['p80'])}, {times['rounds']} calls"
    head.add_row("time", f"{_text(times['median'])} ms ({spread})")
    head.add_row("rate", f"{facts['images per second']:.4g} images a second")
    if (found := facts.get("stages, milliseconds")) is None:
        return [head]
    stages, floors = dict(found), facts.get("floors, milliseconds")
    columns = ["stage", "ms", "share", *(["floor", "of floor"] if floors else [])]
    table = Table(*columns, box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:]:
        column.justify = "right"
    whole = stages.pop(WHOLE)
    for name, spent in {**stages, "everything else": max(0.0, whole - sum(stages.values()))}.items():
        row = [name, _text(spent), f"{100 * spent / whole:.0f} %"]
        if floors:
            floor = floors.get(name)
            row += ["-", ""] if floor is None else [_text(floor), f"{100 * floor / spent:.0f} %"]
        table.add_row(*row)
    if not floors:
        return [head, "", table]
    peaks = facts["peaks"]
    rates = f"floors at {peaks['TFLOP_per_s']:.4g} TFLOP/s and {peaks['GB_per_s']:.4g} GB/s, as measured here"
    return [head, "", table, "", rates]


def _text(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds < 10 else f"{milliseconds:.1f}"
