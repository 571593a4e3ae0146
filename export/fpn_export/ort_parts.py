"""The parts of a plan for ONNX Runtime: graphs that its own optimiser has been over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort
from onnx import ModelProto

from fpn_engine.backends.ort import PROVIDERS, session_options
from fpn_engine.errors import ModelError
from fpn_export.quantization.integers import use_integers
from fpn_export.tensorrt.quantized_graph import is_quantized


def make_ort_parts(
    path: Path, networks: Mapping[str, ModelProto], work: Path, on_progress: Callable[[str], None]
) -> dict[str, bytes]:
    """Optimise trunk, head and joints, which were cut out of ``path``, in the folder ``work``.

    Raises: ModelError if ONNX Runtime refuses one.
    """
    parts = {}
    for name, network in networks.items():
        on_progress(f"optimise {name}")
        if is_quantized(network):
            network = use_integers(network)
        parts[f"{name}.onnx"] = _optimise(path, network.SerializeToString(), work / f"{name}.onnx")
    return parts


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
