"""A made-up machine for the doctor: healthy, with an H200, and anything about it can be changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fpn_engine.doctor import Machine
from fpn_engine.doctor.machine import Reply
from fpn_engine.errors import FpnEngineError

H200 = {"name": "NVIDIA H200", "capability": [9, 0], "memory": 140 * 2**30}
CUDA_TORCH = "__version__ = '2.15.0+cu132'\ndebug = False\ncuda: Optional[str] = '13.2'\nhip: Optional[str] = None\n"
CPU_TORCH = "__version__ = '2.15.0+cpu'\ndebug = False\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
VERSIONS = {
    "fpn-engine": "0.1.0",
    "torch": "2.15.0",
    "triton": "3.9.0",
    "torchvision": "0.29.2",
    "torchcodec": "0.17.0",
    "numpy": "2.4.6",
    "onnx": "1.22.0",
    "onnxscript": "0.7.2",
    "pillow": "13.0.0",
    "pycocotools": "2.0.11",
    "safetensors": "0.8.0",
    "filelock": "4.2.11",
    "onnxruntime-gpu": "1.31.1",
    "tensorrt": "10.13.3.9",
    "tensorrt-cu13": "10.13.3.9",
    "tensorrt-cu13-bindings": "10.13.3.9",
    "tensorrt-cu13-libs": "10.13.3.9",
}
REPLIES: dict[str, dict[str, Any]] = {
    "driver": {"hardware": True, "cuda": "13.2", "driver": "595.10"},
    "torch": {
        "cuda": "13.2",
        "archs": ["sm_80", "sm_90", "sm_100", "compute_120"],
        "devices": [H200],
        "reason": "",
        "cudnn": None,
    },
    "torchvision": {"version": "0.29.2+cu132"},
    "onnxruntime": {
        "providers": ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
        "ir": 13,
        "refused": None,
        "tensorrt": 10,
        "cuda": None,
    },
    "tensorrt": {"version": "10.13.3.9", "library": "10.13.3"},
}
NO_GPU = {"torch": {**REPLIES["torch"], "devices": [], "archs": [], "reason": "Found no NVIDIA driver on your system."}}


class FakeMachine(Machine):
    """A healthy machine with an H200, and whatever is changed about it; None removes."""

    python = (3, 12, 4)
    system = "Linux"
    platform = "Linux-6.8-x86_64"
    cores = 16
    environment: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        versions: dict[str, str | None] | None = None,
        replies: dict[str, Any] | None = None,
        requires: dict[str, list[str]] | None = None,
        version_files: dict[str, str] | None = None,
        cache: Path | FpnEngineError = Path("/cache"),
        **attributes: Any,
    ) -> None:
        self.versions = VERSIONS | (versions or {})
        self.replies = REPLIES | (replies or {})
        self.requirements = {"torch": ["triton~=3.9.0; platform_system == 'Linux'", "nvidia-nccl==9"]} | (
            requires or {}
        )
        self.version_files = {"torch": CUDA_TORCH, "torchvision": "__version__ = '0.29.2+cu132'"} | (
            version_files or {}
        )
        self.cache = cache
        self.__dict__.update(attributes)

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value

    def read(self, path: str) -> str:
        return {
            "/proc/cpuinfo": "processor\t: 0\nflags\t\t: fpu avx avx2 avx512f avx512_vnni avx512_bf16\n",
            "/proc/meminfo": "MemTotal:       134217728 kB\nMemAvailable:   67108864 kB\n",
        }[path]

    def version(self, package: str) -> str | None:
        return self.versions.get(package)

    def requires(self, package: str) -> list[str]:
        return self.requirements.get(package, [])

    def version_file(self, module: str) -> str:
        return self.version_files[module]

    def probe(self, name: str) -> Reply:
        reply = self.replies[name]
        return Reply({}, reply) if isinstance(reply, str) else Reply(reply)

    def check_cache(self) -> Path:
        if isinstance(self.cache, FpnEngineError):
            raise self.cache
        return self.cache
