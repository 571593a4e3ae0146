"""Forms of one model agree; of one with a fault, the stage where it was put is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from fpn_engine.errors import ImageError, ModelError
from fpn_engine.plan import Plan
from fpn_engine.work import Pixels
from fpn_export.verification import Comparison, OpenOptions, Subject, compare, open_subject
from fpn_export.verification.comparison import describe_differences
from fpn_export.verification.matching import match_detections
from fpn_export.verification.trace import STAGES, TRUNK
from fpn_export.verification.verdict import say_verdict
from tests.engine.conftest import SPEC, Tiny
from tests.export.verification.conftest import build, change_file, change_plan, open_native, with_spec

Pictures = list[tuple[str, Pixels]]


def run(a: Subject, b: Subject, pictures: Pictures) -> Comparison:
    return compare(a, b, pictures)


def departure(comparison: Comparison) -> tuple[str, str] | None:
    found = comparison.departure
    return None if found is None else (found.stage, found.fed_part)


def test_checkpoint_and_file_agree_in_every_stage(checkpoint: Subject, file: Subject, pictures: Pictures) -> None:
    comparison = run(checkpoint, file, pictures)
    assert comparison.agrees
    assert list(comparison.stages) == list(STAGES)
    assert sum(comparison.found) > 10
    assert comparison.twins == comparison.found[0] == comparison.found[1]
    worst = max(comparison.stages[stage].fed.value for stage in TRUNK)
    assert 0 < worst < 1e-5, "two runtimes round differently, and no more"
    assert [part for stage, part in comparison.parts if stage == "pyramid"] == ["p5", "p4", "p3", "p2", "p6"]
    assert say_verdict(comparison).startswith("given the same input every stage agrees, the trunk to ")


def test_cut_file_and_plan_agree(tiny: Tiny, file: Subject, native: Plan, pictures: Pictures) -> None:
    cut = open_subject(tiny.model, OpenOptions(cut=True, threads=1))
    assert "cut" in cut.runtime
    for other in (cut, open_native(native), open_subject(tiny.plan)):
        comparison = run(file, other, pictures)
        assert comparison.agrees, say_verdict(comparison)
        assert "bottom-up network" not in comparison.stages, "which a plan does not expose"


FAULTS = {
    "trunk backbone.body.layer2.0.conv1.weight": ("pyramid", "p5"),
    "trunk backbone.fpn.inner_blocks.2.0.weight": ("pyramid", "p4"),
    "trunk backbone.fpn.layer_blocks.1.0.weight": ("pyramid", "p3"),
    "trunk rpn.head.conv.0.0.weight": ("objectness", "p2"),
}


def double_largest(weight: np.ndarray) -> np.ndarray:
    weight.flat[np.abs(weight).argmax()] *= 2
    return weight


@pytest.mark.parametrize("where", FAULTS)
def test_one_weight_of_a_plan(where: str, file: Subject, native: Plan, pictures: Pictures) -> None:
    """Its largest number is doubled: the first stage that sees it is the one that is named."""
    changed = open_native(change_plan(native, *where.split(), double_largest))
    comparison = run(file, changed, pictures)
    assert departure(comparison) == FAULTS[where]
    assert not comparison.agrees
    sentence = say_verdict(comparison)
    assert f"the first stage that departs is the {FAULTS[where][0]}, image " in sentence
    later = [stage for stage in STAGES if STAGES.index(stage) > STAGES.index("box deltas")]
    assert not any(comparison.stages[stage].departs for stage in later), "what comes after is not at fault"


def test_the_head_of_a_plan(file: Subject, native: Plan, pictures: Pictures) -> None:
    """All of a layer, as any one input of it may be 0 behind its ReLU."""
    changed = change_plan(native, "head", "roi_heads.box_head.fc6.weight", lambda weight: weight * 1.01)
    comparison = run(file, open_native(changed), pictures)
    assert departure(comparison) == ("class logits", "")
    assert "; the first stage that departs is the class logits, image " in say_verdict(comparison)


def test_the_bottom_up_network_where_both_expose_it(
    tiny: Tiny, checkpoint: Subject, pictures: Pictures, tmp_path: Path
) -> None:
    path = change_file(tiny, tmp_path / "c.onnx", "backbone.body.layer3.0.conv1.weight", lambda weight: weight * 1.01)
    assert departure(run(checkpoint, open_subject(path), pictures)) == ("bottom-up network", "c4")


def test_box_regression_alone(tiny: Tiny, checkpoint: Subject, pictures: Pictures, tmp_path: Path) -> None:
    name = "roi_heads.box_predictor.bbox_pred.weight"
    path = change_file(tiny, tmp_path / "c.onnx", name, lambda weight: weight + 0.01)
    comparison = run(checkpoint, open_subject(path), pictures)
    assert departure(comparison) == ("box deltas", "")
    assert "the trunk agrees to " in say_verdict(comparison)
    assert "the RoI features agree to " in say_verdict(comparison)


def test_anchors_of_one_level(checkpoint: Subject, pictures: Pictures) -> None:
    """What has no weights: the decoding of a level."""
    sizes = (*SPEC.anchor_sizes[:1], (20.0,), *SPEC.anchor_sizes[2:])
    comparison = run(checkpoint, with_spec(checkpoint, anchor_sizes=sizes), pictures)
    assert departure(comparison) == ("proposals", "p3")
    assert comparison.differences == [f"anchor_sizes {SPEC.anchor_sizes} against {sizes}"]
    assert "image " in say_verdict(comparison)
    assert ", level p3 (" in say_verdict(comparison)


def test_pooling(checkpoint: Subject, pictures: Pictures) -> None:
    pool = dataclasses.replace(SPEC.box_roi_pool, aligned=True)
    comparison = run(checkpoint, with_spec(checkpoint, box_roi_pool=pool), pictures)
    assert departure(comparison) == ("RoI features", "")
    assert comparison.differences == ["box_roi_pool.aligned False against True"]


@pytest.mark.parametrize(
    "changes", [{"box_score_thresh": 0.99}, {"box_nms_thresh": 0.1}, {"box_detections_per_img": 3}]
)
def test_thresholds(changes: dict[str, float], file: Subject, checkpoint: Subject, pictures: Pictures) -> None:
    for first, second in ((checkpoint, with_spec(checkpoint, **changes)), (file, with_spec(checkpoint, **changes))):
        comparison = run(first, second, pictures)
        assert departure(comparison) == ("detections", "")
        (name,) = changes
        assert comparison.differences == [f"{name} {getattr(SPEC, name)} against {changes[name]}"]
        causes = {lost.cause for lost in comparison.lost}
        assert causes
        if name == "box_score_thresh":
            assert causes == {"its score is below B's threshold 0.99"}
        if name == "box_detections_per_img":
            assert causes == {"B has 3 better ones, the most that it reports"}


def test_image_size(checkpoint: Subject, pictures: Pictures) -> None:
    comparison = run(checkpoint, with_spec(checkpoint, min_size=32), pictures)
    assert departure(comparison) == ("preprocessed image", "")
    assert "shapes 1x3x64x96 and 1x3x32x64" in say_verdict(comparison)
    assert not comparison.stages["pyramid"].departs, "given the same image the network is the same"


def test_other_classes(tiny: Tiny, checkpoint: Subject, pictures: Pictures) -> None:
    renamed = (*SPEC.categories[:2], dataclasses.replace(SPEC.categories[2], name="fish"))
    assert describe_differences(SPEC, dataclasses.replace(SPEC, categories=renamed)) == [
        "class 7 'bird' against 7 'fish'"
    ]
    fewer = dataclasses.replace(SPEC, categories=SPEC.categories[:2])
    assert describe_differences(SPEC, fewer) == ["3 classes against 2"]
    assert describe_differences(SPEC, dataclasses.replace(SPEC, source="elsewhere")) == []


def test_other_kinds_of_model(checkpoint: Subject) -> None:
    rpn = with_spec(checkpoint, model="rpn", categories=SPEC.categories[:1])
    with pytest.raises(ModelError, match=r"a faster_rcnn and tiny\.pth a rpn; give two forms of one model"):
        compare(checkpoint, rpn, [])


@pytest.mark.parametrize("side", ["A", "B"])
def test_nan(side: str, tiny: Tiny, checkpoint: Subject, pictures: Pictures, tmp_path: Path) -> None:
    name = "backbone.fpn.inner_blocks.1.0.weight"
    broken = open_subject(change_file(tiny, tmp_path / "nan.onnx", name, lambda weight: weight * np.nan))
    comparison = run(*((broken, checkpoint) if side == "A" else (checkpoint, broken)), pictures)
    assert departure(comparison) == ("pyramid", "p3")
    assert f"(NaN or infinity in {side})" in say_verdict(comparison)
    assert not comparison.agrees
    both = run(broken, broken, pictures)
    assert not both.agrees
    assert "NaN or infinity in both" in say_verdict(both)


def test_a_broken_image_is_passed_over(checkpoint: Subject, file: Subject, pictures: Pictures) -> None:
    comparison = compare(checkpoint, file, [("bad.png", ImageError("bad.png: it is truncated")), pictures[0]])
    assert comparison.failures == [("bad.png", "bad.png: it is truncated")]
    assert [image.name for image in comparison.images] == [pictures[0][0]]
    assert comparison.agrees


def test_lower_precision_is_held_to_its_own_tolerance(tiny: Tiny, file: Subject, pictures: Pictures) -> None:
    half = open_native(build(tiny, "native", "fp16"))
    comparison = run(file, half, pictures)
    assert comparison.tolerances.precision == "fp16"
    assert comparison.departure is None, say_verdict(comparison)
    errors = [comparison.stages[stage].fed.value for stage in TRUNK if stage in comparison.stages]
    assert max(errors) > 1e-4, "it does run in half"
    strict = dataclasses.replace(comparison.tolerances, precision="fp32")
    comparison.tolerances = strict
    assert comparison.detections_agree is (not comparison.lost)


def test_the_order_of_detections_does_not_matter(checkpoint: Subject, pictures: Pictures) -> None:
    found = checkpoint.trace(pictures[0][1]).detections
    order = np.arange(len(found))[::-1]
    turned = dataclasses.replace(found, **{n: getattr(found, n)[order] for n in ("boxes", "scores", "labels")})
    matched = match_detections(found, turned)
    assert len(matched.pairs) == len(found) > 3
    assert (matched.only_a, matched.only_b) == ([], [])
