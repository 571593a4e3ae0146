"""Checkpoints in every form in which people keep them, and where each value of their spec comes from."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from fpn_engine.errors import CheckpointError, SpecError
from fpn_engine.spec import Category, ModelSpec, numbered_categories
from fpn_export import published
from fpn_export.assumptions import GROUPS
from fpn_export.checkpoint import describe_checkpoint, load_checkpoint
from fpn_export.checkpoint_file import hash_checkpoint
from fpn_export.detector import FasterRCNN, FastRCNN
from tests.export.models import make_hollow_state, make_torchvision_detector, relative_error

State = dict[str, Tensor]
OLD_NAMES = {"_blocks.0.0.": "_blocks.0.", "_blocks.1.0.": "_blocks.1.", "rpn.head.conv.0.0.": "rpn.head.conv."}


@pytest.fixture(scope="module")
def state() -> State:
    return make_hollow_state(channels=16, representation_size=8)


def use_old_names(state: State) -> State:
    renamed = {}
    for name, tensor in state.items():
        for new, old in OLD_NAMES.items():
            name = name.replace(new, old)
        renamed[name] = tensor
    assert len(renamed.keys() - state.keys()) == 10
    return renamed


def drop_counters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if "num_batches_tracked" not in name}


FORMS: dict[str, Callable[[State], Any]] = {
    "state dict": lambda state: state,
    "ordered": OrderedDict,
    "reference training": lambda state: {
        "model": state,
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
        "args": argparse.Namespace(lr=0.02, lr_steps=[16, 22]),
        "epoch": 25,
    },
    "lightning": lambda state: {"epoch": 1, "state_dict": {f"model.{k}": v for k, v in state.items()}},
    "model_state_dict": lambda state: {"model_state_dict": state, "loss": 0.5},
    "distributed": lambda state: {f"module.{k}": v for k, v in state.items()},
    "compiled and distributed": lambda state: {f"module._orig_mod.{k}": v for k, v in state.items()},
    "flat with counters": lambda state: {**state, "epoch": 3, "optimizer": {"lr": 0.1}},
    "old names": use_old_names,
    "frozen batch norm": drop_counters,
    "float64": lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_the_same_weights(form: str, state: State, tmp_path: Path) -> None:
    torch.save(FORMS[form](state), tmp_path / "net.pth")
    model = load_checkpoint(tmp_path / "net.pth").model
    assert isinstance(model, FasterRCNN)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert {tensor.device.type for tensor in loaded.values()} == {"cpu"}
    for name, tensor in drop_counters(loaded).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_loaded_detector_equals_torchvision(suffix: str, tmp_path: Path) -> None:
    oracle = make_torchvision_detector(channels=16, representation_size=8, norm_layer=FrozenBatchNorm2d)
    path = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        save_file(oracle.state_dict(), path)
    else:
        legacy = {"_use_new_zipfile_serialization": suffix == ".pth"}
        torch.save(oracle.state_dict(), path, **legacy)
    loaded = load_checkpoint(path)
    images, rois = torch.randn(1, 3, 64, 96), torch.randn(3, 16, 7, 7)
    with torch.inference_mode():
        features = oracle.backbone(images)
        assert max(map(relative_error, loaded.model.trunk(images).features, features.values())) < 1e-4
        expected = oracle.roi_heads.box_predictor(oracle.roi_heads.box_head(rois))
        torch.testing.assert_close(loaded.model.head(rois), expected)
    assert loaded.sha256 == hash_checkpoint(path)
    assert loaded.spec.source == f"net{suffix} sha256:{loaded.sha256[:16]}"


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50", "resnet101"])
def test_architecture_and_widths_come_from_the_tensors(arch: str, tmp_path: Path) -> None:
    state = make_hollow_state(arch=arch, channels=24, num_classes=6, representation_size=10, rpn_depth=2, ratios=(1.0,))
    torch.save(state, tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth", spec_overrides={"aspect_ratios": [1.0]})
    spec, shape = loaded.spec, loaded.shape
    assert (spec.arch, spec.fpn_channels, spec.num_classes, spec.num_anchors) == (arch, 24, 6, 1)
    assert (shape.representation_size, shape.rpn_depth, shape.pool_size) == (10, 2, 7)
    assert loaded.model.spec == spec


def test_width_of_the_body_comes_from_the_tensors(tmp_path: Path) -> None:
    spec = ModelSpec(categories=numbered_categories(2), arch="resnet18", body_width=8, fpn_channels=16)
    model = FasterRCNN(spec, representation_size=8)
    assert model.backbone.body.out_channels == (8, 16, 32, 64)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth")
    assert loaded.spec.body_width == 8
    assert loaded.spec.levels == (2, 3, 4, 5, 6)
    assert tuple(loaded.model.trunk(torch.zeros(1, 3, 32, 32)).features[0].shape) == (1, 16, 8, 8)
    with pytest.raises(CheckpointError, match="body_width is 64 by its specification"):
        load_checkpoint(tmp_path / "net.pth", spec_overrides={"body_width": 64})


def test_fast_rcnn_is_recognised_by_its_missing_rpn(state: State, tmp_path: Path) -> None:
    torch.save({k: v for k, v in state.items() if not k.startswith("rpn.")}, tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth")
    assert isinstance(loaded.model, FastRCNN)
    assert loaded.spec.model == "fast_rcnn"
    with pytest.raises(CheckpointError, match="given as faster_rcnn"):
        load_checkpoint(tmp_path / "net.pth", spec_overrides={"model": "faster_rcnn"})


def test_rpn_is_left_out_on_request(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth", spec_overrides={"model": "fast_rcnn"})
    assert isinstance(loaded.model, FastRCNN)
    assert loaded.assumptions[-1] == "left out the rpn branch, which a Fast R-CNN does not have"


def test_mask_branch_is_left_out(state: State, tmp_path: Path) -> None:
    mask = {"roi_heads.mask_head.0.0.weight": torch.ones(1), "roi_heads.mask_predictor.x": torch.ones(1)}
    torch.save(state | mask, tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth")
    assert loaded.assumptions[-1] == "left out the mask branch, which a Faster R-CNN does not have"


def test_every_field_is_either_in_the_tensors_or_listed_when_assumed(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth")
    in_tensors = {"model", "arch", "body_width", "pyramid", "fpn_channels", "rpn_head_shared", "box_head"}
    in_tensors |= {"source", "size_divisor"}
    listed = {name for names in GROUPS.values() for name in names} | {"categories"}
    assert listed | in_tensors == {field.name for field in dataclasses.fields(ModelSpec)}
    assert loaded.spec == dataclasses.replace(
        ModelSpec(categories=loaded.spec.categories, arch="resnet18", fpn_channels=16),
        source=loaded.spec.source,
    )
    text = "\n".join(loaded.assumptions)
    assert "class_1..class_3" in text
    assert "min_size 800, max_size 1333" in text
    assert "batch_norm_eps 1e-05" in text
    assert all(name in text for name in listed)


def test_stating_everything_leaves_nothing_assumed(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    spec = load_checkpoint(tmp_path / "net.pth").spec.to_dict()
    (tmp_path / "net.json").write_text(json.dumps(spec))
    assert load_checkpoint(tmp_path / "net.pth").assumptions == []


def test_overrides_precede_json_and_json_precedes_defaults(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    values = {
        "min_size": 240,
        "max_size": 320,
        "categories": [{"id": 7, "name": "a"}, {"id": 3, "name": "b"}, {"id": 5, "name": "c"}],
        "box_roi_pool": {"sampling_ratio": 0},
    }
    (tmp_path / "net.json").write_text(json.dumps({"spec": values, "about": {"by": "someone"}}))
    overrides = {"min_size": 200, "box_roi_pool": {"aligned": True}}
    loaded = load_checkpoint(tmp_path / "net.pth", spec_overrides=overrides)
    assert (loaded.spec.min_size, loaded.spec.max_size) == (200, 320)
    assert loaded.spec.categories[0] == Category(id=7, name="a")
    pool = loaded.spec.box_roi_pool
    assert (pool.output_size, pool.sampling_ratio, pool.aligned) == (7, 0, True)
    text = "\n".join(loaded.assumptions)
    assert not any(name in text for name in ("min_size 2", "max_size", "categories", "box_roi_pool"))


def test_spec_path_replaces_the_file_beside(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "net.json").write_text('{"min_size": 100}')
    (tmp_path / "other.json").write_text('{"max_size": 900}')
    spec = load_checkpoint(tmp_path / "net.pth", spec_path=tmp_path / "other.json").spec
    assert (spec.min_size, spec.max_size) == (800, 900)


def test_anchor_sizes_say_whether_there_is_a_p6(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    four = {"anchor_sizes": [[32], [64], [128], [256]]}
    loaded = load_checkpoint(tmp_path / "net.pth", spec_overrides=four)
    assert loaded.spec.levels == (2, 3, 4, 5)
    assert len(loaded.model.trunk(torch.zeros(1, 3, 32, 32)).features) == 4


def test_91_classes_without_names_are_cocos(tmp_path: Path) -> None:
    torch.save(make_hollow_state(channels=16, num_classes=91), tmp_path / "net.pth")
    loaded = load_checkpoint(tmp_path / "net.pth")
    names = {category.id: category.name for category in loaded.spec.categories}
    assert (len(names), names[1], names[12], names[90]) == (90, "person", "N/A", "toothbrush")
    assert "COCO" in loaded.assumptions[0]


def test_published_file_is_known_by_its_digest(state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the 160 MB file: any file whose digest is in the table is run with eps = 0."""
    path = tmp_path / "renamed.pth"
    torch.save(make_hollow_state(channels=16, num_classes=91), path)
    assert load_checkpoint(path).spec.batch_norm_eps == 1e-5
    digest = hash_checkpoint(path)[:8]
    known = dataclasses.replace(published.PUBLISHED[0], digest=digest)
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    loaded = load_checkpoint(path)
    assert loaded.spec.batch_norm_eps == 0.0
    assert loaded.model.backbone.body.bn1.eps == 0.0
    assert loaded.assumptions == []
    assert load_checkpoint(path, spec_overrides={"batch_norm_eps": 1e-3}).spec.batch_norm_eps == 1e-3


def test_published_names_carry_their_digest() -> None:
    assert all(file.name.endswith(f"-{file.digest}.pth") for file in published.PUBLISHED)


def test_description_is_json_and_complete(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    description = describe_checkpoint(tmp_path / "net.pth")
    assert ModelSpec.from_dict(json.loads(json.dumps(description))["spec"]).arch == "resnet18"
    assert (description["arch"], description["fpn_channels"]) == ("resnet18", 16)
    counted = {k: v for k, v in drop_counters(state).items() if "running" not in k}
    assert description["parameters"] == sum(tensor.numel() for tensor in counted.values())
    assert description["needs"] == load_checkpoint(tmp_path / "net.pth").assumptions


def test_unknown_override_is_a_spec_error(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(SpecError, match="unknown key 'min_sze'"):
        load_checkpoint(tmp_path / "net.pth", spec_overrides={"min_sze": 800})


@pytest.mark.shared
def test_real_checkpoint(shared_dir: Path) -> None:
    path = shared_dir / "checkpoints" / "bccd_r18_fpn.pth"
    loaded = load_checkpoint(path)
    spec = loaded.spec
    assert [category.name for category in spec.categories] == ["RBC", "WBC", "Platelets"]
    assert (spec.arch, spec.fpn_channels, spec.min_size, spec.max_size) == ("resnet18", 128, 240, 320)
    assert loaded.shape.representation_size == 256
    assert spec.source == "bccd_r18_fpn.pth sha256:22c1bcab3745e0f4"
    oracle = make_torchvision_detector(channels=128, representation_size=256)
    oracle.load_state_dict(torch.load(path, weights_only=True))
    images = torch.randn(1, 3, 256, 320)
    with torch.inference_mode():
        features, objectness, deltas = loaded.model.trunk(images)
        expected = list(oracle.backbone(images).values())
        expected_objectness, expected_deltas = oracle.rpn.head(expected)
    assert max(map(relative_error, features, expected)) < 1e-4
    assert max(map(relative_error, objectness, expected_objectness)) < 1e-4
    assert max(map(relative_error, deltas, expected_deltas)) < 1e-4
