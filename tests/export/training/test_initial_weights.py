"""Weights to start from: torchvision's classifiers, and detectors of other classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torchvision.models import resnet18, resnet34

from fpn_engine.errors import CheckpointError
from fpn_engine.spec import ModelSpec
from fpn_export.detector import make_detector
from fpn_export.systems import make_system
from fpn_export.training.initial_weights import is_classifier, load_initial_weights
from tests.export.training.squares import CATEGORIES, tiny_spec


def plain_spec() -> ModelSpec:
    return tiny_spec(body_width=64)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    path = tmp_path_factory.mktemp("imagenet") / "resnet18-f37072fd.pth"
    torch.save(resnet18(weights=None).state_dict(), path)
    return path


def test_a_classifier_gives_the_bottom_up_network(classifier: Path) -> None:
    model = make_detector(plain_spec(), representation_size=32)
    taken = load_initial_weights(model, classifier)
    given = torch.load(classifier, weights_only=True)
    for name, tensor in model.backbone.body.state_dict().items():
        assert torch.equal(tensor, given[name]), name
    assert all(not name.startswith("backbone.body.") for name in taken.missing)
    assert "rpn.head.cls_logits.weight" in taken.missing
    assert is_classifier(classifier)


def test_a_conv5_head_gets_the_classifiers_last_stage(classifier: Path) -> None:
    model = make_detector(make_system(plain_spec(), "c4"))
    taken = load_initial_weights(model, classifier)
    given = torch.load(classifier, weights_only=True)
    head = model.roi_heads["box_head"].state_dict()
    assert any(torch.equal(tensor, given["layer4.0.conv1.weight"]) for tensor in head.values())
    assert not [name for name in taken.missing if "layer4" in name]


def test_a_detector_gives_all_that_fits(tmp_path: Path) -> None:
    torch.manual_seed(1)
    trained = make_detector(tiny_spec(), representation_size=32)
    torch.save(trained.state_dict(), tmp_path / "trained.pth")
    model = make_detector(tiny_spec(categories=CATEGORIES[:2]), representation_size=32)
    taken = load_initial_weights(model, tmp_path / "trained.pth")
    assert {name.rpartition(".")[0] for name in taken.missing} == {
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
    }
    assert torch.equal(model.rpn["head"].cls_logits.weight, trained.rpn["head"].cls_logits.weight)
    assert not is_classifier(tmp_path / "trained.pth")


def test_another_architecture_is_refused(tmp_path: Path, classifier: Path) -> None:
    torch.save(resnet34(weights=None).state_dict(), tmp_path / "resnet34.pth")
    # All of a ResNet-18's tensors have namesakes of the same shape in a ResNet-34, but not the other way round.
    model = make_detector(tiny_spec(body_width=64, arch="resnet34"))
    with pytest.raises(CheckpointError, match=r"no bottom-up network for a resnet34 .*--arch"):
        load_initial_weights(model, classifier)
    with pytest.raises(CheckpointError, match="of width 16"):
        load_initial_weights(make_detector(tiny_spec()), classifier)
