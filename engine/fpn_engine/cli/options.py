"""Options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

# Above these a typing error is likelier than a machine: 10,000 threads alone can take all memory.
MAX_BATCH, MAX_THREADS = 1024, 1024

PlanOption = Annotated[
    Path | None,
    typer.Option("--plan", help="Default: $FPN_ENGINE_PLAN, the only *.plan in this folder, or the last one built."),
]
BatchOption = Annotated[int, typer.Option("--batch", min=1, max=MAX_BATCH, help="Most images run at once.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=MAX_THREADS, help="CPU threads of trunk and head; default one per core."),
]
