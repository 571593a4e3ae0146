"""Proposal files, written and read, and what is given to an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpn_engine.errors import FpnEngineError, ProposalError
from fpn_engine.proposal_file import load_proposals, save_proposals
from fpn_engine.proposals import GivenProposals, ProposalBoxes, ProposedImage, as_boxes

BEST, WORST = [10.0, 20.0, 40.5, 60.25], [0.0, 0.0, 5.0, 5.0]


def make_boxes(*boxes: list[float], scores: list[float] | None = None) -> ProposalBoxes:
    given = np.array(scores if scores is not None else [0.5] * len(boxes), dtype=np.float32)
    return ProposalBoxes(np.array(boxes, dtype=np.float32).reshape(-1, 4), given)


IMAGES = [
    ProposedImage(file_name="a/1.png", image_id=7, proposals=make_boxes(BEST, WORST, scores=[0.9, 0.1])),
    ProposedImage(file_name="b/1.png", image_id=1, proposals=make_boxes(WORST)),
    ProposedImage(file_name="2.png", image_id=2, proposals=make_boxes()),
]


@pytest.mark.parametrize("suffix", [".json", ".npz"])
def test_what_is_written_is_read_again(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"proposals{suffix}"
    save_proposals(path, IMAGES)
    loaded = load_proposals(path)
    assert [(image.file_name, image.image_id) for image in loaded] == [("a/1.png", 7), ("b/1.png", 1), ("2.png", 2)]
    for image, expected in zip(loaded, IMAGES, strict=True):
        np.testing.assert_array_equal(image.proposals.boxes, expected.proposals.boxes)
        np.testing.assert_array_equal(image.proposals.scores, expected.proposals.scores)
        assert image.proposals.boxes.dtype == image.proposals.scores.dtype == np.float32
    save_proposals(path, [])
    assert load_proposals(path) == []


def test_npz_is_exact_and_json_nearly(tmp_path: Path) -> None:
    corners = np.sort(np.random.default_rng(0).uniform(0, 1000, (500, 2, 2)), axis=1).reshape(-1, 4).astype(np.float32)
    image = ProposedImage(
        file_name="a.png", image_id=1, proposals=ProposalBoxes(corners, np.linspace(1, 0, 500, dtype=np.float32))
    )
    for suffix, tolerance in ((".npz", 0), (".json", 1e-3)):
        save_proposals(tmp_path / f"p{suffix}", [image])
        (loaded,) = load_proposals(tmp_path / f"p{suffix}")
        np.testing.assert_allclose(loaded.proposals.boxes, corners, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(loaded.proposals.scores, image.proposals.scores)


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_coco_results(tmp_path: Path) -> None:
    path = write(
        tmp_path / "results.json",
        [
            {"image_id": 3, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.25},
            {"file_name": "x.png", "bbox": [0, 0, 1, 1]},
            {"image_id": 3, "category_id": 9, "bbox": [5, 5, 0, 2], "score": 0.75},
            {"image_id": "stem", "file_name": "stem.png", "bbox": [0, 0, 2, 2], "score": 1},
        ],
    )
    by_id, by_name, both = load_proposals(path)
    assert (by_id.image_id, by_id.file_name) == (3, None)
    assert by_id.proposals.boxes.tolist() == [[5, 5, 5, 7], [1, 2, 4, 6]], "best first"
    assert (by_name.image_id, by_name.file_name, by_name.proposals.scores.tolist()) == (None, "x.png", [1.0])
    assert (both.image_id, both.file_name) == ("stem", "stem.png")


def test_the_annotated_boxes_are_proposals_too(tmp_path: Path) -> None:
    truth = {
        "images": [{"id": 4, "file_name": "d.png", "height": 9, "width": 9}, {"id": 5, "file_name": "e.png"}],
        "annotations": [{"id": 1, "image_id": 4, "category_id": 2, "bbox": [1, 1, 2, 2]}],
        "categories": [{"id": 2, "name": "cat"}],
    }
    first, second = load_proposals(write(tmp_path / "truth.json", truth))
    assert (first.file_name, first.image_id, first.proposals.boxes.tolist()) == ("d.png", 4, [[1, 1, 3, 3]])
    assert (second.file_name, len(second.proposals.boxes)) == ("e.png", 0)


@pytest.mark.parametrize(("listed", "named"), [(1, "1"), ("1", 1), ("01", 1)])
def test_ids_may_be_text_of_digits(listed: object, named: object, tmp_path: Path) -> None:
    document = {
        "images": [{"id": listed, "file_name": "a.png"}],
        "annotations": [{"image_id": named, "bbox": [1, 1, 2, 2]}],
    }
    (only,) = load_proposals(write(tmp_path / "p.json", document))
    assert (only.file_name, only.proposals.boxes.tolist()) == ("a.png", [[1, 1, 3, 3]])


def test_a_box_on_an_image_that_is_not_listed(tmp_path: Path) -> None:
    document = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 2, "bbox": [1, 1, 2, 2]}]}
    with pytest.raises(ProposalError, match="a box is on image 2, which is not listed"):
        load_proposals(write(tmp_path / "p.json", document))


def find(images: list[ProposedImage], source: str, image_ids: dict[str, int] | None = None) -> list[list[float]]:
    return GivenProposals(Path("p.json"), images, image_ids)(source).boxes.tolist()


def test_images_are_found_by_name_then_by_id() -> None:
    assert find(IMAGES, "data/a/1.png") == [BEST, WORST]
    assert find(IMAGES, "b/1.png") == [WORST]
    assert find(IMAGES, "/somewhere/2.png") == []
    ids = [ProposedImage(file_name=None, image_id=12, proposals=make_boxes(BEST))]
    assert find(ids, "images/000012.jpg") == [BEST], "the stem is a number"
    assert find(ids, "images/cat.jpg", {"cat.jpg": 12}) == [BEST]
    # Two images of one name: the annotations tell them apart.
    same = [
        ProposedImage(file_name="1.png", image_id=1, proposals=make_boxes(BEST)),
        ProposedImage(file_name="1.png", image_id=2, proposals=make_boxes(WORST)),
    ]
    assert find(same, "images/b/1.png", {"a/1.png": 1, "b/1.png": 2}) == [WORST]
    # A name is surer than an id, which may be of other annotations.
    other = [
        ProposedImage(file_name="1.png", image_id=1, proposals=make_boxes(BEST)),
        ProposedImage(file_name="2.png", image_id=2, proposals=make_boxes(WORST)),
    ]
    assert find(other, "1.png", {"1.png": 2, "2.png": 1}) == [BEST]


def test_it_is_not_guessed_which_of_several_images_is_meant() -> None:
    """As two files give them that were joined: the last would silently take the place of the others."""
    for name in ("1.png", None):
        same = [ProposedImage(file_name=name, image_id=1, proposals=make_boxes(box)) for box in (BEST, WORST)]
        with pytest.raises(ProposalError, match=r"proposals of several images for 'images/1\.png'"):
            find(same, "images/1.png", {"1.png": 1})


@pytest.mark.parametrize("ids", [None, {"c.png": 9}, {"d.png": 4}, {"c.png": 7}])
def test_an_image_that_is_not_in_the_file(ids: dict[str, int] | None) -> None:
    with pytest.raises(ProposalError, match=r"^p\.json has no proposals for the image 'images/c\.png'; give the file"):
        find(IMAGES, "images/c.png", ids)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "cannot read the proposals .*none.json: No such file"),
        ("none.npz", None, "cannot read the proposals .*none.npz: No such file"),
        ("p.txt", "", "is no proposal file by its name; it ends in .json or .npz"),
        ("p.json", "", "are not of the right form: Expecting value"),
        ("p.json", "{", "are not of the right form"),
        ("p.json", "3", "it is no list of objects"),
        ("p.json", "[3]", "it is no list of objects"),
        ("p.json", "{}", "have no 'images'"),
        ("p.json", '{"images": []}', "have no 'annotations'"),
        ("p.json", '[{"bbox": [0, 0, 1, 1]}]', "have no 'image_id'"),
        ("p.json", '[{"image_id": 1, "score": 1}]', "have no 'bbox'"),
        ("p.json", '[{"image_id": 1, "bbox": [0, 0, 1]}]', "not enough values"),
        ("p.json", '[{"image_id": 1, "bbox": [0, 0, "a", 1]}]', "are not of the right form"),
        ("p.json", '[{"image_id": 1, "bbox": [0, 0, 1, 1], "score": null}]', "None is not a finite number"),
        ("p.json", '[{"image_id": 1, "bbox": ["10", "20", "9", "9"]}]', "'10' is not a finite number"),
        ("p.json", '[{"image_id": 1, "bbox": [0, 0, -1, 1]}]', "x1 <= x2"),
        ("p.json", '[{"image_id": 1, "bbox": [0, 0, NaN, 1]}]', "nan is not a finite number"),
        ("p.json", '[{"image_id": [1], "bbox": [0, 0, 1, 1]}]', "are not of the right form"),
        ("p.npz", "", "are not of the right form"),
        ("p.npz", "no archive", "are not of the right form: it is no .npz archive"),
    ],
)
def test_files_that_are_none(name: str, content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ProposalError, match=words) as caught:
        load_proposals(tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": None}, "have no .*counts"),
        ({"counts": np.array([2, 2])}, "do not fit each other"),
        ({"counts": np.array([4, -1])}, "do not fit each other"),
        ({"file_names": np.array(["a.png"])}, "do not fit each other"),
        ({"boxes": np.zeros((3, 5), np.float32)}, "do not fit each other"),
        ({"boxes": np.array([[3, 0, 1, 1]] * 3, np.float32)}, "x1 <= x2"),
        ({"file_names": np.array([{}, {}], dtype=object)}, "are not of the right form: Object arrays cannot be loaded"),
    ],
)
def test_arrays_that_do_not_fit(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    arrays = {
        "file_names": np.array(["a.png", "b.png"]),
        "image_ids": np.array([1, 2]),
        "counts": np.array([2, 1]),
        "boxes": np.array([BEST, WORST, WORST], np.float32),
        "scores": np.array([0.5, 0.5, 0.5], np.float32),
    }
    np.savez(tmp_path / "good.npz", **arrays)
    assert len(load_proposals(tmp_path / "good.npz")[0].proposals.boxes) == 2
    np.savez(tmp_path / "p.npz", **{name: value for name, value in (arrays | change).items() if value is not None})
    with pytest.raises(ProposalError, match=words):
        load_proposals(tmp_path / "p.npz")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FpnEngineError, match="is no proposal file by its name"):
        save_proposals(tmp_path / "p.csv", IMAGES)
    (tmp_path / "p.npz").mkdir()
    with pytest.raises(FpnEngineError, match="it is a folder"):
        save_proposals(tmp_path / "p.npz", IMAGES)


def test_what_is_given_to_an_engine() -> None:
    boxes, empty, rounded = as_boxes([[BEST, WORST], [], make_boxes(BEST)], 3)
    assert (boxes.shape, boxes.dtype, empty.shape, rounded.shape) == ((2, 4), np.float32, (0, 4), (1, 4))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([], "there are proposals for 0 images, but 1 images"),
        ([[BEST], [BEST]], "for 2 images"),
        ([BEST], r"image 0 must be boxes of shape \(n, 4\), not \(4,\)"),
        ([[[1.0, 2.0]]], r"not \(1, 2\)"),
        ([["cat"]], "no array of numbers"),
        ([[[0, 0, np.inf, 1]]], "finite boxes"),
        ([[[5, 0, 4, 1]]], "x1 <= x2"),
        ([[[0, 5, 4, 1]]], "y1 <= y2"),
    ],
)
def test_what_is_no_proposals(given: Any, words: str) -> None:
    with pytest.raises(ProposalError, match=words):
        as_boxes(given, 1)
