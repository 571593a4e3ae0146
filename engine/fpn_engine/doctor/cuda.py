"""torch, the NVIDIA driver and the devices: whether anything can run on a GPU here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from fpn_engine.doctor.finding import Finding
from fpn_engine.doctor.machine import Machine, Reply
from fpn_engine.doctor.packages import torch_cuda

TOPIC = "CUDA"
NO_DEVICE = "no CUDA device: everything runs on the CPU, slower"
VISIBLE = "CUDA_VISIBLE_DEVICES"
LOADER_PATH = "LD_LIBRARY_PATH"
CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
GET_STARTED = "https://pytorch.org/get-started/locally"


def examine_cuda(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    """The devices, or one reason why there are none."""
    version = machine.version("torch")
    if not version:
        return  # reported among the packages
    torch, driver = probes["torch"], probes["driver"].values
    if torch.failure:
        message = f"torch {version} cannot be imported: {torch.failure}"
        yield Finding("problem", "torch", message, "pip install --force-reinstall torch")
        return
    for device in torch.values["devices"]:
        yield from _examine_device(device, torch.values["archs"], driver)
    if torch.values["devices"] and (reason := torch.values.get("cudnn")):
        yield _explain_cudnn(machine, version, reason)
    if not torch.values["devices"]:
        yield _explain_none(machine, version, torch.values, driver)


def _examine_device(device: Mapping[str, Any], archs: list[str], driver: Mapping[str, Any]) -> Iterator[Finding]:
    major, minor = device["capability"]
    facts = [device["name"], f"compute capability {major}.{minor}", f"{device['memory'] / 2**30:.1f} GiB"]
    if driver.get("driver"):
        facts.append(f"driver {driver['driver']}")
    if driver.get("cuda"):
        facts.append(f"for CUDA up to {driver['cuda']}")
    yield Finding("ok", TOPIC, ", ".join(facts))
    if archs and not any(_runs_on(arch, major, minor) for arch in archs):
        yield Finding(
            "problem",
            TOPIC,
            f"torch has no code for the {device['name']} (compute capability {major}.{minor}): {' '.join(archs)}",
            f"install a torch that has, as {GET_STARTED} shows",
        )


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Machine code (sm_) runs on its own major version from its minor up; PTX (compute_) on everything newer."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if not found:
        return False
    built = (int(found[2]), int(found[3]))
    if found[1] == "sm":
        return built[0] == major and built[1] <= minor
    return built <= (major, minor)


def _explain_none(machine: Machine, version: str, torch: Mapping[str, Any], driver: Mapping[str, Any]) -> Finding:
    has_card, supported, built = driver.get("hardware"), driver.get("cuda"), torch_cuda(machine) or torch["cuda"]
    hidden = machine.environment.get(VISIBLE)
    if not has_card and not supported:
        return Finding("note", TOPIC, NO_DEVICE)
    if not built:
        message = f"torch {version} is built for the CPU only, so the NVIDIA GPU here stays idle"
        remedy = "pip install --force-reinstall torch"
        if machine.system != "Linux":  # where the index of PyPI has only CPU builds
            remedy = f"install a torch built for CUDA as {GET_STARTED} shows"
        return Finding("problem", TOPIC, message, remedy)
    if not supported:
        return Finding(
            "problem",
            TOPIC,
            f"there is an NVIDIA GPU but no driver that torch {version} (CUDA {built}) could use",
            "install the NVIDIA driver, or start the container with --gpus all",
        )
    if _major(supported) < _major(built):
        return Finding(
            "problem",
            TOPIC,
            f"the NVIDIA driver {driver.get('driver') or ''} supports CUDA up to {supported}, "
            f"too old for torch {version}, built for CUDA {built}".replace("  ", " "),
            f"update the NVIDIA driver, or install a torch built for CUDA {_major(supported)} as {GET_STARTED} shows",
        )
    if hidden is not None and hidden.strip() in ("", "-1"):
        return Finding(
            "note", TOPIC, f"{VISIBLE}={hidden} hides every GPU: everything runs on the CPU", f"unset {VISIBLE}"
        )
    if not has_card:
        return Finding("note", TOPIC, NO_DEVICE)
    reason = torch["reason"] or "it gives no reason"
    message = f"torch {version} finds no GPU although there is one: {reason}"
    return Finding("problem", TOPIC, message, "see whether nvidia-smi works, then restart the machine or the container")


def _explain_cudnn(machine: Machine, version: str, reason: str) -> Finding:
    """torch brings the cuDNN that it was built for as a package; another one on the loader's path displaces it."""
    package = next((name for name in CUDNN if machine.version(name)), None)
    remedy = f"pip install --force-reinstall torch=={version}"
    if machine.environment.get(LOADER_PATH):
        remedy = f"unset {LOADER_PATH}, or: {remedy}"
    found = f"{package} {machine.version(package)}" if package else "no package of it installed"
    return Finding("problem", "cuDNN", f"torch {version} cannot use cuDNN ({found}): {reason}", remedy)


def _major(version: str) -> int:
    return int(version.split(".")[0])
