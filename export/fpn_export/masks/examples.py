"""Examples with masks: generated scenes, and annotated images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fpn_engine.errors import AnnotationError, ImageError
from fpn_engine.ground_truth import check_images
from fpn_engine.images import to_array
from fpn_engine.masks.ground_truth import SegmentTruth, describe_segments
from fpn_engine.masks.run_lengths import Masks, RunLengths, areas_of, decode_masks, encode_masks
from fpn_export.scenes.scene import SIZE, make_scene


class MaskExample(NamedTuple):
    """One image, (H, W, 3) uint8 RGB, and the masks (M, H, W) bool of its objects, none of them empty."""

    pixels: NDArray[np.uint8]
    masks: Masks


class MaskExamples(Protocol):
    """What a mask model is trained on; ``shapes`` are (height, width) of each image."""

    @property
    def shapes(self) -> Sequence[tuple[int, int]]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> MaskExample: ...


class SceneExamples:
    """Scenes 0..count-1 of a seed, drawn when they are asked for."""

    def __init__(self, seed: int, count: int, size: tuple[int, int] = SIZE) -> None:
        self.seed, self.size = seed, size
        self.shapes = [size] * count

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> MaskExample:
        scene = make_scene(self.seed, index, self.size)
        return MaskExample(scene.image, scene.masks)

    @property
    def truth(self) -> SegmentTruth:
        """What is in them; image ``index`` has the id ``index + 1``."""
        segments = [encode_masks(self[index].masks) for index in range(len(self))]
        return describe_segments([(f"{index:06d}.png", self.size) for index in range(len(self))], segments)


class AnnotatedSegments:
    """The images of COCO annotations that have objects; crowds and empty masks are left out.

    Args: truth: the annotations, of any categories. folder: where the images lie.
    Raises: AnnotationError if images are missing or none has an object.
    """

    def __init__(self, truth: SegmentTruth, folder: Path) -> None:
        objects: dict[int, list[RunLengths]] = {image.id: [] for image in truth.truth.images}
        for annotation, segment, area in zip(
            truth.truth.annotations, truth.segments, areas_of(truth.segments), strict=True
        ):
            if area and not annotation.iscrowd:
                objects[annotation.image_id].append(segment)
        images = [image for image in truth.truth.images if objects[image.id]]
        if not images:
            raise AnnotationError("no annotated image has an object to learn; check the annotations")
        self._paths = [folder / image.file_name for image in images]
        check_images(self._paths, folder)
        self.shapes = [(image.height, image.width) for image in images]
        self._objects = [objects[image.id] for image in images]

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> MaskExample:
        """Raises: ImageError for an image that cannot be read or has another size than annotated."""
        pixels, (height, width) = to_array(self._paths[index]), self.shapes[index]
        if pixels.shape[:2] != (height, width):
            raise ImageError(
                f"{self._paths[index]} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but its annotations are for "
                f"{width}x{height}"
            )
        return MaskExample(pixels, decode_masks(self._objects[index], (height, width)))
