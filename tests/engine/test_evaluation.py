import contextlib
import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fpn_engine.annotations import AnnotatedImage, Annotation, CocoGroundTruth, load_annotations
from fpn_engine.errors import AnnotationError
from fpn_engine.evaluation import (
    PRECISIONS,
    PROPOSAL_RECALLS,
    RECALLS,
    DetectionScore,
    ProposalScore,
    score_detections,
    score_proposals,
)
from fpn_engine.spec import Category

Box = tuple[float, float, float, float]


def make_truth(*objects: tuple[int, int, Box, bool]) -> CocoGroundTruth:
    """Two images, two classes; objects are (image_id, category_id, x y w h, iscrowd)."""
    return CocoGroundTruth(
        images=tuple(AnnotatedImage(id=i, file_name=f"{i}.jpg", height=500, width=500) for i in (10, 20)),
        categories=(Category(id=5, name="[cell]"), Category(id=2, name="dust")),
        annotations=tuple(
            Annotation(image_id=image, category_id=category, bbox=box, area=box[2] * box[3], iscrowd=crowd)
            for image, category, box, crowd in objects
        ),
    )


TRUTH = make_truth(
    (10, 5, (10, 10, 20, 20), False),  # small
    (10, 2, (100, 100, 50, 50), False),  # medium
    (20, 5, (200, 200, 100, 100), False),  # large
)


def result(image_id: int, category_id: int, bbox: Box, score: float = 0.9) -> dict[str, Any]:
    return {"image_id": image_id, "category_id": category_id, "bbox": list(bbox), "score": score}


PERFECT = [result(a.image_id, a.category_id, a.bbox) for a in TRUTH.annotations]


def test_perfect_detections_score_one() -> None:
    values = score_detections(TRUTH, PERFECT).to_dict()
    assert values.pop("per_class") == pytest.approx({"[cell]": 1, "dust": 1})
    assert values == pytest.approx(dict.fromkeys(PRECISIONS + RECALLS, 1))


def test_no_detections_score_zero() -> None:
    values = score_detections(TRUTH, []).to_dict()
    assert values.pop("per_class") == {"[cell]": 0, "dust": 0}
    assert values == dict.fromkeys(PRECISIONS + RECALLS, 0)


def test_a_shifted_box_counts_up_to_its_iou() -> None:
    # 100x100 shifted by 20: IoU = 80 / 120 = 0.667, a hit at 0.50, 0.55, 0.60 and 0.65 of the ten thresholds.
    truth = make_truth((20, 5, (200, 200, 100, 100), False))
    values = score_detections(truth, [result(20, 5, (220, 200, 100, 100))]).to_dict()
    assert [values[name] for name in ("AP", "AP50", "AP75", "AR1")] == pytest.approx([0.4, 1, 0, 0.4])
    assert values["per_class"]["[cell]"] == pytest.approx(0.4)


def test_a_better_scored_false_detection_halves_the_precision() -> None:
    truth = make_truth((20, 5, (200, 200, 100, 100), False))
    results = [result(20, 5, (0, 0, 90, 90), 0.95), result(20, 5, (200, 200, 100, 100), 0.9)]
    values = score_detections(truth, results).to_dict()
    assert [values[name] for name in ("AP", "AR1", "AR10")] == pytest.approx([0.5, 0, 1])


def test_what_is_not_annotated_is_nan_and_null() -> None:
    score = score_detections(make_truth((20, 5, (200, 200, 100, 100), False)), [])
    assert math.isnan(score.APs)
    assert math.isnan(score.per_class["dust"])
    assert json.dumps(score.to_dict(), allow_nan=False).count("null") == 5


def test_the_first_annotation_counts_also_where_the_file_numbers_from_zero(tmp_path: Path) -> None:
    path = tmp_path / "instances.json"
    image = {"id": 0, "file_name": "a.jpg", "height": 9, "width": 9}
    annotation = {"id": 0, "image_id": 0, "category_id": 0, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
    categories = [{"id": 0, "name": "cell"}]
    path.write_text(json.dumps({"images": [image], "categories": categories, "annotations": [annotation]}))
    assert score_detections(load_annotations(path), [result(0, 0, (0, 0, 5, 5))]).AP > 0.99


def test_detections_in_a_crowd_are_neither_right_nor_wrong() -> None:
    truth = make_truth((10, 5, (10, 10, 50, 50), False), (10, 5, (100, 100, 300, 300), True))
    results = [result(10, 5, (120 + i, 120, 50, 50), 0.99) for i in range(5)]
    assert score_detections(truth, [*results, result(10, 5, (10, 10, 50, 50))]).AP > 0.99


def test_only_the_given_images_count() -> None:
    assert score_detections(TRUTH, PERFECT[:2], image_ids=[10]).AR100 == 1.0
    assert score_detections(TRUTH, PERFECT[:2]).AR100 == 0.75  # half of the cells, all of the dust


def test_an_unknown_image_is_refused() -> None:
    with pytest.raises(AnnotationError, match="have no image 30"):
        score_detections(TRUTH, [result(30, 5, (0, 0, 5, 5))])
    with pytest.raises(AnnotationError, match="have no image 30"):
        score_detections(TRUTH, [], image_ids=[10, 30])
    with pytest.raises(AnnotationError, match="have no image 'cell'"):
        score_proposals(TRUTH, {"cell": boxes_and_scores()})  # type: ignore[dict-item]


def test_nothing_is_printed_and_the_results_are_left_alone(capfd: pytest.CaptureFixture[str]) -> None:
    results = [dict(entry) for entry in PERFECT]
    score_detections(TRUTH, results)
    score_proposals(TRUTH, {10: boxes_and_scores((0, 0, 9, 9))})
    assert results == PERFECT
    assert capfd.readouterr() == ("", "")


def boxes_and_scores(*boxes: Box) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    return np.array(boxes, np.float32).reshape(-1, 4), np.linspace(1, 0.5, len(boxes), dtype=np.float32)


def test_proposals_of_any_class_count_once_per_object() -> None:
    score = score_proposals(
        TRUTH,
        {
            10: boxes_and_scores((0, 0, 5, 5), (10, 10, 30, 30), (10, 10, 30, 30)),
            20: boxes_and_scores((220, 200, 320, 300)),  # IoU 0.667: four of ten thresholds
        },
    )
    mean = (1 + 0 + 0.4) / 3
    assert dataclasses.astuple(score) == pytest.approx((mean, mean, 1, 0, 0.4))


def test_only_the_hundred_and_thousand_best_proposals_count() -> None:
    wrong: Box = (0, 0, 5, 5)
    right = [(a.bbox[0], a.bbox[1], a.bbox[0] + a.bbox[2], a.bbox[1] + a.bbox[3]) for a in TRUTH.annotations]
    in_hundred = boxes_and_scores(*[wrong] * 98, *right[:2])
    past_thousand = boxes_and_scores(*[wrong] * 1000, right[2])
    past_hundred = boxes_and_scores(*[wrong] * 999, right[2])
    shuffled = np.random.default_rng(0).permutation(100)
    in_hundred = (in_hundred[0][shuffled], in_hundred[1][shuffled])
    for last, expected in ((past_hundred, (2 / 3, 1, 1, 1, 1)), (past_thousand, (2 / 3, 2 / 3, 1, 1, 0))):
        score = score_proposals(TRUTH, {10: in_hundred, 20: last})
        assert dataclasses.astuple(score) == pytest.approx(expected)


def test_no_proposals_and_no_objects() -> None:
    score = score_proposals(TRUTH, {10: boxes_and_scores()})
    assert set(dataclasses.astuple(score)) == {0.0}
    nothing = score_proposals(make_truth(), {10: boxes_and_scores((0, 0, 5, 5))})
    assert nothing.to_dict() == dict.fromkeys(PROPOSAL_RECALLS)


def test_proposals_agree_with_cocoeval_over_all_images_at_once() -> None:
    rng = np.random.default_rng(0)

    def random_boxes(count: int) -> NDArray[np.float32]:
        corners = rng.uniform(0, 60, (count, 2))
        return np.hstack([corners, corners + rng.uniform(10, 120, (count, 2))]).astype(np.float32)

    objects = [
        (image, int(rng.choice([2, 5])), tuple((box - [0, 0, box[0], box[1]]).tolist()), bool(rng.random() < 0.2))
        for image in (10, 20)
        for box in random_boxes(12)
    ]
    truth = make_truth(*objects)  # type: ignore[arg-type]
    proposals = {image: (random_boxes(300), rng.random(300).astype(np.float32)) for image in (10, 20)}
    assert dataclasses.astuple(score_proposals(truth, proposals)) == pytest.approx(coco_recalls(truth, proposals))


def coco_recalls(truth: CocoGroundTruth, proposals: dict[int, Any]) -> list[float]:
    """The same by ``accumulate`` over a COCO data set made in the usual way."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    coco = COCO()
    coco.dataset = {
        "images": [{"id": image.id} for image in truth.images],
        "categories": [{"id": category.id} for category in truth.categories],
        "annotations": [
            {**dataclasses.asdict(a), "bbox": list(a.bbox), "iscrowd": int(a.iscrowd), "id": i}
            for i, a in enumerate(truth.annotations, start=1)
        ],
    }
    results = [
        result(image_id, 5, (x1, y1, x2 - x1, y2 - y1), score)
        for image_id, (boxes, scores) in proposals.items()
        for (x1, y1, x2, y2), score in zip(boxes.tolist(), scores.tolist(), strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
        evaluator = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluator.params.useCats = 0
        evaluator.params.maxDets = [100, 1000]
        evaluator.evaluate()
        evaluator.accumulate()
    recall = evaluator.eval["recall"].mean(axis=0)[0]  # (area, limit)
    return [recall[0, 0], *recall[:, 1]]


def render(table: Table) -> list[list[str]]:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(table)
    lines = capture.get().replace("┃", "│").splitlines()
    return [
        [cell.strip() for cell in line.strip("│").split("│")]
        for line in lines
        if "A" in line or "." in line or "-" in line
    ]


def test_tables_read_as_in_the_paper() -> None:
    twelve = dict(zip(DetectionScore.__dataclass_fields__, np.linspace(0.12345, 1, 12).tolist(), strict=False))
    score = DetectionScore(**twelve | {"APs": math.nan}, per_class={"[cell]": 0.5, "dust": math.nan})
    assert render(score.to_table()) == [
        ["", "AP", "AP50", "AP75", "APs", "APm", "APl"],
        ["all classes", "12.3", "20.3", "28.3", "-", "44.2", "52.2"],
        ["[cell]", "50.0", "", "", "", "", ""],
        ["dust", "-", "", "", "", "", ""],
        ["", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"],
        ["all classes", "60.2", "68.1", "76.1", "84.1", "92.0", "100.0"],
    ]
    proposals = ProposalScore(AR100=0.44, AR1000=0.563, AR1000s=0.449, AR1000m=0.634, AR1000l=0.662)
    assert render(proposals.to_table()) == [
        ["", "AR100", "AR1k", "AR1ks", "AR1km", "AR1kl"],
        ["proposals", "44.0", "56.3", "44.9", "63.4", "66.2"],
    ]


def test_pycocotools_is_not_imported_before_it_is_needed() -> None:
    code = "import sys, fpn_engine.evaluation; print('pycocotools' in sys.modules)"
    folder = Path(__file__).parents[2] / "engine"
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert printed.stdout == "False\n"


@pytest.mark.shared
def test_the_blood_cells_score_what_torchvision_scored(shared_dir: Path) -> None:
    truth = load_annotations(shared_dir / "data" / "bccd" / "instances_test.json")
    recorded = json.loads((shared_dir / "checkpoints" / "bccd_r18_fpn_test_detections.json").read_text())
    score = score_detections(truth, recorded["detections"])
    values = score.to_dict()
    per_class = values.pop("per_class")
    assert values == pytest.approx(recorded["stats"], abs=1e-4)  # of boxes before they were rounded
    assert list(per_class) == ["RBC", "WBC", "Platelets"]
    assert np.mean(list(per_class.values())) == pytest.approx(score.AP)
