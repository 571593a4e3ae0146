"""Installed packages: their versions, what they ask of each other, and torchvision beside torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion

from fpn_engine.doctor.finding import Finding
from fpn_engine.doctor.machine import Machine, Reply

REQUIRED = ("torch", "numpy", "onnx", "onnxscript", "pillow", "pycocotools", "safetensors", "filelock")
OPTIONAL = {
    "triton": "the kernels run as their PyTorch references",
    "torchvision": "only the tests need it",
    "torchcodec": "only --decode gpu needs it",
}
RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
# Packages that pin versions of those above so tightly that they seldom fit.
PINNING = ("nvidia-modelopt", "torch-tensorrt")
EXTRAS = ("", "onnx", "tensorrt")  # of the packages whose requirements are compared


def examine_packages(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    """Versions of everything that matters here, then what does not fit."""
    for package in (*REQUIRED, *RUNTIMES, *OPTIONAL, *PINNING):
        if version := machine.version(package):
            yield Finding("ok", package, _described(machine, package, version))
        elif package in REQUIRED:
            yield Finding("problem", package, f"{package} is not installed", f"pip install {package}")
        elif package in OPTIONAL and (package != "triton" or machine.system != "Linux"):
            yield Finding("note", package, f"not installed; {OPTIONAL[package]}")
    yield from _examine_runtimes(machine)
    yield from _examine_triton(machine, probes)
    yield from _examine_torchvision(machine, probes)
    yield from _examine_requirements(machine)


def torch_cuda(machine: Machine) -> str | None:
    """The CUDA version that torch was built for, from its ``version.py``; None for a CPU build."""
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", machine.version_file("torch"), re.M)
    return found[1] if found else None


def _described(machine: Machine, package: str, version: str) -> str:
    if package != "torch":
        return version
    cuda = torch_cuda(machine)
    return f"{version}, built for {f'CUDA {cuda}' if cuda else 'the CPU only'}"


def _examine_runtimes(machine: Machine) -> Iterator[Finding]:
    installed = [package for package in RUNTIMES if machine.version(package)]
    if len(installed) == 2:
        yield Finding(
            "problem",
            "onnxruntime",
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        )
    elif not installed:
        package = "onnxruntime-gpu" if machine.system == "Linux" else "onnxruntime"
        yield Finding("problem", "onnxruntime", "ONNX Runtime is not installed", f"pip install {package}")


def _examine_triton(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    if machine.version("triton") or machine.system != "Linux":
        return
    consequence = "triton is not installed, so the kernels run as their PyTorch references"
    if probes["torch"].values.get("devices"):
        yield Finding("problem", "triton", f"{consequence}, slowly", "pip install triton")
    else:
        yield Finding("note", "triton", consequence)


def _examine_torchvision(machine: Machine, probes: Mapping[str, Reply]) -> Iterator[Finding]:
    """A torchvision compiled for another torch registers no operators and fails on import."""
    version, torch = machine.version("torchvision"), machine.version("torch")
    if not version or not torch or probes["torch"].failure:
        return
    failure = probes["torchvision"].failure
    cuda_build = re.search(r"__version__\s*=\s*['\"][^'\"]*\+cu", machine.version_file("torchvision"))
    if not torch_cuda(machine) and (cuda_build or (failure and "torchvision::nms" in failure)):
        yield Finding(
            "problem",
            "torchvision",
            f"torchvision {version} is built for CUDA, but torch {torch} for the CPU only "
            '("operator torchvision::nms does not exist")',
            "pip install --force-reinstall torch torchvision",
        )
    elif failure:
        yield Finding(
            "problem",
            "torchvision",
            f"torchvision {version} cannot be imported beside torch {torch}: {failure}",
            "pip install --force-reinstall torch torchvision",
        )


def _examine_requirements(machine: Machine) -> Iterator[Finding]:
    """What ``pip check`` would say, for the packages that matter here and including their extras."""
    watched = {_normal(name) for name in (*REQUIRED, *RUNTIMES, *OPTIONAL, "tensorrt")}
    for package in ("fpn-engine", "torch", "torchvision", *PINNING):
        version = machine.version(package)
        if not version:
            continue
        unmet = []
        for text in machine.requires(package):
            requirement = _parse(text)
            name = _normal(requirement.name) if requirement else ""
            if requirement and name in watched and not _is_met(requirement, machine.version(name)):
                wanted = f"{requirement.name}{requirement.specifier}"
                unmet.append(wanted)
                remedy = f"pip uninstall {package}" if package in PINNING else f"pip install '{wanted}'"
                message = f"{package} {version} needs {wanted}, but {machine.version(name)} is installed"
                yield Finding("problem", package, message, remedy)
        if package in PINNING and not unmet:
            yield Finding(
                "note",
                package,
                f"{package} {version} pins versions that often conflict with those that fpn-engine needs",
                f"keep {package} in a virtual environment of its own",
            )


def _parse(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _is_met(requirement: Requirement, installed: str | None) -> bool:
    """True too where the requirement is not for this machine, or its package is not there: that is said elsewhere."""
    if installed is None:
        return True
    environment = {key: str(value) for key, value in default_environment().items()}
    marker = requirement.marker
    if marker and not any(marker.evaluate({**environment, "extra": extra}) for extra in EXTRAS):
        return True
    try:
        return requirement.specifier.contains(installed, prereleases=True)
    except InvalidVersion:
        return True


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
