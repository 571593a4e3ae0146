"""Our detectors against torchvision's modules: the same names, shapes and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from torchvision.ops import FrozenBatchNorm2d

from fpn_engine.spec import ModelSpec, RoIPoolSpec, numbered_categories
from fpn_export.detector import FasterRCNN, FastRCNN
from fpn_export.pyramid import FeaturePyramid
from tests.export.models import make_torchvision_detector, relative_error

ARCHITECTURES = ("resnet18", "resnet34", "resnet50", "resnet101")


def make_spec(arch: str, channels: int) -> ModelSpec:
    return ModelSpec(categories=numbered_categories(3), arch=arch, fpn_channels=channels)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("channels", [256, 128])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_names_and_shapes_are_torchvisions(arch: str, channels: int) -> None:
    with torch.device("meta"):
        oracle = make_torchvision_detector(arch, channels=channels, rpn_depth=2)
        ours = FasterRCNN(make_spec(arch, channels), representation_size=64, rpn_depth=2)
    assert shapes(ours) == shapes(oracle)


def test_defaults_are_fasterrcnn_resnet50_fpn() -> None:
    with torch.device("meta"):
        oracle = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        ours = FasterRCNN(ModelSpec(categories=numbered_categories(90)))
    assert shapes(ours) == shapes(oracle)


def test_frozen_batch_norm_lacks_only_the_counters() -> None:
    with torch.device("meta"):
        oracle = make_torchvision_detector(norm_layer=FrozenBatchNorm2d)
        ours = FasterRCNN(make_spec("resnet18", 256), representation_size=64)
    counted = {name: shape for name, shape in shapes(ours).items() if "num_batches_tracked" not in name}
    assert counted == shapes(oracle)


@pytest.mark.parametrize("size", [(160, 224), (96, 352)])
@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_trunk_equals_torchvision(arch: str, size: tuple[int, int]) -> None:
    oracle = make_torchvision_detector(arch, channels=64)
    ours = FasterRCNN(make_spec(arch, 64), representation_size=64).eval()
    ours.load_state_dict(oracle.state_dict())
    images = torch.randn(2, 3, *size)

    with torch.inference_mode():
        stages, levels = ours.pyramid(images)
        features, objectness, deltas = ours.trunk(images)
        expected = list(oracle.backbone(images).values())
        expected_objectness, expected_deltas = oracle.rpn.head(expected)

    assert [tuple(c.shape[-2:]) for c in stages] == [(size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    assert all(torch.equal(level, feature) for level, feature in zip(levels, features, strict=True))
    for actual, wanted in [
        (features, expected),
        (objectness, expected_objectness),
        (deltas, expected_deltas),
    ]:
        assert len(actual) == 5
        assert max(map(relative_error, actual, wanted)) < 1e-4
    assert 0.1 < max(feature.abs().max().item() for feature in features) < 1e3  # or parity proves nothing


def test_p6_of_an_odd_p5_rounds_up() -> None:
    features = FastRCNN(make_spec("resnet18", 32)).eval().trunk(torch.randn(1, 3, 96, 352)).features
    assert tuple(features[3].shape[-2:]) == (3, 11)
    assert torch.equal(features[4], features[3][..., ::2, ::2])


@pytest.mark.parametrize("sides", [((33, 47), (17, 24)), ((7, 5), (4, 3)), ((1, 1), (1, 1))])
def test_pyramid_upsamples_to_the_laterals_size(sides: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """Levels whose sides are no exact doubles: weights of one make the merge visible."""
    pyramid = FeaturePyramid((1, 1, 1, 1), 1, (4, 5))
    for parameter in pyramid.parameters():
        nn.init.zeros_(parameter)
    for block in pyramid.inner_blocks:
        nn.init.ones_(block[0].weight)
    for block in pyramid.layer_blocks:
        block[0].weight.data[..., 1, 1] = 1  # the 3x3 convolution passes its centre through
    c4, c5 = (torch.randn(1, 1, *side) for side in sides)
    p4, p5 = pyramid([c4, c4, c4, c5])
    ys = torch.arange(sides[0][0]) * sides[1][0] // sides[0][0]
    xs = torch.arange(sides[0][1]) * sides[1][1] // sides[0][1]
    assert torch.equal(p5, c5)
    torch.testing.assert_close(p4, c4 + c5[..., ys, :][..., xs])


@pytest.mark.parametrize("rois", [0, 1, 37])
def test_head_equals_torchvision(rois: int) -> None:
    oracle = make_torchvision_detector(channels=32)
    ours = FasterRCNN(make_spec("resnet18", 32), representation_size=64)
    ours.load_state_dict(oracle.state_dict())
    features = torch.randn(rois, 32, 7, 7)
    with torch.inference_mode():
        logits, deltas = ours.head(features)
        expected = oracle.roi_heads.box_predictor(oracle.roi_heads.box_head(features))
    assert (tuple(logits.shape), tuple(deltas.shape)) == ((rois, 4), (rois, 16))
    torch.testing.assert_close(logits, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(deltas, expected[1], rtol=1e-5, atol=1e-6)


def test_pool_size_and_levels_come_from_the_spec() -> None:
    spec = ModelSpec(
        categories=numbered_categories(1),
        arch="resnet18",
        fpn_channels=16,
        levels=(3, 4, 5),
        roi_levels=(3, 4, 5),
        anchor_sizes=((64.0,), (128.0,), (256.0,)),
        box_roi_pool=RoIPoolSpec(output_size=5),
    )
    model = FasterRCNN(spec, representation_size=8).eval()
    output = model.trunk(torch.randn(1, 3, 64, 64))
    assert [tuple(level.shape) for level in output.features] == [
        (1, 16, 8, 8),
        (1, 16, 4, 4),
        (1, 16, 2, 2),
    ]
    assert tuple(model.head(torch.randn(2, 16, 5, 5))[0].shape) == (2, 2)


@pytest.mark.parametrize("levels", [(1, 2), (6,), (5, 6, 7)])
def test_levels_beyond_the_network_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"levels must lie within 2\.\.6"):
        FeaturePyramid((1, 1, 1, 1), 1, levels)


def test_fast_rcnn_has_no_rpn() -> None:
    model = FastRCNN(make_spec("resnet18", 32), representation_size=8).eval()
    assert not [name for name in model.state_dict() if name.startswith("rpn")]
    output = model.trunk(torch.randn(1, 3, 32, 32))
    assert (len(output.features), output.objectness, output.deltas) == (5, (), ())


def test_gradients_reach_every_parameter() -> None:
    model = FasterRCNN(make_spec("resnet18", 16), representation_size=8)
    output = model.trunk(torch.randn(2, 3, 64, 64))
    logits, deltas = model.head(output.features[0][:, :, :7, :7])
    total = sum((part.square().sum() for part in [*output.objectness, *output.deltas]), torch.zeros(()))
    (total + logits.square().sum() + deltas.square().sum()).backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("backbone.body.layer1.0.conv1.weight", (2 / (64 * 9)) ** 0.5),  # kaiming normal, fan out
        ("backbone.fpn.layer_blocks.0.0.weight", (1 / (64 * 9)) ** 0.5),  # uniform with variance 1 / fan in
        ("rpn.head.cls_logits.weight", 0.01),
        ("roi_heads.box_head.fc6.weight", (1 / (64 * 49)) ** 0.5),
        ("roi_heads.box_predictor.cls_score.weight", 0.01),
        ("roi_heads.box_predictor.bbox_pred.weight", 0.001),
    ],
)
def test_initial_weights_have_the_papers_spread(name: str, expected: float) -> None:
    torch.manual_seed(0)
    model = FasterRCNN(make_spec("resnet18", 64), representation_size=256)
    assert model.state_dict()[name].std().item() == pytest.approx(expected, rel=0.15)


def test_initial_biases_are_zero() -> None:
    state = FasterRCNN(make_spec("resnet18", 64), representation_size=64).state_dict()
    assert not [name for name, tensor in state.items() if name.endswith(".bias") and tensor.any()]
