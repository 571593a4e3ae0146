"""The parts of a native plan: what is damaged or does not fit is said in one sentence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from fpn_engine.backends.native import loading as loading_module
from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.packing import part_names
from fpn_engine.engine import Engine
from fpn_engine.errors import NonFiniteError, PlanError
from fpn_engine.plan import Manifest, Plan, read_plan, rebuild_hint
from fpn_export.build import build_plan
from tests.engine.conftest import SPEC, Tiny, make_picture

Parts = dict[str, bytes]
Damage = Callable[[Parts], None]


@pytest.fixture(scope="module")
def native(tiny: Tiny) -> Plan:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FPN_ENGINE_CACHE", str(tiny.plan.parent / "cache"))
        return read_plan(build_plan(tiny.model, tiny.plan.with_name("native.plan"), backend="native").path)


def test_a_native_plan(native: Plan, engine: Engine) -> None:
    manifest = native.manifest
    assert (manifest.backend, manifest.precision, manifest.device) == ("native", "fp32", "cpu")
    assert manifest.runtime == "native fp32 on the CPU"
    assert set(manifest.versions) == {"fpn-engine", "torch"}
    assert sorted(native.parts) == sorted(part_names(SPEC))
    pictures = [make_picture(60, 80), make_picture(90, 50)]
    for ours, theirs in zip(Engine.from_plan(native, threads=2)(pictures), engine(pictures), strict=True):
        assert len(ours) == len(theirs) > 0
        torch.testing.assert_close(torch.from_numpy(ours.scores), torch.from_numpy(theirs.scores), rtol=0, atol=1e-4)


def test_another_version_of_torch_is_no_matter(native: Plan) -> None:
    versions = {"fpn-engine": "0.0.1", "torch": "2.9"}
    manifest = dataclasses.replace(native.manifest, versions=versions)
    assert len(Engine.from_plan(dataclasses.replace(native, manifest=manifest))(make_picture(60, 80))) == 1


def test_not_a_number_is_an_error_and_no_empty_list(native: Plan) -> None:
    """NaN in the first convolution, behind whose ReLU it must not vanish."""
    parts = dict(native.parts)
    tensors = safetensors.torch.load(parts["trunk.safetensors"])
    tensors[json.loads(parts["trunk.json"])["ops"][0]["weight"]][0] = torch.nan
    parts["trunk.safetensors"] = safetensors.torch.save(tensors)
    with pytest.raises(NonFiniteError):
        Engine.from_plan(Plan(native.manifest, parts))(make_picture(60, 80))


def refuse(plan: Plan, *words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Engine.from_plan(plan)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in (*words, "; build it again with: fpn-engine build tiny.onnx"):
        assert word in sentence


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int4"}, "is for native int4 on cpu, which this version does not run"),
        ({"device": "tpu"}, "is for native fp32 on tpu, which this version does not run"),
        ({"backend": "openvino"}, "is for openvino fp32 on cpu, which this version does not run"),
        ({"parts": {}}, "the plan holds []"),
    ],
)
def test_a_plan_for_something_else(native: Plan, change: dict[str, Any], message: str) -> None:
    refuse(dataclasses.replace(native, manifest=dataclasses.replace(native.manifest, **change)), message)


def test_a_processor_without_bfloat16(native: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "has_bfloat16", lambda: False)
    manifest = dataclasses.replace(native.manifest, precision="bf16")
    refuse(dataclasses.replace(native, manifest=manifest), "is for bf16, which this processor", "tiny.onnx --backend")


def test_int8_is_for_the_cpu(native: Plan) -> None:
    manifest = dataclasses.replace(native.manifest, precision="int8", device="cuda")
    with pytest.raises(PlanError, match="is for native int8 on cuda, which this version does not run"):
        loading_module.check_native(manifest)


def test_a_processor_without_int8_products(native: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading_module, "has_int8_products", lambda: False)
    manifest = dataclasses.replace(native.manifest, precision="int8")
    refuse(dataclasses.replace(native, manifest=manifest), "is for int8 on the native backend", "no VNNI")


def edit(name: str, change: Callable[[dict[str, Any]], None]) -> Damage:
    def damage(parts: Parts) -> None:
        values = json.loads(parts[name])
        change(values)
        parts[name] = json.dumps(values).encode()

    return damage


def rewrite(name: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Damage:
    def damage(parts: Parts) -> None:
        tensors = safetensors.torch.load(parts[name])
        change(tensors)
        parts[name] = safetensors.torch.save(tensors)

    return damage


def put(name: str, data: bytes) -> Damage:
    return lambda parts: parts.update({name: data})


def cut_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 4)  # they come in any order
    tensors[name] = tensors[name][:-1].contiguous()


def halve_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = tensors[name].to(torch.bfloat16)


def flatten_a_weight(tensors: dict[str, torch.Tensor]) -> None:
    name = min(name for name, tensor in tensors.items() if tensor.ndim == 4)  # they come in any order
    tensors[name] = tensors[name].flatten()


DAMAGES = {
    "no program": (put("trunk.json", b"{}"), "trunk.json: it has not the keys"),
    "no tensors": (put("trunk.safetensors", b""), "trunk.safetensors is no safetensors file"),
    "garbage": (put("head.safetensors", bytes(range(256)) * 9), "head.safetensors is no safetensors file"),
    "half": (lambda parts: parts.update({"head.safetensors": parts["head.safetensors"][:-9]}), "head.safetensors is"),
    "unknown op": (edit("trunk.json", lambda v: v["ops"][0].update(kind="system")), "no operation 'system'"),
    "unknown field": (edit("trunk.json", lambda v: v["ops"][0].update(code="x")), "conv has no 'code'"),
    "stride": (edit("trunk.json", lambda v: v["ops"][3].update(stride=[2, 2])), "conv"),
    "missing output": (edit("trunk.json", lambda v: v["outputs"].pop()), "its outputs have"),
    "other order": (edit("trunk.json", lambda v: v["outputs"].reverse()), "its outputs have"),
    "half outputs": (edit("head.json", lambda v: v.update(input_dtype="bfloat16")), "of another number type"),
    "missing tensor": (rewrite("trunk.safetensors", lambda t: t.pop(next(iter(t)))), "is missing"),
    "more tensors": (rewrite("head.safetensors", lambda t: t.update(x=torch.zeros(1))), "the tensor x is not used"),
    "shape": (rewrite("trunk.safetensors", cut_a_weight), "conv"),
    "rank": (rewrite("trunk.safetensors", flatten_a_weight), "conv"),
    "type": (rewrite("head.safetensors", halve_a_weight), "of another number type"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_parts(native: Plan, case: str) -> None:
    damage, message = DAMAGES[case]
    parts = dict(native.parts)
    damage(parts)
    refuse(Plan(native.manifest, parts), "the plan is damaged", message)


def test_rebuild_hints(native: Plan) -> None:
    def hint(**changes: Any) -> str:
        manifest: Manifest = dataclasses.replace(native.manifest, **changes)
        return rebuild_hint(manifest).removeprefix("build it again with: ")

    assert hint() == "fpn-engine build tiny.onnx --backend native"
    assert hint(precision="bf16") == "fpn-engine build tiny.onnx --precision bf16"
    assert hint(device="cuda") == "fpn-engine build tiny.onnx --precision fp32 --device cuda"
    assert hint(backend="onnxruntime") == "fpn-engine build tiny.onnx"
    assert hint(source="--model coco", precision="bf16") == "fpn-engine build --model coco --precision bf16"
    assert rebuild_hint(dataclasses.replace(native.manifest, precision="bf16"), precision="fp32").endswith("native")


@pytest.mark.skipif(not has_bfloat16(), reason="this processor does not convolve in bfloat16")
def test_a_bf16_plan(tiny: Tiny, workplace: Path) -> None:
    built = build_plan(tiny.model, workplace / "half.plan", precision="bf16")
    assert (built.manifest.backend, built.manifest.precision) == ("native", "bf16")
    assert built.manifest.runtime == "native bf16 on the CPU"
    (found,) = Engine.load(built.path)(make_picture(60, 80))
    assert len(found) > 0
    assert found.scores.dtype == "float32"
