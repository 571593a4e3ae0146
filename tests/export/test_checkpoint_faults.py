"""Files that are not what they should be: one sentence each, and nothing executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import mobilenet_v3_small, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2, retinanet_resnet50_fpn

from fpn_engine.errors import CheckpointError, FpnEngineError, SpecError
from fpn_export.checkpoint import load_checkpoint
from tests.export.models import make_hollow, make_hollow_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    return make_hollow_state(channels=16, representation_size=8)


def refuse(path: Path, **options: Any) -> str:
    """The sentence with which loading ``path`` fails."""
    with pytest.raises(FpnEngineError) as caught:
        load_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 800  # the longest lists every key of a spec
    return message


def refuse_saved(content: Any, tmp_path: Path, **options: Any) -> str:
    torch.save(content, tmp_path / "net.pth")
    message = refuse(tmp_path / "net.pth", **options)
    assert str(tmp_path / "net.pth") in message
    return message


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is empty"), (b"hello world\n", "is damaged"), (b"\x00\xff" * 500, "is damaged")],
)
def test_contents_that_are_no_checkpoint(content: bytes, words: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    path.write_bytes(content)
    assert words in refuse(path)


@pytest.mark.parametrize("kept", [10, 1000, -1])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_truncated(form: str, kept: int, tmp_path: Path) -> None:
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pth")
    tensors = {"a": torch.randn(30, 30), "b": torch.randn(30, 30)}
    if form == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    path.write_bytes(path.read_bytes()[:kept])
    assert "damaged" in refuse(path)


def test_missing(tmp_path: Path) -> None:
    assert "does not exist" in refuse(tmp_path / "net.pth")


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "net.pth").mkdir()
    assert "not a regular file" in refuse(tmp_path / "net.pth")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "net.pth")
    assert "not a regular file" in refuse(tmp_path / "net.pth")


def test_unknown_suffix(tmp_path: Path) -> None:
    (tmp_path / "net.bin").write_bytes(b"x")
    assert "expected .pth, .pt or .safetensors" in refuse(tmp_path / "net.bin")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pth", tmp_path / "trace"
    torch.save({"a": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    assert "only tensors are loaded" in refuse(path)
    assert not trace.exists()


def test_pickled_model_is_refused_by_the_name_of_its_class(tmp_path: Path) -> None:
    message = refuse_saved(nn.Linear(2, 2), tmp_path)
    assert "torch.nn.modules.linear.Linear" in message
    assert "state_dict()" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [([1, 2], "holds a list"), ({"epoch": 3, "lr": 0.1}, "no tensors but epoch, lr"), ({}, "nothing")],
)
def test_no_state_dict(content: Any, words: str, tmp_path: Path) -> None:
    assert words in refuse_saved(content, tmp_path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (resnet50, ["an image classifier", "missing backbone.body.conv1.weight", "unexpected conv1.weight"]),
        (lambda: retinanet_resnet50_fpn(weights=None, weights_backbone=None), ["a RetinaNet"]),
        (lambda: fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None), ["_v2", "not supported yet"]),
        (mobilenet_v3_small, ["not a Faster R-CNN", "features.0.0.weight"]),
    ],
)
def test_other_networks(make: Callable[[], nn.Module], words: list[str], tmp_path: Path) -> None:
    with torch.device("meta"):
        other = make().state_dict()
    message = refuse_saved(make_hollow(other), tmp_path)
    assert all(word in message for word in words), message


def test_resnet152(tmp_path: Path) -> None:
    message = refuse_saved(make_hollow_state(arch="resnet152", channels=16), tmp_path)
    assert "(3, 8, 36, 3)" in message


def test_grouped_convolutions_do_not_fit(tmp_path: Path) -> None:
    message = refuse_saved(make_hollow_state(arch="resnext50_32x4d", channels=16), tmp_path)
    assert "layer1.0.conv1.weight has shape (128, 64, 1, 1) instead of (64, 64, 1, 1)" in message


@pytest.mark.parametrize(
    "name", ["rpn.head.bbox_pred.bias", "roi_heads.box_predictor.cls_score.weight", "backbone.body.bn1.bias"]
)
def test_missing_tensor_is_named(name: str, state: State, tmp_path: Path) -> None:
    message = refuse_saved({k: v for k, v in state.items() if k != name}, tmp_path)
    assert f"missing {name}" in message


def test_unexpected_tensor_is_named(state: State, tmp_path: Path) -> None:
    extra = {"backbone.fpn.extra_blocks.p6.weight": torch.ones(1)}
    assert "unexpected backbone.fpn.extra_blocks.p6.weight" in refuse_saved(state | extra, tmp_path)


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("roi_heads.box_predictor.bbox_pred.weight", (4, 8), "shape (4, 8) instead of (16, 8)"),
        ("roi_heads.box_head.fc6.weight", (8, 16 * 48), "which is not 16 channels of a square RoI"),
        ("backbone.fpn.inner_blocks.0.0.weight", (16, 65, 1, 1), "takes 65 channels"),
        ("rpn.head.cls_logits.weight", (3,), "4 non-zero sides"),
        ("roi_heads.box_head.fc6.weight", (8, 0), "2 non-zero sides"),
    ],
)
def test_wrong_shapes(name: str, shape: tuple[int, ...], words: str, state: State, tmp_path: Path) -> None:
    assert words in refuse_saved(state | {name: torch.ones(shape)}, tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["backbone.body.layer3.1.bn2.running_var", "roi_heads.box_head.fc7.weight"])
def test_non_finite_weight_is_named(name: str, value: float, state: State, tmp_path: Path) -> None:
    damaged = state[name].clone()
    damaged.view(-1)[-1] = value
    assert f"{name} holds NaN or infinity" in refuse_saved(state | {name: damaged}, tmp_path)


def test_float64_beyond_fp32_is_not_finite(state: State, tmp_path: Path) -> None:
    name = "roi_heads.box_head.fc7.bias"
    damaged = {name: torch.full((8,), 1e300, dtype=torch.float64)}
    assert f"{name} holds NaN or infinity" in refuse_saved(state | damaged, tmp_path)


def test_integer_weights(state: State, tmp_path: Path) -> None:
    name = "roi_heads.box_head.fc7.bias"
    assert "quantised" in refuse_saved(state | {name: torch.ones(8, dtype=torch.int8)}, tmp_path)


def test_one_flipped_bit_is_found_by_the_digest(state: State, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(state, path)
    digest = load_checkpoint(path).sha256
    (tmp_path / "net.json").write_text(json.dumps({"spec": {}, "about": {"sha256": digest.upper()}}))
    load_checkpoint(path)
    (tmp_path / "net.json").write_text(json.dumps({"spec": {}, "about": {"sha256": digest}}), encoding="utf-8-sig")
    load_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    message = refuse(path)
    assert "net.json" in message
    assert digest in message


def test_a_bottomless_description(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "net.json").write_text("[" * 100_000)
    assert "net.json is not valid JSON" in refuse(tmp_path / "net.pth")


def test_published_name_with_other_contents(state: State, tmp_path: Path) -> None:
    path = tmp_path / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    torch.save(state, path)
    assert "instead of 258fb6c6" in refuse(path)


CATEGORIES = [{"id": i, "name": str(i)} for i in range(1, 6)]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"categories": CATEGORIES}, "the number of categories is 5"),
        ({"aspect_ratios": [0.5, 1.0]}, "the number of anchors per location"),
        ({"anchor_sizes": [[32, 48], [64, 96], [128, 192], [256, 384], [512, 768]]}, "is 6 by"),
        ({"arch": "resnet34"}, "arch is resnet34"),
        ({"fpn_channels": 256}, "fpn_channels is 256"),
        ({"body_width": 32}, "body_width is 32"),
        ({"box_roi_pool": {"output_size": 14}}, "box_roi_pool.output_size is 14"),
        ({"anchor_sizes": [[32], [64]]}, "levels p2..p3, but its tensors make p2..p6"),
        ({"anchor_sizes": [[8.0 * 2**k] for k in range(2, 8)]}, "levels p2..p7"),
        ({"levels": [3, 4, 5, 6], "roi_levels": [3, 4, 5]}, "the finest of levels is 3"),
    ],
)
def test_json_against_tensors(spec: dict[str, Any], words: str, state: State, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(json.dumps(spec))
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "net.pth")
    assert words in refuse(tmp_path / "net.pth")


def test_anchors_that_no_default_explains(tmp_path: Path) -> None:
    message = refuse_saved(make_hollow_state(channels=16, ratios=(0.5, 1.0)), tmp_path)
    assert "is 3 by its specification (JSON, options or defaults), but 2 by its tensors" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object"),
        ('{"spec": {}, "abuot": {}}', "unknown key 'abuot'"),
        ('{"spec": []}', "must be JSON objects"),
        ('{"spec": {"min_sze": 3}}', "unknown key 'min_sze'"),
        ('{"min_size": "large"}', "wrong form"),
        ('{"levels": 3}', "wrong form"),
        ('{"box_roi_pool": {"size": 7}}', "unknown key 'size'"),
    ],
)
def test_faults_of_the_json(text: str, words: str, state: State, tmp_path: Path) -> None:
    (tmp_path / "net.json").write_text(text)
    torch.save(state, tmp_path / "net.pth")
    message = refuse(tmp_path / "net.pth")
    assert words in message
    assert "net.json" in message


def test_missing_spec_file(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    assert "nowhere.json cannot be read" in refuse(tmp_path / "net.pth", spec_path=tmp_path / "nowhere.json")


def test_values_out_of_range_stay_spec_errors(state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "net.pth")
    with pytest.raises(SpecError, match=r"net\.pth: box_nms_thresh must be"):
        load_checkpoint(tmp_path / "net.pth", spec_overrides={"box_nms_thresh": 2.0})
