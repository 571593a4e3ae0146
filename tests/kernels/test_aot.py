"""Every kernel compiles for GPUs that are not here, without spills and within their shared memory."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fpn_kernels import aot

KERNELS = Path(__file__).parents[2] / "kernels"
TARGETS = (86, 90)  # the least shared memory of all targets, and the GPU that is tuned for
MODULES = {name: importlib.import_module(f"fpn_kernels.triton.{name}") for name in aot.MODULES}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What ``python -m fpn_kernels.aot`` prints, without the interpreter, which the tests of this process may use."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(KERNELS), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "fpn_kernels.aot", "--json", "--target", *map(str, TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    fine = all(row["spills"] == 0 and row["shared"] <= aot.SHARED_LIMIT[row["target"]] for row in found)
    assert done.returncode == (0 if fine else 1)
    return found


def test_there_is_a_row_for_every_build_and_target(rows):
    builds = [build for module in MODULES.values() for build in module.BUILDS]
    assert [(row["kernel"], row["variant"], row["target"]) for row in rows] == [
        (build.kernel.__name__, build.variant, target) for build in builds for target in TARGETS
    ]
    assert len({(build.kernel.__name__, build.variant) for build in builds}) == len(builds), "a name says which build"


def test_nothing_spills(rows):
    assert [row for row in rows if row["spills"] > 0] == []


def test_shared_memory_suffices(rows):
    assert [row for row in rows if row["shared"] > aot.SHARED_LIMIT[row["target"]]] == []
    assert all(0 < row["registers"] <= 255 for row in rows)


@pytest.mark.parametrize("name", MODULES)
def test_every_kernel_that_is_launched_has_a_build(name):
    module = MODULES[name]
    kernels = {value for key, value in vars(module).items() if key.endswith("_kernel")}
    assert kernels
    assert {build.kernel for build in module.BUILDS} == kernels


def test_an_unknown_target_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        aot.main(["--target", "75"])
    assert "invalid choice: 75" in capsys.readouterr().err
