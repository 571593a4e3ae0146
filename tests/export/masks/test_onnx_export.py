"""The exported file on ONNX Runtime alone against PyTorch: the same places, scores, and pasted masks."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from fpn_engine.masks.spec import MaskSpec
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.masks.variants import make_variant
from fpn_export.onnx_network import SPEC_KEY
from tests.export.masks.alike import assert_same_masks
from tests.export.masks.tiny import random_images, tiny_model, tiny_spec

MASKS = 1000


def open_session(model):
    proto = export_mask_onnx(model)
    return proto, onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def dual():
    model = tiny_model(masks_per_img=MASKS)
    return model, *open_session(model)


def assert_alike(model, session, images):
    names = ("regions", "scores", "masks", "status")
    found = dict(zip(names, session.run(list(names), {"image": images.numpy()}), strict=True))
    expected = model.pipeline(images)
    for name in names:
        assert found[name].dtype == getattr(expected, name).numpy().dtype
    np.testing.assert_allclose(found["scores"], expected.scores.numpy(), atol=1e-5)
    assert found["status"].tolist() == expected.status.tolist() == [0] * len(images)
    assert_same_masks(torch.from_numpy(found["regions"]), torch.from_numpy(found["masks"]), expected, images.shape[2:])
    return found


@pytest.mark.parametrize(("n", "height", "width"), [(1, 160, 224), (3, 96, 64)])
def test_gives_the_masks_of_pytorch(dual, n, height, width):
    model, _, session = dual
    found = assert_alike(model, session, random_images(n, height, width))
    assert found["masks"].shape[1] == MASKS


def test_fewer_locations_than_masks(dual):
    model, _, session = dual
    assert assert_alike(model, session, random_images(1, 32, 32))["scores"].shape == (1, 2 * 86)


def test_one_head_may_win_everywhere(dual):
    """The other's product then has no rows."""
    model = tiny_model()
    with torch.no_grad():
        model.mask_heads[1].score.bias += 100
    assert_alike(model, open_session(model)[1], random_images(1, 64, 64))


def test_one_head_and_larger_masks():
    spec = make_variant(tiny_spec(), "dual-2x")
    model = tiny_model(heads=spec.heads[1:], mask_size=28)
    assert_alike(model, open_session(model)[1], random_images(1, 64, 96))


def test_how_many_is_an_input_too(dual):
    model, _, session = dual
    images = random_images(1, 64, 64)
    (masks,) = session.run(["masks"], {"image": images.numpy(), "masks_per_img": np.array([7])})
    np.testing.assert_allclose(masks, model.pipeline(images, 7).masks.numpy(), atol=1e-4)


def test_a_spoilt_image_is_told(dual):
    _, _, session = dual
    images = random_images(2, 64, 64)
    images[1, 0, 3, 3] = torch.nan
    assert session.run(["status"], {"image": images.numpy()})[0].tolist() == [0, 1]


def test_the_file_is_plain_and_says_what_it_is(dual):
    model, proto, _ = dual
    props = {prop.key: prop.value for prop in proto.metadata_props}
    assert MaskSpec.from_json(props[SPEC_KEY]) == model.spec
    assert {node.domain for node in proto.graph.node} == {""}
    assert not {node.op_type for node in proto.graph.node} & {"If", "Loop", "Scan"}
    assert proto.ir_version == 10
    weights = sum(
        np.prod(tensor.dims) for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT
    )
    assert weights < 1.02 * sum(p.numel() for p in model.parameters()), "no weight is stored twice"
