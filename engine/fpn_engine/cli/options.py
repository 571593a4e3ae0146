"""Options that several subcommands share."""

from __future__ import annotations

import json
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
