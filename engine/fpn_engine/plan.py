"""The plan: one zip file with a manifest and the compiled parts of a model, checked whole before it is used."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fpn_engine.errors import PlanError
from fpn_engine.files import replacing
from fpn_engine.spec import ModelSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_MANIFEST_BYTES = 1 << 20
# A fixed time, so that the same build gives the same bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One file inside the plan."""

    sha256: str
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a plan holds and what it needs.

    Attributes:
        spec: the model. backend, precision: how its trunk and head run.
        device: the kind of device it was built for, "cpu".
        versions: package versions at build time; those in ``Backend`` checks must match when loading.
        build_key: digest of everything that went into the build; the same key means the same plan.
        source: name of the ONNX file.
        parts: the files inside.
    """

    spec: ModelSpec
    backend: str
    precision: str
    device: str
    versions: dict[str, str]
    build_key: str
    source: str
    parts: dict[str, Part] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        values = dataclasses.asdict(self) | {"spec": self.spec.to_dict()}
        return json.dumps(values, indent=1, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(f"keys {sorted(set(values) ^ known)}")
        parts = {str(name): Part(**part) for name, part in values["parts"].items()}
        return cls(**{**values, "spec": ModelSpec.from_dict(values["spec"]), "parts": parts})


@dataclass(frozen=True, slots=True)
class Plan:
    """A manifest and the bytes of its parts."""

    manifest: Manifest
    parts: dict[str, bytes]


def write_plan(path: Path, manifest: Manifest, parts: Mapping[str, bytes]) -> Manifest:
    """Write a plan whole or not at all; returns the manifest with the parts' digests filled in."""
    described = {name: Part(sha256=_sha256(data), size=len(data)) for name, data in parts.items()}
    manifest = dataclasses.replace(manifest, parts=described)
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for name, data in {MANIFEST: manifest.to_json().encode(), **parts}.items():
            archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), data)
    return manifest


def read_manifest(path: Path) -> Manifest:
    """The manifest alone. Raises PlanError if the file is missing, is not a plan, or is of another format version."""
    try:
        with zipfile.ZipFile(path) as archive:
            return _manifest(path, archive)
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from None


def read_plan(path: Path) -> Plan:
    """The whole plan, every part checked against its digest. Raises PlanError in plain words."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest = _manifest(path, archive)
            names = sorted(archive.namelist())
            if names != sorted([MANIFEST, *manifest.parts]):
                raise PlanError(f"{path} is damaged: it holds {names}; {_rebuild(manifest)}")
            parts = {name: _part(path, archive, name, manifest) for name in manifest.parts}
    except (OSError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from None
    return Plan(manifest, parts)


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        info = archive.getinfo(MANIFEST)
    except KeyError:
        raise PlanError(
            f"{path} is not a plan: it has no {MANIFEST}; make one with: fpn-engine build model.onnx"
        ) from None
    if info.file_size > MAX_MANIFEST_BYTES:
        raise PlanError(f"{path} is not a plan: its {MANIFEST} has {info.file_size} bytes")
    try:
        values = json.loads(archive.read(info))
        version = values["format_version"]
    except (ValueError, TypeError, KeyError):
        raise PlanError(f"{path} is damaged: its {MANIFEST} cannot be read; build it again") from None
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format {version}, this fpn-engine reads format {FORMAT_VERSION}; "
            f"{_rebuild_from(str(values.get('source', 'model.onnx')))}"
        )
    try:
        return Manifest.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"{path} is damaged: its {MANIFEST} has a wrong value ({error}); build it again") from None


def _part(path: Path, archive: zipfile.ZipFile, name: str, manifest: Manifest) -> bytes:
    part = manifest.parts[name]
    if archive.getinfo(name).file_size != part.size:
        raise PlanError(f"{path} is damaged: part {name} has the wrong size; {_rebuild(manifest)}")
    try:
        data = archive.read(name)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError):
        data = b""
    if _sha256(data) != part.sha256:
        raise PlanError(f"{path} is damaged: part {name} does not match its sha256; {_rebuild(manifest)}")
    return data


def _unreadable(path: Path, error: Exception) -> PlanError:
    if isinstance(error, FileNotFoundError):
        return PlanError(f"there is no plan {path}; make one with: fpn-engine build model.onnx -o {path}")
    if isinstance(error, OSError):
        return PlanError(f"cannot read {path}: {error.strerror or error}")
    return PlanError(f"{path} is not a plan or is damaged ({error}); make one with: fpn-engine build model.onnx")


def _rebuild(manifest: Manifest) -> str:
    return _rebuild_from(manifest.source)


def _rebuild_from(source: str) -> str:
    return f"build it again with: fpn-engine build {source}"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
