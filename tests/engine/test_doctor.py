"""The doctor on made-up machines: each bad combination is found, and nothing on a healthy one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fpn_engine.doctor as doctor_package
from fpn_engine.cli.app import app
from fpn_engine.doctor import Finding, Machine, examine
from fpn_engine.doctor.machine import Reply
from fpn_engine.errors import FpnEngineError
from tests.engine.fake_machine import CPU_TORCH, H200, NO_GPU, REPLIES, VERSIONS, FakeMachine


def only_problem(machine: Machine, kind: str = "problem") -> Finding:
    """The one finding that asks for something; a bad combination gives one, not a shower."""
    found = [finding for finding in examine(machine) if finding.kind == "problem" or finding.remedy]
    assert [finding.kind for finding in found] == [kind], found
    assert found[0].remedy
    assert "\n" not in found[0].message + found[0].remedy
    return found[0]


def test_healthy_machine_has_facts_only() -> None:
    findings = examine(FakeMachine())
    assert {finding.kind for finding in findings} == {"ok"}, [f for f in findings if f.kind != "ok"]
    said = {finding.topic: finding.message for finding in findings}
    assert said["python"] == "3.12.4"
    assert said["CPU"] == "16 cores, avx2, avx512, vnni, bf16"
    assert said["memory"] == "128.0 GiB, 64.0 GiB available"
    assert said["torch"] == "2.15.0, built for CUDA 13.2"
    assert said["CUDA"] == "NVIDIA H200, compute capability 9.0, 140.0 GiB, driver 595.10, for CUDA up to 13.2"
    assert said["providers"] == "Tensorrt, CUDA, CPU"
    assert said["TensorRT"] == "10.13.3.9 can be imported"
    assert said["cache"] == "/cache is writable"


def test_machine_without_a_gpu_is_healthy() -> None:
    replies = {**NO_GPU, "driver": {"hardware": False, "cuda": None, "driver": None}}
    found = [finding for finding in examine(FakeMachine(replies=replies)) if finding.kind != "ok"]
    assert found == [Finding("note", "CUDA", "no CUDA device: everything runs on the CPU, slower")]


def test_optional_packages_may_be_missing() -> None:
    gone = dict.fromkeys(["torchvision", "torchcodec", *(name for name in VERSIONS if name.startswith("tensorrt"))])
    replies = dict.fromkeys(("torchvision", "tensorrt"), "ModuleNotFoundError: No module named 'x'")
    found = [finding for finding in examine(FakeMachine(gone, replies)) if finding.kind != "ok"]
    topics = ["torchvision", "torchcodec", "TensorRT"]
    assert [(finding.kind, finding.topic) for finding in found] == [("note", topic) for topic in topics]


CPU_REPLIES = {
    "torch": {"cuda": None, "archs": [], "devices": [], "reason": ""},
    "driver": {"hardware": False, "cuda": None, "driver": None},
    "torchvision": "RuntimeError: operator torchvision::nms does not exist",
}
CU12 = {f"tensorrt-cu12{part}": "10.13.3.9" for part in ("", "-bindings", "-libs")}
TENSORRT_11 = {name: "11.1.0.3" for name in VERSIONS if name.startswith("tensorrt")}
REPLY_11 = {"tensorrt": {"version": "11.1.0.3", "library": "11.1.0"}}

PROBLEMS: dict[str, tuple[FakeMachine, str, str]] = {
    "old python": (FakeMachine(python=(3, 10, 12)), "Python 3.10.12 is too old", "Python 3.11 or newer"),
    "both ONNX Runtimes": (
        FakeMachine({"onnxruntime": "1.31.0"}),
        "onnxruntime and onnxruntime-gpu are both installed",
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
    ),
    "no ONNX Runtime": (
        FakeMachine({"onnxruntime-gpu": None}, {"onnxruntime": "ModuleNotFoundError: No module named 'onnxruntime'"}),
        "ONNX Runtime is not installed",
        "pip install onnxruntime-gpu",
    ),
    "broken ONNX Runtime": (
        FakeMachine(replies={"onnxruntime": "ImportError: libstdc++.so.6: version `GLIBCXX_3.4.32' not found"}),
        "onnxruntime-gpu 1.31.1 cannot be imported: ImportError: libstdc",
        "pip install --force-reinstall onnxruntime-gpu onnx",
    ),
    "missing package": (FakeMachine({"pycocotools": None}), "pycocotools is not installed", "pip install pycocotools"),
    "missing torch": (
        FakeMachine({"torch": None}, {"torch": "ModuleNotFoundError: No module named 'torch'"}),
        "torch is not installed",
        "pip install torch",
    ),
    "crashing torch": (
        FakeMachine(replies={"torch": "the process crashed with signal 11", "torchvision": "the same"}),
        "torch 2.15.0 cannot be imported: the process crashed with signal 11",
        "pip install --force-reinstall torch",
    ),
    "torchvision of PyPI beside a CPU torch": (
        FakeMachine(
            replies={**CPU_REPLIES, "torchvision": {"version": "0.29.2+cu132"}}, version_files={"torch": CPU_TORCH}
        ),
        'built for CUDA, but torch 2.15.0 for the CPU only ("operator torchvision::nms does not exist")',
        "pip install --force-reinstall torch torchvision",
    ),
    "torchvision that says so itself": (
        FakeMachine(replies=CPU_REPLIES, version_files={"torch": CPU_TORCH, "torchvision": "__version__ = '0.29.2'"}),
        "operator torchvision::nms does not exist",
        "pip install --force-reinstall torch torchvision",
    ),
    "torchvision of another torch": (
        FakeMachine(replies={"torchvision": "RuntimeError: operator torchvision::nms does not exist"}),
        "torchvision 0.29.2 cannot be imported beside torch 2.15.0",
        "pip install --force-reinstall torch torchvision",
    ),
    "CPU torch on a GPU": (
        FakeMachine(
            replies={"torch": CPU_REPLIES["torch"]},
            version_files={"torch": CPU_TORCH, "torchvision": "__version__ = '0.29.2+cpu'"},
        ),
        "torch 2.15.0 is built for the CPU only, so the NVIDIA GPU here stays idle",
        "pip install --force-reinstall torch",
    ),
    "no driver": (
        FakeMachine(replies={**NO_GPU, "driver": {"hardware": True, "cuda": None, "driver": None}}),
        "an NVIDIA GPU but no driver",
        "install the NVIDIA driver",
    ),
    "old driver": (
        FakeMachine(replies={**NO_GPU, "driver": {"hardware": True, "cuda": "12.4", "driver": "550.54"}}),
        "the NVIDIA driver 550.54 supports CUDA up to 12.4, too old for torch 2.15.0, built for CUDA 13.2",
        "update the NVIDIA driver, or install a torch built for CUDA 12",
    ),
    "driver that fails": (
        FakeMachine(replies={"torch": {**NO_GPU["torch"], "reason": "CUDA unknown error"}}),
        "finds no GPU although there is one: CUDA unknown error",
        "nvidia-smi",
    ),
    "GPU that torch has no code for": (
        FakeMachine(replies={"torch": {**REPLIES["torch"], "devices": [{**H200, "capability": [7, 0]}]}}),
        "torch has no code for the NVIDIA H200 (compute capability 7.0)",
        "install a torch that has",
    ),
    "no triton on a GPU": (FakeMachine({"triton": None}), "triton is not installed", "pip install triton"),
    "other triton than torch's": (
        FakeMachine({"triton": "3.6.0"}),
        "torch 2.15.0 needs triton~=3.9.0, but 3.6.0 is installed",
        "pip install 'triton~=3.9.0'",
    ),
    "older than we need": (
        FakeMachine(requires={"fpn-engine": ["torch>=2.20", 'tensorrt>=10.7; extra == "tensorrt"']}),
        "fpn-engine 0.1.0 needs torch>=2.20, but 2.15.0 is installed",
        "pip install 'torch>=2.20'",
    ),
    "modelopt's pins": (
        FakeMachine({"nvidia-modelopt": "0.40"}, requires={"nvidia-modelopt": ['onnx~=1.19.0; extra == "onnx"']}),
        "nvidia-modelopt 0.40 needs onnx~=1.19.0, but 1.22.0 is installed",
        "pip uninstall nvidia-modelopt",
    ),
    "torch-tensorrt's pins": (
        FakeMachine(
            {"torch-tensorrt": "2.10"}, requires={"torch-tensorrt": ["torch<2.11,>=2.10.0", "not a requirement"]}
        ),
        "torch-tensorrt 2.10 needs torch<2.11,>=2.10.0, but 2.15.0 is installed",
        "pip uninstall torch-tensorrt",
    ),
    "TensorRT bindings alone": (
        FakeMachine(
            {"tensorrt": None, "tensorrt-cu13": None, "tensorrt-cu13-libs": None},
            {"tensorrt": "ImportError: libnvinfer.so.10: cannot open shared object file: No such file or directory"},
        ),
        "bindings are installed without their libraries: ImportError: libnvinfer.so.10",
        "pip install tensorrt==10.13.3.9",
    ),
    "TensorRT that fails": (
        FakeMachine(replies={"tensorrt": "ImportError: libcudart.so.13: cannot open shared object file"}),
        "bindings cannot be imported: ImportError: libcudart.so.13",
        "pip install tensorrt==10.13.3.9",
    ),
    "TensorRT of two releases": (
        FakeMachine({"tensorrt-cu13-libs": "10.9.0.34"}),
        "different releases: tensorrt 10.13.3.9, tensorrt-cu13 10.13.3.9, tensorrt-cu13-bindings 10.13.3.9, "
        "tensorrt-cu13-libs 10.9.0.34",
        "pip install tensorrt==10.13.3.9",
    ),
    "TensorRT twice": (FakeMachine(dict(CU12)), "for two CUDA versions", "pip uninstall -y tensorrt tensorrt-cu12"),
    "another libnvinfer first": (
        FakeMachine(replies={"tensorrt": {"version": "10.13.3.9", "library": "10.9.0"}}),
        "bindings are 10.13.3.9 but the library they find is 10.9.0",
        "LD_LIBRARY_PATH",
    ),
    "TensorRT too old": (
        FakeMachine(
            {name: "10.6.0.26" for name in VERSIONS if name.startswith("tensorrt")},
            {"tensorrt": {"version": "10.6.0.26", "library": "10.6.0"}},
        ),
        "TensorRT 10.6.0.26 is too old for the tensorrt backend, which needs 10.7 or newer",
        "pip install -U 'tensorrt>=10.7'",
    ),
    "TensorRT newer than the driver": (
        FakeMachine(
            replies={
                "driver": {"hardware": True, "cuda": "12.8", "driver": "570.86"},
                "tensorrt": "ImportError: libcudart.so.13",
            }
        ),
        "TensorRT is built for CUDA 13, but the NVIDIA driver supports CUDA up to 12.8",
        "pip uninstall -y tensorrt-cu13 tensorrt-cu13-bindings tensorrt-cu13-libs && pip install tensorrt-cu12",
    ),
    "another cuDNN first": (
        FakeMachine(
            {"nvidia-cudnn-cu13": "9.26.0.51"},
            {"torch": {**REPLIES["torch"], "cudnn": "cuDNN version incompatibility: compiled with (9, 26, 0)"}},
            environment={"LD_LIBRARY_PATH": "/opt/cudnn"},
        ),
        "torch 2.15.0 cannot use cuDNN (nvidia-cudnn-cu13 9.26.0.51): cuDNN version incompatibility",
        "unset LD_LIBRARY_PATH, or: pip install --force-reinstall torch==2.15.0",
    ),
    "no cuDNN": (
        FakeMachine(replies={"torch": {**REPLIES["torch"], "cudnn": "it finds none"}}),
        "torch 2.15.0 cannot use cuDNN (no package of it installed): it finds none",
        "pip install --force-reinstall torch==2.15.0",
    ),
    "cache": (
        FakeMachine(
            cache=FpnEngineError("cannot use the cache folder /c: Read-only file system; set FPN_ENGINE_CACHE")
        ),
        "cannot use the cache folder /c: Read-only file system",
        "set FPN_ENGINE_CACHE",
    ),
    "plan that is not there": (
        FakeMachine(environment={"FPN_ENGINE_PLAN": "/nowhere/model.plan"}),
        "FPN_ENGINE_PLAN names /nowhere/model.plan, which does not exist",
        "unset FPN_ENGINE_PLAN",
    ),
    "plan that is none": (
        FakeMachine(environment={"FPN_ENGINE_PLAN": __file__}),
        "test_doctor.py is not a plan or is damaged",
        "fpn-engine build model.onnx",
    ),
}

NOTES: dict[str, tuple[FakeMachine, str, str]] = {
    "onnx newer than ONNX Runtime": (
        FakeMachine(
            {"onnx": "1.23.2"},
            {"onnxruntime": {**REPLIES["onnxruntime"], "ir": 14, "refused": "Unsupported model IR version: 14"}},
        ),
        "onnxruntime-gpu 1.31.1 refuses what onnx 1.23.2 writes by default (IR 14); the files of fpn-engine are IR 10",
        "ir_version=10",
    ),
    "TensorRT 11 and ONNX Runtime's provider": (
        FakeMachine(dict(TENSORRT_11), REPLY_11),
        "needs TensorRT 10 and cannot use 11.1.0.3",
        "pip install 'tensorrt==10.*'",
    ),
    "a GPU without TensorRT": (
        FakeMachine({name: None for name in VERSIONS if name.startswith("tensorrt")}),
        "not installed; the tensorrt backend is off",
        "pip install 'fpn-engine[tensorrt]'",
    ),
    "ONNX Runtime without CUDA": (
        FakeMachine(
            {"onnxruntime": "1.31.0", "onnxruntime-gpu": None},
            {"onnxruntime": {**REPLIES["onnxruntime"], "providers": ["CPUExecutionProvider"]}},
        ),
        "onnxruntime 1.31.0 has no CUDA provider",
        "pip install onnxruntime-gpu",
    ),
    "hidden GPUs": (
        FakeMachine(replies=NO_GPU, environment={"CUDA_VISIBLE_DEVICES": "-1"}),
        "CUDA_VISIBLE_DEVICES=-1 hides every GPU",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "modelopt that fits": (
        FakeMachine({"nvidia-modelopt": "0.50"}, requires={"nvidia-modelopt": ["numpy>=2"]}),
        "nvidia-modelopt 0.50 pins versions",
        "virtual environment of its own",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_bad_combination_is_one_problem_with_its_remedy(name: str) -> None:
    machine, message, remedy = PROBLEMS[name]
    found = only_problem(machine)
    assert message in found.message
    assert found.remedy
    assert remedy in found.remedy


@pytest.mark.parametrize("name", NOTES)
def test_what_works_with_a_catch_is_a_note(name: str) -> None:
    machine, message, remedy = NOTES[name]
    found = only_problem(machine, "note")
    assert message in found.message
    assert found.remedy
    assert remedy in found.remedy


def test_tensorrt_11_and_a_newer_onnxruntime_get_along() -> None:
    replies = {**REPLY_11, "onnxruntime": {**REPLIES["onnxruntime"], "tensorrt": 11}}
    assert {finding.kind for finding in examine(FakeMachine(dict(TENSORRT_11), replies))} == {"ok"}


def test_triton_is_not_missed_where_it_has_no_wheel() -> None:
    replies = {**CPU_REPLIES, "torchvision": REPLIES["torchvision"]}
    files = {"torch": CPU_TORCH, "torchvision": "__version__ = '0.29.2'"}
    findings = examine(FakeMachine({"triton": None}, replies, version_files=files, system="Darwin"))
    assert [finding.kind for finding in findings if finding.topic == "triton"] == ["note"]
    assert not [finding for finding in findings if finding.kind == "problem"]


def test_this_machine_answers_every_probe() -> None:
    """The made-up replies above have the keys of the real ones."""
    for name in ("driver", "torch", "onnxruntime"):
        reply = Machine().probe(name)
        assert reply.failure is None
        assert set(reply.values) == set(REPLIES[name])
    assert "CPUExecutionProvider" in reply.values["providers"]


def test_probe_that_fails_says_its_last_line() -> None:
    assert Machine().probe("no such probe") == Reply({}, "KeyError: 'no such probe'")


def test_cache_is_checked_by_writing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    assert Machine().check_cache() == tmp_path / "cache"
    assert list((tmp_path / "cache").iterdir()) == []
    (tmp_path / "file").touch()
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(FpnEngineError, match="Not a directory; set FPN_ENGINE_CACHE"):
        Machine().check_cache()


def run(machine: Machine, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[int, str]:
    monkeypatch.setattr(doctor_package, "examine", lambda: examine(machine))
    result = CliRunner().invoke(app, ["doctor", *options])
    return result.exit_code, result.stdout


def test_json_form(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(FakeMachine(python=(3, 10, 1)), monkeypatch, "--json")
    report = json.loads(text)
    assert code == 1
    assert report["healthy"] is False
    assert report["findings"][0] == {
        "kind": "problem",
        "topic": "python",
        "message": "Python 3.10.1 is too old; fpn-engine needs 3.11",
        "remedy": "make a virtual environment with Python 3.11 or newer and install fpn-engine there",
    }
    code, text = run(FakeMachine(), monkeypatch, "--json")
    assert (code, json.loads(text)["healthy"]) == (0, True)


def test_table_ends_with_the_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run(FakeMachine({"onnxruntime": "1.31.0"}), monkeypatch)
    lines = text.splitlines()
    assert code == 1
    assert lines[-1] == "1 problem"
    assert lines[0].split()[:2] == ["ok", "python"]
    problem = next(index for index, line in enumerate(lines) if line.startswith("problem"))
    assert not any(line.startswith(("ok", "note")) for line in lines[problem:])
    assert "remedy: pip uninstall -y onnxruntime" in " ".join(" ".join(lines[problem:]).split())
    code, text = run(FakeMachine(), monkeypatch)
    assert (code, text.splitlines()[-1]) == (0, "everything works")
