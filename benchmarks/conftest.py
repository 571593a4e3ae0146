"""The suites under pytest: the same cases, measured by the same ruler, shown by pytest-benchmark.

pytest benchmarks/ [--quick | --all] [--rows FILE]
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.provenance import describe_run
from benchmarks.rows import ResultFile, Row
from benchmarks.suite import (
    Case,
    Effort,
    RunCase,
    contestants_that_failed,
    prepare_device,
)
from benchmarks.targets import Targets

TIMEOUT = 3600  # seconds: a test is a row here


class SampledClock:
    """pytest-benchmark cannot let contestants take turns; it is given the times that the ruler took, by this timer."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def show(self, benchmark: BenchmarkFixture, seconds: Iterable[float]) -> None:
        waiting = list(seconds)

        def advance() -> None:
            self.now += waiting.pop(0)

        if waiting:
            benchmark.pedantic(advance, rounds=len(waiting), iterations=1)


CLOCK = SampledClock()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks of fpn-engine")
    group.addoption("--quick", action="store_true", help="small models on the CPU, two rounds: a test of the suites")
    group.addoption("--all", action="store_true", dest="every", help="every case, not only the chief ones")
    group.addoption("--largest-batch", type=int, metavar="N", help="default 64 on a GPU, 4 on a CPU")
    group.addoption("--rows", type=Path, metavar="FILE", help="keep the rows in this result file")


def pytest_configure(config: pytest.Config) -> None:
    prepare_device(read_effort(config).device)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.SUITE.list_cases(read_effort(metafunc.config))
        metafunc.parametrize("case", cases, ids=lambda case: case.what.replace(" ", "_"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=False))
            item.add_marker(pytest.mark.timeout(TIMEOUT))
            item.add_marker(pytest.mark.filterwarnings("default"))  # the rivals' are not ours to mend


def read_effort(config: pytest.Config) -> Effort:
    option: Any = config.option
    return Effort(quick=option.quick, every=option.every, largest_batch=option.largest_batch)


@pytest.fixture
def run_case(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> RunCase:
    """Measure a case: what is wrong fails, what cannot run here is skipped, a target of this device is asserted."""
    effort, suite = read_effort(request.config), request.module.SUITE

    def run(case: Case) -> Row:
        *_, measured = case.take(effort)
        facts = describe_run(f"pytest {Path(request.module.__file__).name}{' --quick' * effort.quick}")
        row = {"suite": suite.name, "what": case.what, **measured.row, "quick": effort.quick, **facts}
        if path := request.config.getoption("--rows"):
            ResultFile(path).put(row)
        benchmark.extra_info.update(row)
        CLOCK.show(benchmark, measured.seconds)
        if reason := row.get("not_run"):
            pytest.skip(f"{case.what}: {reason}")
        assert row["complete"]
        assert not contestants_that_failed(row)
        missed = [verdict for verdict in Targets.load_all().judge([row]) if verdict.is_failure]
        assert not missed, "; ".join(str(verdict) for verdict in missed)
        return row

    return run
