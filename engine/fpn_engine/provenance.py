"""Where a figure comes from: the machine and the versions of what runs on it."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    *("fpn-engine", "torch", "triton", "torchvision", "onnxruntime-gpu", "onnxruntime", "onnx", "tensorrt", "numpy"),
)


def describe_machine() -> dict[str, Any]:
    """JSON-ready: the GPU and its driver or the processor, threads, Python and packages."""
    found = {
        "device": _device(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": _versions(),
    }
    driver = _driver()
    return {**found, "driver": driver} if driver else found


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _driver() -> str:
    """NVIDIA's kernel module, as "580.82.07"."""
    words = [line.split() for line in _read("/proc/driver/nvidia/version") if line.startswith("NVRM")]
    return next((word for word in (words or [[]])[0] if word[:1].isdigit()), "")


def _read(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
