"""Segment proposals of one image, on the host, in pixels of the original."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fpn_engine.detections import shortest_floats
from fpn_engine.errors import NonFiniteError
from fpn_engine.masks.paste import paste_in_chunks, scale_regions
from fpn_engine.masks.pipeline import OK, MaskPipeline
from fpn_engine.masks.polygons import trace_polygons
from fpn_engine.masks.run_lengths import Masks, RunLengths, box_of, decode_masks, encode_columns
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.resizing import padded_size, resized_size
from fpn_kernels import pack_images, preprocess


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentProposals:
    """The proposals of one image, best first.

    Attributes:
        scores: (n,) float32 in 0..1, descending. run_lengths: the masks, n of them.
        image_size: (height, width) of the original image in pixels.
    """

    scores: NDArray[np.float32]
    run_lengths: list[RunLengths]
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def masks(self) -> Masks:
        """(n, H, W) bool."""
        return decode_masks(self.run_lengths, self.image_size)

    @property
    def boxes(self) -> NDArray[np.float32]:
        """(n, 4) float32 around the masks, x1 y1 x2 y2, half-open; zeros for an empty mask."""
        return np.array([box_of(one) for one in self.run_lengths], np.float32).reshape(-1, 4)

    def polygons(self) -> list[list[list[float]]]:
        """The outlines of each mask, as :func:`fpn_engine.masks.polygons.trace_polygons` gives them."""
        return [trace_polygons(decode_masks([one], self.image_size)[0]) for one in self.run_lengths]

    def to_results(self, image_id: int | str) -> list[dict[str, Any]]:
        """COCO's segmentation results."""
        rows = zip(self.run_lengths, shortest_floats(self.scores), strict=True)
        return [
            {"image_id": image_id, "category_id": 1, "segmentation": dict(mask), "score": score} for mask, score in rows
        ]


def preprocess_image(spec: MaskSpec, pixels: NDArray[np.uint8]) -> tuple[torch.Tensor, tuple[int, int]]:
    """(H, W, 3) uint8 RGB to what the network sees, (1, 3, H', W'), and its height and width before padding."""
    resized = resized_size(pixels.shape[0], pixels.shape[1], spec.min_size, spec.max_size)
    images = preprocess(
        *pack_images([torch.from_numpy(np.ascontiguousarray(pixels))]),
        torch.tensor([resized]),
        padded_size(resized, spec.size_divisor),
        spec.image_mean,
        spec.image_std,
        reverse_channels=spec.channel_order == "bgr",
    )
    return images, resized


def propose_segments(
    pipeline: MaskPipeline, pixels: NDArray[np.uint8], *, limit: int | None = None, threshold: float | None = None
) -> SegmentProposals:
    """The segments that a model proposes in one image.

    Args:
        pixels: (H, W, 3) uint8 RGB. limit, threshold: of the spec if None; how many, and the probability of a pixel.
    Raises: NonFiniteError if the network gives NaN or infinity.
    """
    spec, size = pipeline.spec, (pixels.shape[0], pixels.shape[1])
    images, resized = preprocess_image(spec, pixels)
    found = pipeline(images.to(pipeline.device), limit)
    if found.status[0] != OK:
        raise NonFiniteError("the network gave NaN or infinity for this image; check its weights")
    regions = scale_regions(found.regions[0], resized, size)
    cut = spec.mask_thresh if threshold is None else threshold
    run_lengths: list[RunLengths] = []
    for part in paste_in_chunks(found.masks[0], regions, size, cut):
        run_lengths += encode_columns(part.cpu().numpy())
    return SegmentProposals(scores=found.scores[0].cpu().numpy(), run_lengths=run_lengths, image_size=size)
