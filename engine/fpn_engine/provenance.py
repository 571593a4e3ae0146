"""Where a figure comes from: the machine and the versions of what runs on it."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "triton", "torchvision", "tensorrt", "onnxruntime-gpu", "onnxruntime", "onnx", "numpy")


def describe_machine() -> dict[str, Any]:
    """JSON-ready: the GPU and its driver or the processor, threads, Python and packages."""
    return {
        "device": _device(),
        **_driver(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": _versions(),
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _driver() -> dict[str, str]:
    """Of the GPU, if there is one."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"driver": answer.stdout.split()[0]} if answer.stdout else {}


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
