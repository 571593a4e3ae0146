"""Which plan is used when none is named: the variable, the only one here, the last one built."""

from pathlib import Path

import pytest

from fpn_engine.discovery import VARIABLE, FoundPlan, find_plan, remember_plan
from fpn_engine.errors import PlanError


@pytest.fixture
def built(workplace: Path) -> Path:
    """The last plan built, in another folder."""
    path = workplace.parent / "built.plan"
    path.touch()
    remember_plan(path)
    return path


def test_order(built: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_plan(None) == FoundPlan(built, "the last plan built")
    (workplace / "here.plan").touch()
    assert find_plan(None) == FoundPlan(Path("here.plan"), "the only plan in this folder")
    monkeypatch.setenv(VARIABLE, "given.plan")
    assert find_plan(None) == FoundPlan(Path("given.plan"), "$FPN_ENGINE_PLAN")
    assert find_plan(Path("named.plan")) == FoundPlan(Path("named.plan"), None)


def test_of_several_plans_here_none_is_taken(built: Path, workplace: Path) -> None:
    for name in ("a.plan", "b.plan"):
        (workplace / name).touch()
    assert find_plan(None) == FoundPlan(built, "the last plan built")
    built.unlink()
    with pytest.raises(PlanError, match=r"several plans here \(a.plan, b.plan\); name one with --plan"):
        find_plan(None)


def test_folders_and_other_files_are_no_plans(workplace: Path) -> None:
    (workplace / "folder.plan").mkdir()
    (workplace / "file.txt").touch()
    assert find_plan(None) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"a\0b", b"/nowhere/x.plan"])
def test_a_damaged_memory_is_no_plan(content: bytes, built: Path) -> None:
    (built.parent / "cache" / "last-plan").write_bytes(content)
    assert find_plan(None) is None


def test_an_unusable_cache_is_no_obstacle(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "file").touch()
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(workplace / "file" / "cache"))
    assert find_plan(None) is None


def test_a_plan_is_remembered_from_anywhere(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "here.plan").touch()
    remember_plan(Path("here.plan"))
    monkeypatch.chdir(workplace.parent)
    assert find_plan(None) == FoundPlan(workplace / "here.plan", "the last plan built")
