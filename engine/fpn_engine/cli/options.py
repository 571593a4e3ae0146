"""Options that several subcommands share."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fpn_engine.named import MODELS

# Above these a typing error is likelier than a machine: 10,000 threads alone can take all memory.
MAX_BATCH, MAX_THREADS, MAX_STREAMS, MAX_BUCKET = 1024, 1024, 16, 8192

PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", help="Default: $FPN_ENGINE_PLAN, the only *.plan in this folder, or the last one built."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME", help=f"A named model: {', '.join(model.name for model in MODELS)}."),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Most images run at once.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=MAX_THREADS, help="CPU threads of trunk and head; default one per core."),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="cpu, cuda or cuda:1, of the kind the plan was built for; default its current one."),
]
StreamsOption = Annotated[
    int, typer.Option("--streams", min=1, max=MAX_STREAMS, help="On CUDA: batches that compute at once.")
]


class Decode(StrEnum):
    cpu = "cpu"
    gpu = "gpu"


DecodeOption = Annotated[
    Decode, typer.Option("--decode", help="gpu: JPEG files on the device of a CUDA plan; needs TorchCodec.")
]
BucketOption = Annotated[
    int | None,
    typer.Option(
        "--bucket",
        min=1,
        max=MAX_BUCKET,
        metavar="PIXELS",
        help="Pad images to multiples of this: fewer shapes, slightly other results.",
    ),
]

UNSAID = "What a checkpoint does not say"
SpecOption = Annotated[
    Path | None,
    typer.Option(
        "--spec",
        help="JSON file with what the tensors do not say; default NAME.json beside NAME.pth.",
        rich_help_panel=UNSAID,
    ),
]
ClassesOption = Annotated[
    str | None,
    typer.Option("--classes", help="Class names in label order: cat,dog,bird.", rich_help_panel=UNSAID),
]
MinSizeOption = Annotated[
    int | None, typer.Option("--min-size", help="Pixels of the short side after resizing.", rich_help_panel=UNSAID)
]
MaxSizeOption = Annotated[
    int | None, typer.Option("--max-size", help="Most pixels of the long side after resizing.", rich_help_panel=UNSAID)
]
ScoreOption = Annotated[
    float | None, typer.Option("--score", min=0, max=1, help="Lowest score to report.", rich_help_panel=UNSAID)
]
NmsOption = Annotated[
    float | None,
    typer.Option("--nms", min=0, max=1, help="IoU above which a box yields to a better one.", rich_help_panel=UNSAID),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=JSON", help="Any other field of the spec; repeatable.", rich_help_panel=UNSAID),
]


def gather_overrides(
    classes: str | None,
    min_size: int | None,
    max_size: int | None,
    score: float | None,
    nms: float | None,
    assigned: list[str] | None,
) -> dict[str, Any]:
    """What these options say of the spec, as JSON values."""
    said = {
        "min_size": min_size,
        "max_size": max_size,
        "box_score_thresh": score,
        "box_nms_thresh": nms,
        "categories": _categories(classes),
    }
    return {name: value for name, value in said.items() if value is not None} | assignments(assigned or [])


def _categories(names: str | None) -> list[dict[str, Any]] | None:
    if names is None:
        return None
    listed = [name.strip() for name in names.split(",")]
    if "" in listed or len(set(listed)) < len(listed):
        raise typer.BadParameter(f"{names!r} has an empty name or one twice", param_hint="--classes")
    return [{"id": number, "name": name} for number, name in enumerate(listed, start=1)]


def assignments(given: list[str], option: str = "--set") -> dict[str, Any]:
    """KEY=JSON assignments as a mapping; what is not JSON is text."""
    values = {}
    for assignment in given:
        key, sign, text = assignment.partition("=")
        if not sign:
            raise typer.BadParameter(f"{assignment!r} is not KEY=JSON", param_hint=option)
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values
