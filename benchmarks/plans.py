"""Plans of a model that is in memory, in any precision: for int8 and fp8 it is quantised on pictures first."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from onnx import ModelProto
from PIL import Image

from fpn_engine.errors import BackendError, FpnEngineError
from fpn_engine.plan import Plan, read_plan
from fpn_engine.spec import ModelSpec
from fpn_export.build import AUTO, ForCuda, build_plan
from fpn_export.quantization.quantize import QuantizeOptions, quantize_model
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject

QUANTIZED = ("int8", "fp8")
PICTURES, PICTURE_SIZE = 8, (240, 320)  # to calibrate a random model on


def build(
    subject: Subject,
    precision: str,
    backend: str = AUTO,
    tune_for: ForCuda | None = None,
    photographs: Sequence[Path] = (),
) -> Plan:
    """A plan for the CPU, or with ``tune_for`` for CUDA; what is measured for it stays in the timing cache.

    Args: photographs: to calibrate on, random pictures without.
    Raises: FpnEngineError in one sentence if there is no such plan.
    """
    model = subject.onnx_model
    if precision in QUANTIZED:
        model = _quantize(subject, precision, tuple(photographs))
    return build_model(model, precision, backend, tune_for)


def build_model(model: ModelProto, precision: str, backend: str = AUTO, tune_for: ForCuda | None = None) -> Plan:
    """A plan of an ONNX model, which is quantised already if it is to be; the rest as :func:`build`."""
    with tempfile.TemporaryDirectory() as folder:
        path, plan = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        path.write_bytes(model.SerializeToString())
        try:
            build_plan(path, plan, backend=backend, precision=precision, tune_for=tune_for, on_note=print)
        except FpnEngineError as error:  # without the name of a file that is gone by then
            raise BackendError(str(error).replace(f"{path}: ", "").replace(folder, "")) from error
        return read_plan(plan)


@lru_cache(maxsize=2)
def _quantize(subject: Subject, precision: str, photographs: tuple[Path, ...]) -> ModelProto:
    """All layers that can be."""
    spec: ModelSpec = subject.spec
    with tempfile.TemporaryDirectory() as folder:
        paths = list(photographs) or _draw(Path(folder))
        options = QuantizeOptions(precision=precision, calibrate=len(paths), score=1, sensitivity=0, tolerance=None)
        return quantize_model(subject.onnx_model, spec, paths, options)[0]


def _draw(folder: Path) -> list[Path]:
    paths = [folder / f"{seed}.png" for seed in range(PICTURES)]
    for seed, path in enumerate(paths):
        Image.fromarray(make_picture(*PICTURE_SIZE, seed)).save(path)
    return paths
