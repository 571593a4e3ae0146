"""Ahead-of-time compilation of every Triton kernel for every supported GPU, on any machine.

    python -m fpn_kernels.aot [--target 90 ...] [--json]

prints registers, spills, shared memory and the instructions that tell how a kernel works: tensor-core products and
128-bit loads. Needs Triton, not a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TARGETS = (80, 86, 89, 90, 100, 120)  # compute capability times ten
# Shared memory that one thread block may have, in bytes (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
MODULES = (
    "candidates",
    "convolution",
    "decode",
    "epilogue",
    "few_channels",
    "finiteness",
    "kept",
    "max_pool",
    "nms",
    "nms_chunks",
    "nms_order",
    "preprocess",
    "roi_align",
    "roi_pool",
    "selection",
    "topdown",
    "windows",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """What a kernel became on one target.

    Attributes:
        registers per thread; spills: bytes of local memory per thread; shared: bytes of shared memory per block.
        tensor_core: MMA instructions; wide_loads: 128-bit global loads, asynchronous copies included.
    """

    kernel: str
    variant: str
    target: int
    warps: int
    registers: int
    spills: int
    shared: int
    tensor_core: int
    wide_loads: int


def compile_all(targets: Sequence[int] = TARGETS) -> Iterator[Compiled]:
    """Compile every build of every kernel. Raises: RuntimeError if Triton or its disassembler is not there."""
    for module in MODULES:
        for build in importlib.import_module(f"fpn_kernels.triton.{module}").BUILDS:
            for target in targets:
                yield compile_build(build, target)


def compile_build(build: Any, target: int) -> Compiled:
    """Compile one :class:`fpn_kernels.triton.builds.Build` for one target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = build.kernel.arg_names
    signature = {name: build.signature.get(name, "constexpr") for name in names}
    attributes = {
        path: [["tt.divisibility", 16]]
        for name, kind in build.signature.items()
        for path, part in _split(names.index(name), kind)
        if part.startswith("*") or name in build.divisible
    }
    source = ASTSource(build.kernel, signature, {(names.index(n),): v for n, v in build.constants.items()}, attributes)
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    resources = _read_resources(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Compiled(
        kernel=build.kernel.__name__,
        variant=build.variant,
        target=target,
        warps=build.num_warps,
        registers=resources["REG"],
        spills=resources["STACK"] + resources["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_core=len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx)),
        wide_loads=len(re.findall(r"\bld\.global\S*\.v4\.b32\b|\bcp\.async\S* \[[^\]]+\], \[[^\]]+\], 0x10\b", ptx)),
    )


def _split(position: int, kind: str | tuple[str, ...]) -> list[tuple[tuple[int, ...], str]]:
    """Each part of an argument, which is several if it is a tuple: its path as Triton counts, and its type."""
    if isinstance(kind, str):
        return [((position,), kind)]
    return [((position, i), part) for i, part in enumerate(kind)]


def _read_resources(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one function in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        listing = subprocess.run(
            [_find_cuobjdump(), "--dump-resource-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", listing)}
    if "REG" not in found:
        raise RuntimeError(f"cuobjdump said nothing about registers: {listing.strip()}")
    return found


def _find_cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = os.environ.get("TRITON_CUOBJDUMP_PATH") or (str(bundled) if bundled.exists() else shutil.which("cuobjdump"))
    if found is None:
        raise RuntimeError("cuobjdump is not there; it comes with Triton and with the CUDA toolkit")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit code is 1 if a kernel spills or needs more shared memory than its target has."""
    parser = argparse.ArgumentParser(prog="python -m fpn_kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=int, nargs="+", default=TARGETS, choices=TARGETS, metavar="SM")
    parser.add_argument("--json", action="store_true", help="one object per line")
    given = parser.parse_args(arguments)
    fine = True
    columns = [field.name for field in dataclasses.fields(Compiled)]
    if not given.json:
        print(" ".join(f"{column:>12}" for column in columns))
    for row in compile_all(given.target):
        fine &= row.spills == 0 and row.shared <= SHARED_LIMIT[row.target]
        values = dataclasses.asdict(row)
        print(json.dumps(values) if given.json else " ".join(f"{v:>12}" for v in values.values()), flush=True)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
