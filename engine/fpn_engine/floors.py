"""Floors: the least time of each stage of a plan on this device, so that what is left to gain is seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fpn_engine.backends.native.costs import count_costs
from fpn_engine.backends.native.packing import unpack_part
from fpn_engine.batching import Batch
from fpn_engine.plan import Manifest, Plan
from fpn_engine.roofline import DTYPES, Peaks, count_mapping
from fpn_engine.spec import ModelSpec
from fpn_engine.stages import BOX_HEAD, STAGES, TRUNK


def has_floors(manifest: Manifest) -> bool:
    """Whether they can be counted: those of detectors' native plans, which hold their operations as data."""
    return isinstance(manifest.spec, ModelSpec) and manifest.backend == "native" and manifest.precision in DTYPES


def count_floors(plan: Plan, batches: Iterable[Batch], peaks: Peaks) -> Mapping[str, float]:
    """Milliseconds of each stage that moves maps or multiplies, in the order of the dataflow, for all ``batches``.

    Operations count one after another, as they run; the box head runs on all proposals that may be.
    """
    spec, found = plan.manifest.detector, dict[str, float]()
    programs = {name: unpack_part(name, plan.parts) for name in ("trunk", "head")[: 1 + spec.has_box_head]}
    itemsize = DTYPES[plan.manifest.precision].itemsize
    for batch in batches:
        number, size = len(batch.indices), batch.padded_size
        rows = number * spec.rpn_post_nms_top_n_test
        inputs = {
            "trunk": (TRUNK, (number, *size, 3)),
            "head": (BOX_HEAD, (rows, spec.feature_channels * spec.box_roi_pool.output_size**2)),
        }
        spent = count_mapping(spec, size, number, itemsize, peaks)
        for name, (program, weights) in programs.items():
            stage, shape = inputs[name]
            costs = count_costs(program, shape, {key: tuple(tensor.shape) for key, tensor in weights.items()})
            spent[stage] = sum(peaks.milliseconds(cost.moved, 2 * cost.macs) for cost in costs)
        for stage, milliseconds in spent.items():
            found[stage] = found.get(stage, 0.0) + milliseconds
    return {name: found[name] for name in STAGES if name in found}
