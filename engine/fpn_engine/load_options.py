"""Load options: how a plan is made ready."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from fpn_engine.batching import Size
from fpn_engine.errors import OptionError
from fpn_engine.plan import Manifest


class LoadOptions(TypedDict, total=False):
    """How a plan is made ready; what is not said here is said at :class:`fpn_engine.engine.Engine`.

    Attributes:
        threads: CPU threads of the neural parts, None takes one per core.
        device: "cpu", "cuda" or "cuda:1", of the kind that the plan was built for; None takes that kind's current one.
        streams: on CUDA, how many groups of images compute at once, each on parts and buffers of its own: more
            throughput where one group does not fill the device, for latency and memory.
        images: how many there will be, where that is known; see :func:`fpn_engine.light.is_light`.
        decode: "gpu" decodes JPEG files on the device, which needs TorchCodec; see
            :class:`fpn_engine.runtime.device_reader.DeviceReader`. The pixels of a stream's outcomes are then tensors
            there, (H, W, 3) with any strides, in memory of another stream than the current one.
    """

    batch_size: int
    threads: int | None
    device: str | None
    streams: int
    buckets: int | Sequence[Size] | None
    graphs: bool
    graph_memory: int | None
    images: int | None
    decode: Literal["cpu", "gpu"]


MAY_BE_NONE = ("threads", "images", "graph_memory")


def check_options(options: LoadOptions) -> None:
    """Raises: TypeError for an option that there is not, as a call does; OptionError for a value of the wrong kind."""
    if unknown := sorted(set(options) - set(LoadOptions.__annotations__)):
        known = ", ".join(LoadOptions.__annotations__)
        raise TypeError(f"a plan is not loaded with {unknown[0]!r}; there are {known}")
    for name, least in (("batch_size", 1), ("threads", 1), ("streams", 1), ("images", 0), ("graph_memory", 0)):
        value = options.get(name, least)
        if value is None and name in MAY_BE_NONE:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise OptionError(f"{name} must be a whole number from {least} on, not {value!r}")
    if not isinstance(graphs := options.get("graphs", True), bool):
        raise OptionError(f"graphs must be True or False, not {graphs!r}")
    device = options.get("device")
    if device is not None and not isinstance(device, str):
        raise OptionError(f"device must be a name such as 'cpu' or 'cuda:1', not {device!r}")


def decodes_on_gpu(options: LoadOptions, manifest: Manifest) -> bool:
    """Whether JPEG files should be. Raises: OptionError for another word, or a plan that does not run on a GPU."""
    decode = options.get("decode", "cpu")
    if decode not in ("cpu", "gpu"):
        raise OptionError(f"decode must be cpu or gpu, not {decode!r}")
    if decode == "gpu" and manifest.device != "cuda":
        raise OptionError(
            f"--decode gpu (decode='gpu') is for plans that run on a GPU, and this one is for {manifest.backend} on "
            f"{manifest.device}; leave it out, or build with --device cuda"
        )
    return decode == "gpu"
