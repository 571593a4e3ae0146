"""The end-to-end ONNX file as ONNX Runtime runs it by itself, and its stages cut out at the tensors that have names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, helper
from onnx.utils import Extractor
from torch import Tensor

from fpn_engine.backends import TrunkOutput
from fpn_engine.backends.ort import open_session
from fpn_engine.detections import Detections
from fpn_engine.errors import BackendError, ModelError
from fpn_engine.pipeline import PaddedDetections
from fpn_engine.proposals import Boxes as GivenBoxes
from fpn_engine.spec import ModelSpec
from fpn_engine.work import Pixels
from fpn_export.onnx_boxes import ABOVE_EMPTY
from fpn_export.onnx_export import trunk_outputs
from fpn_export.onnx_roi_features import roi_maps
from fpn_export.verification.subject import PipelineSubject, as_detections, no_detections, scale_given
from fpn_export.verification.trace import Answer, Boxes, Input, Maps, Trace

Arrays = dict[str, NDArray[Any]]
OUTPUTS = ("boxes", "scores", "labels", "counts", "status")
LIMIT = "box_detections_per_img"


class OnnxSubject:
    """An end-to-end file. Its trace is one run of the whole file, each stage alone a run of the part cut out for it.

    Only the preprocessing, which is not in the file, is the engine's.

    Raises: ModelError if the file lacks a tensor that it should have.
    """

    def __init__(
        self, model: ModelProto, spec: ModelSpec, *, name: str, runtime: str, precision: str, threads: int | None = None
    ) -> None:
        self.name, self.runtime, self.spec, self.precision = name, runtime, spec, precision
        self._model, self._threads = model, threads
        self._before = PipelineSubject(
            name=name, runtime=runtime, spec=spec, precision=precision, run_trunk=_refuse, head=None
        )
        made = {output for node in model.graph.node for output in node.output}
        self._maps = [name for name in trunk_outputs(spec) if name in made]
        self._sessions: dict[tuple[str, ...], Any] = {}
        self._inner = [*self._maps]
        if spec.has_box_head:
            self._inner += ["roi_slots", "roi_features", "class_logits", "box_deltas"]
            self._inner += ["proposals", "proposal_scores"] if spec.has_rpn else []

    def preprocess(self, pixels: Pixels) -> Input:
        return self._before.preprocess(pixels)

    def trace(self, pixels: Pixels, given: GivenBoxes | None = None) -> Trace:
        prepared = self.preprocess(pixels)
        feeds = {"image": prepared.image.numpy(), "image_sizes": prepared.image_sizes.numpy()}
        if given is not None:
            feeds |= self._feed_proposals(scale_given(given, prepared))
        found = _run(self._whole, [*OUTPUTS, *self._inner], feeds)
        proposals = roi_features = answer = None
        if self.spec.has_box_head:
            proposals = self._real(found) if given is None else scale_given(given, prepared)
            rows = (_unsort(found, name) for name in ("roi_features", "class_logits", "box_deltas"))
            roi_features, class_logits, box_deltas = rows
            answer = Answer(class_logits, box_deltas)
        detections = as_detections(self.spec, _as_padded(found), prepared)
        return Trace(
            input=prepared,
            maps={name: torch.from_numpy(found[name]) for name in self._maps},
            proposals=proposals,
            roi_features=roi_features,
            answer=answer,
            detections=no_detections(self.spec, prepared.shape) if detections is None else detections,
            finite=detections is not None,
        )

    def run_trunk(self, given: Input) -> Maps:
        found = self._run_part(["image"], self._maps, {"image": given.image.numpy()})
        return {name: torch.from_numpy(found[name]) for name in self._maps}

    def propose(self, maps: Maps, given: Input) -> Boxes:
        names = [name for name in self._maps if name.startswith(("objectness_", "deltas_"))]
        feeds = {name: maps[name].numpy() for name in names}
        feeds |= {"image": given.image.numpy(), "image_sizes": given.image_sizes.numpy()}
        return self._real(self._run_part(list(feeds), ["proposals", "proposal_scores"], feeds))

    def pool(self, maps: Maps, proposals: Boxes) -> Tensor:
        spec = self.spec
        if not len(proposals.boxes):
            return torch.zeros(0, spec.feature_channels, *[spec.box_roi_pool.output_size] * 2)
        feeds = {name: maps[name].numpy() for name in roi_maps(spec)} | self._feed_proposals(proposals)
        return _unsort(self._run_part(list(feeds), ["roi_slots", "roi_features"], feeds), "roi_features")

    def run_head(self, roi_features: Tensor) -> Answer:
        if not len(roi_features):
            width = self.spec.num_classes
            return Answer(torch.zeros(0, width), torch.zeros(0, 4 * width))
        names = ["class_logits", "box_deltas"]
        found = self._run_part(["roi_features"], names, {"roi_features": roi_features.numpy()})
        return Answer(*(torch.from_numpy(found[name]) for name in names))

    def finish(
        self, maps: Maps, proposals: Boxes | None, answer: Answer | None, given: Input, **thresholds: Any
    ) -> Detections | None:
        feeds: Arrays = {"image_sizes": given.image_sizes.numpy()}
        if proposals is None or answer is None:
            listed = self.propose(maps, given)
            feeds = {"proposals": listed.boxes[None].numpy(), "proposal_scores": listed.scores[None].numpy()}
            thresholds = {name: value for name, value in thresholds.items() if name == LIMIT}
        else:
            if not len(proposals.boxes):
                return no_detections(self.spec, given.shape)
            feeds |= {"class_logits": answer.class_logits.numpy(), "box_deltas": answer.box_deltas.numpy()}
            feeds |= {"proposals": proposals.boxes[None].numpy(), "roi_slots": np.arange(len(proposals.boxes))}
        cut = list(feeds)
        for name, value in thresholds.items():
            feeds[name] = np.array([value], np.int64) if name == LIMIT else np.array(value, np.float32)
        found = self._run_part([*cut, *thresholds], [name for name in OUTPUTS if name != "status"], feeds)
        broken = not all(bool(tensor.isfinite().all()) for tensor in (*(answer or ()), *maps.values()))
        found["status"] = np.array([int(broken)])
        return as_detections(self.spec, _as_padded(found), given)

    def _feed_proposals(self, proposals: Boxes) -> Arrays:
        feeds: Arrays = {"proposals": proposals.boxes[None].numpy()}
        if self.spec.has_rpn:
            return feeds | {"proposal_scores": proposals.scores[None].numpy()}
        if not len(proposals.boxes):  # the file wants at least one slot
            feeds = {"proposals": np.zeros((1, 1, 4), np.float32)}
        return feeds | {"proposal_counts": np.array([len(proposals.boxes)])}

    def _real(self, found: Arrays) -> Boxes:
        """The slots that are not empty; those stand behind the others."""
        real = found["proposal_scores"][0] > ABOVE_EMPTY
        return Boxes(torch.from_numpy(found["proposals"][0][real]), torch.from_numpy(found["proposal_scores"][0][real]))

    @cached_property
    def _whole(self) -> Any:
        model = ModelProto.FromString(self._model.SerializeToString())
        known = {value.name for value in model.graph.output}
        types = {value.name: value.type.tensor_type.elem_type for value in self._inferred.graph.value_info}
        for name in self._inner:
            if name not in known:
                if name not in types:
                    raise ModelError(f"{self.name} has no tensor {name}; export it again with this version")
                model.graph.output.append(helper.make_tensor_value_info(name, types[name], None))
        return open_session(model.SerializeToString(), self._threads)

    @cached_property
    def _inferred(self) -> ModelProto:
        return onnx.shape_inference.infer_shapes(self._model)

    def _run_part(self, inputs: Sequence[str], outputs: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        key = (*sorted(inputs), ">", *outputs)
        if key not in self._sessions:
            try:
                part = Extractor(self._inferred).extract_model(list(inputs), list(outputs))
            except (ValueError, KeyError) as error:
                raise ModelError(f"{self.name} cannot be cut into its stages ({error}); export it again") from None
            self._sessions[key] = open_session(part.SerializeToString(), self._threads)
        wanted = {value.name for value in self._sessions[key].get_inputs()}
        wanted |= {value.name for value in self._sessions[key].get_overridable_initializers()}
        return _run(self._sessions[key], outputs, {name: feeds[name] for name in feeds if name in wanted})


def _refuse(image: Tensor) -> tuple[tuple[Tensor, ...], TrunkOutput]:
    raise AssertionError("the file has a trunk of its own")


def _run(session: Any, names: Sequence[str], feeds: Mapping[str, NDArray[Any]]) -> Arrays:
    try:
        found = session.run(list(names), dict(feeds))
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        raise BackendError(f"ONNX Runtime failed while running the model: {error}") from None
    return dict(zip(names, found, strict=True))


def _unsort(found: Arrays, name: str) -> Tensor:
    """Rows that the file has level by level, in the order of the proposals, of which none is missing."""
    rows = np.empty_like(found[name])
    rows[np.argsort(np.argsort(found["roi_slots"]))] = found[name]
    return torch.from_numpy(rows)


def _as_padded(found: Arrays) -> PaddedDetections:
    return PaddedDetections(*(torch.from_numpy(np.ascontiguousarray(found[name])) for name in OUTPUTS))
