"""Reading: what was found in one image of a batch as Detections, masks pasted into the image and encoded."""

from __future__ import annotations

import numpy as np
import torch

from fpn_engine.detections import Detections
from fpn_engine.masks.paste import paste_in_chunks, paste_in_regions, scale_regions
from fpn_engine.masks.run_lengths import RunLengths, box_of, encode_columns, encode_region
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.tasks import NON_FINITE, PaddedMasks

Size = tuple[int, int]


def read_masks(spec: MaskSpec, found: PaddedMasks, row: int, shape: Size, image_size: Size) -> Detections | None:
    """What is real of row ``row``, in pixels of the original; None if the network gave NaN or infinity.

    Masks are pasted on the device where they are.

    Args: shape, image_size: (h, w) of the original and resized image.
    """
    if int(found.status[row]) == NON_FINITE:
        return None
    n = int(found.counts[row])
    regions = scale_regions(torch.as_tensor(found.regions[row, :n]), image_size, shape)
    masks = torch.as_tensor(found.masks[row, :n])
    run_lengths: list[RunLengths] = []
    if masks.device.type == "cpu":
        for x, y, mask in paste_in_regions(masks, regions, shape, spec.mask_thresh):
            run_lengths.append(encode_region(mask, x, y, shape))
    else:
        for part in paste_in_chunks(masks, regions, shape, spec.mask_thresh):
            run_lengths += encode_columns(part.cpu().numpy())
    return Detections(
        boxes=np.array([box_of(one) for one in run_lengths], np.float32).reshape(-1, 4),
        scores=torch.as_tensor(found.scores[row, :n]).cpu().numpy().copy(),
        labels=np.ones(n, np.int64),
        image_size=shape,
        categories=spec.categories,
        run_lengths=tuple(run_lengths),
    )
