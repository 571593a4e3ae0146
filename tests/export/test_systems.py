"""The systems of the paper: what each of them is made of, and which specs there are none of."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fpn_engine.errors import ModelError, SpecError
from fpn_engine.pipeline import Proposals, Thresholds
from fpn_engine.spec import ARCHITECTURES, MODELS, ModelSpec, RoIPoolSpec, numbered_categories
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.box_head import Conv5Head
from fpn_export.detector import FasterRCNN, FastRCNN, RegionProposalNetwork, make_detector
from fpn_export.onnx_export import export_onnx
from fpn_export.pyramid import make_pyramid
from fpn_export.resnet import ResNet
from fpn_export.systems import SYSTEMS, make_system
from fpn_kernels import assign_levels, roi_align
from tests.export.models import randomize_batch_norm
from tests.export.random_system import BASE, SIZE, make_images, make_random_system, make_rois
from tests.threads import one_thread

__all__ = ["one_thread"]

PAPER = ModelSpec(categories=numbered_categories(80))
FIVE = (32.0, 64.0, 128.0, 256.0, 512.0)
# As many candidates as five levels have together.
ON_ONE_MAP = {"anchor_sizes": (FIVE,), "rpn_pre_nms_top_n_test": 5000}


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("fpn", {}),
        (
            "c4",
            {
                "pyramid": "none",
                "levels": (4,),
                "roi_levels": (4,),
                "box_head": "conv5",
                "box_roi_pool": RoIPoolSpec(output_size=14),
                **ON_ONE_MAP,
            },
        ),
        ("c5", {"pyramid": "none", "levels": (5,), "roi_levels": (5,), **ON_ONE_MAP}),
        ("bottom_up", {"pyramid": "bottom_up"}),
        ("top_down", {"pyramid": "top_down"}),
        ("finest", {"levels": (2,), "roi_levels": (2,), **ON_ONE_MAP}),
        ("unshared", {"rpn_head_shared": False}),
        ("roi_pool", {"box_roi_pool": RoIPoolSpec(kind="max")}),
    ],
)
def test_systems_of_the_paper(system: str, expected: dict[str, Any]) -> None:
    assert make_system(PAPER, system) == dataclasses.replace(PAPER, **expected)
    fast = make_system(PAPER, system, "fast_rcnn")
    assert fast == dataclasses.replace(PAPER, model="fast_rcnn", **expected)
    rpn = make_system(PAPER, system, "rpn")
    assert (rpn.model, rpn.categories[0].name, rpn.box_detections_per_img) == ("rpn", "object", 1000)
    assert ModelSpec.from_json(rpn.to_json()) == rpn


def test_every_system_is_described() -> None:
    assert list(SYSTEMS) == ["fpn", "c4", "c5", "bottom_up", "top_down", "finest", "unshared", "roi_pool"]
    assert all(system.rows and system.summary for system in SYSTEMS.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((PAPER, "c6"), "unknown system 'c6'; known are fpn, c4"),
        ((PAPER, "c4", "yolo"), "unknown model 'yolo'"),
        ((make_system(PAPER, "c5"), "c4"), "must be an fpn, not none"),
    ],
)
def test_no_such_system(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        make_system(*arguments)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pyramid": "sideways"}, "pyramid must be one of fpn, bottom_up, top_down, none, not 'sideways'"),
        ({"pyramid": "none"}, "levels must be one level of 2..5 where pyramid is none"),
        ({"pyramid": "none", "levels": (6,), "anchor_sizes": (FIVE,)}, "one level of 2..5 where pyramid is none"),
        ({"box_head": "conv5"}, "box_head must be two_mlp unless pyramid is none and levels are"),
        (
            {"pyramid": "none", "levels": (5,), "roi_levels": (5,), "anchor_sizes": (FIVE,), "box_head": "conv5"},
            "box_head must be two_mlp",
        ),
        ({"box_head": "three_mlp"}, "box_head must be one of two_mlp, conv5"),
        ({"box_roi_pool": RoIPoolSpec(kind="mean")}, "box_roi_pool.kind must be one of align, max, not 'mean'"),
        ({"model": "rpn"}, "categories must be one category, the object, for an rpn"),
        ({"body_width": 0}, "body_width must be at least 1"),
        ({"levels": (2,), "anchor_sizes": (FIVE,)}, r"roi_levels must be consecutive and among \(2,\)"),
    ],
)
def test_specs_that_are_no_system(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        dataclasses.replace(PAPER, **changes)


def test_truth_values_are_not_numbers() -> None:
    with pytest.raises(SpecError, match="rpn_head_shared in the model specification has a value of the wrong form"):
        ModelSpec.from_dict(PAPER.to_dict() | {"rpn_head_shared": 1})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"box_roi_pool": {"aligned": "no"}}, "box_roi_pool .* 'no' is not true or false"),
        ({"box_roi_pool": {"output_size": 7.5}}, "box_roi_pool .* 7.5 is not a whole number"),
        ({"box_roi_pool": {"output_size": True}}, "box_roi_pool .* True is not a whole number"),
        ({"levels": "23456"}, "levels .* '2' is not a whole number"),
        ({"levels": [2.9, 3, 4, 5, 6]}, "levels .* 2.9 is not a whole number"),
        ({"categories": [{"id": 1.7, "name": "a"}]}, "categories .* 1.7 is not a whole number"),
        ({"categories": ["ab"]}, "categories .* 'a'"),
        ({"categories": [{"id": 2**31, "name": "a"}]}, "categories must be categories of ids of 32 bits"),
        ({"box_detections_per_img": 100_001}, "box_detections_per_img must be at most 100000"),
        ({"image_mean": [True, 0, 0]}, "image_mean .* True is not a finite number"),
        ({"rpn_nms_thresh": "0.7"}, "rpn_nms_thresh .* '0.7' is not a finite number"),
        ({"bbox_reg_weights": [0, 10, 5, 5]}, "bbox_reg_weights must be four positive numbers"),
        ({"box_roi_pool": {"size": 7}}, "unknown key 'size' in the model specification's RoIPoolSpec"),
    ],
)
def test_specs_of_wrong_types(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        ModelSpec.from_dict(PAPER.to_dict() | changes)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_spec_knows_the_channels_of_the_stages(arch: str) -> None:
    spec = dataclasses.replace(PAPER, arch=arch, body_width=24)
    with torch.device("meta"):
        body = ResNet(arch, 1e-5, 24)
        maps = body(torch.zeros(1, 3, 64, 64))
    assert tuple(c.shape[1] for c in maps) == body.out_channels == spec.stage_channels
    assert make_system(spec, "c4").feature_channels == spec.stage_channels[2]


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("model", MODELS)
def test_parts(system: str, model: str) -> None:
    with torch.device("meta"):
        detector = make_detector(make_system(BASE, system, model))
        stages, levels = detector.pyramid(torch.zeros(1, 3, 64, 64))
        answers = detector.trunk(torch.zeros(1, 3, 64, 64)).objectness
    names = set(detector.state_dict())
    kind = {"faster_rcnn": FasterRCNN, "fast_rcnn": FastRCNN, "rpn": RegionProposalNetwork}[model]
    assert type(detector) is kind
    assert any(name.startswith("rpn.") for name in names) == (model != "fast_rcnn")
    assert any(name.startswith("roi_heads.") for name in names) == (model != "rpn")
    assert any(name.startswith("backbone.fpn.") for name in names) == (system not in ("c4", "c5"))
    assert len(stages) == (3 if system == "c4" else 4)
    assert len(levels) == len(detector.spec.levels) == len(detector.spec.level_names)
    assert {level.shape[1] for level in levels} == {detector.spec.feature_channels}
    per_cell = 15 if system in ("c4", "c5", "finest") else 3
    assert [answer.shape[1] for answer in answers] == ([] if model == "fast_rcnn" else [per_cell] * len(levels))


def make_stages(sides: tuple[int, ...] = (24, 12, 6, 3)) -> list[Tensor]:
    """c2..c5 of 8, 16, 32, 64 channels, sides by stage."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, 8 * 2**i, side, side, generator=generator) for i, side in enumerate(sides)]


def find_dependences(system: str) -> dict[str, list[str]]:
    """Which stages each level depends on, by changing one stage after the other."""
    torch.manual_seed(0)
    pyramid = make_pyramid(make_system(BASE, system))
    stages = make_stages()
    with torch.no_grad():
        before = pyramid(stages)
        found: dict[str, list[str]] = {f"p{level}": [] for level in range(2, 7)}
        for number, stage in enumerate(stages):
            changed = [*stages[:number], stage + 1, *stages[number + 1 :]]
            for level, a, b in zip(found, pyramid(changed), before, strict=True):
                if not torch.equal(a, b):
                    found[level].append(f"c{number + 2}")
    return found


def test_levels_of_the_fpn_depend_on_all_coarser_stages() -> None:
    assert find_dependences("fpn") == {
        "p2": ["c2", "c3", "c4", "c5"],
        "p3": ["c3", "c4", "c5"],
        "p4": ["c4", "c5"],
        "p5": ["c5"],
        "p6": ["c5"],
    }


def test_levels_of_a_bottom_up_pyramid_depend_on_their_own_stage() -> None:
    assert find_dependences("bottom_up") == {"p2": ["c2"], "p3": ["c3"], "p4": ["c4"], "p5": ["c5"], "p6": ["c5"]}


def test_levels_of_a_top_down_pyramid_depend_on_c5_alone() -> None:
    assert find_dependences("top_down") == {f"p{level}": ["c5"] for level in range(2, 7)}


def pass_through(pyramid: nn.Module) -> None:
    """Laterals that add up the channels, and outputs that leave each value as it is."""
    for parameter in pyramid.parameters():
        nn.init.zeros_(parameter)
    for block in pyramid.inner_blocks:  # type: ignore[union-attr]
        nn.init.ones_(block[0].weight)
    for block in pyramid.layer_blocks:  # type: ignore[union-attr]
        block[0].weight.data[..., 1, 1] = torch.eye(len(block[0].weight))


def test_values_of_the_pyramids() -> None:
    stages = make_stages()
    sums = [c.sum(dim=1, keepdim=True).expand(-1, 16, -1, -1) for c in stages]
    bottom_up, top_down = (make_pyramid(make_system(BASE, system)) for system in ("bottom_up", "top_down"))
    pass_through(bottom_up)
    pass_through(top_down)
    with torch.no_grad():
        for level, own in zip(bottom_up(stages), sums, strict=False):
            torch.testing.assert_close(level, own)
        for level, factor in zip(top_down(stages), (8, 4, 2, 1), strict=False):
            torch.testing.assert_close(
                level, sums[-1].repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
            )
        torch.testing.assert_close(top_down(stages)[-1], sums[-1][..., ::2, ::2])


def test_a_top_down_pyramid_takes_the_sizes_of_the_stages() -> None:
    pyramid = make_pyramid(make_system(BASE, "top_down"))
    levels = pyramid(make_stages((23, 12, 6, 3)))
    assert [level.shape[-1] for level in levels] == [23, 12, 6, 3, 2]


def test_a_bottom_up_body_ends_at_the_last_level() -> None:
    changes = {"levels": (2, 3), "roi_levels": (2, 3), "anchor_sizes": ((32.0,), (64.0,))}
    detector = make_random_system("bottom_up", "faster_rcnn", **changes)
    assert not [name for name in detector.state_dict() if "layer3" in name or "layer4" in name]
    assert [level.shape[1:] for level in detector.trunk(make_images()).features] == [(16, 16, 24), (16, 8, 12)]


@pytest.mark.parametrize(("system", "number"), [("c4", 2), ("c5", 3)])
def test_a_single_map_is_the_stage_itself(system: str, number: int) -> None:
    detector = make_random_system(system, "faster_rcnn")
    stages, levels = detector.pyramid(make_images())
    assert len(levels) == 1
    assert torch.equal(levels[0], stages[number])
    out = detector.trunk(make_images())
    rois = make_rois()
    pool = detector.spec.box_roi_pool
    pooled = detector.pipeline.pool(out, rois)
    assert pool.output_size == (14 if system == "c4" else 7)
    assert torch.equal(pooled, roi_align(stages[number], rois, pool.output_size, 1 / 2 ** (number + 2), 2))


def test_the_finest_level_gives_all_rois() -> None:
    """Eq. 1 degenerates where there is one level: RoIs of every size come from it."""
    detector = make_random_system("finest", "faster_rcnn")
    out = detector.trunk(make_images())
    (p2,) = out.features
    assert tuple(p2.shape[-2:]) == (SIZE[0] // 4, SIZE[1] // 4)
    rois = make_rois()
    assert len(set(assign_levels(rois[:, 1:], 2, 5, 4, BASE.canonical_size).tolist())) == 4
    assert torch.equal(detector.pipeline.pool(out, rois), roi_align(p2, rois, 7, 1 / 4, 2))


def test_roi_pool_takes_each_roi_from_its_level() -> None:
    detector = make_random_system("roi_pool", "faster_rcnn")
    out = detector.trunk(make_images())
    rois = make_rois()
    pooled = detector.pipeline.pool(out, rois)
    levels = assign_levels(rois[:, 1:], 2, 5, 4, BASE.canonical_size)
    for level in range(2, 6):
        expected = torchvision.ops.roi_pool(out.features[level - 2], rois, 7, 1 / 2**level)
        assert torch.equal(pooled[levels == level], expected[levels == level])


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_conv5_is_the_classifiers_last_stage(arch: str) -> None:
    """A classifier's weights go into the head by their names."""
    torch.manual_seed(0)
    classifier = getattr(torchvision.models, arch)(weights=None).eval()
    randomize_batch_norm(classifier)
    spec = dataclasses.replace(make_system(PAPER, "c4"), arch=arch)
    head = Conv5Head(spec).eval()
    head.load_state_dict({k: v for k, v in classifier.state_dict().items() if k.startswith("layer4.")})
    rois = torch.randn(3, spec.feature_channels, 14, 14)
    with torch.inference_mode():
        expected = classifier.avgpool(classifier.layer4(rois)).flatten(1)
        torch.testing.assert_close(head(rois), expected)
        torch.testing.assert_close(fold_batch_norm(head)(rois), expected, rtol=1e-4, atol=1e-4)
    assert expected.shape == (3, head.out_features)


def test_unshared_heads_answer_their_own_level() -> None:
    detector = make_random_system("unshared", "rpn")
    names = [name for name in detector.state_dict() if name.startswith("rpn.")]
    assert {name.split(".")[2] for name in names} == set("01234")
    assert "rpn.head.0.conv.0.0.weight" in names
    images = make_images()
    before = detector.trunk(images)
    nn.init.zeros_(detector.rpn["head"][1].cls_logits.weight)  # type: ignore[index]
    after = detector.trunk(images)
    unchanged = [torch.equal(a, b) for a, b in zip(after.objectness, before.objectness, strict=True)]
    assert unchanged == [True, False, True, True, True]
    assert all(torch.equal(a, b) for a, b in zip(after.deltas, before.deltas, strict=True))


def test_unshared_heads_with_the_same_weights_are_a_shared_one() -> None:
    shared, unshared = (make_random_system(system, "rpn") for system in ("fpn", "unshared"))
    weights = shared.state_dict()
    unshared.load_state_dict(
        {
            name: weights[".".join(part for i, part in enumerate(name.split(".")) if name[:4] != "rpn." or i != 2)]
            for name in unshared.state_dict()
        }
    )
    expected = shared.trunk(make_images())
    for ours, theirs in zip(unshared.trunk(make_images()), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("system", SYSTEMS)
def test_gradients_reach_every_weight(system: str) -> None:
    detector = make_random_system(system, "faster_rcnn")
    out = detector.trunk(make_images())
    logits, deltas = detector.head(detector.pipeline.pool(out, make_rois()))
    sum(part.square().sum() for part in (*out.objectness, *out.deltas, logits, deltas)).backward()  # type: ignore[union-attr]
    assert not [name for name, parameter in detector.named_parameters() if parameter.grad is None]


def test_initial_weights_of_the_new_parts() -> None:
    torch.manual_seed(0)
    state = make_detector(make_system(dataclasses.replace(BASE, body_width=32), "c4")).state_dict()
    # He et al. 2015, fan out, for what ReLU follows
    spread = state["roi_heads.box_head.layer4.0.conv1.weight"].std().item()
    assert spread == pytest.approx((2 / (256 * 9)) ** 0.5, rel=0.05)
    assert state["rpn.head.cls_logits.weight"].std().item() == pytest.approx(0.01, rel=0.15)


def test_an_rpn_detects_its_best_proposals() -> None:
    detector = make_random_system("fpn", "rpn")
    images, sizes = make_images(), torch.tensor([(64, 90), (60, 96)])
    with torch.inference_mode():
        found = detector(images, sizes, Thresholds.of(detector.spec).override(box_detections_per_img=20))
        proposals = detector.pipeline.propose(detector.trunk(images), SIZE, sizes)
    assert found.scores.shape == (2, 20)
    assert torch.equal(found.boxes, proposals.boxes[:, :20])
    assert torch.equal(found.scores, proposals.scores[:, :20])
    assert (found.labels == 1).all()
    assert found.counts.tolist() == [20, 20] < proposals.counts.tolist()
    with torch.inference_mode():
        none = detector(images, sizes, Thresholds.of(detector.spec).override(box_score_thresh=1.0))
    assert none.counts.tolist() == [0, 0]
    assert none.labels.count_nonzero() + none.scores.count_nonzero() + none.boxes.count_nonzero() == 0


def test_parts_that_are_not_there() -> None:
    rpn, fast = make_random_system("fpn", "rpn"), make_random_system("fpn", "fast_rcnn")
    images, sizes = make_images(), torch.tensor([SIZE, SIZE])
    thresholds = Thresholds.of(BASE)
    with pytest.raises(ValueError, match="a fast_rcnn detects among given proposals"):
        fast.pipeline(images, sizes, thresholds)
    given, out = Proposals.given(torch.zeros(2, 1, 4), torch.ones(2, dtype=torch.int64)), rpn.trunk(images)
    with pytest.raises(ValueError, match="an rpn has no box head"):
        rpn.pipeline.classify(out, given, sizes, thresholds)
    with pytest.raises(ModelError, match="the model is a FastRCNN, but its specification says faster_rcnn"):
        export_onnx(fast, BASE)
