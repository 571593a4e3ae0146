"""Named models: what they are called, where their files come from and where they may lie."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torchvision.models import get_model_weights

from fpn_engine.errors import FpnEngineError
from fpn_engine.named import MODELS, NamedModel, checkpoint_places, download_url, find_model
from fpn_export.published import PUBLISHED

COCO = find_model("coco")
PUBLISHED_MODELS = [model for model in MODELS if model.file_name]


@pytest.fixture(autouse=True)
def plain_environment(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("FPN_ENGINE_MIRROR", "TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)


def test_names_are_distinct() -> None:
    names = [name for model in MODELS for name in (model.name, model.builder) if name]
    assert len(set(names)) == len(names)
    assert {find_model(name).name for name in names} == {model.name for model in MODELS}


@pytest.mark.parametrize("model", PUBLISHED_MODELS, ids=lambda model: model.name)
def test_published_files_are_those_of_torchvision(model: NamedModel) -> None:
    (weights,) = [entry for entry in get_model_weights(model.builder) if entry.url == download_url(model)]
    assert model.megabytes == round(weights.meta["_file_size"] * 2**20 / 1e6)
    assert re.fullmatch("[0-9a-f]{8}", model.digest)
    (published,) = [entry for entry in PUBLISHED if entry.name == model.file_name]
    assert published.digest == model.digest
    assert len(published.categories) + 1 == len(weights.meta["categories"])
    assert published.categories[0].name == "person"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("fasterrcnn_resnet50_fpn_v2", "its box head has four convolutions"),
        ("coco-v2", "its box head has four convolutions"),
        ("fasterrcnn_mobilenet_v3_large_fpn", "its body is a MobileNet"),
        ("RetinaNet_ResNet50_FPN_V2", "it has one stage"),
        ("ssd300_vgg16", "it has one stage"),
    ],
)
def test_well_known_models_that_are_not_supported(name: str, reason: str) -> None:
    with pytest.raises(FpnEngineError, match=f"the model {name} is not supported: {reason}") as caught:
        find_model(name)
    assert str(caught.value).endswith("; there are demo, scene-masks, coco, coco-mask, coco-person")


@pytest.mark.parametrize("name", ["", "cat", "COCO"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(FpnEngineError, match=f"there is no model named '{name}'; there are demo, scene-masks, coco, "):
        find_model(name)


@pytest.mark.parametrize("base", ["https://mirror.example/models", "http://mirror.example/models/"])
def test_a_mirror(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert download_url(COCO) == f"https://download.pytorch.org/models/{COCO.file_name}"
    monkeypatch.setenv("FPN_ENGINE_MIRROR", base)
    assert download_url(COCO) == f"{base.rstrip('/')}/{COCO.file_name}"


@pytest.mark.parametrize("base", ["file:///etc", "/models", "mirror.example", "ftp://mirror.example"])
def test_a_mirror_is_on_the_web(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FPN_ENGINE_MIRROR", base)
    with pytest.raises(FpnEngineError, match="set it to an address that starts with http:// or https://"):
        download_url(COCO)


def test_places(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = workplace.parent / "cache" / "checkpoints" / COCO.file_name
    monkeypatch.setenv("HOME", "/home/me")
    assert list(checkpoint_places(COCO)) == [ours, Path("/home/me/.cache/torch/hub/checkpoints") / COCO.file_name]
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert list(checkpoint_places(COCO)) == [ours, Path("/xdg/torch/hub/checkpoints") / COCO.file_name]
    monkeypatch.setenv("TORCH_HOME", "~/torch")
    assert list(checkpoint_places(COCO)) == [Path("/home/me/torch/hub/checkpoints") / COCO.file_name]
