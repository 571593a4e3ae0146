"""Checkpoints of every system: recognised by their tensors, and refused where those and the spec disagree."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpn_engine.errors import CheckpointError, FpnEngineError
from fpn_engine.spec import MODELS, OBJECT, ModelSpec, numbered_categories
from fpn_export.checkpoint import describe_checkpoint, load_checkpoint
from fpn_export.detector import make_detector
from fpn_export.detector_shape import infer_shape
from fpn_export.systems import SYSTEMS, make_system
from tests.export.models import make_hollow
from tests.export.random_system import make_images
from tests.threads import one_thread

__all__ = ["one_thread"]

BASE = ModelSpec(categories=numbered_categories(2), arch="resnet18", body_width=8, fpn_channels=16)
# What no tensor shows.
STATED = {"bottom_up": {"pyramid": "bottom_up"}, "roi_pool": {"box_roi_pool": {"kind": "max"}}}


def make_state(spec: ModelSpec, **options: Any) -> dict[str, Tensor]:
    with torch.device("meta"):
        state = make_detector(spec, representation_size=8, **options).state_dict()
    return make_hollow(state)


def save(path: Path, spec: ModelSpec, **options: Any) -> Path:
    torch.save(make_state(spec, **options), path)
    return path


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("system", SYSTEMS)
def test_tensors_say_which_system_it_is(system: str, model: str, tmp_path: Path) -> None:
    spec = make_system(BASE, system, model)
    if model == "fast_rcnn":  # nothing shows an RPN or its anchors
        defaults = {"rpn_head_shared": True, "anchor_sizes": tuple((8.0 * 2**level,) for level in spec.levels)}
        spec = dataclasses.replace(spec, **defaults)
    path = save(tmp_path / "net.pth", spec)
    counts = ("box_detections_per_img", "rpn_pre_nms_top_n_test")
    stated = STATED.get(system, {}) | {name: getattr(spec, name) for name in counts}
    loaded = load_checkpoint(path, spec_overrides=stated)
    if spec.pyramid == "none":  # there is none to have a width
        spec = dataclasses.replace(spec, fpn_channels=loaded.spec.fpn_channels)
    if model == "rpn":  # nothing shows a box head
        spec = dataclasses.replace(spec, box_head="two_mlp", box_roi_pool=loaded.spec.box_roi_pool)
    assert loaded.spec == dataclasses.replace(spec, source=loaded.spec.source)
    assert loaded.model.spec == loaded.spec
    with torch.inference_mode():
        assert len(loaded.model.trunk(make_images(1)).features) == len(spec.levels)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_json_beside_it_gives_the_spec_back(system: str, tmp_path: Path) -> None:
    spec = make_system(BASE, system, "rpn" if system == "fpn" else "faster_rcnn")
    path = save(tmp_path / "net.pth", spec)
    path.with_suffix(".json").write_text(json.dumps({"spec": spec.to_dict()}))
    loaded = load_checkpoint(path)
    assert loaded.spec == dataclasses.replace(spec, source=loaded.spec.source)
    assert loaded.assumptions == []
    assert describe_checkpoint(path)["fpn_channels"] == spec.feature_channels


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
@pytest.mark.parametrize("system", ["c4", "c5", "top_down", "bottom_up"])
def test_shapes(system: str, arch: str) -> None:
    spec = dataclasses.replace(make_system(BASE, system), arch=arch)
    shape = infer_shape(make_state(spec, rpn_depth=2))
    assert shape.archs == (arch,)
    assert (shape.model, shape.body_width, shape.rpn_depth, shape.num_heads) == ("faster_rcnn", 8, 2, 0)
    assert shape.pyramids == {"bottom_up": ("fpn", "bottom_up"), "top_down": ("top_down",)}.get(system, ("none",))
    assert shape.feature_channels == spec.feature_channels
    assert shape.box_head == spec.box_head
    assert shape.pool_size == (0 if system == "c4" else 7)


def test_a_short_body_may_be_of_two_architectures(tmp_path: Path) -> None:
    short = {"levels": (2, 3), "roi_levels": (2, 3), "anchor_sizes": ((32.0,), (64.0,))}
    spec = dataclasses.replace(BASE, arch="resnet101", pyramid="bottom_up", **short)
    path = save(tmp_path / "net.pth", spec)
    loaded = load_checkpoint(path)
    assert loaded.shape.archs == ("resnet50", "resnet101")
    assert loaded.shape.pyramids == ("bottom_up",)
    assert (loaded.spec.arch, loaded.spec.levels, loaded.spec.pyramid) == ("resnet50", (2, 3), "bottom_up")
    assert load_checkpoint(path, spec_overrides={"arch": "resnet101"}).spec.arch == "resnet101"


@pytest.mark.parametrize("levels", [(2,), (2, 3, 4), (3, 4, 5, 6)])
@pytest.mark.parametrize("pyramid", ["fpn", "top_down", "bottom_up"])
def test_levels_that_are_stated(pyramid: str, levels: tuple[int, ...], tmp_path: Path) -> None:
    roi_levels = tuple(level for level in levels if level <= 5)
    sizes = tuple((8.0 * 2**level,) for level in levels)
    spec = dataclasses.replace(BASE, pyramid=pyramid, levels=levels, roi_levels=roi_levels, anchor_sizes=sizes)
    stated = {"pyramid": pyramid, "levels": list(levels)}
    loaded = load_checkpoint(save(tmp_path / "net.pth", spec), spec_overrides=stated)
    assert loaded.spec == dataclasses.replace(spec, source=loaded.spec.source)


def test_the_rpn_of_a_faster_rcnn(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pth", BASE)
    path.with_suffix(".json").write_text(json.dumps(BASE.to_dict()))
    loaded = load_checkpoint(path, spec_overrides={"model": "rpn"})
    assert loaded.spec.categories == (OBJECT,)
    assert loaded.assumptions == ["left out the roi_heads branch, which an RPN does not have"]
    assert not [name for name in loaded.model.state_dict() if name.startswith("roi_heads.")]


def test_assumptions_leave_out_what_is_not_there(tmp_path: Path) -> None:
    rpn = "\n".join(load_checkpoint(save(tmp_path / "rpn.pth", make_system(BASE, "fpn", "rpn"))).assumptions)
    fast = "\n".join(load_checkpoint(save(tmp_path / "fast.pth", make_system(BASE, "fpn", "fast_rcnn"))).assumptions)
    assert "assumed anchors" in rpn
    assert "assumed proposals" in rpn
    assert "assumed detections: box_detections_per_img 100" in rpn
    assert not any(word in rpn for word in ("assumed pooling", "roi_levels", "box_nms_thresh"))
    assert "assumed pooling" in fast
    assert "assumed anchors" not in fast
    assert "assumed proposals" not in fast


def test_a_pooling_that_is_stated_is_not_assumed(tmp_path: Path) -> None:
    path = save(tmp_path / "net.pth", BASE)
    for stated, assumed in (({"kind": "max"}, False), ({"kind": "align"}, True), ({}, True)):
        loaded = load_checkpoint(path, spec_overrides={"box_roi_pool": stated})
        assert ("box_roi_pool" in "\n".join(loaded.assumptions)) == assumed


@pytest.mark.parametrize(
    ("system", "model", "stated", "words"),
    [
        ("fpn", "faster_rcnn", {"pyramid": "top_down"}, "pyramid is top_down by its specification"),
        ("top_down", "rpn", {"pyramid": "fpn"}, "but top_down by its tensors"),
        ("fpn", "rpn", {"pyramid": "none", "levels": [4], "roi_levels": [4]}, "but fpn or bottom_up by its tensors"),
        ("c5", "rpn", {"pyramid": "fpn"}, "but none by its tensors"),
        ("c4", "rpn", {"levels": [5], "roi_levels": [5]}, "its specification has levels p5..p5, but its tensors make"),
        ("c4", "faster_rcnn", {"box_head": "two_mlp"}, "box_head is two_mlp by its specification"),
        ("finest", "rpn", {"anchor_sizes": [[32.0]]}, "is 3 by its specification"),
        ("finest", "rpn", {"anchor_sizes": [[8.0]] * 5}, "levels p2..p6, but its tensors make p2..p2"),
        ("unshared", "rpn", {"rpn_head_shared": True}, "rpn_head_shared is True by its specification"),
        ("fpn", "rpn", {"rpn_head_shared": False}, "rpn_head_shared is False by its specification"),
        ("unshared", "rpn", {"anchor_sizes": [[8.0]] * 4}, "the number of levels is 4 by its specification"),
        ("fpn", "rpn", {"model": "faster_rcnn"}, "given as faster_rcnn, but it has no roi_heads tensors"),
        ("fpn", "fast_rcnn", {"model": "rpn"}, "given as rpn, but it has no rpn.head tensors"),
        ("top_down", "rpn", {"levels": [2, 3], "roi_levels": [2]}, "levels p2..p3, but its tensors make p2..p6"),
    ],
)
def test_specs_that_the_tensors_contradict(
    system: str, model: str, stated: dict[str, Any], words: str, tmp_path: Path
) -> None:
    path = save(tmp_path / "net.pth", make_system(BASE, system, model))
    if "anchor_sizes" not in stated and "levels" in stated:
        stated = stated | {"anchor_sizes": [[32.0]] * len(stated["levels"])}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, spec_overrides=stated)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("system", "missing", "words"),
    [
        ("unshared", "rpn.head.2.bbox_pred.bias", "its tensors do not fit an RPN (missing rpn.head.2.bbox_pred.bias)"),
        ("unshared", "rpn.head.0.cls_logits.weight", "missing rpn.head.0.cls_logits.weight"),
        ("top_down", "backbone.fpn.inner_blocks.0.0.weight", "missing backbone.fpn.inner_blocks.0.0.weight"),
        ("c4", "backbone.body.layer3.0.conv1.weight", "(2, 2, 1) basic blocks"),
    ],
)
def test_missing_tensors_are_named(system: str, missing: str, words: str, tmp_path: Path) -> None:
    state = make_state(make_system(BASE, system, "rpn"))
    del state[missing]
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(FpnEngineError) as caught:
        load_checkpoint(tmp_path / "net.pth")
    assert words in str(caught.value)


def test_a_bottom_up_network_alone_is_no_detector(tmp_path: Path) -> None:
    state = {k: v for k, v in make_state(BASE).items() if k.startswith("backbone.")}
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"not a Faster R-CNN .*missing rpn\.head\.conv\.0\.0\.weight"):
        load_checkpoint(tmp_path / "net.pth")
