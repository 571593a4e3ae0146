"""MaskSpec: geometry by hand, JSON and back, what is refused."""

import dataclasses
import json

import pytest

from fpn_engine.errors import SpecError
from fpn_engine.masks.spec import FIVE, MODEL, SEVEN, MaskHead, MaskSpec, read_spec
from fpn_engine.spec import OBJECT, ModelSpec


def test_sizes_are_the_papers():
    spec = MaskSpec()
    assert [spec.object_size(FIVE, level) for level in spec.levels] == [32, 64, 128, 256, 512]
    assert [spec.region_size(FIVE, level) for level in spec.levels] == [40, 80, 160, 320, 640]
    larger = [spec.region_size(SEVEN, level) / spec.region_size(FIVE, level) for level in spec.levels]
    assert larger == pytest.approx([2**0.5] * 5)
    assert (spec.fpn_channels, spec.hidden_channels, spec.mask_size, spec.masks_per_img) == (128, 512, 14, 1000)


def test_json_and_back():
    spec = MaskSpec(arch="resnet18", heads=(MaskHead(kernel=3, octave=0.25),), mask_size=28, levels=(3, 4), source="x")
    assert MaskSpec.from_json(spec.to_json()) == spec
    assert MaskSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert MaskSpec.from_json("{}") == MaskSpec()


def test_the_kind_of_a_spec_is_told_by_its_model():
    detector = ModelSpec(categories=(OBJECT,))
    assert read_spec(detector.to_dict()) == detector
    assert read_spec(MaskSpec().to_dict()) == MaskSpec()
    assert MaskSpec().to_dict()["model"] == MODEL
    with pytest.raises(SpecError, match="unknown key 'rpn_nms_thresh'"):
        read_spec({"model": MODEL, "rpn_nms_thresh": 0.5})


def test_the_backbone_has_what_is_shared():
    backbone = MaskSpec(arch="resnet34", levels=(3, 4, 5, 6), fpn_channels=96).backbone
    assert (backbone.arch, backbone.levels, backbone.fpn_channels) == ("resnet34", (3, 4, 5, 6), 96)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": "vgg"}, "arch must be one of"),
        ({"min_size": 2000}, "min_size must be"),
        ({"levels": (2, 3, 4, 5, 6, 7)}, "levels must be consecutive levels of 2..6"),
        ({"levels": (6,)}, "levels must be levels that begin at 5"),
        ({"levels": ()}, "levels must be"),
        ({"heads": ()}, "at least one head"),
        ({"heads": (MaskHead(kernel=4),)}, "odd kernels"),
        ({"heads": (FIVE, MaskHead(kernel=7))}, "distinct octaves"),
        ({"mask_size": 0}, "mask_size must be"),
        ({"padding": float("nan")}, "padding must be"),
        ({"mask_thresh": 1.0}, "mask_thresh must be"),
        ({"masks_per_img": 0}, "masks_per_img must be"),
        ({"model": "rpn"}, "model must be fpn_masks"),
    ],
    ids=str,
)
def test_refuses(change, message):
    with pytest.raises(SpecError, match=message):
        MaskSpec(**change)
    if "model" not in change:
        values = {**MaskSpec().to_dict(), **change}
        if "heads" in change:
            values["heads"] = [dataclasses.asdict(head) for head in change["heads"]]
        with pytest.raises(SpecError):
            MaskSpec.from_dict(values)


@pytest.mark.parametrize(
    "values",
    [
        {"heads": 5},
        {"heads": [{"kernel": 5, "size": 3}]},
        {"heads": [{"octave": 0.5}]},
        {"mask_size": "x"},
        {"mask_size": 14.5},
        {"mask_size": True},
        {"padding": "inf"},
        {"levels": 3},
        {"unknown": 1},
        [],
    ],
    ids=str,
)
def test_values_of_the_wrong_form_are_one_sentence(values):
    with pytest.raises(SpecError) as caught:
        MaskSpec.from_dict(values)
    assert "\n" not in str(caught.value)
