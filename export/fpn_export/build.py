"""Build: from the end-to-end ONNX file to a plan for this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import onnxruntime as ort
from onnx import ModelProto

import fpn_engine
from fpn_engine.backends.ort import PROVIDERS, session_options
from fpn_engine.errors import FpnEngineError, ModelError, PlanError
from fpn_engine.files import remove_stale, unusable_cache
from fpn_engine.locks import alone_on
from fpn_engine.plan import FORMAT_VERSION, Manifest, read_plan, write_plan
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.onnx_file import parse_onnx, read_bytes

BACKEND = "onnxruntime"
PRECISION = "fp32"


class Built(NamedTuple):
    """The plan's path and manifest, and whether it was there already."""

    path: Path
    manifest: Manifest
    cached: bool


def build_plan(
    model_path: Path,
    plan_path: Path,
    *,
    force: bool = False,
    source: str | None = None,
    on_progress: Callable[[str], None] = lambda step: None,
) -> Built:
    """Cut, optimise and write the plan for an ONNX file.

    A sound plan already there with the same build key (the file's digest, the options and the versions) is left as it
    is. Builds of one plan wait for each other; an interrupted build leaves the old plan or none. ``source`` is what
    the plan says it was built from, instead of the file's name.

    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    if os.path.isdir(plan_path):
        raise PlanError(f"cannot write {plan_path}: it is a folder; give the name of a file")
    if os.path.realpath(plan_path) == os.path.realpath(model_path):
        raise PlanError(f"the plan would replace the model {model_path}; give another name with -o")
    with _alone(plan_path, on_progress) as work:
        on_progress("read")
        data = read_bytes(model_path)
        key = build_key(hashlib.sha256(data).hexdigest())
        if not force and (known := _existing(plan_path, key)):
            return Built(plan_path, known, cached=True)
        model, spec = parse_onnx(model_path, data)
        on_progress("cut")
        parts = {}
        for name, part in _cut(model_path, model, spec).items():
            on_progress(f"optimise {name}")
            parts[f"{name}.onnx"] = _optimise(model_path, part.SerializeToString(), work / f"{name}.onnx")
        on_progress("write")
        manifest = Manifest(
            spec=spec,
            backend=BACKEND,
            precision=PRECISION,
            device="cpu",
            versions=_versions(),
            build_key=key,
            source=source or model_path.name,
        )
        return Built(plan_path, write_plan(plan_path, manifest, parts), cached=False)


def _versions() -> dict[str, str]:
    return {"fpn-engine": fpn_engine.__version__, "onnxruntime": ort.__version__}


def build_key(digest: str) -> str:
    """Digest of all that goes into a build: the ``digest`` of the file it begins with, the options and the versions."""
    inputs = {"onnx": digest, "backend": BACKEND, "precision": PRECISION, "format": FORMAT_VERSION, **_versions()}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _existing(path: Path, key: str) -> Manifest | None:
    """The manifest of a plan with this key, every part checked: a damaged plan is built again."""
    try:
        manifest = read_plan(path).manifest
    except FpnEngineError:
        return None
    return manifest if manifest.build_key == key else None


@contextlib.contextmanager
def _alone(plan_path: Path, on_progress: Callable[[str], None]) -> Iterator[Path]:
    """Hold the lock on ``plan_path`` and yield an empty working folder; what a killed holder left is removed."""
    with alone_on(plan_path, "builds", lambda: on_progress("wait for another build of this plan")) as work:
        remove_stale(plan_path)
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
        except OSError as error:
            raise unusable_cache(work.parent, error) from None
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _cut(path: Path, model: ModelProto, spec: ModelSpec) -> dict[str, ModelProto]:
    try:
        trunk = {"trunk": cut_trunk(model, spec)}
        return trunk | {"head": cut_head(model, spec)} if spec.has_box_head else trunk
    except (ModelError, ValueError) as error:  # onnx raises ValueError for a graph that hangs together badly
        raise ModelError(f"cannot cut {path}: {error}") from None


def _optimise(path: Path, model: bytes, optimised: Path) -> bytes:
    """ONNX Runtime's graph optimisation up to the level that does not depend on the processor."""
    options = session_options()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(optimised)
    try:
        ort.InferenceSession(model, options, providers=PROVIDERS)
        return optimised.read_bytes()
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"ONNX Runtime {ort.__version__} cannot optimise {path} ({reason}); export it again or free some disk space"
        ) from None
