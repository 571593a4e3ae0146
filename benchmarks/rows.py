"""Result files: one JSON array of rows, each with its provenance, saved as each is measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import replacing

Row = dict[str, Any]
# A row is taken again on another device, at another commit, or in earnest after a quick try.
IDENTITY = ("suite", "what", "device", "commit", "quick")


class ResultFile:
    """Rows of any number of suites; written again whole, under another name first, after each change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = read_rows(path) if path.exists() else []

    def find_complete(self, key: Mapping[str, Any]) -> Row | None:
        """The row with these values that is not to be taken again."""
        return next((row for row in self.rows if row.get("complete") and key.items() <= row.items()), None)

    def put(self, row: Row) -> None:
        """Add a row in place of the one that it grew from."""
        key = {name: row[name] for name in IDENTITY}
        self.rows = [other for other in self.rows if not key.items() <= other.items()] + [row]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.rows, indent=1) + "\n")


def read_rows(path: Path) -> list[Row]:
    """Raises: FpnEngineError if the file is not an array of objects."""
    try:
        rows = json.loads(path.read_text())
    except OSError as error:
        raise FpnEngineError(f"cannot read {path}: {error.strerror}; give a result file that exists") from error
    except ValueError as error:
        raise FpnEngineError(f"{path} is not JSON ({error}); give a file that python -m benchmarks wrote") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise FpnEngineError(f"{path} is not an array of rows; give a file that python -m benchmarks wrote")
    return rows


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of rows that differ in commit and date alone, the newest; in the order of their first appearance."""
    newest: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("suite", "what", "device", "quick"))
        if key not in newest or row.get("date", "") >= newest[key].get("date", ""):
            newest[key] = row
    return list(newest.values())
