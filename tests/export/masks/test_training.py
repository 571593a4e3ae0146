"""Training a mask-proposal model: what a step learns, that it learns, that a stopped run goes on as if it had not."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fpn_engine.engine import Engine
from fpn_engine.errors import AnnotationError, CheckpointError, NonFiniteError
from fpn_engine.masks.ground_truth import load_segments
from fpn_engine.masks.regions import Regions
from fpn_engine.results import coco_results
from fpn_export.masks.batches import MaskBatch, MaskObjects, find_boxes, load_mask_batches
from fpn_export.masks.checkpoint import load_mask_model
from fpn_export.masks.examples import AnnotatedSegments, SceneExamples
from fpn_export.masks.step import compute_mask_losses, cut_masks
from fpn_export.masks.targets import assign_examples
from fpn_export.masks.training import MaskJob, SegmentValidation, make_recipe, train_masks
from fpn_export.scenes.dataset import IMAGES, write_coco
from fpn_export.training.trainer import Habits
from tests.export.masks.tiny import SIDE, tiny_model, tiny_spec

SIZE = (96, 128)


def make_job(folder, steps=4, **changes):
    values = {
        "spec": tiny_spec(body_width=8, masks_per_img=50),
        "recipe": make_recipe(steps, 2, warmup_steps=0),
        "output": folder,
        "examples": SceneExamples(1, 6, SIZE),
        "data": {"scenes": 1},
        "device": "cpu",
        "habits": Habits(save_every=1),
    }
    return MaskJob(**(values | changes))


def make_batch(seed=2, n=2):
    loader = load_mask_batches(SceneExamples(seed, n, SIZE), tiny_spec(), make_recipe(1, n, flip=0.0))
    return next(iter(loader))


def test_the_recipe_is_appendix_as():
    recipe = make_recipe()
    assert (recipe.steps, recipe.batch_size, recipe.rate, recipe.anchors_per_image) == (80_000, 16, 0.03, 128)
    warm = recipe.warmup_steps
    assert [recipe.rate_at(step) for step in (warm, 59_999, 60_000, 79_999)] == pytest.approx(
        [0.03, 0.03, 0.003, 0.003]
    )
    assert make_recipe(10, 4).rate == pytest.approx(0.03 / 4)


def test_boxes_of_masks():
    masks = np.zeros((2, 5, 7), np.bool_)
    masks[0, 1:3, 2:6] = masks[1, 4, 6] = True
    assert find_boxes(masks).tolist() == [[2, 1, 6, 3], [6, 4, 7, 5]]
    assert find_boxes(masks[:0]).shape == (0, 4)


def test_batches_keep_masks_and_pictures_together():
    """Flipped or not, what is under a mask is the same; boxes are those of the masks in the resized picture."""
    spec = dataclasses.replace(tiny_spec(), image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    for flip in (0.0, 1.0):
        loader = load_mask_batches(SceneExamples(2, 1, SIZE), spec, make_recipe(1, 1, flip=flip))
        batch = next(iter(loader))
        pixels, masks = SceneExamples(2, 1, SIZE)[0]
        expected = torch.from_numpy(pixels).permute(2, 0, 1) / 255
        if flip:
            expected, masks = expected.flip(2), masks[:, :, ::-1].copy()
        torch.testing.assert_close(batch.images[0], expected)
        assert torch.equal(batch.objects[0].masks, torch.from_numpy(masks))
        assert batch.objects[0].boxes.tolist() == find_boxes(masks).tolist()


def test_a_mask_is_cut_as_its_region_shows_it():
    masks = torch.zeros(2, 60, 80, dtype=torch.bool)
    masks[1, 10:30, 20:40] = True
    objects = MaskObjects(torch.zeros(2, 4), masks, torch.tensor([2.0, 0.5]))
    # Twice as wide and half as high as the resized picture: columns 10..20 and rows 20..60 there.
    regions = torch.tensor([[10.0, 20, 20, 60], [5, 20, 25, 60], [100, 100, 140, 140]])
    cut = cut_masks(objects, regions, torch.tensor([1, 1, 1]), 4)
    assert cut[0].all()
    assert cut[1].int().tolist() == [[0, 1, 1, 0]] * 4
    assert not cut[2].any()
    assert not cut_masks(objects, regions[:1], torch.tensor([0]), 4).any()


def test_losses_are_those_of_the_convolution():
    """Sparse training against dense maps, one example after another."""
    model, batch = tiny_model(), make_batch()
    losses = compute_mask_losses(model, batch, torch.Generator().manual_seed(3), examples=64)["segments"]
    scores, masks = model.dense(batch.images)
    regions = Regions(model.spec)
    targets = assign_examples(
        regions,
        [part.shape[2:] for part in scores],
        [o.boxes for o in batch.objects],
        64,
        torch.Generator().manual_seed(3),
    )
    score_losses, mask_losses = [], []
    for (image, level, y, x), head, number in zip(*(part.tolist() for part in targets), strict=True):
        wanted = torch.tensor(float(number >= 0))
        score_losses.append(F.binary_cross_entropy_with_logits(scores[level][image, head, y, x], wanted))
        if number >= 0:
            region = regions.cover(*(torch.tensor([v]) for v in (level, head, y, x)))
            cut = cut_masks(batch.objects[image], region, torch.tensor([number]), 14)[0]
            logits = masks[level][image, head, :, y, x].view(14, 14)
            mask_losses.append(F.binary_cross_entropy_with_logits(logits, cut.float()))
    assert 0 < len(mask_losses) < len(score_losses) / 3
    torch.testing.assert_close(losses.score, torch.stack(score_losses).mean())
    torch.testing.assert_close(losses.mask, 10 * torch.stack(mask_losses).mean())


def test_negatives_teach_the_score_alone():
    model, batch = tiny_model(), make_batch()
    empty = [MaskObjects(o.boxes[:0], o.masks[:0], o.scale) for o in batch.objects]
    losses = compute_mask_losses(model, MaskBatch(batch.images, empty))["segments"]
    assert losses.mask == 0
    sum(losses).backward()
    for head in model.mask_heads:
        assert head.mask.weight.grad.count_nonzero() == 0
        assert head.score.weight.grad.count_nonzero() > 0


def test_it_learns(tmp_path):
    """Few steps on few scenes: both losses fall, and the trained model proposes them better than the fresh one."""
    examples = SceneExamples(1, 2, SIZE)
    seen = []
    job = make_job(
        tmp_path, 60, recipe=make_recipe(60, 2, warmup_steps=5, flip=0.0, learning_rate=0.02), examples=examples
    )
    assert train_masks(
        dataclasses.replace(job, habits=Habits()), lambda progress: seen.append(progress.losses)
    ).complete
    for name in ("segments_score", "segments_mask"):
        assert np.mean([row[name] for row in seen[-5:]]) < 0.8 * np.mean([row[name] for row in seen[:5]])
    model = load_mask_model(tmp_path / "best.pth")
    score = SegmentValidation(examples.truth, lambda number: examples[number].pixels)
    fresh = score(tiny_model(masks_per_img=50))
    assert score(model).AR1000 > fresh.AR1000 + 0.02
    (found,) = Engine(model.pipeline)(examples[0].pixels)
    assert len(found) == 50
    assert found.masks.shape == (50, *SIZE)
    assert found.boxes.shape == (50, 4)
    assert len(found.polygons) == len(coco_results(found, 7)) == 50


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    whole, parts = make_job(tmp_path / "whole"), make_job(tmp_path / "parts")
    assert train_masks(whole).complete
    steps = []
    assert not train_masks(parts, lambda progress: steps.append(progress.step), lambda: len(steps) == 2).complete
    assert train_masks(parts, lambda progress: steps.append(progress.step)).complete
    assert steps == [1, 2, 3, 4]
    ends = [torch.load(job.output / "last.pth", weights_only=True) for job in (whole, parts)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    with pytest.raises(CheckpointError, match="other settings"):
        train_masks(dataclasses.replace(parts, spec=tiny_spec(mask_size=28)))


def test_validation_chooses_the_best(tmp_path):
    examples = SceneExamples(5, 1, SIZE)
    job = make_job(
        tmp_path,
        2,
        validation=SegmentValidation(examples.truth, lambda number: examples[number].pixels),
        habits=Habits(validate_every=1),
    )
    scores = []
    train_masks(job, lambda progress: scores.append(progress.score))
    assert len(scores) == 2
    assert "AR1000" in (tmp_path / "best.json").read_text()


def test_annotated_images(tmp_path):
    path = write_coco(tmp_path, 1, 3, SIZE)
    examples, scenes = AnnotatedSegments(load_segments(path), tmp_path / IMAGES), SceneExamples(1, 3, SIZE)
    assert examples.shapes == scenes.shapes
    for index in range(3):
        for found, expected in zip(examples[index], scenes[index], strict=True):
            assert np.array_equal(found, expected)
    with pytest.raises(AnnotationError, match="3 of 3 annotated images are not in"):
        AnnotatedSegments(load_segments(path), tmp_path)


def test_checkpoints_that_do_not_fit_are_told(tmp_path):
    train_masks(make_job(tmp_path, 1))
    weights = torch.load(tmp_path / "best.pth", weights_only=True)
    about = (tmp_path / "best.json").read_text()
    torch.save(weights, tmp_path / "other.pth")
    (tmp_path / "other.json").write_text(about)
    with pytest.raises(CheckpointError, match=r"is not the file that .*other.json describes"):
        load_mask_model(tmp_path / "other.pth")
    (tmp_path / "other.json").write_text(tiny_spec(mask_size=7).to_json())
    with pytest.raises(CheckpointError, match="do not fit the mask-proposal model"):
        load_mask_model(tmp_path / "other.pth")
    (tmp_path / "other.json").write_text('{"arch": "vgg"}')
    with pytest.raises(CheckpointError, match="arch must be one of"):
        load_mask_model(tmp_path / "other.pth")


def test_a_spoilt_network_is_told():
    model = tiny_model()
    with torch.no_grad():
        model.mask_heads[0].score.bias.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        Engine(model.pipeline)(np.zeros((SIDE, SIDE, 3), np.uint8))
