"""ONNX Runtime and TensorRT: what they offer, and whether their parts belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fpn_engine.doctor.finding import Finding
from fpn_engine.doctor.machine import Machine, Reply
from fpn_engine.doctor.packages import RUNTIMES

TENSORRT_PROVIDER = "TensorrtExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
OLDEST = (10, 7)  # as pyproject.toml and the backend have it
FAMILIES = ("tensorrt-cu12", "tensorrt-cu13")  # each with -bindings and -libs


def examine_onnxruntime(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    """Providers, and the files that it refuses."""
    installed = [package for package in RUNTIMES if machine.version(package)]
    if not installed:
        return  # reported among the packages
    package = installed[-1]
    version, reply = machine.version(package), probes["onnxruntime"]
    if reply.failure:
        message = f"{package} {version} cannot be imported: {reply.failure}"
        yield Finding("problem", "onnxruntime", message, f"pip install --force-reinstall {package} onnx")
        return
    providers = reply.values["providers"]
    yield Finding("ok", "providers", ", ".join(name.removesuffix("ExecutionProvider") for name in providers))
    if probes["torch"].values.get("devices") and CUDA_PROVIDER not in providers:
        message = f"{package} {version} has no CUDA provider, so the onnxruntime backend leaves the GPU idle"
        remedy = f"pip uninstall -y {package} && pip install onnxruntime-gpu"
        yield Finding("note", "onnxruntime", message, remedy)
    elif probes["torch"].values.get("devices") and (reason := reply.values.get("cuda")):
        message = f"{package} {version} cannot load its CUDA provider and runs nothing on the GPU: {reason}"
        yield Finding("note", "onnxruntime", message, f"pip install '{package}[cuda,cudnn]'")
    if reply.values["refused"]:
        yield Finding(
            "note",
            "onnx",
            f"{package} {version} refuses what onnx {machine.version('onnx')} writes by default "
            f"(IR {reply.values['ir']}); the files of fpn-engine are IR 10 and load",
            "save models of your own with ir_version=10 and opset 20",
        )
    linked, tensorrt = reply.values["tensorrt"], _tensorrt_version(machine)
    if TENSORRT_PROVIDER in providers and linked and tensorrt and int(tensorrt.split(".")[0]) != linked:
        yield Finding(
            "note",
            "TensorRT",
            f"the TensorRT provider of {package} {version} needs TensorRT {linked} and cannot use {tensorrt}",
            f"use fpn-engine's own tensorrt backend, or: pip install 'tensorrt=={linked}.*'",
        )


def examine_tensorrt(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    """Whether bindings and libraries are there, from one release, and work."""
    names = ["tensorrt", *(f"{family}{part}" for family in FAMILIES for part in ("", "-bindings", "-libs"))]
    found = {name: version for name in names if (version := machine.version(name))}
    if not found:
        has_gpu = bool(probes["torch"].values.get("devices"))
        remedy = "pip install 'fpn-engine[tensorrt]'" if has_gpu else None
        yield Finding("note", "TensorRT", "not installed; the tensorrt backend is off", remedy)
        return
    version = _tensorrt_version(machine)
    reply = probes["tensorrt"]
    families = [family for family in FAMILIES if any(name.startswith(family) for name in found)]
    listed = ", ".join(f"{name} {version}" for name, version in found.items())
    reinstall = f"pip uninstall -y {' '.join(found)} && pip install tensorrt=={version}"
    if len(families) > 1:
        yield Finding("problem", "TensorRT", f"TensorRT is installed for two CUDA versions: {listed}", reinstall)
    elif len(set(found.values())) > 1:
        yield Finding("problem", "TensorRT", f"the parts of TensorRT are from different releases: {listed}", reinstall)
    elif probes["torch"].values.get("devices") and (
        too_old := _driver_too_old(families[0] if families else "", probes["driver"].values)
    ):  # where torch runs: without it the driver is what is reported already
        yield Finding("problem", "TensorRT", *too_old)
    elif reply.failure:
        bare = any(name.endswith("-bindings") for name in found) and not any(name.endswith("-libs") for name in found)
        what = "bindings are installed without their libraries" if bare else "bindings cannot be imported"
        yield Finding("problem", "TensorRT", f"TensorRT {version}: its {what}: {reply.failure}", reinstall)
    elif (library := reply.values["library"]) and not _same_release(reply.values["version"], library):
        yield Finding(
            "problem",
            "TensorRT",
            f"TensorRT's bindings are {reply.values['version']} but the library they find is {library}",
            f"take other TensorRT folders off LD_LIBRARY_PATH, or: {reinstall}",
        )
    elif _numbers(version or "0") < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        message = f"TensorRT {version} is too old for the tensorrt backend, which needs {wanted} or newer"
        yield Finding("problem", "TensorRT", message, f"pip install -U 'tensorrt>={wanted}'")
    else:
        yield Finding("ok", "TensorRT", f"{reply.values['version']} can be imported")


def _driver_too_old(family: str, driver: Mapping[str, Any]) -> tuple[str, str] | None:
    """What to say, and the remedy, if the driver cannot run what TensorRT was built for."""
    built, supported = family.rpartition("cu")[2], driver.get("cuda")
    if not built or not supported or _numbers(supported)[0] >= int(built):
        return None
    return (
        f"TensorRT is built for CUDA {built}, but the NVIDIA driver supports CUDA up to {supported}",
        f"update the NVIDIA driver, or: pip uninstall -y {family} {family}-bindings {family}-libs && "
        f"pip install tensorrt-cu{_numbers(supported)[0]}",
    )


def _numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in version.split(".")[:2])


def _tensorrt_version(machine: Machine) -> str | None:
    """Version of the bindings, under whichever name they were installed."""
    names = [*(f"{family}-bindings" for family in FAMILIES), "tensorrt", *FAMILIES]
    return next((version for name in names if (version := machine.version(name))), None)


def _same_release(bindings: str, library: str) -> bool:
    """Bindings have a fourth number, the build, that the library does not tell."""
    return bindings.split(".")[:3] == library.split(".")[:3]
