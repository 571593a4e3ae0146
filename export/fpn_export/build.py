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
import torch
from onnx import ModelProto

import fpn_engine
from fpn_engine.backends.loading import BACKENDS
from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.loading import PRECISIONS, check_int8, check_native_device
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.backends.ort import TRUNK
from fpn_engine.backends.tensorrt.bindings import load_bindings
from fpn_engine.errors import BackendError, FpnEngineError, ModelError, PlanError
from fpn_engine.files import remove_stale, unusable_cache
from fpn_engine.locks import alone_on
from fpn_engine.masks.spec import AnySpec
from fpn_engine.plan import FORMAT_VERSION, Manifest, read_plan, write_plan
from fpn_engine.spec import ModelSpec
from fpn_export.contest import hold_contest, open_trunks
from fpn_export.native.parts import make_native_parts
from fpn_export.native.tactics import TuneFor, make_tactics
from fpn_export.networks import cut_networks
from fpn_export.onnx_file import parse_onnx, read_bytes
from fpn_export.onnx_joints import cut_joints
from fpn_export.ort_cuda_parts import ProviderOptions, make_ort_cuda_parts
from fpn_export.ort_parts import make_ort_parts
from fpn_export.tensorrt.builder import BuildOptions
from fpn_export.tensorrt.parts import describe_target, make_tensorrt_parts
from fpn_export.tensorrt.quantized_graph import QUANTIZED_TYPES, not_quantized, quantized_precision
from fpn_export.tensorrt.typed_graph import PRECISIONS as TENSORRT_PRECISIONS

AUTO = "auto"
CHOICES = (AUTO, *BACKENDS)
NO_INT8_ON_CUDA = "int8 runs on the CPU, or on an NVIDIA GPU with --backend tensorrt"
Steps = Callable[[str], None]
ForCuda = TuneFor | BuildOptions | ProviderOptions  # of the native backend, of TensorRT, of ONNX Runtime


class Built(NamedTuple):
    """The plan's path and manifest, and whether it was there already."""

    path: Path
    manifest: Manifest
    cached: bool


def build_plan(
    model_path: Path,
    plan_path: Path,
    *,
    backend: str = AUTO,
    precision: str | None = None,
    force: bool = False,
    source: str | None = None,
    tune_for: ForCuda | None = None,
    on_progress: Steps = lambda step: None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Built:
    """Cut, optimise and write the plan for an ONNX file.

    ``tune_for`` makes it a plan for CUDA, which the native backend runs: for the GPU that is here, on which tactics are
    measured, or for another. "tensorrt" is for the GPU that is here, at any precision that TensorRT has, and takes
    ``BuildOptions`` there, its own defaults without. "onnxruntime" with ``ProviderOptions`` is for any GPU, and is
    compiled where it is loaded.

    ``backend`` "onnxruntime" or "native" is taken as it is. "auto" times both at fp32 and int8 and takes the faster,
    which ``on_note`` is told in one line; at "bf16" it is native, the one that runs it.

    ``precision`` None is that of a quantised model, and for any other fp32 on the CPU and fp16 on CUDA.

    A sound plan already there with the same build key (the file's digest, the options and the versions) is left as it
    is. Builds of one plan wait for each other; an interrupted build leaves the old plan or none. ``source`` is what
    the plan says it was built from, instead of the file's name.

    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    if backend == "tensorrt":
        tune_for = tune_for or BuildOptions()
    chosen = _settle(backend, precision or _usual(tune_for), tune_for)
    if os.path.isdir(plan_path):
        raise PlanError(f"cannot write {plan_path}: it is a folder; give the name of a file")
    if os.path.realpath(plan_path) == os.path.realpath(model_path):
        raise PlanError(f"the plan would replace the model {model_path}; give another name with -o")
    with _alone(plan_path, on_progress) as work:
        on_progress("read")
        data = read_bytes(model_path)
        key = build_key(hashlib.sha256(data).hexdigest(), backend, precision, tune_for)
        if not force and (known := _existing(plan_path, key)):
            return Built(plan_path, known, cached=True)
        model, spec = parse_onnx(model_path, data)
        precision = _fit_model(model_path, model, precision, chosen, tune_for)
        on_progress("cut")
        device = "cuda" if tune_for else "cpu"
        networks = _cut(model_path, lambda: cut_networks(model, spec))
        maker = _PartMaker(model_path, model, networks, spec, precision, device, work, on_progress, tune_for)
        made = _make_faster(maker) if chosen == AUTO else Made(chosen, maker.make(chosen))
        versions = _versions(made.backend)
        if isinstance(tune_for, TuneFor):
            versions |= make_tactics(made.parts, spec, tune_for, on_progress, on_note)
        elif isinstance(tune_for, BuildOptions):
            versions |= describe_target(made.parts)
        elif tune_for:
            versions["provider"] = tune_for.provider
        on_progress("write")
        manifest = Manifest(
            spec=spec,
            backend=made.backend,
            precision=precision,
            device=device,
            versions=versions,
            build_key=key,
            source=source or model_path.name,
        )
        written = write_plan(plan_path, manifest, made.parts)
        if made.reason:
            on_note(made.reason)
        return Built(plan_path, written, cached=False)


class Made(NamedTuple):
    """The parts of a plan, the backend that they are for and, if it was not asked for, why it was taken."""

    backend: str
    parts: dict[str, bytes]
    reason: str = ""


class _PartMaker(NamedTuple):
    """Makes the parts of one model for any backend."""

    path: Path
    model: ModelProto
    networks: dict[str, ModelProto]
    spec: AnySpec
    precision: str
    device: str
    work: Path
    on_progress: Steps
    tune_for: ForCuda | None

    def make(self, backend: str) -> dict[str, bytes]:
        if isinstance(self.tune_for, BuildOptions):
            return make_tensorrt_parts(
                self.path, self.networks, self.spec, self.precision, self.tune_for, self.on_progress
            )
        if isinstance(self.tune_for, ProviderOptions):
            if not isinstance(self.spec, ModelSpec):
                raise BackendError(
                    "mask proposals run on CUDA natively or on TensorRT; take --backend native or tensorrt"
                )
            return make_ort_cuda_parts(
                self.path, self.networks, self.spec, self.precision, self.tune_for, self.on_progress
            )
        if backend == "native":
            return make_native_parts(self.path, self.networks, self.spec, self.precision, self.on_progress, self.device)
        networks = self.networks
        if isinstance(self.spec, ModelSpec):
            spec = self.spec
            networks = networks | _cut(self.path, lambda: cut_joints(self.model, spec))
        return make_ort_parts(self.path, networks, self.work, self.on_progress)


def _settle(backend: str, precision: str, tune_for: ForCuda | None = None) -> str:
    """The backend that is left by precision and device.

    Raises: BackendError for what does not go together or is not here.
    """
    if precision == "fp8" and backend in CHOICES and backend != "tensorrt":
        raise BackendError("fp8 runs on TensorRT only; add --backend tensorrt")
    precisions = TENSORRT_PRECISIONS if backend == "tensorrt" else PRECISIONS
    for what, given, known in (("backend", backend, CHOICES), ("precision", precision, precisions)):
        if given not in known:
            raise BackendError(f"there is no {what} {given!r}; take one of {', '.join(known)}")
    if (backend == "tensorrt") != isinstance(tune_for, BuildOptions):
        raise BackendError("TensorRT builds on the GPU that is to run the plan, with options of its own")
    if isinstance(tune_for, BuildOptions):
        return backend
    if isinstance(tune_for, ProviderOptions):
        if backend != "onnxruntime":
            raise BackendError(f"a provider is ONNX Runtime's, not of the {backend} backend; add --backend onnxruntime")
        return backend
    if tune_for:
        if backend not in (AUTO, "native"):
            raise BackendError(f"the {backend} backend is not built for CUDA this way; take --backend native")
        if precision == "int8":
            raise BackendError(NO_INT8_ON_CUDA)
        if not tune_for.target:
            check_native_device()
        return "native"
    if precision in ("fp32", "int8"):
        return backend
    if backend == "onnxruntime":
        raise BackendError(f"the onnxruntime backend does not run {precision}; take --backend native or fp32")
    if precision == "bf16" and not has_bfloat16():
        raise BackendError("this processor or this torch cannot convolve in bf16; build with --precision fp32")
    return "native"


def _fit_model(path: Path, model: ModelProto, precision: str | None, backend: str, tune_for: ForCuda | None) -> str:
    """The precision for what the model is: quantised to int8, to fp8, or float.

    Raises: ModelError if they do not go together, which TensorRT's own check has more to say of; BackendError if the
        backend does not run it on the device.
    """
    found = quantized_precision(model)
    if backend == "tensorrt":
        return precision or (found if found in QUANTIZED_TYPES else None) or _usual(tune_for)
    if found is None:
        if precision == "int8":
            raise ModelError(f"{path}: {not_quantized('int8')}")
        return precision or _usual(tune_for)
    if found != "int8":
        raise ModelError(f"{path} is quantised to {found}, which TensorRT runs only; add --backend tensorrt")
    if tune_for:
        raise BackendError(f"{path} is quantised; {NO_INT8_ON_CUDA}")
    if precision not in (None, "int8"):
        raise ModelError(f"{path} is quantised, which does not go with {precision}; leave --precision out")
    if backend == "native":
        check_int8()
    return "int8"


def _usual(tune_for: ForCuda | None) -> str:
    """The precision of a float model that none is named for."""
    return "fp16" if tune_for else "fp32"


def _make_faster(maker: _PartMaker) -> Made:
    """The parts for the backend that runs the trunk faster here; ONNX Runtime's where native lacks an operator."""
    made = {"onnxruntime": maker.make("onnxruntime")}
    try:
        if maker.precision == "int8":
            check_int8()
        made["native"] = maker.make("native")
    except (ModelError, BackendError) as error:
        return Made("onnxruntime", made["onnxruntime"], f"taking onnxruntime: {error}")
    maker.on_progress("time")
    trunks = open_trunks(made["onnxruntime"][TRUNK], unpack_part("trunk", made["native"]), maker.spec)
    verdict = hold_contest(trunks, maker.spec)
    return Made(verdict.backend, made[verdict.backend], verdict.reason)


def _versions(backend: str) -> dict[str, str]:
    """The versions that a plan for ``backend`` is noted with; of both for "auto"."""
    versions = {"fpn-engine": fpn_engine.__version__}
    if backend == "tensorrt":
        return versions | {"tensorrt": load_bindings().version}
    if backend != "native":
        versions["onnxruntime"] = ort.__version__
    if backend != "onnxruntime":
        versions["torch"] = str(torch.__version__)
    return versions


def build_key(digest: str, backend: str = AUTO, precision: str | None = None, tune_for: ForCuda | None = None) -> str:
    """Digest of all that goes into a build: the ``digest`` of the file it begins with, the options and the versions."""
    options = {"backend": backend, "precision": precision or _usual(tune_for)}
    if tune_for:
        options |= tune_for.describe()
    inputs = {"onnx": digest, **options, "format": FORMAT_VERSION, **_versions(backend)}
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


def _cut(path: Path, cut: Callable[[], dict[str, ModelProto]]) -> dict[str, ModelProto]:
    try:
        return cut()
    except (ModelError, ValueError) as error:  # onnx raises ValueError for a graph that hangs together badly
        raise ModelError(f"cannot cut {path}: {error}") from None
