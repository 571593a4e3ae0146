"""Which plan to use when none is named."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fpn_engine.errors import FpnEngineError, PlanError
from fpn_engine.files import cache_folder, replacing

VARIABLE = "FPN_ENGINE_PLAN"
NO_PLAN = "there is no plan to use; make one with: fpn-engine export model.pth, then fpn-engine build model.onnx"
_LAST = "last-plan"


class FoundPlan(NamedTuple):
    """A plan's path and, if it was not named, why it was chosen."""

    path: Path
    reason: str | None


def find_plan(named: Path | None) -> FoundPlan | None:
    """The plan named, else $FPN_ENGINE_PLAN, else the only *.plan in the current folder, else the last one built.

    Returns: None if there is none. Raises: PlanError if there are several in the current folder and no other hint.
    """
    if named is not None:
        return FoundPlan(named, None)
    if given := os.environ.get(VARIABLE):
        return FoundPlan(Path(given), f"${VARIABLE}")
    here = sorted(path for path in Path.cwd().glob("*.plan") if os.path.isfile(path))
    if len(here) == 1:
        return FoundPlan(Path(here[0].name), "the only plan in this folder")
    if last := _last_built():
        return FoundPlan(last, "the last plan built")
    if here:
        names = ", ".join(plan.name for plan in here)
        raise PlanError(f"there are several plans here ({names}); name one with --plan")
    return None


def remember_plan(path: Path) -> None:
    """Make ``path`` the last plan built."""
    with replacing(cache_folder() / _LAST) as temporary:
        temporary.write_text(str(path.absolute()), encoding="utf-8")


def _last_built() -> Path | None:
    try:
        path = Path((cache_folder() / _LAST).read_text(encoding="utf-8"))
    except (OSError, FpnEngineError, UnicodeDecodeError):
        return None
    return path if os.path.isfile(path) else None
