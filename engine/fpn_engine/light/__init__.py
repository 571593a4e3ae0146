"""A plan on ONNX Runtime and NumPy alone: the first results are there before torch would have been imported."""

from __future__ import annotations

import sys

from fpn_engine.plan import Manifest

# Images for which the import of torch is not worth its while: it takes about 2.5 s of two cores, and an image of
# R50-FPN at 800x1216 about 0.3 s less afterwards, as RoIAlign reads the trunk's maps as they are.
MOST_IMAGES = 8


def is_light(manifest: Manifest, images: int | None, device: str | None = None, streams: int = 1) -> bool:
    """Whether the light runner should take a plan.

    Args:
        images: how many there will be, None where that is not known. device, streams: as of
            :class:`fpn_engine.engine.LoadOptions`.
    """
    return (
        images is not None
        and images <= MOST_IMAGES
        and manifest.backend == "onnxruntime"
        and manifest.device == "cpu"
        and device in (None, "cpu")
        and streams == 1
        and "torch" not in sys.modules
    )
