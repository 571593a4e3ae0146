"""The plan: one zip file with a manifest and the compiled parts of a model, checked whole before it is used."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fpn_engine.errors import PlanError
from fpn_engine.files import replacing
from fpn_engine.masks.spec import AnySpec, MaskSpec, read_spec
from fpn_engine.spec import ModelSpec

FORMAT_VERSION = 2  # 2: a plan for ONNX Runtime on the CPU holds joints too
MANIFEST = "manifest.json"
NAMED_SOURCE = "--model "  # begins the source of a plan that was built from a named model
MAX_MANIFEST_BYTES = 1 << 20
MAX_REASON = 200  # characters of a wrong value that a message repeats
# A fixed time, so that the same build gives the same bytes.
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
# What zipfile raises on a crafted or damaged archive.
_DAMAGE = (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, OverflowError, ValueError)


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
        device: the kind of device it was built for, "cpu" or "cuda".
        versions: package versions at build time; those in ``Backend`` checks must match when loading.
        build_key: digest of everything that went into the build; the same key means the same plan.
        source: name of the ONNX file, or "--model NAME" for a named model.
        parts: the files inside.
    """

    spec: AnySpec
    backend: str
    precision: str
    device: str
    versions: dict[str, str]
    build_key: str
    source: str
    parts: dict[str, Part] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def runtime(self) -> str:
        """How it runs, for people: onnxruntime fp32 on the CPU."""
        return f"{self.backend} {self.precision} on the {self.device.upper()}"

    @property
    def detector(self) -> ModelSpec:
        """The spec of a detector. Raises PlanError for a mask-proposal model."""
        if isinstance(self.spec, MaskSpec):
            raise PlanError(f"the plan built from {self.source} is of a mask-proposal model; give one of a detector")
        return self.spec

    def to_json(self) -> str:
        values = dataclasses.asdict(self) | {"spec": self.spec.to_dict()}
        return json.dumps(values, indent=1, sort_keys=True)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        known = {f.name for f in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(f"keys {sorted(set(values) ^ known)}")
        for name in ("backend", "precision", "device", "build_key", "source"):
            _require_type(name, values[name], str)
        for package, version in values["versions"].items():
            _require_type(f"versions.{package}", version, str)
        parts = {name: Part(**part) for name, part in values["parts"].items()}
        for name, part in parts.items():
            _require_type(f"parts.{name}.size", part.size, int)
            _require_type(f"parts.{name}.sha256", part.sha256, str)
        return cls(**{**values, "spec": read_spec(values["spec"]), "parts": parts})


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


def read_plan(path: Path) -> Plan:
    """The whole plan, every part checked against its digest.

    Raises: PlanError in plain words if the file is missing, damaged, no plan or of another format version.
    """
    with _open(path) as archive:
        manifest = _manifest(path, archive)
        if sorted(archive.namelist()) != sorted([MANIFEST, *manifest.parts]):
            raise PlanError(
                f"{path} is damaged: it holds other files than its {MANIFEST} says; {rebuild_hint(manifest)}"
            )
        return Plan(manifest, {name: _part(path, archive, name, manifest) for name in manifest.parts})


@contextlib.contextmanager
def _open(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        if path.exists() and not path.is_file():
            raise PlanError(f"{path} is not a file; give a plan that fpn-engine build wrote")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except FileNotFoundError:
        raise PlanError(f"there is no plan {path}; make one with: fpn-engine build model.onnx -o {path}") from None
    except OSError as error:
        raise PlanError(
            f"cannot read {path}: {error.strerror or error}; give a plan that fpn-engine build wrote"
        ) from None
    except _DAMAGE as error:
        raise PlanError(
            f"{path} is not a plan or is damaged ({error}); make one with: fpn-engine build model.onnx"
        ) from None


def _manifest(path: Path, archive: zipfile.ZipFile) -> Manifest:
    try:
        info = archive.getinfo(MANIFEST)
    except KeyError:
        raise PlanError(
            f"{path} is not a plan: it has no {MANIFEST}; make one with: fpn-engine build model.onnx"
        ) from None
    if info.file_size > MAX_MANIFEST_BYTES:
        raise PlanError(
            f"{path} is not a plan: its {MANIFEST} has {info.file_size} bytes; "
            "make one with: fpn-engine build model.onnx"
        )
    data = _read_stored(archive, info)
    try:
        values = json.loads(data)
        version = values["format_version"]
        _require_type("format_version", version, int)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PlanError(f"{path} is damaged: its {MANIFEST} cannot be read; build it again") from None
    if version != FORMAT_VERSION:
        raise PlanError(
            f"{path} has plan format {version}, this fpn-engine reads format {FORMAT_VERSION}; "
            f"{_rebuild_from(str(values.get('source', 'model.onnx')))}"
        )
    try:
        return Manifest.from_dict(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = str(error)[:MAX_REASON]
        raise PlanError(f"{path} is damaged: its {MANIFEST} has a wrong value ({reason}); build it again") from None


def _part(path: Path, archive: zipfile.ZipFile, name: str, manifest: Manifest) -> bytes:
    part = manifest.parts[name]
    info = archive.getinfo(name)
    if info.file_size != part.size:
        raise PlanError(f"{path} is damaged: part {name} has the wrong size; {rebuild_hint(manifest)}")
    try:
        data = _read_stored(archive, info)
    except _DAMAGE:
        data = b""
    if _sha256(data) != part.sha256:
        raise PlanError(f"{path} is damaged: part {name} does not match its sha256; {rebuild_hint(manifest)}")
    return data


def _read_stored(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member as it lies in the file: nothing is unpacked, so that nothing is larger than the file."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise zipfile.BadZipFile(f"{info.filename} is compressed")
    return archive.read(info)


def rebuild_hint(manifest: Manifest, *, precision: str | None = None) -> str:
    """The command that makes the plan anew, or one for the CPU in another ``precision`` if one is given."""
    if manifest.backend == "tensorrt" and precision is None:
        return _rebuild_from(manifest.source, f" --backend tensorrt --precision {manifest.precision}")
    options = " --device cuda" if manifest.device == "cuda" and precision is None else ""
    if manifest.backend == "onnxruntime" and options:
        provider = " --provider tensorrt" if manifest.versions.get("provider") == "tensorrt" else ""
        provider += f" --precision {manifest.precision}"
        return _rebuild_from(manifest.source, f" --backend onnxruntime{options}{provider}")
    precision = precision or manifest.precision
    if precision in ("bf16", "fp16") or options:  # which only the native backend runs
        return _rebuild_from(manifest.source, f" --precision {precision}{options}")
    return _rebuild_from(manifest.source, (" --backend native" if manifest.backend == "native" else "") + options)


def _rebuild_from(source: str, options: str = "") -> str:
    source = source if source.isprintable() else "model.onnx"
    option = NAMED_SOURCE if source.startswith(NAMED_SOURCE) else ""
    return f"build it again with: fpn-engine build {option}{shlex.quote(source.removeprefix(option))}{options}"


def _require_type(name: str, value: object, kind: type) -> None:
    if type(value) is not kind:
        raise ValueError(f"{name} is {value!r}")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
