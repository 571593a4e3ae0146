"""Doctor: what this machine has, and the combinations of packages and drivers that are known not to work."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from fpn_engine.doctor.cuda import examine_cuda
from fpn_engine.doctor.finding import Finding
from fpn_engine.doctor.machine import Machine
from fpn_engine.doctor.packages import examine_packages
from fpn_engine.doctor.probes import PROBES
from fpn_engine.doctor.runtimes import examine_onnxruntime, examine_tensorrt
from fpn_engine.doctor.system import examine_storage, examine_system

__all__ = ["Finding", "Machine", "examine"]


def examine(machine: Machine | None = None) -> list[Finding]:
    """Everything worth saying about a machine, by default this one, facts and problems in order of topic."""
    machine = machine or Machine()
    with ThreadPoolExecutor() as pool:  # each probe is a process; together they take as long as the slowest
        probes = dict(zip(PROBES, pool.map(machine.probe, PROBES), strict=True))
    return [
        *examine_system(machine),
        *examine_packages(machine, probes),
        *examine_cuda(machine, probes),
        *examine_onnxruntime(machine, probes),
        *examine_tensorrt(machine, probes),
        *examine_storage(machine),
    ]
