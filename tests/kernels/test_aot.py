"""Every kernel compiles for GPUs that are not here, without spills and within their shared memory."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from fpn_kernels import aot

pytestmark = pytest.mark.timeout(3600)  # on a cold cache; the first test compiles everything

KERNELS = Path(__file__).parents[2] / "kernels"
LAUNCHED = ("candidates", "decode", "finiteness", "kept", "nms", "nms_chunks", "nms_order", "preprocess", "roi_align")
LAUNCHED += ("roi_pool", "selection", "topdown", "windows")
MODULES = {name: importlib.import_module(f"fpn_kernels.triton.{name}") for name in aot.MODULES}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What ``python -m fpn_kernels.aot`` prints, without the interpreter, which the tests of this process may use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    halves = (aot.TARGETS[::2], aot.TARGETS[1::2])
    with ThreadPoolExecutor(len(halves)) as pool:
        return [
            row
            for found in pool.map(lambda targets: compile_in_a_process(targets, environment), halves)
            for row in found
        ]


def compile_in_a_process(targets: Sequence[int], environment: Mapping[str, str]) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "fpn_kernels.aot", "--json", "--target", *map(str, targets)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    fine = all(row["spills"] == 0 and row["shared"] <= aot.SHARED_LIMIT[row["target"]] for row in found)
    assert done.returncode == (0 if fine else 1)
    return found


def test_there_is_a_row_for_every_build_and_target(rows):
    builds = [build for module in MODULES.values() for build in module.BUILDS]
    assert sorted((row["kernel"], row["variant"], row["target"]) for row in rows) == sorted(
        (build.kernel.__name__, build.variant, target) for build in builds for target in aot.TARGETS
    )
    assert len({(build.kernel.__name__, build.variant) for build in builds}) == len(builds), "a name says which build"


def test_nothing_spills(rows):
    assert [row for row in rows if row["spills"] > 0] == []


def test_shared_memory_suffices(rows):
    assert [row for row in rows if row["shared"] > aot.SHARED_LIMIT[row["target"]]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_kernels_use_wide_loads_and_tensor_cores(rows):
    wide = ("merge_kernel", "lateral_kernel", "roi_align_kernel", "roi_pool_kernel")
    wide += ("gather_windows_kernel", "window_linear_kernel", "check_words_kernel", "take_kernel")
    rows = [row for row in rows if row["kernel"] in wide and not row["variant"].endswith("C=1")]
    assert {row["kernel"] for row in rows} == set(wide)
    assert [row for row in rows if row["wide_loads"] == 0] == []
    products = ("lateral_kernel", "window_linear_kernel")
    half = [row for row in rows if row["kernel"] in products and not row["variant"].startswith("fp32")]
    assert half
    assert [row for row in half if row["tensor_core"] == 0] == []


@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_that_is_launched_has_a_build(name):
    module = MODULES[name]
    kernels = {value for key, value in vars(module).items() if key.endswith("_kernel")}
    assert kernels
    assert {build.kernel for build in module.BUILDS} == kernels


def test_launches_of_one_element_compile():
    """As they do on a GPU, with ones for constants; the interpreter knows no types."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tests.kernels.compile_launches"]
    done = subprocess.run(command, env=environment, cwd=KERNELS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == {build.kernel.__name__ for name in LAUNCHED for build in MODULES[name].BUILDS}


def test_an_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--target", "75"])
    assert "invalid choice: 75" in capsys.readouterr().err
