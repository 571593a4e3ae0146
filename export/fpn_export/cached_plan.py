"""Plans of named models, built once for each version and kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder, replacing
from fpn_engine.locks import alone_on
from fpn_engine.plan import NAMED_SOURCE, read_plan
from fpn_export.any_model import export_any, load_any
from fpn_export.build import AUTO, ForCuda, build_key, build_plan

FOLDER = "plans"


def find_cached(
    name: str, digest: str, backend: str = AUTO, precision: str | None = None, tune_for: ForCuda | None = None
) -> Path | None:
    """The plan of the model ``name`` if it is there, is sound, and was built by these versions.

    Args: digest: of the checkpoint, or how it begins. backend, precision, tune_for: as
        :func:`fpn_export.build.build_plan` has them.
    """
    path = _locate(name, digest, backend, precision, tune_for)
    try:
        read_plan(path)
    except FpnEngineError:
        return None
    return path


def make_cached(
    name: str,
    digest: str,
    checkpoint: Path,
    *,
    backend: str = AUTO,
    precision: str | None = None,
    tune_for: ForCuda | None = None,
    force: bool = False,
    on_progress: Callable[[str], None] = lambda step: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Path:
    """Export and build the plan that :func:`find_cached` finds; of two processes one works, the other waits.

    Args: force: build it even if it is there. The others as build_plan has them.
    Raises: FpnEngineError as load_any, export_any and build_plan do, and if the cache cannot be written.
    """
    plan = _locate(name, digest, backend, precision, tune_for)
    with alone_on(plan, FOLDER, lambda: on_progress("wait for another process that builds it")):
        if not force and (found := find_cached(name, digest, backend, precision, tune_for)):
            return found
        on_progress("read")
        loaded = load_any(checkpoint)
        model = plan.with_suffix(".onnx")
        try:
            with replacing(model) as temporary:
                onnx.save(export_any(loaded, on_progress=on_progress), str(temporary))
            return build_plan(
                model,
                plan,
                backend=backend,
                precision=precision,
                tune_for=tune_for,
                force=True,
                source=NAMED_SOURCE + name,
                on_progress=on_progress,
                on_note=on_note,
            ).path
        finally:
            model.unlink(missing_ok=True)


def _locate(name: str, digest: str, backend: str, precision: str | None, tune_for: ForCuda | None) -> Path:
    return cache_folder() / FOLDER / f"{name}-{build_key(digest, backend, precision, tune_for)[:16]}.plan"
