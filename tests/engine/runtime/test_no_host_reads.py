"""Between the packed images and the packed result nothing is read back and no shape depends on a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fpn_engine.batching import make_batches
from fpn_engine.buckets import Buckets
from fpn_engine.pipeline import Pipeline, Thresholds
from fpn_engine.runtime.captured import Line
from fpn_engine.runtime.packet import PacketForm, unpack_result
from fpn_engine.runtime.runner import Group, Task
from fpn_export.bundled import CHECKPOINT
from fpn_export.checkpoint import load_checkpoint
from fpn_export.detector import FpnDetector
from tests.engine.conftest import make_picture
from tests.engine.runtime.conftest import KINDS, fixed, make_group, make_model, pretend_cuda
from tests.engine.runtime.host_reads import HostReadError, NoHostReads

SLOTS = {"faster_rcnn": 0, "fast_rcnn": 8, "rpn": 0}

FORBIDDEN: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda t: t[0].item(),
    "int": lambda t: int(t.max()),
    "bool": lambda t: bool((t > 0).any()),
    "equal": lambda t: torch.equal(t, t + 1),
    "nonzero": lambda t: t.nonzero(),
    "where": lambda t: torch.where(t > 0),
    "mask": lambda t: t[t > 0],
    "masked_select": lambda t: t.masked_select(t > 0),
    "mask_assigned": lambda t: t.__setitem__(t > 0, t[:2]),
    "unique": lambda t: t.unique(),
    "repeat_interleave": lambda t: t.repeat_interleave(t.to(torch.int64)),
    "tensor": lambda t: t + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_mode_sees(name: str, inference: bool) -> None:
    t = torch.tensor([0.0, 1.0, 2.0])
    with torch.inference_mode(inference), NoHostReads(), pytest.raises(HostReadError):
        FORBIDDEN[name](t.clone())


def test_the_mode_allows_what_a_graph_can() -> None:
    t = torch.tensor([0.0, 1.0, 2.0])
    index = torch.tensor([2, 0])
    with torch.inference_mode(), NoHostReads() as mode:
        found = (
            t[index] + t.gather(0, index) + t.masked_fill(t > 1, 0)[:2] + torch.where(t > 0, t, 0)[:2].topk(2).values
        )
        found = found + t.repeat_interleave(2)[:2] + torch.arange(2)
    assert found.shape == (2,)
    assert len(mode.ops) > 8


def make_line(pipeline: Pipeline, kind: str, task: Task | None = None) -> Line:
    """With two images in place."""
    group, detecting = make_group([(60, 80), (61, 79)], boxes=5 if SLOTS[kind] else None)
    form = PacketForm(2, SLOTS[kind])
    packet = torch.zeros(form.count_bytes(group), dtype=torch.uint8)
    form.write(packet, group, 0)
    return Line(pipeline, task or detecting, form, packet, packet[: form.head_bytes])


@pytest.mark.usefixtures("atomic_ops")
@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_line(kind: str) -> None:
    line = make_line(fixed(make_model(KINDS[kind])), kind)
    with torch.inference_mode():
        expected = line()
        with NoHostReads() as mode:
            found = line()
    assert torch.equal(found, expected)
    ops = {name for name in mode.ops if name.startswith("fpn::")}
    assert len(ops) == {"faster_rcnn": 9, "fast_rcnn": 6, "rpn": 6}[kind]


@pytest.mark.usefixtures("atomic_ops")
def test_the_bundled_model() -> None:
    model = load_checkpoint(CHECKPOINT).model.eval()
    (batch,) = make_batches([(120, 160)], model.spec, 1, Buckets(None, 32))
    group = Group([make_picture(120, 160)], batch.image_sizes)
    form = PacketForm(1)
    packet = torch.zeros(form.count_bytes(group), dtype=torch.uint8)
    form.write(packet, group, 0)
    task = Task(padded_size=batch.padded_size, thresholds=Thresholds.of(model.spec).override(box_score_thresh=1e-3))
    line = Line(fixed(model), task, form, packet, packet[: form.head_bytes])
    with torch.inference_mode():
        expected = line()
        with NoHostReads():
            found = line()
    assert torch.equal(found, expected)
    assert int(found[0, 0]) > 0


@pytest.mark.usefixtures("atomic_ops")
def test_the_proposals_alone(model: FpnDetector) -> None:
    line = make_line(fixed(model), "faster_rcnn", Task(padded_size=(64, 96), thresholds=None))
    with torch.inference_mode(), NoHostReads():
        assert line().shape == (2, 4 + 7 * model.spec.rpn_post_nms_top_n_test)


@pytest.mark.usefixtures("atomic_ops")
def test_what_the_cpu_may_do_would_be_seen(model: FpnDetector) -> None:
    line = make_line(fixed(model, fixed_shapes=None), "faster_rcnn")
    with torch.inference_mode(), NoHostReads(), pytest.raises(HostReadError, match="_local_scalar_dense"):
        line()


def test_fixed_shapes_change_no_result(model: FpnDetector) -> None:
    lines = [make_line(fixed(model, fixed_shapes=choice), "faster_rcnn") for choice in (True, False)]
    with torch.inference_mode():
        ours, theirs = (line() for line in lines)
    counts = ours[:, 0].tolist()
    assert min(counts) > 0
    assert counts == theirs[:, 0].tolist()
    torch.testing.assert_close(ours[:, 44:].view(torch.float32), theirs[:, 44:].view(torch.float32), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["faster_rcnn", "rpn"])
def test_slots_behind_the_last_are_zero(kind: str) -> None:
    model = make_model(KINDS[kind])
    thresholds = Thresholds.of(model.spec).override(box_nms_thresh=0.0, box_detections_per_img=1000)
    line = make_line(fixed(model), kind, Task(padded_size=(64, 96), thresholds=thresholds))
    with torch.inference_mode():
        found = unpack_result(line())
    for row, count in enumerate(found.counts.tolist()):
        assert 0 < count < 1000
        for part in (found.boxes, found.scores, found.labels):
            assert not part[row, count:].any()
            assert part[row, :count].any()


@pytest.mark.parametrize("kind", KINDS)
def test_the_branches_that_cuda_takes(kind: str) -> None:
    """With tensors that have a shape and say that they are on a GPU, and no values that could be read."""
    model = make_model(KINDS[kind])
    with FakeTensorMode(), torch.inference_mode():
        pretend_cuda(model)
        pipeline = Pipeline(model.spec, model.trunk, model.head if model.has_box_head else None, "cuda")
        form = PacketForm(2, SLOTS[kind])
        places = (torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1 << 16, form.head_bytes))
        line = Line(pipeline, make_group([(60, 80)])[1], form, *places)
        with NoHostReads() as mode:
            found = line()
    slots = model.spec.box_detections_per_img
    assert (found.device.type, found.shape, found.dtype) == ("cuda", (2, 4 + 7 * slots), torch.int32)
    assert any(name.startswith("fpn::") for name in mode.ops)
