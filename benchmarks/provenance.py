"""Where a figure comes from: machine, versions, commit."""

from __future__ import annotations

import datetime
import os
import subprocess
from typing import Any

from fpn_engine.provenance import describe_machine


def describe_run(command: str) -> dict[str, Any]:
    """JSON-ready provenance of a measurement taken by ``command``."""
    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        **describe_machine(),
    }


def _commit() -> str:
    """$FPN_ENGINE_COMMIT is for a copy of the files without their history."""
    if given := os.environ.get("FPN_ENGINE_COMMIT"):
        return given
    try:
        answer = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()
