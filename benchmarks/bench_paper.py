"""The paper's other systems (Lin et al. 2017): the C4 baseline and mask proposals.

Its Faster R-CNN with FPN is in ``bench_engine``.

    python -m benchmarks.bench_paper -o FILE
    pytest benchmarks/bench_paper.py

torchvision has no C4 detector; what is found is compared with PyTorch's own modules in float32, which stand in the row.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from benchmarks.contest import Contest
from benchmarks.mask_proposals import TOLERANCE, compare, evaluate_densely, make_plan
from benchmarks.ours import list_ours, make_eager_parts
from benchmarks.scene import QUICK_SIZE, SIZE, Contestant, Scene
from benchmarks.suite import Case, Effort, Measured, NotHereError, RunCase, Suite, run_suite
from benchmarks.timing import describe_times, time_in_turns
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.spec import numbered_categories
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.variants import make_variant
from tests.export.random_system import REPRESENTATION_SIZE, make_random_system
from tests.parity.subject import Subject
from tests.parity.torchvision_oracle import Found

VARIANT = "dual"  # as benchmarks.mask_proposals has it by default
PYTORCH = "fpn-engine, PyTorch's parts fp32"
C4 = "R50-C4, {}x{}, batch 1"
MASKS = "R50-FPN masks, {}x{}, batch 1"
# As large as the paper's baseline: one map, 5 sizes and 3 ratios of anchors.
FULL_SIZE: dict[str, Any] = {
    "arch": "resnet50",
    "body_width": 64,
    "categories": numbered_categories(80),
    "anchor_sizes": ((32.0, 64.0, 128.0, 256.0, 512.0),),
    "canonical_size": 224,
    "min_size": SIZE[0],
    "max_size": SIZE[1],
    "rpn_pre_nms_top_n_test": 5000,
    "rpn_post_nms_top_n_test": 1000,
    "box_detections_per_img": 100,
}


class SystemScene(Scene):
    """A system that torchvision has not."""

    has_oracle: ClassVar[bool] = False

    @cached_property
    def expected(self) -> dict[int, Found]:
        found = self._eager.detect(0)
        return {row: found[row] for row in sorted({0, self.batch - 1})}

    @cached_property
    def expected_maps(self) -> dict[int, Sequence[Tensor]]:
        assert self._eager.maps is not None
        maps = self._eager.maps()
        return {row: [level[row : row + 1].float() for level in maps] for row in self.expected}

    @cached_property
    def _eager(self) -> Contestant:
        return make_eager_parts(self)


def list_cases(effort: Effort) -> list[Case]:
    size = QUICK_SIZE if effort.quick else SIZE
    return [
        Case(what=C4.format(*size), measure=measure_c4),
        Case(what=MASKS.format(*size), measure=measure_masks),
    ]


def measure_c4(effort: Effort) -> Iterator[Measured]:
    detector = make_random_system("c4", "faster_rcnn", **({} if effort.quick else FULL_SIZE))
    subject = Subject(detector.spec, detector, REPRESENTATION_SIZE)
    size = QUICK_SIZE if effort.quick else SIZE
    scene = SystemScene(subject, size, 1, effort.device, detector.spec.arch)
    groups = [{PYTORCH: make_eager_parts}, list_ours(effort.device, effort.quick)]
    return Contest(scene, groups, effort).grow()


@torch.no_grad()
def measure_masks(effort: Effort) -> Iterator[Measured]:
    """The CPU plan beside the fully convolutional model, which has to give the same. From a normalised image."""
    if effort.device.type == "cuda":
        raise NotHereError("the mask model has been measured on a CPU only")
    torch.manual_seed(0)
    spec = MaskSpec(arch="resnet18" if effort.quick else "resnet50")
    model = FpnMasks(make_variant(spec, VARIANT)).eval()
    plan = make_plan(model)
    size = QUICK_SIZE if effort.quick else SIZE
    inputs = [[torch.randn(1, 3, *size)] for _ in range(2)]
    differences = compare(model, plan, inputs[0][0])
    error = max(differences["scores"], differences["masks"])
    assert error <= TOLERANCE, f"scores or masks differ by {error:.2g}"
    contestants = {"fpn-engine, native fp32": plan, "fully convolutional fp32": partial(evaluate_densely, model)}
    times, turns = time_in_turns(contestants, inputs, rounds=effort.rounds, seconds=effort.seconds)
    row = {"variant": VARIANT, "largest_error": float(f"{error:.2g}"), "contestants": describe_times(times, turns)}
    yield Measured.of({**row, "complete": True}, times)


SUITE = Suite(name="paper", summary="the paper's C4 baseline and mask proposals", list_cases=list_cases)


def test_paper(case: Case, run_case: RunCase) -> None:
    run_case(case)


if __name__ == "__main__":
    sys.exit(run_suite(SUITE, sys.argv[1:]))
