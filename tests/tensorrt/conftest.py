"""The real bindings of both generations over stand-in libraries, a double of TensorRT, and small networks."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from onnx import ModelProto

import fpn_engine.backends.tensorrt.bindings as bindings_module
from fpn_engine.errors import FpnEngineError
from fpn_engine.spec import ModelSpec
from fpn_export.onnx_cut import cut_head, cut_trunk
from fpn_export.onnx_export import export_onnx
from tests.export.random_system import make_random_system
from tests.tensorrt.double import make_double
from tests.tensorrt.standin import MACHINES, write_stand_ins
from tests.tensorrt.strict import StrictModule
from tests.tensorrt.surface import read_surface
from tests.threads import one_thread

__all__ = ["one_thread"]

GENERATIONS = (10, 11)
WHEEL = "tensorrt-cu13-bindings"
KEPT_SECONDS = 7 * 24 * 3600  # after which a newer version may be out
PIP = (
    "-m",
    "pip",
    "install",
    "--quiet",
    "--disable-pip-version-check",
    "--no-deps",
    "--retries",
    "1",
    "--timeout",
    "15",
)


def why_no_tensorrt() -> str:
    """Why nothing can be built and run for real here; "" where it can."""
    from fpn_engine.backends.tensorrt.device import CudaDevice

    try:
        CudaDevice()
        bindings_module.load_bindings()
    except FpnEngineError as error:
        return str(error)
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``tensorrt`` are skipped where TensorRT or a GPU is missing."""
    marked = [item for item in items if item.get_closest_marker("tensorrt")]
    if marked and (reason := why_no_tensorrt()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


def fetch_bindings(major: int, folder: Path) -> Path:
    """The newest bindings of a generation in a folder of their own, kept for a week; skips where pip gets none.

    They are not among the test requirements: installed beside a real TensorRT they would replace its own.
    """
    place = folder / f"tensorrt-{major}"
    with FileLock(place.with_suffix(".lock")):
        if not place.exists() or time.time() - place.stat().st_mtime > KEPT_SECONDS:
            fresh = folder / f"tensorrt-{major}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            wanted = f"{WHEEL}>={major},<{major + 1}"
            command = [sys.executable, *PIP, "--target", str(fresh), wanted]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode == 0:
                shutil.rmtree(place, ignore_errors=True)
                fresh.rename(place)
            elif not place.exists():
                lines = done.stderr.strip().splitlines() or ["no reason given"]
                pytest.skip(f"pip finds no {wanted}, which the real API is read from: {lines[-1]}")
    return place


@pytest.fixture(scope="session", params=GENERATIONS, ids=lambda major: f"tensorrt-{major}")
def surface(
    request: pytest.FixtureRequest, pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """All classes, signatures and enum members of the newest bindings of one generation."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        pytest.skip(f"stand-in libraries are made for Linux on {' and '.join(MACHINES)} only")
    cache = pytestconfig.cache
    folder = cache.mkdir("tensorrt-bindings") if cache else tmp_path_factory.mktemp("bindings")
    bindings = fetch_bindings(request.param, folder)
    libraries = tmp_path_factory.mktemp(f"stand-ins-{request.param}")
    write_stand_ins(libraries, request.param)
    found = read_surface(bindings, libraries)
    assert found["version"].startswith(f"{request.param}.")
    return found


@pytest.fixture
def trt(surface: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[StrictModule]:
    """A double of TensorRT in the place of the module ``tensorrt``."""
    module = make_double(surface)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    bindings_module.load_bindings.cache_clear()
    yield module
    bindings_module.load_bindings.cache_clear()


@dataclass(frozen=True)
class Networks:
    """A small detector: its whole file, its spec and what is cut out of it."""

    model: ModelProto
    spec: ModelSpec
    parts: dict[str, ModelProto]


def make_networks(system: str = "fpn", model: str = "faster_rcnn") -> Networks:
    detector = make_random_system(system, model)
    exported = export_onnx(detector, detector.spec)
    parts = {"trunk": cut_trunk(exported, detector.spec)}
    if detector.spec.has_box_head:
        parts["head"] = cut_head(exported, detector.spec)
    return Networks(exported, detector.spec, parts)


@pytest.fixture(scope="session")
def small() -> Networks:
    return make_networks()


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where timing caches go."""
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"
