"""Two annotated pictures for the commands; import ``dataset`` into a test module."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpn_engine.engine import Engine
from fpn_engine.images import read_image
from tests.engine.conftest import SPEC, Pixels, save_picture


def annotate(path: Path, images: dict[str, tuple[Pixels, list[tuple[int, list[float]]]]]) -> None:
    """Write COCO annotations: for each file name the picture and its (category id, corners)."""
    listed, objects = [], []
    for image_id, (name, (pixels, boxes)) in enumerate(images.items(), start=10):
        height, width, _ = pixels.shape
        listed.append({"id": image_id, "file_name": name, "height": height, "width": width})
        for category_id, (x1, y1, x2, y2) in boxes:
            entry = {"id": len(objects) + 1, "image_id": image_id, "category_id": category_id}
            objects.append(entry | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    categories = [{"id": category.id, "name": category.name} for category in SPEC.categories]
    path.write_text(json.dumps({"images": listed, "categories": categories, "annotations": objects}))


@pytest.fixture
def dataset(workplace: Path, engine: Engine) -> Path:
    """Two images, annotated with the best detection in each."""
    images: dict[str, tuple[Pixels, list[tuple[int, list[float]]]]] = {}
    for number, (height, width) in enumerate([(60, 80), (90, 50)], start=1):
        pixels = read_image(save_picture(workplace / "images" / f"{number}.png", height, width, seed=number))
        best = next(iter(engine(pixels)[0]))
        images[f"{number}.png"] = pixels, [(best.category.id, list(best.box))]
    annotate(workplace / "truth.json", images)
    return workplace / "truth.json"
