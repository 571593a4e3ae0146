"""The folder of a training run: where it stands, its log and its models, so that it can be taken up again."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

import fpn_engine
from fpn_engine.errors import CheckpointError
from fpn_engine.files import remove_stale, replacing, unwritable
from fpn_engine.masks.spec import read_spec
from fpn_export.detector import FpnDetector
from fpn_export.training.recipe import Recipe

FORMAT = 1
STEP = "step"  # the first column of the logs
STATE, LOG, SCORES, BEST, LAST = "state.pt", "log.csv", "scores.csv", "best", "last"
STEP_FOLDERS = ("1-rpn", "2-fast_rcnn", "3-rpn", "4-fast_rcnn")  # the folders of alternating training
FILES = (STATE, LOG, SCORES, *(f"{model}{suffix}" for model in (BEST, LAST) for suffix in (".pth", ".json")))


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """Where a run stands.

    Attributes:
        step: updates done.
        weights: the model's state dict. optimizer: the optimizer's.
        settings: everything that decides the weights, JSON-ready; a run is taken up only under the same.
        best: the main figure of the best model so far, or None.
        seconds: of training so far.
        score_due: the model is to be scored at this step and was not, since an image could not be read.
        validated_on: what identifies the images by which it was the best, or None if that is not known.
    """

    step: int
    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    settings: Mapping[str, Any]
    best: float | None
    seconds: float
    score_due: bool = False
    validated_on: str | None = None


class RunFolder:
    """Holds ``state.pt``, ``log.csv``, ``scores.csv`` and the models ``best.pth`` and ``last.pth`` with their JSON.

    Args: alone: hold the folder against other runs; of a run's processes only the first does.
    Raises: CheckpointError if the folder cannot be used or another run trains in it.
    """

    def __init__(self, path: Path, *, alone: bool = True) -> None:
        self.path = path
        self._lock = FileLock(path / ".lock")
        try:
            path.mkdir(parents=True, exist_ok=True)
            if alone:
                self._lock.acquire(timeout=0)
                for name in FILES:
                    remove_stale(path / name)
        except Timeout:
            raise CheckpointError(f"another run is training in {path}; wait for it or give another folder") from None
        except OSError as error:
            raise CheckpointError(f"cannot train in {path}: {error.strerror or error}; give another folder") from None

    def close(self) -> None:
        """Let others train here."""
        self._lock.release()

    def load_state(self, settings: Mapping[str, Any]) -> State | None:
        """Where the run in this folder stands, or None for a new one.

        Raises: CheckpointError if the state is damaged, or of a run under other settings.
        """
        path = self.path / STATE
        if not os.path.exists(path):
            return None
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            if values.pop("format") != FORMAT:
                raise ValueError("another version wrote it")
            state = State(**values)
            before = _completed(state.settings)
        except Exception as error:  # the unpickler raises whatever damaged bytes make it do
            raise CheckpointError(
                f"{path} cannot be read ({type(error).__name__}); train into another folder or with --restart"
            ) from None
        changed = _differences(before, json.loads(json.dumps(settings)))
        if changed:
            raise CheckpointError(
                f"{self.path} holds a run with other settings ({'; '.join(changed[:3])}); give the same ones to go on, "
                "another folder, or --restart to begin anew"
            )
        return state

    def save_state(self, state: State) -> None:
        """Raises: FpnEngineError if it cannot be written; the one before remains."""
        values = {f.name: getattr(state, f.name) for f in dataclasses.fields(State)}
        with replacing(self.path / STATE) as temporary:
            _write(temporary, _serialized({"format": FORMAT, **values}))

    def clear(self) -> None:
        """Forget the run that is here, joint or alternating."""
        for name in FILES:
            path = self.path / name
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                reason = error.strerror or error
                raise CheckpointError(f"cannot remove {path}: {reason}; give another folder") from None
        for name in STEP_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)

    def save_model(self, name: str, model: FpnDetector, about: Mapping[str, Any]) -> Path:
        """Write the weights as ``name``.pth, named as torchvision's, and the spec beside them; returns the former.

        Raises: FpnEngineError if one cannot be written; a file that was there remains.
        """
        path = self.path / f"{name}.pth"
        weights = _serialized({key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()})
        with replacing(path) as temporary:
            _write(temporary, weights)
        digest = hashlib.sha256(weights).hexdigest()
        trained = {"trained_with": f"fpn-engine {fpn_engine.__version__}", **about, "sha256": digest}
        with replacing(path.with_suffix(".json")) as temporary:
            document = {"spec": model.spec.to_dict(), "about": trained}
            temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        return path

    def has_model(self, name: str) -> bool:
        """Whether a model of that name was saved here."""
        return os.path.isfile(self.path / f"{name}.pth")

    def rewind_log(self, step: int) -> None:
        """Drop what the logs say about updates after ``step``, which will be done again, and damaged rows.

        Without its names of columns, or before the first update, a log begins anew.

        Raises: CheckpointError if a log is no file, or cannot be read.
        """
        for name in (LOG, SCORES):
            path = self.path / name
            if not os.path.lexists(path):
                continue
            if not os.path.isfile(path):
                raise CheckpointError(f"{path} is no file, and the log of the run goes there; remove it")
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError as error:
                raise CheckpointError(f"cannot read {path}: {error.strerror or error}; give another folder") from None
            kept = _good_rows([line.split(",") for line in text.splitlines()], step) if step else []
            if not kept:
                path.unlink()
                continue
            with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(kept)

    def log(self, name: str, row: Mapping[str, float]) -> None:
        """Append a row to a CSV file; its first column is the step. Raises: FpnEngineError if it cannot be written."""
        path = self.path / name
        new = not os.path.exists(path)
        try:
            with path.open("a", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                if new:
                    writer.writerow(row)
                writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row.values())
        except OSError as error:
            raise unwritable(path, error) from None


def _serialized(values: Mapping[str, Any]) -> memoryview:
    """What torch.save writes. To a full disk it raises RuntimeError, and it writes the name of a path into the file."""
    buffer = io.BytesIO()
    torch.save(values, buffer)
    return buffer.getbuffer()


def _write(path: Path, data: memoryview) -> None:
    """Write a file that a power cut after it leaves whole."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _good_rows(rows: Sequence[Sequence[str]], step: int) -> list[Sequence[str]]:
    """The names of the columns and the whole rows up to ``step``; none if the names are damaged."""
    if not rows or rows[0][0] != STEP or not all(name.isprintable() for name in rows[0]):
        return []
    names, *rest = rows
    return [names, *(row for row in rest if len(row) == len(names) and _is_of(row, step))]


def _is_of(row: Sequence[str], step: int) -> bool:
    """Whether a row has numbers alone, the first a step up to ``step``."""
    try:
        [float(value) for value in row]
        return 1 <= int(row[0]) <= step
    except ValueError:
        return False


def _completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that an older version saved, with today's defaults for what it did not know."""
    spec, recipe = read_spec(settings["spec"]), Recipe.from_dict(settings["recipe"])
    return json.loads(json.dumps({**settings, "spec": spec.to_dict(), "recipe": recipe.to_dict()}))


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in {**before, **now}:
        a, b = before.get(key), now.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} was {json.dumps(a)}, is {json.dumps(b)}")
    return found
