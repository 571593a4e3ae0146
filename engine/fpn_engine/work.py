"""Work under way: images whose batches have been submitted, and what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fpn_engine.batching import Batch, Size, trim
from fpn_engine.detections import Detections
from fpn_engine.errors import FpnEngineError, NonFiniteError
from fpn_engine.masks.spec import AnySpec, MaskSpec
from fpn_engine.tasks import AnyPixels, Found, PaddedMasks, Pending

Pixels = NDArray[np.uint8]
NON_FINITE_REASON = "the network gave NaN or infinity; check the checkpoint's weights"


class Outcome(NamedTuple):
    """What became of one image of a stream: its pixels and detections, or the error that was met.

    Pixels that were decoded on the GPU stay there; see :class:`fpn_engine.load_options.LoadOptions`.
    """

    source: str
    pixels: AnyPixels | None
    result: Detections | FpnEngineError


class Work:
    """Images whose batches are under way."""

    def __init__(self, spec: AnySpec, images: Sequence[AnyPixels]) -> None:
        self.images = images
        self.batches: list[tuple[Batch, Pending]] = []
        self.failures: dict[int, FpnEngineError] = {}
        self._spec = spec

    def finish(self) -> list[Detections | FpnEngineError]:
        """Wait; the result of each image, without its source."""
        results: dict[int, Detections | FpnEngineError] = dict(self.failures)
        for batch, pending in self.batches:
            found = pending.wait()
            for row, index in enumerate(batch.indices):
                h, w = self.images[index].shape[:2]
                read = _read(self._spec, found, row, (h, w), batch.image_sizes[row])
                results[index] = NonFiniteError(NON_FINITE_REASON) if read is None else read
        return [results[index] for index in range(len(self.images))]


def _read(spec: AnySpec, found: Found, row: int, shape: Size, image_size: Size) -> Detections | None:
    """What was found in one image, in pixels of the original, or None if the network gave NaN or infinity."""
    if isinstance(found, PaddedMasks):
        from fpn_engine.masks.reading import read_masks  # needs torch, which detectors can do without

        assert isinstance(spec, MaskSpec)  # for mypy
        return read_masks(spec, found, row, shape, image_size)
    trimmed = trim(found, row, shape, image_size)
    if trimmed is None:
        return None
    return Detections(**trimmed._asdict(), image_size=shape, categories=spec.categories)


class Window(NamedTuple):
    """Images of a stream in their order, pixels or error, and the work on those that could be read."""

    read: Sequence[tuple[str, AnyPixels | FpnEngineError]]
    work: Work

    @property
    def batches(self) -> Sequence[object]:
        return self.work.batches

    def finish(self) -> Iterator[Outcome]:
        results = iter(self.work.finish())
        for source, pixels in self.read:
            if isinstance(pixels, FpnEngineError):
                yield Outcome(source, None, pixels)
                continue
            result = next(results)
            if isinstance(result, FpnEngineError):
                yield Outcome(source, pixels, name_error(result, source))
            else:
                yield Outcome(source, pixels, replace(result, source=source))


def name_error(error: FpnEngineError, source: str) -> FpnEngineError:
    """The same error with the name of its image before it."""
    return type(error)(f"{source}: {error}")
