"""A detector in all its forms, PyTorch, ONNX and plan, beside torchvision's with the same weights."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor

from fpn_engine.engine import Engine
from fpn_engine.light.runner import LightRunner
from fpn_engine.pipeline import Proposals
from fpn_engine.plan import Plan, read_plan
from fpn_engine.resizing import padded_size, resized_size
from fpn_engine.spec import ModelSpec
from fpn_export.build import build_plan
from fpn_export.detector import FasterRCNN, FpnDetector
from fpn_export.native.tactics import TuneFor
from fpn_export.onnx_export import export_onnx
from fpn_kernels import pack_images, preprocess
from tests.parity.random_detector import REPRESENTATION_SIZE, SMALL, make_random_detector
from tests.parity.torchvision_oracle import Found, Oracle, Pixels, build_oracle

OUTPUTS = ("boxes", "scores", "labels", "counts", "status")
Arrays = dict[str, NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class Subject:
    """One detector; what takes seconds to make is made once, when first asked for."""

    spec: ModelSpec
    model: FpnDetector
    representation_size: int

    @cached_property
    def onnx_model(self) -> onnx.ModelProto:
        """Not to be changed."""
        return export_onnx(self.model, self.spec)

    @cached_property
    def session(self) -> ort.InferenceSession:
        return open_session(self.onnx_model)

    @cached_property
    def plan(self) -> Plan:
        return self.build("onnxruntime")

    @cached_property
    def native_plan(self) -> Plan:
        return self.build("native")

    def build(self, backend: str, precision: str = "fp32", tune_for: TuneFor | None = None) -> Plan:
        """A new plan for a backend; ``tune_for`` makes it one for CUDA."""
        return build_model(self.onnx_model, backend, precision, tune_for)

    def engine(self, *, batch_size: int = 1, plan: Plan | None = None, **changes: Any) -> Engine:
        """The plan, or another one, loaded, with fields of its spec changed; none that the cut parts depend on."""
        return Engine.from_plan(self._changed(plan or self.plan, changes), batch_size=batch_size)

    def light_engine(self, *, batch_size: int = 1, **changes: Any) -> Engine:
        """The plan loaded as if torch were not there; the rest as :meth:`engine`."""
        light = LightRunner(self._changed(self.plan, changes))
        return Engine(light, runner=light, batch_size=batch_size)

    def _changed(self, plan: Plan, changes: dict[str, Any]) -> Plan:
        spec = dataclasses.replace(self.spec, **changes)
        return Plan(dataclasses.replace(plan.manifest, spec=spec), plan.parts)

    def oracle(self, **changes: Any) -> Oracle:
        spec = dataclasses.replace(self.spec, **changes)
        return Oracle(build_oracle(spec, representation_size=self.representation_size, state=self.model.state_dict()))


def build_model(model: onnx.ModelProto, backend: str, precision: str, tune_for: TuneFor | None = None) -> Plan:
    """A new plan of an ONNX model."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", folder)
        model_path, plan_path = Path(folder) / "model.onnx", Path(folder) / "model.plan"
        model_path.write_bytes(model.SerializeToString())
        build_plan(model_path, plan_path, backend=backend, precision=precision, tune_for=tune_for)
        return read_plan(plan_path)


def open_session(model: onnx.ModelProto, extra_outputs: Sequence[str] = ()) -> ort.InferenceSession:
    """ONNX Runtime alone; ``extra_outputs`` are inner float tensors to look at."""
    if extra_outputs:
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        known = {output.name for output in copy.graph.output}
        copy.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.INT64 if name == "roi_slots" else TensorProto.FLOAT, None)
            for name in extra_outputs
            if name not in known
        )
        model = copy
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # torch wants the cores in between
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run_onnx(
    session: ort.InferenceSession,
    image: Tensor,
    image_sizes: Sequence[Sequence[int]],
    given: Proposals | None = None,
    **thresholds: Any,
) -> Arrays:
    """Feed a preprocessed batch, a Fast R-CNN its proposals too; ``thresholds`` override initializers of the file."""
    types = {
        value.name: np.int64 if "int64" in value.type else np.float32
        for value in session.get_overridable_initializers()
    }
    feeds: Arrays = {"image": image.numpy(), "image_sizes": np.array(image_sizes, dtype=np.int64).reshape(-1, 2)}
    if given is not None:
        feeds |= {"proposals": given.boxes.numpy(), "proposal_counts": given.counts.numpy()}
    for name, value in thresholds.items():
        feeds[name] = np.array([value] if name == "box_detections_per_img" else value, dtype=types[name])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def found_in(outputs: Arrays, row: int, original: Sequence[int], resized: Sequence[int]) -> Found:
    """One image of an ONNX answer, boxes in pixels of the original."""
    assert outputs["status"][row] == 0
    n = int(outputs["counts"][row])
    h, w = (np.float32(side) / np.float32(new) for side, new in zip(original, resized, strict=True))
    boxes = outputs["boxes"][row, :n] * np.array([w, h, w, h], dtype=np.float32)
    return Found(boxes, outputs["scores"][row, :n], outputs["labels"][row, :n])


def preprocess_together(images: Sequence[Pixels], spec: ModelSpec) -> tuple[Tensor, Tensor]:
    """Images of one padded size as a batch and their sizes in it."""
    sizes = [resized_size(*image.shape[:2], spec.min_size, spec.max_size) for image in images]
    (padded,) = {padded_size(size) for size in sizes}
    packed = pack_images([torch.from_numpy(image) for image in images])
    image_sizes = torch.tensor(sizes, dtype=torch.int64)
    return preprocess(*packed, image_sizes, padded, spec.image_mean, spec.image_std), image_sizes


@cache
def random_subject(arch: str, spec: ModelSpec = SMALL, representation_size: int = REPRESENTATION_SIZE) -> Subject:
    """Random weights that find something; the same object for every test of the session."""
    spec, oracle = make_random_detector(arch, spec, representation_size)
    model = FasterRCNN(spec, representation_size=representation_size).eval()
    model.load_state_dict(oracle.state_dict())
    return Subject(spec, model, representation_size)
