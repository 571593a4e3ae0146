"""Plans of named models, built once for each version and kept in the cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder, replacing
from fpn_engine.locks import alone_on
from fpn_engine.plan import NAMED_SOURCE, read_plan
from fpn_export.build import build_key, build_plan
from fpn_export.checkpoint import load_checkpoint
from fpn_export.onnx_export import export_onnx

FOLDER = "plans"


def find_cached(name: str, digest: str) -> Path | None:
    """The plan of the model ``name`` if it is there, is sound, and was built by these versions.

    Args: digest: of the checkpoint, or how it begins.
    """
    path = _locate(name, digest)
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
    force: bool = False,
    on_progress: Callable[[str], None] = lambda step: None,
) -> Path:
    """Export and build the plan that :func:`find_cached` finds; of two processes one works, the other waits.

    Args: force: build it even if it is there.
    Raises: FpnEngineError as load_checkpoint, export_onnx and build_plan do, and if the cache cannot be written.
    """
    plan = _locate(name, digest)
    with alone_on(plan, FOLDER, lambda: on_progress("wait for another process that builds it")):
        if not force and (found := find_cached(name, digest)):
            return found
        on_progress("read")
        loaded = load_checkpoint(checkpoint)
        model = plan.with_suffix(".onnx")
        try:
            with replacing(model) as temporary:
                onnx.save(export_onnx(loaded.model, loaded.spec, on_progress=on_progress), str(temporary))
            return build_plan(model, plan, force=True, source=NAMED_SOURCE + name, on_progress=on_progress).path
        finally:
            model.unlink(missing_ok=True)


def _locate(name: str, digest: str) -> Path:
    return cache_folder() / FOLDER / f"{name}-{build_key(digest)[:16]}.plan"
