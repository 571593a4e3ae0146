"""Which plan a subcommand runs: named, found, or made from a named model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fpn_engine.cli.console import downloading, note, steps
from fpn_engine.errors import PlanError

if TYPE_CHECKING:
    from fpn_engine.named import NamedModel

ForCuda = Any  # of fpn_export.build, which only the subcommands that need it import


def choose_plan(plan: Path | None, model: str | None, *, default: str | None = None) -> Path:
    """The plan that --plan or --model names, else the one that discovery finds, else that of the model ``default``.

    What was not named is said on stderr. Raises: FpnEngineError if there is none, or it cannot be made.
    """
    if plan is not None and model is not None:
        raise typer.BadParameter("does not go with --plan", param_hint="--model")
    if model is not None:
        return plan_of_model(model)

    from fpn_engine.discovery import NO_PLAN, find_plan

    if found := find_plan(plan):
        if found.reason:
            note(f"using {found.path} ({found.reason})")
        return found.path
    if default is None:
        raise PlanError(NO_PLAN)
    path = plan_of_model(default)
    introduce(default, path)
    return path


def introduce(name: str, plan: Path) -> None:
    """Say on stderr what the model of ``plan``, which nobody named, knows, and how to get another."""
    from fpn_engine.plan import read_plan

    classes = ", ".join(category.name for category in read_plan(plan).manifest.spec.categories)
    note(
        f"using the {name} model, which knows {classes}; for others: --model coco, or export and build a checkpoint of "
        "your own"
    )


def plan_of_model(
    name: str,
    *,
    backend: str = "auto",
    precision: str | None = None,
    tune_for: ForCuda | None = None,
    force: bool = False,
) -> Path:
    """The cached plan of a named model; fetched, exported and built first if it is not there."""
    from fpn_engine.named import find_model
    from fpn_export.bundled import find_bundled, hash_bundled
    from fpn_export.cached_plan import find_cached, make_cached

    model = find_model(name)
    digest = model.digest if model.file_name else hash_bundled(model.name)
    if not force and (found := find_cached(model.name, digest, backend, precision, tune_for)):
        return found
    checkpoint = _fetch(model) if model.file_name else find_bundled(model.name)
    with steps(f"preparing the {model.name} model, once") as step:
        return make_cached(
            model.name,
            digest,
            checkpoint,
            backend=backend,
            precision=precision,
            tune_for=tune_for,
            force=force,
            on_progress=step,
            on_note=note,
        )


def checkpoint_of_model(name: str) -> Path:
    """The checkpoint of a named model; downloaded if it is not here."""
    from fpn_engine.named import find_model
    from fpn_export.bundled import find_bundled

    model = find_model(name)
    return _fetch(model) if model.file_name else find_bundled(model.name)


def _fetch(model: NamedModel) -> Path:
    """The checkpoint of a published model, downloaded if it is not here."""
    from fpn_engine.download import download, has_digest
    from fpn_engine.named import checkpoint_places, download_url

    places = list(checkpoint_places(model))
    for place in places:
        if has_digest(place, model.digest):
            note(f"using {place}")
            return place
    url = download_url(model)
    note(f"downloading {url} ({model.megabytes} MB) to {places[0]}, once")
    with downloading(model.name) as advance:
        waiting = f"another process is downloading {model.file_name}; waiting for it"
        download(url, places[0], model.digest, on_progress=advance, on_wait=lambda: note(waiting))
    return places[0]
