"""Pascal VOC: XML files to ground truth, lists of names, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fpn_engine.annotations import find_images, load_annotations
from fpn_engine.errors import AnnotationError
from fpn_engine.evaluation import score_detections
from fpn_engine.ground_truth import AnnotatedImage
from fpn_engine.voc import VOC_NAMES
from tests.engine.conftest import Run, Tiny, save_picture
from tests.engine.voc_files import write_object, write_xml


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Three images as VOC2007 lays them out, and two lists of them."""
    root = tmp_path / "VOC2007"
    folder = root / "Annotations"
    write_xml(folder, "000007", write_object("dog", (1, 1, 80, 60)))
    write_xml(
        folder,
        "000012",
        write_object("cat", (11, 21, 30, 40), "<truncated>1</truncated><difficult>0</difficult>"),
        write_object("dog", (5.5, 6, 5.5, 6), "<difficult> 1 </difficult>"),
    )
    write_xml(folder, "000100", write_object("aeroplane", (0, 1, 81, 10)))
    lists = root / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "test.txt").write_text("000012\n000007\n\n")
    (lists / "cat_test.txt").write_text("000012  1\n000007 -1\n")
    return root


def test_a_folder(voc: Path) -> None:
    truth = load_annotations(voc)
    assert truth.images[1] == AnnotatedImage(id=12, file_name="000012.jpg", height=60, width=80)
    assert [image.id for image in truth.images] == [7, 12, 100]
    assert [(category.id, category.name) for category in truth.categories] == [
        (1, "aeroplane"),
        (8, "cat"),
        (12, "dog"),
    ]
    dog, cat, difficult, plane = truth.annotations
    assert (dog.image_id, dog.category_id, dog.bbox) == (7, 12, (0.0, 0.0, 80.0, 60.0))
    assert (cat.bbox, cat.area, cat.iscrowd) == ((10.0, 20.0, 20.0, 20.0), 400.0, False)
    assert (difficult.bbox, difficult.iscrowd) == ((4.5, 5.0, 1.0, 1.0), True)
    assert plane.bbox == (0.0, 0.0, 80.0, 10.0)  # cut to the image
    assert find_images(voc) == voc / "JPEGImages"


def test_names_have_the_order_of_the_devkit() -> None:
    assert list(VOC_NAMES) == sorted(VOC_NAMES)
    assert len(set(VOC_NAMES)) == 20


@pytest.mark.parametrize("name", ["test.txt", "cat_test.txt"])
def test_a_list(voc: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = load_annotations(voc / "ImageSets" / "Main" / name)
    assert [image.file_name for image in truth.images] == ["000012.jpg", "000007.jpg"]
    assert len(truth.annotations) == 3
    assert truth.categories == load_annotations(voc).categories
    monkeypatch.chdir(voc / "ImageSets")
    assert load_annotations(f"Main/{name}") == truth
    assert find_images(f"Main/{name}") == voc / "JPEGImages"


def test_other_names_are_numbered_alphabetically(voc: Path) -> None:
    write_xml(
        voc / "Annotations", "2007_000027", write_object("Bear &amp; cub", (1, 1, 2, 2)), filename="/home/me/a.PNG"
    )
    truth = load_annotations(voc)
    assert [(category.id, category.name) for category in truth.categories] == [
        (1, "Bear & cub"),
        (2, "aeroplane"),
        (3, "cat"),
        (4, "dog"),
    ]
    assert [(image.id, image.file_name) for image in truth.images][-1] == (4, "2007_000027.PNG")
    listed = load_annotations(voc / "ImageSets" / "Main" / "test.txt")
    assert listed.categories == truth.categories


def test_files_beside_their_images(tmp_path: Path) -> None:
    write_xml(tmp_path, "a.rf.1", write_object("cell", (1, 1, 2, 2)), filename="a.rf.1")
    (tmp_path / "a.rf.1.jpg").touch()
    assert [image.file_name for image in load_annotations(tmp_path).images] == ["a.rf.1.jpg"]
    assert find_images(tmp_path) == tmp_path


def test_difficult_objects_neither_help_nor_harm(voc: Path) -> None:
    truth = load_annotations(voc)
    found = [
        {"image_id": thing.image_id, "category_id": thing.category_id, "bbox": list(thing.bbox), "score": 0.9}
        for thing in truth.annotations
    ]
    missed = [each for each in found if each["bbox"] != [4.5, 5.0, 1.0, 1.0]]
    assert len(missed) == len(found) - 1
    assert score_detections(truth, found).to_dict()["AP"] == pytest.approx(1)
    assert score_detections(truth, missed).to_dict()["AP"] == pytest.approx(1)
    path = voc / "Annotations" / "000012.xml"
    path.write_text(path.read_text().replace("<difficult> 1 <", "<difficult>0<"))
    assert score_detections(load_annotations(voc), missed).to_dict()["AP"] < 0.9


DOCTYPE = '<?xml version="1.0"?><!DOCTYPE a [<!ENTITY x "boo"><!ENTITY y "&x;&x;">]><annotation>&y;</annotation>'
EXTERNAL = '<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid XML"),
        (b"<annotation>", "not valid XML"),
        (b"\xff\xd8\xff\xe0", "not valid XML"),
        (b'<?xml version="1.0" encoding="klingon"?><annotation/>', "not valid XML"),
        (DOCTYPE.encode(), "it has a DOCTYPE"),
        (DOCTYPE.encode("utf-16"), "it has a DOCTYPE"),
        (EXTERNAL.encode(), "it has a DOCTYPE"),
        (b"<a>" * 1_000_000, "not valid XML"),
        (b"<a>" * 500_000 + b"</a>" * 500_000, "the file holds <a>, not <annotation>"),
        (b"<annotation/>" + b" " * (5 << 20), "it has more than 4 MiB"),
        (b"<html/>", "the file holds <html>, not <annotation>"),
        (b"<annotation/>", "<annotation> has no size/width"),
    ],
)
def test_files_that_are_none(voc: Path, content: bytes, message: str) -> None:
    path = voc / "Annotations" / "000200.xml"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=message) as caught:
        load_annotations(voc)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ("<object/>", "an object has no name"),
        ("<object><name>cat</name></object>", "<object> has no bndbox/xmin"),
        (write_object("cat", ("x", 1, 2, 2)), "bndbox/xmin is 'x', which is no number"),
        (write_object("cat", ("nan", 1, 2, 2)), "which is no number"),
        (write_object("cat", (9, 1, 8, 2)), "the box 9, 1, 8, 2 of its cat has no pixel inside the image"),
        (write_object("cat", (81, 1, 90, 2)), "has no pixel inside the image"),
    ],
)
def test_objects_that_are_none(voc: Path, objects: str, message: str) -> None:
    write_xml(voc / "Annotations", "000200", objects)
    with pytest.raises(AnnotationError, match=r"000200\.xml are not VOC's: ") as caught:
        load_annotations(voc)
    assert message in str(caught.value)


def test_a_size_that_is_none(voc: Path) -> None:
    write_xml(voc / "Annotations", "000200", size="<size><width>0</width><height>0</height></size>")
    with pytest.raises(AnnotationError, match="its size is 0 x 0"):
        load_annotations(voc)


def test_lists_and_folders_that_are_none(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    lists = voc / "ImageSets" / "Main"
    (lists / "missing.txt").write_text("000007\n000008\n")
    (lists / "empty.txt").write_text("\n")
    (lists / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    (tmp_path / "alone.txt").write_text("000007\n")
    for path, message in {
        tmp_path / "empty": "holds no XML files; give a folder of VOC annotations or a COCO JSON file",
        tmp_path / "none.txt": "there is no folder or list of annotations",
        tmp_path / "alone.txt": "no folder above it has a folder Annotations",
        lists / "missing.txt": "lists '000008', which has no XML file in Annotations",
        lists / "empty.txt": "is empty",
        lists / "bytes.txt": "is not a list of image names",
    }.items():
        with pytest.raises(AnnotationError, match=message) as caught:
            load_annotations(path)
        assert str(path) in str(caught.value)
    write_xml(tmp_path / "nothing", "a")
    with pytest.raises(AnnotationError, match="hold no object"):
        load_annotations(tmp_path / "nothing")


def test_names_may_have_spaces(voc: Path) -> None:
    write_xml(voc / "Annotations", "b c", write_object("cat", (1, 1, 5, 5)))
    path = voc / "ImageSets" / "Main" / "spaces.txt"
    path.write_text("b c\n000007  1\n")
    assert [image.file_name for image in load_annotations(path).images] == ["b c.jpg", "000007.jpg"]


def test_eval_with_a_voc_folder(workplace: Path, tiny: Tiny, run: Run) -> None:
    folder = workplace / "VOC"
    for number, name in enumerate(["cat", "zebra"]):
        write_xml(folder / "Annotations", f"{number}", write_object(name, (3, 3, 40, 40)), filename=f"{number}.png")
        save_picture(folder / "JPEGImages" / f"{number}.png", seed=number)
    score = run("eval", "--annotations", folder, "--plan", tiny.plan, "--json")
    assert (score.code, score.err) == (0, "")
    assert set(json.loads(score.out)["per_class"]) == {"cat", "zebra"}
    write_xml(folder / "Annotations", "2", write_object("bear", (3, 3, 40, 40)))
    other = run("eval", "--annotations", folder, "--images", folder / "JPEGImages", "--plan", tiny.plan)
    assert (other.code, other.out) == (1, "")
    assert "1 of 3 annotated images are not in" in other.err
    (folder / "Annotations" / "2.xml").unlink()
    write_xml(folder / "Annotations", "0", write_object("bear", (3, 3, 40, 40)), filename="0.png")
    renamed = run("eval", "--annotations", folder, "--plan", tiny.plan)
    assert "category 1 is 'cat' to the model but 'bear' in the annotations" in renamed.err
