"""ONNX Runtime's CUDA and TensorRT providers: sessions on a GPU, or one sentence why there is none.

ONNX Runtime leaves a provider that it cannot load, and operators that it lacks, to the CPU. Here that is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from fpn_engine.backends.ort import session_options
from fpn_engine.backends.ort_binding import Place
from fpn_engine.errors import BackendError
from fpn_engine.files import cache_folder

PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
ENGINES = "onnxruntime-tensorrt"  # where the TensorRT provider keeps what it compiled, in the cache folder
NO_CPU = ("session.disable_cpu_ep_fallback", "1")
QUIET = 4  # ONNX Runtime's log level "fatal": what it would log is in our error
Shapes = list[list[list[int]]]  # of each profile the smallest, best and largest


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderChoice:
    """What runs a plan's networks.

    Attributes:
        provider: "cuda" or "tensorrt". shapes: of each input, the profiles that TensorRT compiles for.
    """

    provider: str
    shapes: dict[str, Shapes] = field(default_factory=dict)

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Self:
        """Raises ValueError for anything that :meth:`to_json` does not write."""
        values = json.loads(data)
        if not isinstance(values, dict) or set(values) != {"provider", "shapes"} or values["provider"] not in PROVIDERS:
            raise ValueError("it names no provider")
        shapes = {
            str(name): [[[int(side) for side in shape] for shape in profile] for profile in profiles]
            for name, profiles in values["shapes"].items()
        }
        return cls(provider=values["provider"], shapes=shapes)


def check_provider(provider: str) -> None:
    """Raise BackendError, with the cause and the remedy, if ONNX Runtime here cannot load the provider."""
    import onnxruntime as ort

    title = f"ONNX Runtime {ort.__version__}"
    if PROVIDERS[provider] not in ort.get_available_providers():
        remedy = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
        raise BackendError(f"{title} has no {_title(provider)} provider; install the one that has: {remedy}")
    if (reason := why_not_loaded(provider)) is not None:
        raise BackendError(
            f"{title} cannot load its {_title(provider)} provider: {reason}; {_remedy(provider, reason)}"
        )


def why_not_loaded(provider: str) -> str | None:
    """What the loader says of the provider's library, such as which library it misses; None if it loads."""
    import onnxruntime as ort

    folder = Path(ort.__file__).parent / "capi"
    if hasattr(ort, "preload_dlls"):
        with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does not find
            ort.preload_dlls()  # CUDA's and cuDNN's libraries of pip's packages, where torch has not loaded them
    try:
        ctypes.CDLL(str(folder / "libonnxruntime_providers_shared.so"), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(folder / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return str(error).rpartition("/")[2]
    return None


def open_gpu_session(
    model: bytes, choice: ProviderChoice, place: Place, *, input_name: str, half: bool, threads: int | None = None
) -> Any:
    """A session on the stream of ``place``, all of it on the GPU.

    Args: half: the network is float16; else float32, not rounded to TF32. input_name: for the profiles of TensorRT.
    Raises: BackendError if the provider cannot be loaded, or if it leaves anything to the CPU.
    """
    import onnxruntime as ort

    check_provider(choice.provider)
    options = session_options(threads)
    options.log_severity_level = QUIET
    options.add_session_config_entry(*NO_CPU)
    title = _title(choice.provider)
    try:
        session = ort.InferenceSession(
            model, options, providers=provider_options(choice, place, input_name, half), enable_fallback=0
        )
    except Exception as error:  # ONNX Runtime's own exceptions share no public base
        reason = str(error).strip().splitlines()[0]
        if "fallback to CPU" in reason:
            reason = "it left operators to the CPU, or found no device"
        raise BackendError(
            f"ONNX Runtime {ort.__version__} cannot run the model with its {title} provider: {reason}; see what is "
            "wrong with: fpn-engine doctor"
        ) from None
    if session.get_providers()[:1] != [PROVIDERS[choice.provider]]:
        raise BackendError(
            f"ONNX Runtime {ort.__version__} left its {title} provider out without a reason; see what is wrong with: "
            "fpn-engine doctor"
        )
    return session


def provider_options(
    choice: ProviderChoice, place: Place, input_name: str, half: bool
) -> Sequence[tuple[str, Mapping[str, str]]]:
    """The providers in order of preference, with their options; TensorRT leaves what it lacks to CUDA."""
    shared = {"device_id": str(place.known_as[1]), "user_compute_stream": str(place.handle)}
    cuda = (PROVIDERS["cuda"], {**shared, "use_tf32": str(int(half))})
    if choice.provider == "cuda":
        return [cuda]
    folder = cache_folder() / ENGINES
    engines = {
        "trt_fp16_enable": str(int(half)),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }
    for index, kind in enumerate(("min", "opt", "max")):
        profiles = choice.shapes.get(input_name, [])
        listed = ["x".join(map(str, profile[index])) for profile in profiles]
        if listed:
            engines[f"trt_profile_{kind}_shapes"] = ",".join(f"{input_name}:{shape}" for shape in listed)
    return [(PROVIDERS["tensorrt"], {**shared, **engines}), cuda]


def _title(provider: str) -> str:
    return {"cuda": "CUDA", "tensorrt": "TensorRT"}[provider]


def _remedy(provider: str, reason: str) -> str:
    if provider == "tensorrt" and "libnvinfer" in reason:
        version = reason.partition("libnvinfer.so.")[2].partition(":")[0]
        wanted = f"'tensorrt=={version}.*'" if version.isdigit() else "tensorrt"
        return f"pip install {wanted}, or take --backend tensorrt, which runs newer ones too"
    return "install the CUDA libraries that it needs: pip install 'onnxruntime-gpu[cuda,cudnn]'"
