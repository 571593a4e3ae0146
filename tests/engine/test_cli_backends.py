"""``build --backend`` and ``--precision`` on the command line, and what ``info`` says of the plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.plan import read_plan
from tests.contest import CHOICE, settle_contest
from tests.engine.conftest import Bundled, Run, Tiny, save_picture

needs_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this processor does not convolve in bfloat16")


@pytest.fixture
def model(tiny: Tiny, workplace: Path) -> str:
    (workplace / "model.onnx").symlink_to(tiny.model)
    return "model.onnx"


def test_the_choice_is_one_line(model: str, run: Run) -> None:
    first, second, third = run("build", model).err.splitlines()
    assert first == CHOICE
    assert second.startswith("model.plan: onnxruntime fp32 on the CPU, ")
    assert third == "next: fpn-engine infer image.jpg"
    assert CHOICE not in run("build", model).err, "up to date"


def test_native_wins(model: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settle_contest(monkeypatch, "native")
    assert "\nmodel.plan: native fp32 on the CPU, " in run("build", model).err


def test_native_on_request(model: str, workplace: Path, run: Run) -> None:
    built = run("build", model, "--backend", "native")
    assert (built.code, built.out) == (0, "")
    assert built.err.startswith("model.plan: native fp32 on the CPU, ")
    save_picture(workplace / "a.png")
    native = run("infer", "a.png", "--json", "--threads", "1")
    assert run("build", model, "--backend", "onnxruntime").code == 0
    onnxruntime = run("infer", "a.png", "--json")
    assert (native.code, onnxruntime.code) == (0, 0)
    ours, theirs = (json.loads(ran.out) for ran in (native, onnxruntime))
    assert json.dumps(ours).count("score") == json.dumps(theirs).count("score") > 0


def test_info_says_how_much_memory(model: str, run: Run) -> None:
    run("build", model, "--backend", "native")
    text = run("info", "model.plan").out
    assert "native fp32, CPU" in text
    assert "MB for one image of 64 x 96" in text
    facts = json.loads(run("info", "model.plan", "--json").out)
    assert facts["backend"] == "native"
    assert 0 < facts["trunk memory"]["bytes"] < facts["trunk memory"]["without reuse"] / 2
    run("build", model, "--backend", "onnxruntime")
    assert "trunk memory" not in json.loads(run("info", "model.plan", "--json").out)


@needs_bfloat16
def test_bf16(model: str, workplace: Path, run: Run) -> None:
    built = run("build", model, "--precision", "bf16")
    assert built.err.startswith("model.plan: native bf16 on the CPU, ")
    save_picture(workplace / "a.png")
    assert run("infer", "a.png").code == 0


@needs_bfloat16
def test_bf16_of_a_named_model(bundled: Bundled, workplace: Path, run: Run) -> None:
    assert run("build", "--model", "demo", "--precision", "bf16").code == 0
    manifest = read_plan(workplace / "demo.plan").manifest
    assert (manifest.backend, manifest.precision, manifest.source) == ("native", "bf16", "--model demo")
    assert len(list(bundled.plan.parent.glob("demo-*.plan"))) == 2, "beside the other, under another name"


def test_what_does_not_go_together(model: str, run: Run) -> None:
    ran = run("build", model, "--backend", "onnxruntime", "--precision", "bf16")
    assert ran.code == 1
    assert ran.err.strip() == "fpn-engine: the onnxruntime backend does not run bf16; take --backend native or fp32"
    assert run("build", model, "--backend", "openvino").code == 2
    assert run("build", model, "--precision", "fp64").code == 2


def test_fp16(model: str, workplace: Path, run: Run) -> None:
    assert run("build", model, "--precision", "fp16").err.startswith("model.plan: native fp16 on the CPU, ")
    save_picture(workplace / "a.png")
    assert run("infer", "a.png").code == 0


def test_a_plan_for_a_gpu_elsewhere(model: str, workplace: Path, run: Run) -> None:
    built = run("build", model, "--target", "sm_90", "--tactics", "full", "--tune-for", "2x64x96")
    assert built.code == 0
    first, second = built.err.splitlines()[:2]
    assert first == "tactics are measured when the plan is first loaded on a GPU of sm_90"
    assert second.startswith("model.plan: native fp16 on the CUDA, ")
    facts = json.loads(run("info", "model.plan", "--json").out)
    assert (facts["device"], facts["built with"]["compute capability"]) == ("cuda", "9.0")
    assert facts["trunk memory"]["bytes"] > 0
    save_picture(workplace / "a.png")
    if not torch.cuda.is_available():
        ran = run("infer", "a.png")
        assert ran.code == 1
        assert "the plan is for native fp16 on cuda, and PyTorch finds no CUDA device here" in ran.err
        assert len(ran.err.strip().splitlines()) <= 2, "which plan, and why not"


def test_options_for_cuda_go_with_it(model: str, run: Run) -> None:
    assert run("build", model, "--tune-for", "1x64x96").code == 2
    assert run("build", model, "--target", "sm_90", "--tune-for", "64x96").code == 2
    ran = run("build", model, "--target", "sm_1")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "there is no target 'sm_1'; take one of sm_80," in ran.err
    if not torch.cuda.is_available():
        assert "PyTorch finds no CUDA device here" in run("build", model, "--device", "cuda").err
