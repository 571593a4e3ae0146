"""The captured runner: from packed uint8 images to packed detections as one graph per batch and padded size."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from fpn_engine.errors import DeviceMemoryError
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.pipeline import Proposals
from fpn_engine.runtime.graphs import Capture, Captured, GraphCache
from fpn_engine.runtime.packet import PacketForm, pack_result
from fpn_engine.runtime.runner import AnyPipeline
from fpn_engine.runtime.staging import SLOTS, StagingRing
from fpn_engine.runtime.transport import Transport
from fpn_engine.tasks import Group, Pending, Task
from fpn_kernels import PackedImages

IMAGE_BYTES = 6 << 20  # staged per image to begin with: 2 megapixels; larger ones make the ring grow
MIN_GIVEN = 64  # given proposals per image are padded to a power of two from here, so that few graphs serve all


class Line:
    """The pipeline from fixed places in memory: reads a packet's head and pixels, returns the packed result.

    Attributes:
        head: (head_bytes,) uint8, the head of the packet to run.
    """

    def __init__(self, pipeline: AnyPipeline, task: Task, form: PacketForm, pixels: Tensor, head: Tensor) -> None:
        self.head = head
        self._pipeline = pipeline
        self._task = task
        self._pixels = pixels
        self._fields = form.view(head)
        self._is_given = form.slots > 0

    def __call__(self) -> Tensor:
        offsets, sizes, image_sizes, counts, boxes = self._fields
        packed = PackedImages(self._pixels, offsets, sizes)
        batch = self._pipeline.preprocess(packed, image_sizes, self._task.padded_size)
        given = Proposals.given(boxes, counts) if self._is_given else None
        return pack_result(self._pipeline.run(batch, image_sizes, self._task, given))


class CapturedRunner:
    """Uploads beside what computes, replays graphs, and brings results back in one copy each; masks stay there.

    A group is padded to the next power of two of images, ``batch_size`` at most, by repeating its last one, so that
    few graphs serve all; the rows behind it are computed and left. Several threads may submit; one at a time goes
    through, which takes no longer than writing the packet, except where something is captured.

    Without the memory for a group it gives all graphs up and tries once more.

    Args:
        pipeline: with fixed shapes, on the transport's device; nobody else runs it, as its parts may have buffers.
        batch_size: most images of a group. graph_memory: bytes; see :class:`GraphCache`.
    """

    depth = SLOTS

    def __init__(
        self, pipeline: AnyPipeline, transport: Transport, capture: Capture, *, batch_size: int, graph_memory: int
    ) -> None:
        self._pipeline = pipeline
        self._transport = transport
        self._batch_size = batch_size
        self._lock = threading.Lock()
        self.graphs: GraphCache[Line] = GraphCache(capture, transport.launch, graph_memory)
        with torch.inference_mode(), transport.computing():
            self._ring = StagingRing(transport, batch_size * IMAGE_BYTES)

    def submit(self, group: Group, task: Task) -> Pending:
        try:
            return self._submit(group, task)
        except DeviceMemoryError:  # which keeps what was computed so far, until this block is left
            pass
        with self._lock, self._transport.computing():
            self.graphs.clear()
            self._transport.release()
        return self._submit(group, task)

    def _submit(self, group: Group, task: Task) -> Pending:
        form = self._form_of(group)
        size = form.count_bytes(group)
        with self._lock, torch.inference_mode(), self._transport.computing():
            if not self._ring.fits(size):
                self.graphs.clear()  # they read from where the buffer is now
                self._ring.grow(size)
            slot = self._ring.acquire()
            slot.upload(form.write(slot.packet, group, slot.start))
            line = self.graphs.prepare((form, task), lambda: self._make_line(form, task))
            self._transport.copy(slot.region[: form.head_bytes], line.head)
            packed, spec = self.graphs.run((form, task)), self._pipeline.spec
            if isinstance(spec, MaskSpec):
                return slot.keep(packed, len(group.images), spec.mask_size)
            return slot.download(packed, len(group.images))

    def warm(self, group: Group, task: Task) -> None:
        self.capture(group, task)

    def capture(self, group: Group, task: Task) -> Captured:
        """The graph for groups like this one, with ``group`` where it reads: a replay detects in it again."""
        for _ in range(2):
            self.submit(group, task).wait()
        captured = self.graphs.find((self._form_of(group), task))
        if captured is None:
            raise RuntimeError("another thread displaced the graph; prepare before threads begin")
        return captured

    def _form_of(self, group: Group) -> PacketForm:
        batch = min(self._batch_size, _next_power_of_two(len(group.images)))
        if group.given is None:
            return PacketForm(batch)
        return PacketForm(batch, max(MIN_GIVEN, _next_power_of_two(max(len(boxes) for boxes in group.given))))

    def _make_line(self, form: PacketForm, task: Task) -> Line:
        return Line(self._pipeline, task, form, self._ring.pixels, self._transport.device_buffer(form.head_bytes))


def _next_power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()
