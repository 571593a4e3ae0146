"""Building an engine: one code path for TensorRT 10.x and 11.x, strongly typed, no precision flags."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fpn_engine.backends.tensorrt.bindings import Bindings
from fpn_engine.backends.tensorrt.device import CudaDevice
from fpn_engine.backends.tensorrt.target import HARDWARE, Hardware
from fpn_engine.errors import BackendError, ModelError
from fpn_export.tensorrt.profiles import Batches, Profile
from fpn_export.tensorrt.progress import Phases, make_monitor
from fpn_export.tensorrt.timing_cache import TimingCache

LEVELS = range(6)  # of optimisation; TensorRT's own is 3
MAX_ERRORS = 3  # of the parser that a message repeats


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildOptions:
    """How engines are built.

    Attributes:
        batches: images at once. sizes: padded (height, width) to build for, none for all that the model may see.
        optimization_level: 0 (builds fastest) to 5 (searches longest).
        version_compatible: the engine can run on later versions of TensorRT of the same major number, where their
            lean runtime is installed. hardware: on which other GPUs it runs, see ``Target``.
    """

    batches: Batches = field(default_factory=Batches)
    sizes: tuple[tuple[int, int], ...] = ()
    optimization_level: int = 3
    version_compatible: bool = False
    hardware: Hardware = "none"

    def __post_init__(self) -> None:
        if self.optimization_level not in LEVELS:
            raise BackendError(f"the optimisation level is {LEVELS[0]} to {LEVELS[-1]}, not {self.optimization_level}")
        if self.hardware not in HARDWARE:
            raise BackendError(f"there is no hardware compatibility {self.hardware!r}; take one of {HARDWARE}")

    def describe(self) -> dict[str, Any]:
        """What the engines depend on, the GPU that is here among it. Raises BackendError where there is none."""
        return {"gpu": str(CudaDevice().gpu), **asdict(self)}


def build_engine(
    network: bytes,
    profiles: Sequence[Profile],
    bindings: Bindings,
    options: BuildOptions,
    *,
    exact: bool,
    timing: TimingCache,
    on_progress: Callable[[str], None] = lambda line: None,
) -> bytes:
    """A serialised engine of an ONNX network with one input.

    Args:
        network: strongly typed ONNX, see ``typed_graph``. profiles: shapes of its input.
        exact: float32 is calculated as float32, not as TF32.
        timing: what was measured before is taken from it, what is measured now is put there.
    Raises: ModelError if the parser refuses the network, BackendError if no engine can be built of it.
    """
    trt = bindings.trt
    bindings.logger.errors.clear()
    builder = trt.Builder(bindings.logger)
    parsed = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(parsed, bindings.logger)
    if not parser.parse(network):
        raise ModelError(f"TensorRT {bindings.version} cannot take the network: {_parser_errors(parser)}")
    config = builder.create_builder_config()
    config.builder_optimization_level = options.optimization_level
    if exact:
        config.clear_flag(trt.BuilderFlag.TF32)
    _set_compatibility(trt, config, options)
    name = parsed.get_input(0).name
    for profile in profiles:
        _add_profile(builder, config, name, profile)
    phases = Phases(on_progress)
    monitor = make_monitor(trt, phases)
    config.progress_monitor = monitor
    cache = _attach_cache(config, timing.read())
    engine = builder.build_serialized_network(parsed, config)
    if phases.failure:
        raise phases.failure
    if engine is None:
        raise BackendError(f"TensorRT {bindings.version} builds no engine: {bindings.take_errors()}")
    if cache is not None:
        timing.write(bytes(cache.serialize()))
    return bytes(engine)


def _parser_errors(parser: Any) -> str:
    found = [parser.get_error(index) for index in range(min(MAX_ERRORS, parser.num_errors))]
    lines = [f"{error.node_operator()} {error.node_name()}: {' '.join(error.desc().split())}" for error in found]
    return "; ".join(lines) or "it gives no reason"


def _set_compatibility(trt: Any, config: Any, options: BuildOptions) -> None:
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        # The runtime inside would be a program, which nobody should have to run from a file.
        config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.hardware != "none":
        level = trt.HardwareCompatibilityLevel
        config.hardware_compatibility_level = {
            "same_compute_capability": level.SAME_COMPUTE_CAPABILITY,
            "ampere_plus": level.AMPERE_PLUS,
        }[options.hardware]


def _add_profile(builder: Any, config: Any, name: str, profile: Profile) -> None:
    made = builder.create_optimization_profile()
    made.set_shape(name, profile.low, profile.best, profile.high)
    if config.add_optimization_profile(made) < 0:
        raise BackendError(f"TensorRT does not take the shapes {profile.low} to {profile.high} of {name}")


def _attach_cache(config: Any, known: bytes) -> Any:
    """The timing cache that the build reads and fills; what another version or a crash left is not used."""
    for data in (known, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None
