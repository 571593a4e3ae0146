"""Build: from the end-to-end ONNX file to a plan for this machine."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import onnxruntime as ort
from filelock import FileLock

import fpn_engine
from fpn_engine.backends.ort import PROVIDERS, session_options
from fpn_engine.errors import FpnEngineError, ModelError
from fpn_engine.files import cache_folder, remove_stale, sha256_of
from fpn_engine.plan import FORMAT_VERSION, Manifest, read_manifest, write_plan
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.onnx_file import read_onnx

BACKEND = "onnxruntime"
PRECISION = "fp32"


class Built(NamedTuple):
    """The plan's path and manifest, and whether it was there already."""

    path: Path
    manifest: Manifest
    cached: bool


def build_plan(
    model_path: Path, plan_path: Path, *, force: bool = False, on_progress: Callable[[str], None] = lambda step: None
) -> Built:
    """Cut, optimise and write the plan for an ONNX file.

    A plan already there with the same build key (the file's digest, the options and the versions) is left as it is.
    Builds of one plan wait for each other; an interrupted build leaves the old plan or none.

    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    on_progress("read")
    digest = _digest(model_path)
    key = _build_key(digest)
    with _lock(plan_path):
        remove_stale(plan_path)
        if not force and (known := _existing(plan_path, key)):
            return Built(plan_path, known, cached=True)
        model, spec = read_onnx(model_path)
        on_progress("cut")
        trunk, head = cut_trunk(model, spec), cut_head(model, spec)
        parts = {}
        for name, part in (("trunk", trunk), ("head", head)):
            on_progress(f"optimise {name}")
            parts[f"{name}.onnx"] = _optimise(part.SerializeToString())
        on_progress("write")
        manifest = Manifest(
            spec=spec,
            backend=BACKEND,
            precision=PRECISION,
            device="cpu",
            versions=_versions(),
            build_key=key,
            source=model_path.name,
        )
        return Built(plan_path, write_plan(plan_path, manifest, parts), cached=False)


def _digest(path: Path) -> str:
    try:
        return sha256_of(path)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None


def _versions() -> dict[str, str]:
    return {"fpn-engine": fpn_engine.__version__, "onnxruntime": ort.__version__}


def _build_key(digest: str) -> str:
    inputs = {"onnx": digest, "backend": BACKEND, "precision": PRECISION, "format": FORMAT_VERSION, **_versions()}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def _existing(path: Path, key: str) -> Manifest | None:
    try:
        manifest = read_manifest(path)
    except FpnEngineError:
        return None
    return manifest if manifest.build_key == key else None


def _lock(path: Path) -> FileLock:
    folder = cache_folder() / "locks"
    folder.mkdir(exist_ok=True)
    return FileLock(folder / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16]}.lock")


def _optimise(model: bytes) -> bytes:
    """ONNX Runtime's graph optimisation up to the level that does not depend on the processor."""
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "model.onnx"
        options = session_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(optimised)
        ort.InferenceSession(model, options, providers=PROVIDERS)
        return optimised.read_bytes()
