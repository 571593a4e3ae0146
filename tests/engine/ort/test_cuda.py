"""ONNX Runtime on CUDA without a GPU: what is asked of it, whose memory, on which stream; and true numbers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from fpn_engine.backends import ort_providers
from fpn_engine.backends.loading import load_parts
from fpn_engine.backends.ort_cuda import CHOICE, load_ort_cuda, trunk_shapes
from fpn_engine.backends.ort_providers import ProviderChoice, check_provider, open_gpu_session, why_not_loaded
from fpn_engine.engine import Engine
from fpn_engine.errors import BackendError, PlanError
from fpn_engine.pipeline import Pipeline
from fpn_engine.plan import Plan, read_plan, rebuild_hint
from fpn_engine.runtime import make_runner
from fpn_engine.runtime.runner import EagerRunner
from fpn_export.build import build_plan
from fpn_export.ort_cuda_parts import ProviderOptions
from fpn_export.tensorrt.profiles import Batches
from tests.engine.conftest import SPEC, Tiny, make_picture
from tests.engine.ort.stand_in import DEVICE, HANDLE, RecordingSession, StandInPlace, recorded

__all__ = ["recorded"]


def build(tiny: Tiny, folder: Path, precision: str = "fp32", **options: object) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(folder / "cache"))
        tune_for = ProviderOptions(**options)  # type: ignore[arg-type]
        build_plan(tiny.model, folder / "c.plan", backend="onnxruntime", precision=precision, tune_for=tune_for)
    return read_plan(folder / "c.plan")


@pytest.fixture
def plan(tiny: Tiny, tmp_path: Path) -> Plan:
    return build(tiny, tmp_path)


def test_the_plan_names_its_provider(plan: Plan) -> None:
    manifest = plan.manifest
    assert (manifest.backend, manifest.device, manifest.versions["provider"]) == ("onnxruntime", "cuda", "cuda")
    command = "fpn-engine build tiny.onnx --backend onnxruntime --device cuda"
    assert rebuild_hint(manifest).endswith(f"{command} --precision fp32")
    other = dataclasses.replace(manifest, precision="fp16", versions={**manifest.versions, "provider": "tensorrt"})
    assert rebuild_hint(other).endswith(f"{command} --provider tensorrt --precision fp16")
    assert json.loads(plan.parts[CHOICE]) == {"provider": "cuda", "shapes": {}}


def test_numbers_and_shapes(plan: Plan, tiny: Tiny, recorded: type[RecordingSession]) -> None:
    """The same as the plan for the CPU, level by level, at several sizes."""
    trunk, head = load_ort_cuda(plan, 1, StandInPlace())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "InferenceSession", type(recorded.made[0].real))
        expected_trunk, expected_head = load_parts(read_plan(tiny.plan), 1)
    assert head is not None
    assert expected_head is not None
    for n, height, width in ((1, 64, 96), (2, 96, 64), (1, 32, 32)):
        images = torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(n))
        for ours, theirs in zip(trunk(images), expected_trunk(images), strict=True):
            assert len(ours) >= len(theirs) > 0
            for actual, wanted in zip(ours, theirs, strict=False):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    features = torch.randn(5, SPEC.fpn_channels, 7, 7)
    for actual, wanted in zip(head(features), expected_head(features), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert [tuple(answer.shape) for answer in head(features[:0])] == [(0, 4), (0, 16)]


def test_nothing_is_copied(plan: Plan, recorded: type[RecordingSession]) -> None:
    """Inputs are bound where they lie, outputs where the caller gets them; on the GPU, in order with its stream."""
    trunk, head = load_ort_cuda(plan, 1, StandInPlace())
    first, second = recorded.made
    images = torch.randn(1, 3, 64, 96)
    out = trunk(images)
    (binding,) = first.bindings
    (bound,) = binding.inputs
    assert bound == ("image", "cuda", DEVICE, (1, 3, 64, 96), images.data_ptr())
    addresses = {value.name: value.address for value in binding.outputs}
    assert {value[1:3] for value in binding.outputs} == {("cuda", DEVICE)}
    for kind, maps in (("", out.features), ("objectness_", out.objectness), ("deltas_", out.deltas)):
        for level, tensor in zip(SPEC.level_names, maps, strict=False):
            assert addresses[f"{kind}{level}_nhwc"] == tensor.data_ptr()
    assert head is not None
    features = torch.randn(3, SPEC.fpn_channels, 7, 7).to(memory_format=torch.channels_last)
    answers = head(features)
    (binding,) = second.bindings
    assert binding.inputs[0].address == features.data_ptr(), "NHWC rows are the features' own memory"
    assert [value.address for value in binding.outputs] == [answer.data_ptr() for answer in answers]
    assert first.running == second.running == ["in order"]
    assert not first.waits, "a run does not wait for the GPU"


def test_options_of_the_cuda_provider(plan: Plan, recorded: type[RecordingSession]) -> None:
    load_ort_cuda(plan, 1, StandInPlace())
    assert len(recorded.made) == 2
    for session in recorded.made:
        ((name, options),) = session.providers
        assert name == "CUDAExecutionProvider"
        assert options == {"device_id": str(DEVICE), "user_compute_stream": str(HANDLE), "use_tf32": "0"}
        assert session.enable_fallback == 0
        assert session.options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"


def test_options_of_the_tensorrt_provider(
    tiny: Tiny, tmp_path: Path, recorded: type[RecordingSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "kept"))
    plan = build(tiny, tmp_path, "fp16", provider="tensorrt", batches=Batches(best=1, most=4), sizes=((64, 96),))
    trunk, _ = load_ort_cuda(plan, 1, StandInPlace())
    first, second = recorded.made
    assert [name for name, _ in first.providers] == ["TensorrtExecutionProvider", "CUDAExecutionProvider"]
    options = dict(first.providers)["TensorrtExecutionProvider"]
    assert options["trt_profile_min_shapes"] == "image:1x3x64x96"
    assert options["trt_profile_max_shapes"] == "image:4x3x64x96"
    assert options["trt_fp16_enable"] == "1"
    assert options["trt_engine_cache_path"].startswith(str(tmp_path / "kept"))
    assert {option["user_compute_stream"] for _, option in first.providers} == {str(HANDLE)}
    roi = dict(second.providers)["TensorrtExecutionProvider"]["trt_profile_max_shapes"]
    assert roi == f"roi_rows:{4 * SPEC.rpn_post_nms_top_n_test}x{49 * SPEC.fpn_channels}"
    assert {tensor.dtype for tensor in trunk(torch.zeros(1, 3, 64, 96)).features} == {torch.float16}


def test_a_provider_that_is_left_out_is_an_error(plan: Plan, recorded: type[RecordingSession]) -> None:
    recorded.loses = ("CUDAExecutionProvider",)
    with pytest.raises(BackendError, match="left its CUDA provider out without a reason"):
        load_ort_cuda(plan, 1, StandInPlace())


def test_a_provider_that_is_not_in_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match=r"has no CUDA provider; .* pip install onnxruntime-gpu"):
        check_provider("cuda")


def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: list(ort_providers.PROVIDERS.values()))
    reason = "libnvinfer.so.10: cannot open shared object file: No such file or directory"
    monkeypatch.setattr(ort_providers, "why_not_loaded", lambda provider: reason)
    with pytest.raises(BackendError) as caught:
        check_provider("tensorrt")
    assert f"cannot load its TensorRT provider: {reason}; pip install 'tensorrt==10.*', or take" in str(caught.value)
    monkeypatch.setattr(ort_providers, "why_not_loaded", lambda provider: "libcudnn.so.9: cannot open")
    with pytest.raises(BackendError, match=r"libcudnn\.so\.9: .*pip install 'onnxruntime-gpu\[cuda,cudnn\]'"):
        check_provider("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_for_real_without_a_gpu(provider: str, plan: Plan, capfd: pytest.CaptureFixture[str]) -> None:
    """One error, and nothing on the way: ONNX Runtime itself would take the CPU and log it."""
    with pytest.raises(BackendError) as caught:
        open_gpu_session(
            plan.parts["trunk.onnx"], ProviderChoice(provider=provider), StandInPlace(), input_name="image", half=False
        )
    assert "provider" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")
    if ort_providers.PROVIDERS[provider] in ort.get_available_providers():
        assert why_not_loaded(provider) is None or ".so" in str(why_not_loaded(provider))


def test_whole_detections(plan: Plan, tiny: Tiny, recorded: type[RecordingSession]) -> None:
    """Through the pipeline, beside the plan for the CPU."""
    picture = make_picture(60, 80)
    found = Engine(Pipeline(SPEC, *load_ort_cuda(plan, 1, StandInPlace())))(picture)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ort, "InferenceSession", type(recorded.made[0].real))
        expected = Engine.load(tiny.plan)(picture)[0]
    assert len(found) == len(expected) > 0
    assert abs(found.scores - expected.scores).max() < 1e-4
    assert abs(found.boxes - expected.boxes).max() < 1e-2


def test_it_is_not_captured(plan: Plan, recorded: type[RecordingSession]) -> None:
    parts = load_ort_cuda(plan, 1, StandInPlace())
    pipeline = Pipeline(SPEC, *parts)
    pipeline.device = torch.device("cuda", 0)  # of which nothing is asked
    assert isinstance(make_runner([pipeline], 1), EagerRunner)


def test_a_damaged_choice(plan: Plan) -> None:
    for data in (b"{}", b"[]", b"x", b'{"provider": "dml", "shapes": {}}', b'{"provider": "cuda", "shapes": {"a": 1}}'):
        with pytest.raises(PlanError, match=r"provider\.json.*build it again with: fpn-engine build tiny\.onnx"):
            load_ort_cuda(Plan(plan.manifest, {**plan.parts, CHOICE: data}), 1, StandInPlace())


def test_shapes_of_the_coarse_levels() -> None:
    """P6 of a height of 800 has 13 rows, not 12.5."""
    assert trunk_shapes(SPEC, 2, 800, 1088)["objectness_p6_nhwc"] == (2, 13, 17, 3)
    assert trunk_shapes(SPEC, 2, 800, 1088)["p2_nhwc"] == (2, 200, 272, SPEC.fpn_channels)
