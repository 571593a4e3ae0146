"""Average recall of segments: by hand, and against COCOeval on everything at once."""

import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_engine.errors import AnnotationError
from fpn_engine.masks.evaluation import Segments, score_segments
from fpn_engine.masks.ground_truth import describe_segments, load_segments
from fpn_engine.masks.run_lengths import decode_masks, encode_masks
from fpn_export.scenes.dataset import write_coco
from tests.engine.voc_files import write_object, write_xml

SIZE = (120, 160)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_coco(tmp_path_factory.mktemp("scenes"), 3, 4, SIZE)


def shifted(truth, image, seed=0):
    """Proposals: the objects' masks moved a little, best first by chance, and noise."""
    random = np.random.RandomState([seed, image])
    own = [s for a, s in zip(truth.truth.annotations, truth.segments, strict=True) if a.image_id == image]
    masks = [np.roll(mask, random.randint(-3, 4, 2), (0, 1)) for mask in decode_masks(own, SIZE) for _ in range(4)]
    masks += list(random.uniform(size=(8, *SIZE)) < 0.1)
    return Segments(encode_masks(np.array(masks)), random.uniform(size=len(masks)).astype(np.float32))


def test_without_an_area_an_object_has_its_masks(path, tmp_path):
    document = json.loads(path.read_text())
    areas = [entry.pop("area") for entry in document["annotations"]]
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert [each.area for each in load_segments(tmp_path / "a.json").truth.annotations] == areas


def test_pascal_voc_has_no_masks(tmp_path):
    (tmp_path / "Annotations").mkdir()
    write_xml(tmp_path / "Annotations", "a", write_object("cat", (1, 1, 5, 5)))
    with pytest.raises(AnnotationError, match="has boxes alone; masks need COCO annotations"):
        load_segments(tmp_path)


def test_equals_cocoeval(path):
    truth = load_segments(path)
    proposals = {image: shifted(truth, image) for image in (1, 2, 3)}
    score = score_segments(truth, proposals)
    coco = COCO()
    coco.dataset = json.loads(path.read_text())
    coco.createIndex()
    rows = [
        {"image_id": image, "category_id": 1, "segmentation": mask, "score": value}
        for image, found in proposals.items()
        for mask, value in zip(found.masks, found.scores.tolist(), strict=True)
    ]
    evaluator = COCOeval(coco, coco.loadRes(rows), "segm")
    evaluator.params.useCats, evaluator.params.maxDets = 0, [10, 100, 1000]
    evaluator.evaluate()
    evaluator.accumulate()
    recall = evaluator.eval["recall"][:, 0]  # (IoU, area, limit)
    expected = [*recall[:, 0].mean(axis=0), *recall[:, 1:, 2].mean(axis=0)]
    found = (score.AR10, score.AR100, score.AR1000, score.AR1000s, score.AR1000m, score.AR1000l)
    assert [-1 if np.isnan(value) else value for value in found] == pytest.approx(expected)
    assert 0.1 < score.AR10 < score.AR1000 < 1


def test_the_truth_itself_is_found(path):
    truth = load_segments(path)
    own = {image.id: [] for image in truth.truth.images}
    for annotation, segment in zip(truth.truth.annotations, truth.segments, strict=True):
        own[annotation.image_id].append(segment)
    perfect = {image: Segments(masks, np.ones(len(masks), np.float32)) for image, masks in own.items()}
    score = score_segments(truth, perfect)
    assert (score.AR100, score.AR1000) == (1, 1)
    assert score_segments(truth, {1: perfect[1]}, [1]).AR1000 == 1
    assert pytest.approx(len(own[1]) / len(truth.segments)) == score_segments(truth, {1: perfect[1]}).AR1000
    assert score_segments(truth, {}).AR1000 == 0


def test_in_memory_as_from_the_file(path):
    truth = load_segments(path)
    segments = [
        [s for a, s in zip(truth.truth.annotations, truth.segments, strict=True) if a.image_id == image.id]
        for image in truth.truth.images
    ]
    images = [(image.file_name, (image.height, image.width)) for image in truth.truth.images]
    described = describe_segments(images, segments)
    proposals = {image: shifted(truth, image) for image in (1, 2)}
    assert described.segments == truth.segments
    found, expected = (score_segments(one, proposals).to_dict() for one in (described, truth))
    assert found == expected


def test_nothing_annotated():
    truth = describe_segments([("a", SIZE)], [[]])
    score = score_segments(truth, {})
    assert np.isnan(score.AR1000)
    assert score.to_dict() == dict.fromkeys(("AR10", "AR100", "AR1000", "AR1000s", "AR1000m", "AR1000l"))
    assert score.to_table().row_count == 1


def test_mistakes_are_told(path, tmp_path):
    truth = load_segments(path)
    with pytest.raises(AnnotationError, match="no image 99"):
        score_segments(truth, {}, [99])
    small = encode_masks(np.ones((1, 5, 5), np.bool_))
    with pytest.raises(AnnotationError, match="5x5 pixels is not of image 1"):
        score_segments(truth, {1: Segments(small, np.ones(1, np.float32))})
    document = json.loads(path.read_text())
    document["annotations"][0]["segmentation"] = [[1, 2]]
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match=r"bad.json: a segmentation is neither"):
        load_segments(tmp_path / "bad.json")
    del document["annotations"][0]["segmentation"]
    (tmp_path / "bad.json").write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match="an object without a segmentation"):
        load_segments(tmp_path / "bad.json")
