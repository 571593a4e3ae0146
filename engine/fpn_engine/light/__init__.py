"""A plan on ONNX Runtime and NumPy alone: the first results are there before torch would have been imported."""

from __future__ import annotations

import sys

from fpn_engine.plan import Manifest
from fpn_engine.spec import ModelSpec

# Images for which the import of torch is not worth its while. Measured on two cores, in processor time: the import
# costs 1.7 s, and with torch an image takes 0.65 s less (R50-FPN, 800x1216) or 0.1 s less (R18-FPN, 480x640), since
# RoIAlign then reads the maps as they are. So this is between the 5 and the 17 at which the two even out.
MOST_IMAGES = 8


def is_light(manifest: Manifest, images: int | None, device: str | None = None, streams: int = 1) -> bool:
    """Whether the light runner should take a plan.

    Args:
        images: how many there will be, None where that is not known. device, streams: as of
            :class:`fpn_engine.load_options.LoadOptions`.
    """
    return (
        images is not None
        and images <= MOST_IMAGES
        and isinstance(manifest.spec, ModelSpec)
        and manifest.backend == "onnxruntime"
        and manifest.device == "cpu"
        and device in (None, "cpu")
        and streams == 1
        and "torch" not in sys.modules
    )
