"""Whole runs from files: joint, alternating, on given proposals, and what can be wrong with the files."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fpn_engine.annotations import Annotation, load_annotations
from fpn_engine.errors import (
    AnnotationError,
    CheckpointError,
    FpnEngineError,
    ImageError,
    ProposalError,
    SpecError,
)
from fpn_engine.spec import OBJECT, Category
from fpn_export.checkpoint import load_checkpoint
from fpn_export.masks.examples import SceneExamples
from fpn_export.masks.training import MaskJob, train_masks
from fpn_export.systems import SYSTEMS, make_system
from fpn_export.training.alternating import STEPS, train_alternating
from fpn_export.training.examples import AnnotatedExamples
from fpn_export.training.job import Job, identify, train
from fpn_export.training.recipe import Recipe
from fpn_export.training.run_folder import RunFolder
from fpn_export.training.trainer import Habits
from tests.engine.voc_files import write_object, write_xml
from tests.export.masks.tiny import tiny_spec as tiny_mask_spec
from tests.export.training.squares import tiny_spec, write_squares

RECIPE = Recipe(
    steps=4,
    batch_size=2,
    learning_rate=0.005,
    warmup_steps=1,
    clip_norm=1.0,
    anchors_per_image=16,
    rois_per_image=16,
    proposals_per_image=50,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("squares"), seed=1, count=6)


def make_job(data: Path, output: Path, **changes: Any) -> Job:
    values = {
        "annotations": [data],
        "images": [data.parent / "images"],
        "output": output,
        "spec": tiny_spec(rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=50),
        "representation_size": 32,
        "recipe": RECIPE,
        "habits": Habits(validate_every=100, save_every=2),
        "device": "cpu",
    }
    return Job(**(values | changes))


def test_a_joint_run_scores_its_model(data: Path, run_path: Path) -> None:
    outcome = train(make_job(data, run_path, val_annotations=data))
    assert outcome.complete
    assert outcome.step == 4
    assert outcome.best is not None
    assert 0 <= outcome.best <= 1
    assert load_checkpoint(run_path / "best.pth").assumptions == []


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_of_the_paper_trains(system: str, data: Path, run_path: Path) -> None:
    base = tiny_spec(rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=50, body_width=8, fpn_channels=8)
    spec = make_system(base, system)
    recipe = Recipe.from_dict(RECIPE.to_dict() | {"steps": 2})
    assert train(make_job(data, run_path, spec=spec, recipe=recipe)).complete
    loaded = load_checkpoint(run_path / "last.pth")
    assert dataclasses.replace(loaded.spec, source="") == spec


def test_alternating_training_shares_features(data: Path, run_path: Path) -> None:
    job = make_job(data, run_path, val_annotations=data)
    notes: list[str] = []
    outcome = train_alternating(job, on_note=notes.append)
    assert outcome.complete
    assert [note for note in notes if note.startswith("step ")] == [f"step {step.name}" for step in STEPS]
    parts = {step.name: load_checkpoint(run_path / step.name / "last.pth").model.state_dict() for step in STEPS}
    joined = load_checkpoint(run_path / "best.pth")
    assert joined.spec.model == "faster_rcnn"
    for name, tensor in joined.model.state_dict().items():
        origin = "3-rpn" if name.startswith("rpn.") else "4-fast_rcnn"
        assert torch.equal(tensor, parts[origin][name]), name
        if name.startswith("backbone."):
            assert all(torch.equal(tensor, parts[step][name]) for step in ("2-fast_rcnn", "3-rpn")), name
    assert any(not torch.equal(t, parts["1-rpn"][n]) for n, t in parts["2-fast_rcnn"].items() if "fpn" in n)
    assert load_checkpoint(run_path / "1-rpn" / "last.pth").spec.categories == (OBJECT,)


def test_alternating_training_goes_on_where_it_was_stopped(data: Path, run_path: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    train_alternating(make_job(data, whole))
    seen: list[int] = []
    stopped = train_alternating(
        make_job(data, run_path), lambda progress: seen.append(progress.step), lambda: len(seen) == 6
    )
    assert not stopped.complete
    assert train_alternating(make_job(data, run_path), lambda progress: seen.append(progress.step)).complete
    assert seen == [1, 2, 3, 4] * 4
    a, b = (torch.load(path / "last.pth", weights_only=True) for path in (whole, run_path))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_alternating_training_takes_proposals_of_the_right_images(run_path: Path, tmp_path: Path) -> None:
    """Generated sets call their images alike: each file of proposals is for its own annotations."""
    paths = [write_squares(tmp_path / str(seed), seed=seed, count=2) for seed in (1, 2, 3)]
    sets = {"annotations": paths[:2], "images": [path.parent / "images" for path in paths[:2]]}
    job = make_job(paths[0], run_path, **sets, val_annotations=paths[2], val_images=paths[2].parent / "images")
    assert train_alternating(job).complete
    files = [run_path / "1-rpn" / f"proposals-{i}-{identify(path)[:12]}.npz" for i, path in enumerate(paths)]
    assert {*files} == {*(run_path / "1-rpn").glob("*.npz")}
    job = make_job(paths[0], tmp_path / "guess", **sets, spec=dataclasses.replace(job.spec, model="fast_rcnn"))
    with pytest.raises(ProposalError, match="have proposals of several images for"):
        train(dataclasses.replace(job, proposals=files[:2]))
    assert train(
        dataclasses.replace(job, output=tmp_path / "told", proposals=files[:2], paired_proposals=True)
    ).complete


def test_alternating_training_keeps_its_folder_to_itself(data: Path, run_path: Path) -> None:
    folder = RunFolder(run_path)
    with pytest.raises(CheckpointError, match="another run is training in"):
        train_alternating(make_job(data, run_path, restart=True))
    folder.close()
    assert train(make_job(data, run_path)).complete
    with pytest.raises(CheckpointError, match="holds a run that is not alternating; give another folder, or --restart"):
        train_alternating(make_job(data, run_path))
    assert train_alternating(make_job(data, run_path, restart=True)).complete


def test_a_joint_run_leaves_an_alternating_one_alone(data: Path, run_path: Path) -> None:
    job = make_job(data, run_path, recipe=dataclasses.replace(RECIPE, steps=1))
    assert train_alternating(job).complete
    before = (run_path / "best.pth").read_bytes()
    with pytest.raises(CheckpointError, match="holds an alternating run; go on with --alternating"):
        train(job)
    assert (run_path / "best.pth").read_bytes() == before
    assert train(dataclasses.replace(job, restart=True)).complete
    assert not (run_path / STEPS[0].name).exists()


def test_alternating_training_stops_while_it_writes_proposals(data: Path, run_path: Path) -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(True)
        return len(asked) == RECIPE.steps + 2

    assert not train_alternating(make_job(data, run_path), should_stop=should_stop).complete
    assert (run_path / "1-rpn" / "last.pth").exists()
    assert not list((run_path / "1-rpn").glob("*.npz"))
    assert train_alternating(make_job(data, run_path)).complete


def test_the_best_by_other_images_is_not_the_best(data: Path, run_path: Path, tmp_path: Path) -> None:
    job = make_job(data, run_path, val_annotations=data, habits=Habits(validate_every=1, save_every=1))
    train(job, should_stop=lambda: True)
    state = torch.load(run_path / "state.pt", weights_only=True)
    torch.save(state | {"best": 2.0}, run_path / "state.pt")  # what no score reaches
    assert train(job).best == 2
    torch.save(state | {"best": 2.0}, run_path / "state.pt")
    other = write_squares(tmp_path / "other", seed=5, count=3)
    best = train(dataclasses.replace(job, val_annotations=other, val_images=other.parent / "images")).best
    assert best is not None
    assert best < 2


def test_a_complete_run_without_validation_keeps_its_best(data: Path, run_path: Path) -> None:
    job = make_job(data, run_path, val_annotations=data, habits=Habits(validate_every=1, save_every=1))
    assert train(job).complete
    marked = load_checkpoint(run_path / "last.pth").model.state_dict()
    marked["backbone.body.conv1.weight"].zero_()
    torch.save(marked, run_path / "best.pth")
    before = (run_path / "best.pth").read_bytes()
    assert train(dataclasses.replace(job, val_annotations=None)).complete
    assert (run_path / "best.pth").read_bytes() == before


def test_a_complete_run_is_scored_on_other_images(data: Path, run_path: Path, tmp_path: Path) -> None:
    assert train(make_job(data, run_path)).best is None
    assert train(make_job(data, run_path, val_annotations=data)).best is not None
    other = write_squares(tmp_path / "other", seed=5, count=3)
    job = make_job(data, run_path, val_annotations=other, val_images=other.parent / "images")
    assert train(job).best is not None
    assert (run_path / "scores.csv").read_text().count("\n4,") == 2


@pytest.mark.parametrize("run", [train, train_alternating])
@pytest.mark.parametrize("what", ["images", "val_images", "init"])
def test_restart_forgets_nothing_before_all_is_there(what: str, run: Any, data: Path, run_path: Path) -> None:
    job = make_job(data, run_path, val_annotations=data, recipe=dataclasses.replace(RECIPE, steps=1))
    assert run(job).complete
    before = {path.name: path.stat().st_mtime_ns for path in run_path.rglob("*.*")}
    nowhere = {"images": [run_path / "none"], "val_images": run_path / "none", "init": run_path / "none.pth"}[what]
    with pytest.raises(FpnEngineError):
        run(dataclasses.replace(job, restart=True, **{what: nowhere}))
    with pytest.raises(FpnEngineError, match="is of the run that --restart forgets"):
        run(dataclasses.replace(job, restart=True, init=run_path / "best.pth"))
    assert {path.name: path.stat().st_mtime_ns for path in run_path.rglob("*.*")} == before
    assert run(dataclasses.replace(job, restart=True)).complete


def make_proposals(data: Path, path: Path) -> Path:
    """The annotated boxes."""
    document = json.loads(data.read_text())
    path.write_text(json.dumps({"images": document["images"], "annotations": document["annotations"]}))
    return path


def test_proposals_to_score_on_are_looked_for_before_training(data: Path, run_path: Path, tmp_path: Path) -> None:
    other = write_squares(tmp_path / "other", seed=5, count=3)
    for image in (document := json.loads(other.read_text()))["images"]:
        os.rename(other.parent / "images" / image["file_name"], other.parent / "images" / f"v{image['file_name']}")
        image["file_name"] = f"v{image['file_name']}"
        image["id"] += 100
    for annotation in document["annotations"]:
        annotation["image_id"] += 100
    other.write_text(json.dumps(document))
    given = {"proposals": [make_proposals(data, tmp_path / "p.json")]}
    given |= {"spec": dataclasses.replace(tiny_spec(), model="fast_rcnn")}
    scored = {"val_annotations": other, "val_images": other.parent / "images"}
    with pytest.raises(ProposalError, match="has no proposals for the image 'v"):
        train(make_job(data, run_path, **given, **scored))
    assert not (run_path / "log.csv").exists()
    # More proposals, of images to score on, are no other run.
    assert not train(make_job(data, run_path, **given), should_stop=lambda: True).complete
    given["proposals"] = [*given["proposals"], make_proposals(other, tmp_path / "q.json")]
    outcome = train(make_job(data, run_path, **given, **scored))
    assert outcome.complete
    assert outcome.best is not None
    # Other proposals to learn among are.
    edit(tmp_path / "p.json", tmp_path / "p.json", lambda document: document["annotations"].pop())
    with pytest.raises(CheckpointError, match=r"other settings \(data\.proposals"):
        train(make_job(data, run_path, **given, **scored))


def test_alternating_training_may_be_scored_on_other_images(data: Path, run_path: Path, tmp_path: Path) -> None:
    assert train_alternating(make_job(data, run_path)).complete
    assert train_alternating(make_job(data, run_path, val_annotations=data)).best is not None


def test_proposals_for_a_model_that_finds_its_own_are_refused(data: Path, run_path: Path, tmp_path: Path) -> None:
    job = make_job(data, run_path, proposals=[make_proposals(data, tmp_path / "p.json")])
    with pytest.raises(ProposalError, match="a faster_rcnn finds its own proposals"):
        train(job)
    with pytest.raises(ProposalError, match="makes its own proposals; leave out --proposals"):
        train_alternating(job)


def test_a_narrow_model_trains_on_the_cpu_at_ordinary_sizes(data: Path, run_path: Path) -> None:
    """In the format that others train in, oneDNN's gradient of its first shortcut writes beyond its memory."""
    spec = dataclasses.replace(tiny_spec(body_width=8), min_size=480, max_size=640)
    assert train(make_job(data, run_path, spec=spec, recipe=dataclasses.replace(RECIPE, steps=2))).complete


def test_a_fast_rcnn_needs_proposals(data: Path, run_path: Path) -> None:
    spec = dataclasses.replace(tiny_spec(), model="fast_rcnn")
    with pytest.raises(ProposalError, match="--proposals"):
        train(make_job(data, run_path, spec=spec))
    with pytest.raises(SpecError, match="not a fast_rcnn"):
        train_alternating(make_job(data, run_path, spec=spec))


def edit(data: Path, target: Path, change: Any) -> Path:
    document = json.loads(data.read_text())
    change(document)
    target.write_text(json.dumps(document))
    return target


def test_images_that_are_not_there_are_counted(data: Path, run_path: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"6 of 6 annotated images are not in .*--images"):
        train(make_job(data, run_path, images=[tmp_path]))


def test_images_to_score_on_are_looked_for_before_training(data: Path, run_path: Path, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=r"6 of 6 annotated images are not in .*--val-images"):
        train(make_job(data, run_path, val_annotations=data, val_images=tmp_path))
    assert not (run_path / "log.csv").exists()


def test_annotations_without_objects_are_said(data: Path, run_path: Path, tmp_path: Path) -> None:
    empty = edit(data, tmp_path / "empty.json", lambda document: document["annotations"].clear())
    with pytest.raises(AnnotationError, match="no annotated image has an object"):
        train(make_job(empty, run_path, images=[data.parent / "images"]))
    with pytest.raises(AnnotationError, match="no object to score on"):
        train(make_job(data, run_path, val_annotations=empty))


def test_an_image_of_another_size_is_named(data: Path, run_path: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for path in (data.parent / "images").iterdir():
        Image.open(path).resize((50, 40)).save(images / path.name)
    with pytest.raises(ImageError, match=r"\.png is 50x40 pixels, but its annotations are for 96x96"):
        train(make_job(data, run_path, images=[images]))
    with pytest.raises(ImageError, match=r"50x40 pixels, but its annotations are for 96x96; stopped after step"):
        train(make_job(data, run_path, val_annotations=data, val_images=images))


def test_a_run_of_another_width_is_not_taken_up(data: Path, run_path: Path) -> None:
    train(make_job(data, run_path))
    with pytest.raises(CheckpointError, match=r"other settings \(data.representation_size was 32, is 16\)"):
        train(make_job(data, run_path, representation_size=16))


def test_nor_one_of_changed_voc_annotations(run_path: Path, tmp_path: Path) -> None:
    """The list of names stays, what is in the images changes."""
    images = tmp_path / "JPEGImages"
    images.mkdir()
    Image.new("RGB", (80, 60)).save(images / "a.jpg")
    names = tmp_path / "train.txt"
    names.write_text("a\n")
    write_xml(tmp_path / "Annotations", "a", write_object("red", (1, 1, 40, 40)))
    spec = dataclasses.replace(tiny_spec(), categories=(Category(id=1, name="red"),))
    job = make_job(names, run_path, images=[images], spec=spec)
    assert train(job).complete
    assert train(job).complete
    write_xml(tmp_path / "Annotations", "a", write_object("red", (1, 1, 40, 41)))
    with pytest.raises(CheckpointError, match=r"other settings \(data.annotations was"):
        train(job)


def test_boxes_are_cut_to_the_image(data: Path) -> None:
    """Of four, one lies outside and one touches the border from there."""
    boxes = [(-10, 5, 30, 20), (60, 80, 500, 500), (96, 0, 10, 10), (200, 200, 5, 5)]
    truth = load_annotations(data)
    annotations = tuple(
        Annotation(image_id=1, category_id=1, bbox=box, area=box[2] * box[3], iscrowd=False) for box in boxes
    )
    examples = AnnotatedExamples(
        dataclasses.replace(truth, annotations=annotations), data.parent / "images", truth.categories
    )
    assert len(examples) == 1
    assert examples.objects_of(0)[0].tolist() == [[0, 5, 20, 25], [60, 80, 96, 96]]


def test_a_batch_that_does_not_divide_is_said(data: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fpn_export.training.processes.dist.init_process_group", lambda *args, **options: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(FpnEngineError, match="a batch of 2 does not divide among 3 processes"):
        train(make_job(data, run_path))
    masks = MaskJob(spec=tiny_mask_spec(), recipe=RECIPE, output=run_path, examples=SceneExamples(1, 1), data={})
    with pytest.raises(FpnEngineError, match="a batch of 2 does not divide among 3 processes"):
        train_masks(masks)


def test_a_gpu_that_is_not_there_is_said(data: Path, run_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(FpnEngineError, match="there is no CUDA device here"):
        train(make_job(data, run_path, device="cuda"))


@pytest.mark.parametrize("device", ["toaster", "mps", "meta", "cpu:x"])
def test_a_device_that_nothing_trains_on_is_said(device: str, data: Path, run_path: Path) -> None:
    with pytest.raises(FpnEngineError, match=f"^cannot train on {device}; --device is cpu or cuda$"):
        train(make_job(data, run_path, device=device))
