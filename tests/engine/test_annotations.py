import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fpn_engine.annotations import AnnotatedImage, Annotation, CocoGroundTruth, load_annotations
from fpn_engine.errors import AnnotationError
from fpn_engine.spec import Category

DATA: dict[str, Any] = {
    "images": [{"id": 3, "file_name": "a.jpg", "height": 480, "width": 640}],
    "categories": [{"id": 1, "name": "cell"}, {"id": 90, "name": "dust"}],
    "annotations": [{"id": 0, "image_id": 3, "category_id": 90, "bbox": [1, 2, 30, 40]}],
}


def load(tmp_path: Path, data: object) -> CocoGroundTruth:
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return load_annotations(path)


def test_what_may_be_missing_gets_its_usual_value(tmp_path: Path) -> None:
    truth = load(tmp_path, DATA)
    assert truth.images == (AnnotatedImage(id=3, file_name="a.jpg", height=480, width=640),)
    assert truth.categories == (Category(id=1, name="cell"), Category(id=90, name="dust"))
    assert truth.annotations == (
        Annotation(image_id=3, category_id=90, bbox=(1.0, 2.0, 30.0, 40.0), area=1200.0, iscrowd=False),
    )
    assert truth.image_ids == {"a.jpg": 3}


def test_a_byte_order_mark_and_no_annotations_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    path.write_text("\ufeff" + json.dumps(DATA | {"annotations": []}), encoding="utf-8")
    assert load_annotations(path).annotations == ()


def test_ids_may_be_text_of_digits(tmp_path: Path) -> None:
    data = copy.deepcopy(DATA)
    data["annotations"][0]["image_id"] = "3"
    assert load(tmp_path, data) == load(tmp_path, DATA)


@pytest.mark.parametrize(("value", "is_crowd"), [("0", False), ("1", True), (False, False), (1, True), (None, False)])
def test_crowds_may_be_text_of_digits(tmp_path: Path, value: object, is_crowd: bool) -> None:
    data = copy.deepcopy(DATA)
    data["annotations"][0]["iscrowd"] = value
    assert load(tmp_path, data).annotations[0].iscrowd is is_crowd


def change(*keys: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def apply(data: dict[str, Any]) -> None:
        *path, last = keys
        for key in path:
            data = data[key]
        data[last] = to

    return apply


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("images", to=[]), "no image id is listed"),
        (change("categories", to=[]), "no category id is listed"),
        (change("annotations", to=None), "'annotations' is not a list of objects"),
        (change("images", to=[3]), "'images' is not a list of objects"),
        (change("images", 0, to={"id": 3, "height": 1, "width": 1}), "an entry has no 'file_name'"),
        (change("images", to=DATA["images"] * 2), "the image id 3 is used twice"),
        (change("categories", 1, "id", to=1), "the category id 1 is used twice"),
        (change("categories", 1, "name", to="cell"), "the category name 'cell' is used twice"),
        (change("annotations", 0, "image_id", to=4), "on image 4, which is not listed"),
        (change("annotations", 0, "category_id", to=2), "has category 2, which is not listed"),
        (change("annotations", 0, "image_id", to="x"), "wrong form"),
        (change("annotations", 0, to={"image_id": 3, "category_id": 1}), "an entry has no 'bbox'"),
        (change("annotations", 0, "bbox", to=[1, 2, 3]), "wrong form"),
        (change("annotations", 0, "bbox", to=[1, 2, -3, 4]), "no box x, y, width, height"),
        (change("annotations", 0, "bbox", to=[1, 2, float("nan"), 4]), "nan is not a finite number"),
        (change("annotations", 0, "bbox", to="1234"), "'1' is not a finite number"),
        (change("annotations", 0, "area", to=float("nan")), "nan is not a finite number"),
        (change("annotations", 0, "image_id", to=3.5), "3.5 is not a whole number"),
        (change("images", 0, "file_name", to=None), "None is no file name"),
    ],
)
def test_what_is_not_coco_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str) -> None:
    data = copy.deepcopy(DATA)
    damage(data)
    with pytest.raises(AnnotationError, match=r"instances\.json are not COCO detection annotations: ") as caught:
        load(tmp_path, data)
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [[], 3, None])
def test_json_of_another_kind_is_refused(tmp_path: Path, data: object) -> None:
    with pytest.raises(AnnotationError, match="holds no JSON object"):
        load(tmp_path, data)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"\xff\xd8\xff\xe0", b"[" * 100_000])
def test_a_corrupt_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "instances.json"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=r"instances\.json are not valid JSON"):
        load_annotations(path)


def test_a_missing_file_is_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"cannot read the annotations .*none\.json: No such file"):
        load_annotations(tmp_path / "none.json")


def test_ids_that_mean_different_classes_are_refused(tmp_path: Path) -> None:
    truth = load(tmp_path, DATA)
    truth.check_categories([Category(id=1, name="cell"), Category(id=2, name="only the model's")])
    truth.check_categories([Category(id=1, name="class_1"), Category(id=90, name="class_90")])
    with pytest.raises(AnnotationError, match="category 1 is 'dust' to the model but 'cell' in the annotations"):
        truth.check_categories([Category(id=1, name="dust")])
    with pytest.raises(AnnotationError, match="'cell' is category 2 to the model but 1 in the annotations"):
        truth.check_categories([Category(id=2, name="cell")])


@pytest.mark.shared
def test_the_blood_cells(shared_dir: Path) -> None:
    truth = load_annotations(shared_dir / "data" / "bccd" / "instances_test.json")
    assert (len(truth.images), len(truth.annotations)) == (72, 945)
    assert [category.name for category in truth.categories] == ["RBC", "WBC", "Platelets"]
