"""Python, processor, memory, and the files that fpn-engine keeps or is pointed to."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from fpn_engine.discovery import VARIABLE
from fpn_engine.doctor.finding import Finding
from fpn_engine.doctor.machine import Machine
from fpn_engine.errors import FpnEngineError
from fpn_engine.plan import read_plan

OLDEST_PYTHON = (3, 11)
# What to look for in /proc/cpuinfo, as x86 and ARM spell it, and what to call it.
FEATURES = {
    "avx2": ("avx2",),
    "avx512": ("avx512f",),
    "vnni": ("avx512_vnni", "avx_vnni"),
    "bf16": ("avx512_bf16", "bf16"),
    "amx": ("amx_tile",),
    "neon": ("asimd",),
}


def examine_system(machine: Machine) -> Iterator[Finding]:
    """Facts about Python, the processor and memory."""
    version = ".".join(map(str, machine.python))
    if machine.python < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        remedy = f"make a virtual environment with Python {oldest} or newer and install fpn-engine there"
        yield Finding("problem", "python", f"Python {version} is too old; fpn-engine needs {oldest}", remedy)
    else:
        yield Finding("ok", "python", version)
    yield Finding("ok", "platform", machine.platform)
    listed = re.search(r"^(?:flags|Features)\s*:(.*)$", machine.read("/proc/cpuinfo"), re.M)
    flags = set(listed[1].split()) if listed else set()
    features = [name for name, spellings in FEATURES.items() if flags.intersection(spellings)]
    yield Finding("ok", "CPU", ", ".join([f"{machine.cores} {'core' if machine.cores == 1 else 'cores'}", *features]))
    memory = {name: int(kib) / 2**20 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", machine.read("/proc/meminfo"))}
    if "MemTotal" in memory:
        free = f", {memory['MemAvailable']:.1f} GiB available" if "MemAvailable" in memory else ""
        yield Finding("ok", "memory", f"{memory['MemTotal']:.1f} GiB{free}")


def examine_storage(machine: Machine) -> Iterator[Finding]:
    """The cache folder and the plan that the environment names."""
    try:
        yield Finding("ok", "cache", f"{machine.check_cache()} is writable")
    except FpnEngineError as error:
        yield _from_error("cache", error)
    named = machine.environment.get(VARIABLE)
    if not named:
        return
    if not Path(named).exists():
        remedy = f"unset {VARIABLE}, or build that plan with: fpn-engine build model.onnx -o {named}"
        yield Finding("problem", "plan", f"{VARIABLE} names {named}, which does not exist", remedy)
        return
    try:
        manifest = read_plan(Path(named)).manifest
        yield Finding("ok", "plan", f"{VARIABLE} names {named}: {manifest.backend} {manifest.precision}")
    except FpnEngineError as error:
        yield _from_error("plan", error)


def _from_error(topic: str, error: FpnEngineError) -> Finding:
    """Our errors are "what is wrong; what to do"."""
    message, _, remedy = str(error).rpartition("; ")
    return Finding("problem", topic, message or remedy, remedy if message else None)
