"""What only an import can tell, each asked in a process of its own: a broken package may crash it, not the doctor.

Run as ``python -m fpn_engine.doctor.probes NAME``; prints one JSON object.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

NVIDIA_VENDOR = "0x10de"
DISPLAY_CLASS = "0x03"  # first byte of the PCI class of VGA and 3D controllers
ERRORS_ONLY = 4  # ONNX Runtime's log level "fatal"


def probe_driver() -> dict[str, Any]:
    """Is there an NVIDIA card, and which driver: ``hardware``, ``cuda`` ("13.2") and ``driver`` ("580.65.06")."""
    found: dict[str, Any] = {"hardware": _has_nvidia_card(), "cuda": None, "driver": None}
    windows = sys.platform == "win32"
    if (cuda := _library("nvcuda.dll" if windows else "libcuda.so.1")) is not None:
        number = ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(number)) == 0 and number.value:
            found["cuda"] = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if (nvml := _library("nvml.dll" if windows else "libnvidia-ml.so.1")) is not None and nvml.nvmlInit_v2() == 0:
        text = ctypes.create_string_buffer(80)
        if nvml.nvmlSystemGetDriverVersion(text, len(text)) == 0:
            found["driver"] = text.value.decode()
    return found


def probe_torch() -> dict[str, Any]:
    """torch's ``cuda`` version or None, ``archs``, ``devices``, the ``reason`` why there are none, and ``cudnn``.

    ``cudnn`` is why torch cannot use cuDNN, None where it can or where torch is for the CPU.
    """
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    reason = " ".join(str(warning.message) for warning in caught)
    devices = []
    if available:
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            capability = [device.major, device.minor]
            devices.append({"name": device.name, "capability": capability, "memory": device.total_memory})
    elif torch.version.cuda:
        try:
            torch.cuda.init()
        except Exception as error:
            reason = str(error)
    archs = torch.cuda.get_arch_list() if available else []
    found = {"cuda": torch.version.cuda, "archs": archs, "devices": devices, "reason": _first_line(reason)}
    return found | {"cudnn": _why_no_cudnn(torch) if torch.version.cuda else None}


def probe_torchvision() -> dict[str, Any]:
    """Only whether it can be imported beside this torch."""
    import torchvision

    return {"version": torchvision.__version__}


def probe_onnxruntime() -> dict[str, Any]:
    """``providers``; ``refused``, why it does not load what onnx writes by default; ``tensorrt``, its major version.

    ``cuda`` is why the library of its CUDA provider cannot be loaded, None if it can or is not there.
    """
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph)
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    refused = None
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        refused = _first_line(str(error))
    return {
        "providers": ort.get_available_providers(),
        "ir": onnx.IR_VERSION,
        "refused": refused,
        "tensorrt": _linked_tensorrt(Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_tensorrt.so"),
        "cuda": _why_not_loaded(ort, "libonnxruntime_providers_cuda.so"),
    }


def probe_tensorrt() -> dict[str, Any]:
    """``version`` of the bindings and ``library``, that of the libnvinfer they found, or None if it does not say."""
    try:
        bindings = importlib.import_module("tensorrt")
    except ModuleNotFoundError:
        bindings = importlib.import_module("tensorrt_bindings")
    version = str(bindings.__version__)
    library = _library(f"libnvinfer.so.{version.split('.')[0]}")
    try:
        number = int(library.getInferLibVersion()) if library else 0
    except AttributeError:
        number = 0
    # From TensorRT 10 on: major * 10000 + minor * 100 + patch.
    found = f"{number // 10000}.{number // 100 % 100}.{number % 100}" if number >= 100_000 else None
    return {"version": version, "library": found}


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "driver": probe_driver,
    "torch": probe_torch,
    "torchvision": probe_torchvision,
    "onnxruntime": probe_onnxruntime,
    "tensorrt": probe_tensorrt,
}


def main() -> None:
    answer = os.dup(1)
    os.dup2(2, 1)  # what libraries print must not mix with the answer
    values = PROBES[sys.argv[1]]()
    with os.fdopen(answer, "w", encoding="utf-8") as stream:
        json.dump(values, stream)


def _why_no_cudnn(torch: Any) -> str | None:
    """torch compares the cuDNN that it finds with the one that it was built for and raises if they do not fit."""
    try:
        return None if torch.backends.cudnn.version() else "it finds none"
    except Exception as error:
        return _first_line(str(error)) or type(error).__name__


def _has_nvidia_card() -> bool:
    for device in Path("/sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == NVIDIA_VENDOR and kind.startswith(DISPLAY_CLASS):
            return True
    return False


def _library(name: str) -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def _why_not_loaded(ort: Any, name: str) -> str | None:
    """What the loader says, with the libraries of pip's packages there as the engine has them."""
    folder = Path(ort.__file__).parent / "capi"
    if not (folder / name).exists():
        return None
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / name))
    except OSError as error:
        return _first_line(str(error)).rpartition("/")[2]
    return None


def _linked_tensorrt(library: Path) -> int | None:
    """Major version of the TensorRT that a library was linked with, from the names it asks the loader for."""
    try:
        found = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes())
    except OSError:
        return None
    return int(found[1]) if found else None


def _first_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[0] if lines else ""


if __name__ == "__main__":
    main()
