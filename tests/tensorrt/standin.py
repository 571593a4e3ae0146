"""Stand-ins for TensorRT's libraries: shared objects that export names and do nothing, written without a compiler.

The bindings can be imported over them, so that every class, method and enum member of the real API is there to check
the code against. Nothing can be built or run with them: each function returns null.
"""

from __future__ import annotations

import platform
import struct
from pathlib import Path

EXPORTS = {
    "nvinfer": (
        "createInferBuilder_INTERNAL",
        "createInferRefitter_INTERNAL",
        "createInferRuntime_INTERNAL",
        "getBuilderPluginRegistry",
        "getPluginRegistry",
    ),
    "nvinfer_plugin": ("initLibNvInferPlugins",),
    "nvonnxparser": (
        "createNvOnnxParser_INTERNAL",
        "createNvOnnxParserRefitter_INTERNAL",
        "getNvOnnxParserVersion",
    ),
}
# ELF machine number and a function that returns 0.
MACHINES = {
    "x86_64": (62, bytes.fromhex("31c0c3")),  # xor eax, eax; ret
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6")),  # mov x0, #0; ret
}
PAGE = 0x10000  # the largest page size of either machine
HEADER, PROGRAM_HEADER, SYMBOL, DYNAMIC = 64, 56, 24, 16
DT_NULL, DT_HASH, DT_STRTAB, DT_SYMTAB, DT_STRSZ, DT_SYMENT, DT_SONAME = 0, 4, 5, 6, 10, 11, 14
PT_LOAD, PT_DYNAMIC, PT_GNU_STACK = 1, 2, 0x6474E551
READ_EXECUTE, READ_WRITE = 5, 6
GLOBAL_FUNCTION = 1 << 4 | 2


def write_stand_ins(folder: Path, major: int) -> list[Path]:
    """The three libraries of TensorRT ``major``, in the order in which they are to be loaded."""
    paths = []
    for stem, names in EXPORTS.items():
        path = folder / f"lib{stem}.so.{major}"
        path.write_bytes(make_library(path.name, names))
        paths.append(path)
    return paths


def make_library(soname: str, names: tuple[str, ...]) -> bytes:
    """A 64-bit ELF shared object (System V ABI, ch. 4 and 5) in which every name is the same function."""
    machine, code = MACHINES[platform.machine()]
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in (soname, *names))
    hashes_at = HEADER + 4 * PROGRAM_HEADER
    count = len(names) + 1  # with the undefined symbol, number 0
    # One bucket whose chain runs through all symbols: the loader compares names.
    hashes = struct.pack(f"<{3 + count}I", 1, count, 1, *_chain(count))
    symbols_at = _align(hashes_at + len(hashes))
    strings_at = symbols_at + SYMBOL * count
    code_at = _align(strings_at + len(strings))
    end = code_at + len(code)
    symbols = bytes(SYMBOL)
    for name in names:
        start = strings.index(b"\0" + name.encode() + b"\0") + 1
        symbols += struct.pack("<IBBHQQ", start, GLOBAL_FUNCTION, 0, 1, code_at, len(code))
    dynamic_at = _align(end, PAGE)
    entries = [
        (DT_SONAME, 1),
        (DT_HASH, hashes_at),
        (DT_STRTAB, strings_at),
        (DT_SYMTAB, symbols_at),
        (DT_STRSZ, len(strings)),
        (DT_SYMENT, SYMBOL),
        (DT_NULL, 0),
    ]
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    identity = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = identity + struct.pack(
        "<HHIQQQIHHHHHH", 3, machine, 1, 0, HEADER, 0, 0, HEADER, PROGRAM_HEADER, 4, 64, 0, 0
    )
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, align)
        for kind, flags, at, size, align in (
            (PT_LOAD, READ_EXECUTE, 0, end, PAGE),
            (PT_LOAD, READ_WRITE, dynamic_at, len(dynamic), PAGE),
            (PT_DYNAMIC, READ_WRITE, dynamic_at, len(dynamic), 8),
            (PT_GNU_STACK, READ_WRITE, 0, 0, 16),
        )
    )
    library = bytearray(dynamic_at + len(dynamic))
    for at, piece in (
        (0, header + segments + hashes),
        (symbols_at, symbols + strings),
        (code_at, code),
        (dynamic_at, dynamic),
    ):
        library[at : at + len(piece)] = piece
    return bytes(library)


def _chain(count: int) -> tuple[int, ...]:
    """The chain table: each symbol points to the next, the last to none."""
    return (0, *(number + 1 if number + 1 < count else 0 for number in range(1, count)))


def _align(offset: int, unit: int = 16) -> int:
    return -(-offset // unit) * unit
