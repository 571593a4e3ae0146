"""The JSON file beside a checkpoint: what its tensors do not say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fpn_engine.errors import CheckpointError

KEYS = ("about", "spec")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """Values for ModelSpec, and the SHA-256 that the checkpoint must have if the file states one."""

    path: Path
    spec: Mapping[str, Any]
    sha256: str | None


def read_sidecar(path: Path) -> Sidecar:
    """Read ``{"spec": {...}, "about": {...}}`` or a bare spec object.

    ``about`` is free text for people, except ``about.sha256``, the digest of the checkpoint.

    Raises: CheckpointError if the file cannot be read, is not such JSON or has other keys beside ``spec``.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(values).__name__}")
    if "spec" not in values:
        return Sidecar(path=path, spec=values, sha256=None)
    unknown = sorted(set(values) - set(KEYS))
    if unknown:
        raise CheckpointError(f"unknown key {unknown[0]!r} in {path}; known keys: {', '.join(KEYS)}")
    about = values.get("about", {})
    if not isinstance(values["spec"], Mapping) or not isinstance(about, Mapping):
        raise CheckpointError(f"spec and about in {path} must be JSON objects")
    return Sidecar(path=path, spec=values["spec"], sha256=about.get("sha256"))
