"""The commands with an RPN, which proposes, and a Fast R-CNN, which is given proposals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest

from fpn_engine.detections import Detections
from fpn_engine.engine import Engine
from fpn_engine.errors import PlanError, ProposalError
from fpn_engine.images import read_image
from fpn_engine.plan import Plan, read_plan
from fpn_engine.proposal_file import load_proposals
from fpn_export.checkpoint import load_checkpoint
from fpn_export.onnx_export import export_onnx
from tests.engine.conftest import SPEC, Run, Tiny, build, make_picture
from tests.engine.dataset import annotate, dataset

__all__ = ["dataset"]

EVAL = ("eval", "--annotations", "truth.json", "--images", "images", "--json")


class Halves(NamedTuple):
    """The tiny detector's RPN and its Fast R-CNN, as plans of their own."""

    rpn: Path
    fast: Path


@pytest.fixture(scope="module")
def halves(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Halves:
    folder = tmp_path_factory.mktemp("halves")
    plans = []
    for model in ("rpn", "fast_rcnn"):
        # All proposals are detections, as in table 1.
        most = {"box_detections_per_img": SPEC.rpn_post_nms_top_n_test} if model == "rpn" else {}
        loaded = load_checkpoint(tiny.checkpoint, spec_overrides={"model": model, **most})
        onnx.save(export_onnx(loaded.model, loaded.spec), str(folder / f"{model}.onnx"))
        build(folder / f"{model}.onnx", folder / f"{model}.plan")
        plans.append(folder / f"{model}.plan")
    return Halves(*plans)


def assert_same(ours: Detections, theirs: Detections) -> None:
    """Boxes went to the original's pixels and back, which rounds."""
    assert len(ours) == len(theirs) > 5
    np.testing.assert_allclose(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.boxes, theirs.boxes, rtol=0, atol=1e-2)
    assert ours.labels.tolist() == theirs.labels.tolist()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_fast_rcnn_finds_the_same_among_the_same_proposals(batch_size: int, halves: Halves, engine: Engine) -> None:
    pictures = [make_picture(h, w, seed=h) for h, w in [(60, 80), (90, 50), (61, 79), (20, 30)]]
    rpn, fast = Engine.load(halves.rpn), Engine.load(halves.fast, batch_size=batch_size)
    proposals = rpn.propose(pictures)
    for ours, theirs in zip(fast(pictures, proposals=proposals), engine(pictures), strict=True):
        assert_same(ours, theirs)
    (one,) = fast(pictures[0], proposals=[proposals[0].boxes.tolist()])
    assert_same(one, engine(pictures[0])[0])
    (none,) = fast(pictures[0], proposals=[[]])
    assert len(none) == 0
    some = [proposal.boxes[: 40 - 9 * number] for number, proposal in enumerate(proposals)]
    for ours, picture, boxes in zip(fast(pictures, proposals=some), pictures, some, strict=True):
        assert_same(ours, fast(picture, proposals=[boxes])[0])


def test_the_halves_together_score_as_the_whole(dataset: Path, tiny: Tiny, halves: Halves, run: Run) -> None:
    whole = json.loads(run(*EVAL, "--plan", tiny.plan).out)
    for suffix in (".npz", ".json"):
        saved = run(*EVAL, "--plan", halves.rpn, "--save-proposals", f"p{suffix}")
        assert saved.code == 0
        assert saved.err == f"p{suffix}: proposals of 2 images\n"
        recall = json.loads(saved.out)
        assert set(recall) == {"AR100", "AR1000", "AR1000s", "AR1000m", "AR1000l"}
        ran = run(*EVAL, "--plan", halves.fast, "--proposals", f"p{suffix}")
        assert (ran.code, ran.err) == (0, "")
        score = json.loads(ran.out)
        assert score["AP"] == pytest.approx(whole["AP"], abs=0.01)
        assert score["AR100"] == pytest.approx(whole["AR100"], abs=0.01)


def test_eval_of_an_rpn_and_recall_of_a_faster_rcnn(
    dataset: Path, tiny: Tiny, halves: Halves, engine: Engine, run: Run
) -> None:
    pixels = read_image("images/1.png")
    (proposals,) = engine.propose(pixels)
    annotate(dataset, {"1.png": (pixels, [(1, box) for box in proposals.boxes[:3].tolist()])})
    alone = json.loads(run(*EVAL, "--plan", halves.rpn).out)
    assert alone["AR100"] == alone["AR1000"] == 1
    assert json.loads(run(*EVAL, "--plan", halves.rpn, "--recall").out) == alone
    assert json.loads(run(*EVAL, "--plan", tiny.plan, "--recall").out) == alone
    assert "AP50" in json.loads(run(*EVAL, "--plan", tiny.plan).out)
    ran = run(*EVAL, "--plan", tiny.plan, "--save-proposals", "p.json")
    assert json.loads(ran.out) == alone
    (image,) = load_proposals(Path("p.json"))
    assert (image.file_name, image.image_id, len(image.proposals.boxes)) == ("1.png", 10, len(proposals.boxes))


def test_infer_with_the_results_of_an_rpn(dataset: Path, tiny: Tiny, halves: Halves, run: Run) -> None:
    """The COCO results of the one command are the proposals of the other."""
    proposed = run("infer", "images", "--plan", halves.rpn, "--format", "coco", "-o", "rpn.json")
    assert (proposed.code, proposed.err) == (0, "")
    results = json.loads(Path("rpn.json").read_text())
    assert {result["category_id"] for result in results} == {1}
    ran = run("infer", "images", "--plan", halves.fast, "--proposals", "rpn.json", "--json")
    assert (ran.code, ran.err) == (0, "")
    whole = json.loads(run("infer", "images", "--plan", tiny.plan, "--json").out)
    for ours, theirs in zip(json.loads(ran.out), whole, strict=True):
        assert ours["image"] == theirs["image"]
        assert len(ours["detections"]) == len(theirs["detections"]) > 5
        assert ours["detections"][0]["score"] == pytest.approx(theirs["detections"][0]["score"], abs=1e-3)


def test_infer_finds_images_by_the_annotations_ids(dataset: Path, halves: Halves, run: Run) -> None:
    entries = [{"image_id": 10, "bbox": [0, 0, 60, 60], "score": 1}, {"image_id": 11, "bbox": [0, 0, 9, 9]}]
    Path("ids.json").write_text(json.dumps(entries))
    given = ("infer", "images", "--plan", halves.fast, "--proposals", "ids.json", "--json")
    assert run(*given, "--annotations", dataset).code == 0
    without = run(*given)
    assert without.code == 4
    assert "ids.json has no proposals for the image 'images/1.png'" in without.err


def test_infer_goes_on_after_an_image_without_proposals(dataset: Path, halves: Halves, run: Run) -> None:
    Path("one.json").write_text(json.dumps([{"file_name": "2.png", "bbox": [0, 0, 40, 40]}]))
    ran = run("infer", "images", "--plan", halves.fast, "--proposals", "one.json", "--json", "--batch", 2)
    assert ran.code == 3
    first, second = json.loads(ran.out)
    assert first == {
        "image": "images/1.png",
        "error": "one.json has no proposals for the image 'images/1.png'; give the file that belongs to it",
    }
    assert second["image"] == "images/2.png"
    assert ran.err.endswith("1 of 2 images failed\n")


def test_info(halves: Halves, run: Run) -> None:
    rpn, fast = run("info", halves.rpn).out, run("info", halves.fast).out
    assert "rpn resnet18, pyramid of 16 channels" in rpn
    assert "1 object" in rpn
    assert "RoIAlign" not in rpn
    assert "score 0.0, NMS 0.7" in rpn
    assert "two_mlp on RoIAlign 7 x 7, 2 samples" in fast
    assert "proposal_counts" in run("info", halves.fast.with_suffix(".onnx")).out


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        ("fast", [], "this plan is a Fast R-CNN, which detects among given proposals; give --proposals FILE"),
        ("fast", ["--proposals", "missing.json"], "cannot read the proposals missing.json: No such file"),
        ("fast", ["--proposals", "images/1.png"], "is no proposal file by its name"),
        ("fast", ["--proposals", "truth.txt"], "is no proposal file by its name"),
        ("fast", ["--proposals", "wrong.json"], "the proposals wrong.json are not of the right form"),
        ("fast", ["--proposals", "one.json"], "one.json has no proposals for the image 'images/2.png'"),
        ("rpn", ["--proposals", "one.json"], "this plan finds its own proposals; --proposals is for a Fast R-CNN only"),
    ],
)
def test_wrong_proposals(
    plan: str, options: list[str], words: str, dataset: Path, halves: Halves, run: Run, workplace: Path
) -> None:
    (workplace / "wrong.json").write_text("[1]")
    (workplace / "one.json").write_text(json.dumps([{"file_name": "1.png", "bbox": [0, 0, 40, 40]}]))
    path = getattr(halves, plan)
    ran = run(*EVAL, "--plan", path, *options)
    assert (ran.code, ran.out) == (1, "")
    assert words in ran.err
    assert "Traceback" not in ran.err
    if not options or plan == "rpn":  # the one option and its messages are shared
        inferred = run("infer", "images", "--plan", path, *options)
        assert (inferred.code, inferred.out) == (1, "")
        assert words in inferred.err


def test_wrong_recall(dataset: Path, halves: Halves, run: Run) -> None:
    Path("two.json").write_text(
        json.dumps([{"file_name": f"{number}.png", "bbox": [0, 0, 40, 40]} for number in (1, 2)])
    )
    given = (*EVAL, "--plan", halves.fast, "--proposals", "two.json")
    assert "a Fast R-CNN has no RPN and proposes nothing" in run(*given, "--recall").err
    assert "is no proposal file by its name" in run(*EVAL, "--plan", halves.rpn, "--save-proposals", "p.csv").err


def test_an_engine_says_what_it_needs(halves: Halves, engine: Engine) -> None:
    picture = make_picture(60, 80)
    rpn, fast = Engine.load(halves.rpn), Engine.load(halves.fast)
    with pytest.raises(ProposalError, match="this model is a Fast R-CNN"):
        fast(picture)
    with pytest.raises(ProposalError, match="this model is a Fast R-CNN"):
        list(fast.stream([]))
    with pytest.raises(ProposalError, match="there are proposals for 2 images, but 1 images"):
        fast(picture, proposals=[[], []])
    with pytest.raises(ProposalError, match="has no RPN"):
        fast.propose(picture)
    for finds_its_own in (rpn, engine):
        with pytest.raises(ProposalError, match="this model finds its own proposals"):
            finds_its_own(picture, proposals=[[]])


def test_a_plan_with_the_wrong_parts(halves: Halves, tiny: Tiny) -> None:
    rpn, whole = read_plan(halves.rpn), read_plan(tiny.plan)
    with pytest.raises(PlanError, match=r"the plan holds .'detections.onnx', 'trunk.onnx'., not .* and head.onnx and"):
        Engine.from_plan(_with_parts(whole, rpn))
    with pytest.raises(PlanError, match=r"the plan holds .*'head.onnx', .*, not detections.onnx and trunk.onnx;"):
        Engine.from_plan(_with_parts(rpn, whole))


def _with_parts(plan: Plan, parts_of: Plan) -> Plan:
    return Plan(dataclasses.replace(plan.manifest, parts=parts_of.manifest.parts), parts_of.parts)
