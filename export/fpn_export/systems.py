"""The systems that the paper compares (Lin et al. 2017, tables 1-3 and sec. 4.1), each as changes of a base spec.

The base is the paper's own system, an FPN with anchors of one size on each level; what a system does not concern
(ResNet, widths, image and anchor sizes, thresholds) is the base's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fpn_engine.errors import SpecError
from fpn_engine.spec import FINEST_STAGE, MODELS, OBJECT, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row of the tables.

    Attributes: rows: where it stands in the paper. summary: what it is. changes: fields of the spec, given the base.
    """

    rows: str
    summary: str
    changes: Callable[[ModelSpec], dict[str, Any]]


def _on_one_map(base: ModelSpec, level: int, **changes: Any) -> dict[str, Any]:
    """All of the base's anchors on one level, with as many candidates as its levels have together, and all RoIs."""
    sizes = tuple(size for sizes in base.anchor_sizes for size in sizes)
    candidates = base.rpn_pre_nms_top_n_test * len(base.levels)
    one_map = {"levels": (level,), "roi_levels": (level,), "anchor_sizes": (sizes,)}
    return {**one_map, "rpn_pre_nms_top_n_test": candidates, **changes}


def _on_c4(base: ModelSpec) -> dict[str, Any]:
    # The head's stride of 2 brings twice as many bins down to the base's: 14 to 7.
    pool = dataclasses.replace(base.box_roi_pool, output_size=2 * base.box_roi_pool.output_size)
    return _on_one_map(base, 4, pyramid="none", box_head="conv5", box_roi_pool=pool)


SYSTEMS = {
    "fpn": System(rows="tables 1-3 (c)", summary="the feature pyramid network", changes=lambda base: {}),
    "c4": System(
        rows="tables 1-3 (a)", summary="the single map C4, with stage 5 of the ResNet as box head", changes=_on_c4
    ),
    "c5": System(
        rows="tables 1-3 (b)",
        summary="the single map C5",
        changes=lambda base: _on_one_map(base, 5, pyramid="none"),
    ),
    "bottom_up": System(
        rows="tables 1-2 (d)",
        summary="a pyramid without top-down pathway",
        changes=lambda base: {"pyramid": "bottom_up"},
    ),
    "top_down": System(
        rows="tables 1-2 (e)",
        summary="a pyramid without lateral connections",
        changes=lambda base: {"pyramid": "top_down"},
    ),
    "finest": System(
        rows="tables 1-2 (f)",
        summary="the finest level of the pyramid alone",
        changes=lambda base: _on_one_map(base, FINEST_STAGE),
    ),
    "unshared": System(
        rows="sec. 4.1",
        summary="an RPN head for each level",
        changes=lambda base: {"rpn_head_shared": False},
    ),
    "roi_pool": System(
        rows="Girshick 2015, sec. 2.1",
        summary="RoIPool in place of RoIAlign",
        changes=lambda base: {"box_roi_pool": dataclasses.replace(base.box_roi_pool, kind="max")},
    ),
}


def make_system(base: ModelSpec, system: str, model: str = "faster_rcnn") -> ModelSpec:
    """The spec of a system.

    Args:
        base: an FPN; its model does not matter. system: a key of ``SYSTEMS``.
        model: "rpn" (table 1), "fast_rcnn" (table 2) or "faster_rcnn" (table 3). An RPN has the one category "object"
            and reports all proposals that it makes, rpn_post_nms_top_n_test (1000 in table 1).
    Raises: SpecError for an unknown system or model, or if the base is no FPN or its values do not fit the system.
    """
    if system not in SYSTEMS:
        raise SpecError(f"unknown system {system!r}; known are {', '.join(SYSTEMS)}")
    if model not in MODELS:
        raise SpecError(f"unknown model {model!r}; known are {', '.join(MODELS)}")
    if base.pyramid != "fpn":
        raise SpecError(f"the base of a system must be an fpn, not {base.pyramid}")
    changes = SYSTEMS[system].changes(base) | {"model": model}
    if model == "rpn":
        changes |= {"categories": (OBJECT,), "box_detections_per_img": base.rpn_post_nms_top_n_test}
    return dataclasses.replace(base, **changes)
