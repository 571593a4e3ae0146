"""The parts of a plan for ONNX Runtime on CUDA: networks in their number types, compiled where they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto

from fpn_engine.backends.ort_cuda import CHOICE, PRECISIONS
from fpn_engine.backends.ort_providers import PROVIDERS, ProviderChoice
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.spec import ModelSpec
from fpn_export.tensorrt.profiles import Batches, Profile, image_profiles, roi_profile
from fpn_export.tensorrt.typed_graph import type_graph


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderOptions:
    """What an ONNX Runtime plan for CUDA is built for.

    Attributes:
        provider: "cuda" or "tensorrt". batches, sizes: that the TensorRT provider compiles for, as ``BuildOptions``
            has them; the CUDA provider takes any.
    """

    provider: str = "cuda"
    batches: Batches = field(default_factory=Batches)
    sizes: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        if self.provider not in PROVIDERS:
            raise BackendError(f"there is no provider {self.provider!r}; take one of {', '.join(PROVIDERS)}")

    def describe(self) -> dict[str, Any]:
        """What the plan depends on."""
        return {"provider": self.provider, "batches": [self.batches.best, self.batches.most], "sizes": self.sizes}


def make_ort_cuda_parts(
    path: Path,
    networks: Mapping[str, ModelProto],
    spec: ModelSpec,
    precision: str,
    options: ProviderOptions,
    on_progress: Callable[[str], None],
) -> dict[str, bytes]:
    """Networks cut out of ``path`` as they are, in fp32 or fp16: which operators to fuse is for the provider to say.

    Raises: BackendError for another precision, ModelError for a network that does not fit it.
    """
    if precision not in PRECISIONS:
        raise BackendError(
            f"the onnxruntime backend does not run {precision} on CUDA; take --precision fp16 or fp32, or --backend "
            "native or tensorrt"
        )
    parts = {}
    for name, network in networks.items():
        on_progress(f"type {name}")
        try:
            parts[f"{name}.onnx"] = type_graph(network, precision).SerializeToString()
        except (ModelError, onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"{path} cannot be made {precision} ({reason})") from None
    shapes: dict[str, list[Profile]] = {}
    if options.provider == "tensorrt":
        shapes["image"] = image_profiles(spec, options.batches, options.sizes)
        if spec.has_box_head:
            shapes["roi_rows"] = [roi_profile(spec, options.batches)]
    listed = {name: [[list(shape) for shape in profile] for profile in each] for name, each in shapes.items()}
    return parts | {CHOICE: ProviderChoice(provider=options.provider, shapes=listed).to_json()}
