"""Mask proposals on the captured runner, on stand-ins for a GPU: right, never early, and nothing is read back."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fpn_engine.batching import make_batches
from fpn_engine.buckets import Buckets
from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.runtime import make_runner
from fpn_engine.runtime.captured import CapturedRunner, Line
from fpn_engine.runtime.packet import PacketForm, pack_result, unpack_masks
from fpn_engine.runtime.runner import EagerRunner
from fpn_engine.tasks import Group, PaddedMasks, Task, Thresholds
from fpn_export.masks.model import FpnMasks
from tests.engine.conftest import make_picture
from tests.engine.runtime.conftest import pretend_cuda
from tests.engine.runtime.host_reads import NoHostReads
from tests.engine.runtime.stand_ins import DeferredTransport, RecordingCapture
from tests.export.masks.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("atomic_ops")


@pytest.fixture(scope="module")
def model() -> FpnMasks:
    return tiny_model(masks_per_img=20)


@pytest.fixture(scope="module")
def pipeline(model: FpnMasks) -> MaskPipeline:
    """As a GPU runs it."""
    return MaskPipeline(model.spec, model.trunk, model.answer, fixed_shapes=True)


def make_masks_group(model: FpnMasks, shapes: list[tuple[int, int]], seed: int = 0) -> tuple[Group, Task]:
    (batch,) = make_batches(shapes, model.spec, len(shapes), Buckets(None, 32))
    images = [make_picture(*shape, seed + i) for i, shape in enumerate(shapes)]
    return Group(images, batch.image_sizes), Task(padded_size=batch.padded_size, thresholds=Thresholds.of(model.spec))


def assert_same(ours: PaddedMasks, theirs: PaddedMasks) -> None:
    assert theirs.counts.tolist() == [20] * len(theirs.counts)
    assert float(theirs.masks.std()) > 0.1
    for name, mine, other in zip(ours._fields, ours, theirs, strict=True):
        assert mine.dtype == other.dtype, name
        assert torch.equal(mine, other), name


def test_a_packet_of_masks(pipeline: MaskPipeline) -> None:
    images = torch.randn(3, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    found = pipeline(images)
    found.counts[1], found.status[2] = 7, 1
    packed = pack_result(found)
    assert packed.shape == (3, 4 + 20 * (5 + 14 * 14))
    for ours, right in zip(unpack_masks(packed, 14), found, strict=True):
        assert torch.equal(ours, right)


def test_a_packet_of_one_image_and_an_odd_number_of_words(pipeline: MaskPipeline) -> None:
    """Each row but the first then begins between two words of 64 bits."""
    found = pipeline(torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0)))
    odd = PaddedMasks(found.regions[:, :5], found.scores[:, :5], found.masks[:, :5], found.counts, found.status)
    packed = pack_result(odd)
    assert packed.shape[1] % 2 == 1
    for row in range(2):
        for ours, right in zip(unpack_masks(packed[row : row + 1], 14), odd, strict=True):
            assert torch.equal(ours, right[row : row + 1])


@pytest.mark.parametrize("early", [False, True])
def test_replays_are_right_and_stay(early: bool, model: FpnMasks, pipeline: MaskPipeline) -> None:
    """Results that wait while others are computed are not overwritten by them."""
    transport = DeferredTransport(early_uploads=early)
    capture = RecordingCapture(transport)
    runner = CapturedRunner(pipeline, transport, capture, batch_size=2, graph_memory=10**9)
    eager = EagerRunner(pipeline)
    groups = [make_masks_group(model, [(96, 128), (96, 121 + seed)], seed) for seed in range(6)]
    pending = [runner.submit(group, task) for group, task in groups]
    for number in (5, 0, 3, 1, 4, 2, 0):
        found = pending[number].wait()
        assert isinstance(found, PaddedMasks)
        right = eager.submit(*groups[number]).wait()
        assert isinstance(right, PaddedMasks)
        assert_same(found, right)
    assert capture.captures == 1
    assert capture.live[0].replays == 5
    assert "download" not in transport.log
    assert transport.log.count("keep") == 6


def test_a_group_of_fewer_images(model: FpnMasks, pipeline: MaskPipeline) -> None:
    transport = DeferredTransport()
    runner = CapturedRunner(pipeline, transport, RecordingCapture(transport), batch_size=4, graph_memory=10**9)
    group, task = make_masks_group(model, [(96, 128)] * 3)
    found = runner.submit(group, task).wait()
    assert len(found.counts) == 3


def test_the_branches_that_cuda_takes() -> None:
    """With tensors that have a shape and say that they are on a GPU, and no values that could be read."""
    model = tiny_model(masks_per_img=20)
    _, task = make_masks_group(model, [(96, 128), (96, 128)])
    with FakeTensorMode(), torch.inference_mode():
        pretend_cuda(model)
        pipeline = MaskPipeline(model.spec, model.trunk, model.answer, "cuda")
        form = PacketForm(2)
        places = (torch.empty(size, dtype=torch.uint8, device="cuda") for size in (1 << 16, form.head_bytes))
        line = Line(pipeline, task, form, *places)
        with NoHostReads() as mode:
            found = line()
    assert (found.device.type, found.shape, found.dtype) == ("cuda", (2, 4 + 20 * (5 + 14 * 14)), torch.int32)
    assert {"fpn::window_linear", "fpn::select_topk"} <= {name.partition(".")[0] for name in mode.ops}


def test_on_a_cpu_nothing_is_captured(pipeline: MaskPipeline) -> None:
    assert isinstance(make_runner([pipeline], 1), EagerRunner)


def test_what_cannot_be_captured_is_not(model: FpnMasks) -> None:
    class Stubborn:
        captures = False

    pipeline = MaskPipeline(model.spec, Stubborn(), model.answer)  # type: ignore[arg-type]
    assert not pipeline.captures
    assert MaskPipeline(model.spec, model.trunk, model.answer).captures
