"""Plans: a round trip, and every way in which the file may not be what was written."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fpn_engine.errors import FpnEngineError, PlanError
from fpn_engine.plan import FORMAT_VERSION, MANIFEST, MAX_MANIFEST_BYTES, Manifest, read_plan, write_plan
from fpn_engine.spec import Category, ModelSpec

SPEC = ModelSpec(categories=(Category(id=1, name="RBC"), Category(id=7, name="späße")), arch="resnet18", min_size=320)
MANIFEST_VALUE = Manifest(
    spec=SPEC,
    backend="onnxruntime",
    precision="fp32",
    device="cpu",
    versions={"fpn-engine": "0.1.0", "onnxruntime": "1.31.1"},
    build_key="ab" * 32,
    source="model.onnx",
)
PARTS = {"trunk.onnx": bytes(range(256)) * 4, "head.onnx": b"head" * 100}


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.plan"
    write_plan(path, MANIFEST_VALUE, PARTS)
    return path


def refuse(path: Path, *words: str) -> str:
    """The one sentence that ``path`` gets; it names the file and what to do."""
    with pytest.raises(PlanError) as caught:
        read_plan(path)
    sentence = str(caught.value)
    assert str(path) in sentence
    assert "\n" not in sentence
    assert len(sentence) < 500 + len(str(path))
    assert any(remedy in sentence for remedy in ("fpn-engine build", "build it again")), sentence
    for word in words:
        assert word in sentence
    return sentence


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def rewrite(path: Path, content: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def change_manifest(path: Path, **changes: Any) -> None:
    content = members(path)
    values = json.loads(content[MANIFEST]) | changes
    rewrite(path, {**content, MANIFEST: json.dumps({k: v for k, v in values.items() if v is not ...}).encode()})


def test_round_trip(plan: Path) -> None:
    read = read_plan(plan)
    assert read.parts == PARTS
    assert read.manifest.spec == SPEC
    assert dataclasses.replace(read.manifest, parts={}) == MANIFEST_VALUE
    assert {name: part.size for name, part in read.manifest.parts.items()} == {k: len(v) for k, v in PARTS.items()}


def test_same_build_gives_the_same_bytes(plan: Path, tmp_path: Path) -> None:
    written = write_plan(tmp_path / "again.plan", MANIFEST_VALUE, PARTS)
    assert (tmp_path / "again.plan").read_bytes() == plan.read_bytes()
    assert written == read_plan(plan).manifest


def test_plan_without_parts_and_with_an_empty_one(tmp_path: Path) -> None:
    for parts in ({}, {"empty": b""}):
        write_plan(tmp_path / "model.plan", MANIFEST_VALUE, parts)
        assert read_plan(tmp_path / "model.plan").parts == parts


def test_what_is_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "x.plan"
    refuse(path, "there is no plan", "fpn-engine build model.onnx -o")
    for data in (b"", b"text\n", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), os.urandom(5000)):
        path.write_bytes(data)
        refuse(path, "is not a plan")
    rewrite(path, {"other": b"x"})
    refuse(path, "it has no manifest.json")
    refuse(tmp_path, "is not a file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "is not a file")
    (tmp_path / "dangling").symlink_to("nowhere")
    refuse(tmp_path / "dangling", "there is no plan")
    (tmp_path / "loop").symlink_to("loop")
    refuse(tmp_path / "loop")
    refuse(path / "below")


def test_truncated(plan: Path) -> None:
    data = plan.read_bytes()
    for length in [*range(0, len(data), 97), len(data) - 1]:
        plan.write_bytes(data[:length])
        refuse(plan)


@pytest.mark.parametrize("name", [MANIFEST, *PARTS])
def test_flipped_byte_in_a_part(plan: Path, name: str) -> None:
    data = bytearray(plan.read_bytes())
    data[data.index(members(plan)[name]) + 50] ^= 1
    plan.write_bytes(data)
    sentence = refuse(plan, "damaged")
    assert name in sentence


def test_flipped_bit_anywhere_is_found_or_harmless(plan: Path) -> None:
    expected, data = read_plan(plan), plan.read_bytes()
    generator = random.Random(0)
    directory = range(data.index(b"PK\x01\x02"), len(data))  # the zip's own records, bit by bit the most fragile
    for position in [*generator.sample(range(len(data)), 400), *directory]:
        changed = bytearray(data)
        changed[position] ^= 1 << generator.randrange(8)
        plan.write_bytes(changed)
        try:
            assert read_plan(plan) == expected
        except PlanError as error:
            assert "\n" not in str(error)  # noqa: PT017


def test_extra_missing_and_duplicate_members(plan: Path) -> None:
    content = members(plan)
    rewrite(plan, {**content, "extra.bin": b"x"})
    refuse(plan, "holds other files than its manifest.json says", "fpn-engine build model.onnx")
    rewrite(plan, {name: data for name, data in content.items() if name != "head.onnx"})
    refuse(plan, "holds other files")
    rewrite(plan, content)
    for name in (MANIFEST, "head.onnx"):
        rewrite(plan, content)
        with zipfile.ZipFile(plan, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr(name, content[name])
        refuse(plan, "holds other files")


def test_exchanged_parts(plan: Path) -> None:
    content = members(plan)
    rewrite(plan, {**content, "head.onnx": content["trunk.onnx"]})
    refuse(plan, "head.onnx", "wrong size")
    rewrite(plan, {**content, "head.onnx": bytes(len(content["head.onnx"]))})
    refuse(plan, "head.onnx", "does not match its sha256", "fpn-engine build model.onnx")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_members_are_not_unpacked(plan: Path, compression: int) -> None:
    rewrite(plan, members(plan), compression)
    refuse(plan, "is compressed")
    rewrite(plan, {MANIFEST: bytes(MAX_MANIFEST_BYTES)}, compression)
    refuse(plan, "is compressed")


def test_size_beyond_the_file(plan: Path) -> None:
    """A part that claims 3 GB, in the manifest and in the zip, is refused before memory is taken."""
    values = json.loads(members(plan)[MANIFEST])
    values["parts"]["head.onnx"]["size"] = 3_000_000_000
    change_manifest(plan, parts=values["parts"])
    data = bytearray(plan.read_bytes())
    entry = data.rindex(b"head.onnx") - 46  # its record in the central directory; the sizes stand at 20 and 24
    struct.pack_into("<II", data, entry + 20, 3_000_000_000, 3_000_000_000)
    plan.write_bytes(data)
    refuse(plan)


@pytest.mark.parametrize("version", [0, 1, 99])
def test_other_format_version(plan: Path, version: int) -> None:
    change_manifest(plan, format_version=version, source="my model.onnx", new_key=1)
    refuse(plan, f"has plan format {version}", f"reads format {FORMAT_VERSION}", "fpn-engine build 'my model.onnx'")


WRONG = {
    "version text": {"format_version": "1"},
    "version true": {"format_version": True},
    "version list": {"format_version": [1] * 10_000},
    "unknown key": {"surprise": 1},
    "missing key": {"backend": ...},
    "backend": {"backend": 5},
    "device": {"device": None},
    "source": {"source": ["a"]},
    "versions list": {"versions": ["onnxruntime"]},
    "versions of numbers": {"versions": {"onnxruntime": 1.31}},
    "parts list": {"parts": ["head.onnx"]},
    "part text": {"parts": {"head.onnx": "x"}},
    "part without size": {"parts": {"head.onnx": {"sha256": ""}}},
    "part with more": {"parts": {"head.onnx": {"sha256": "", "size": 1, "x": 1}}},
    "part size text": {"parts": {"head.onnx": {"sha256": "", "size": "1"}}},
    "part digest number": {"parts": {"head.onnx": {"sha256": 1, "size": 1}}},
    "spec text": {"spec": "resnet18"},
    "spec unknown key": {"spec": SPEC.to_dict() | {"speed": 1}},
    "spec type": {"spec": SPEC.to_dict() | {"min_size": "big"}},
    "spec infinite": {"spec": SPEC.to_dict() | {"min_size": float("inf")}},
    "spec empty category": {"spec": SPEC.to_dict() | {"categories": [[]]}},
    "spec many levels": {"spec": SPEC.to_dict() | {"levels": [2, 10**12]}},
    "spec long": {"spec": SPEC.to_dict() | {"arch": "x" * 100_000}},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_in_the_manifest(plan: Path, name: str) -> None:
    change_manifest(plan, **WRONG[name])
    refuse(plan, "damaged")


@pytest.mark.parametrize("text", ["", "null", "1", '"x"', "[]", "{", "[" * 100_000, '{"a":' * 50_000, "\xff\xfe", "{}"])
def test_manifest_that_is_no_object(plan: Path, text: str) -> None:
    rewrite(plan, {**members(plan), MANIFEST: text.encode("latin-1")})
    refuse(plan, "manifest.json cannot be read")


def test_huge_manifest(plan: Path) -> None:
    content = members(plan)
    rewrite(plan, {**content, MANIFEST: content[MANIFEST] + b" " * MAX_MANIFEST_BYTES})
    refuse(plan, "its manifest.json has")


def test_source_is_quoted_in_the_remedy(plan: Path) -> None:
    change_manifest(plan, source="x; rm -rf ~")
    rewrite(plan, {**members(plan), "extra": b""})
    refuse(plan, "fpn-engine build 'x; rm -rf ~'")
    change_manifest(plan, source="two\nlines")
    refuse(plan, "fpn-engine build model.onnx")


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FpnEngineError, match=r"cannot write .*; give a place that is writable"):
        write_plan(tmp_path / "file" / "model.plan", MANIFEST_VALUE, PARTS)
    with pytest.raises(FpnEngineError, match="it is a folder"):
        write_plan(tmp_path, MANIFEST_VALUE, PARTS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("written", [0, 1, 700])
def test_disk_full(plan: Path, monkeypatch: pytest.MonkeyPatch, written: int) -> None:
    """The disk takes ``written`` bytes and then no more; the old plan stays."""
    before = plan.read_bytes()

    class FullDisk(zipfile.ZipFile):
        def writestr(self, *arguments: Any, **options: Any) -> None:
            assert self.fp is not None
            self.fp.write(bytes(written))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(zipfile, "ZipFile", FullDisk)
    with pytest.raises(FpnEngineError) as caught:
        write_plan(plan, MANIFEST_VALUE, {"head.onnx": b"new"})
    monkeypatch.undo()
    expected = f"cannot write {plan}: No space left on device; give a place that is writable and has space"
    assert str(caught.value) == expected
    assert plan.read_bytes() == before
    assert list(plan.parent.iterdir()) == [plan]


def test_file_size_limit_of_the_system(plan: Path) -> None:
    """A real refusal by the system in the midst of a write: a process that may write 64 KiB."""
    before = plan.read_bytes()
    code = (
        "import resource, signal, sys; from pathlib import Path; from tests.engine.test_plan import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try: write_plan(Path(sys.argv[1]), MANIFEST_VALUE, {'head.onnx': bytes(1 << 20)})\n"
        "except FpnEngineError as error: sys.exit(str(error))\n"
    )
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "engine"), str(root / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code, plan], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert done.stderr.strip() == f"cannot write {plan}: File too large; give a place that is writable and has space"
    assert plan.read_bytes() == before
    assert list(plan.parent.iterdir()) == [plan]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupted_write_leaves_the_old_plan(
    plan: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    before, writestr = plan.read_bytes(), zipfile.ZipFile.writestr

    def interrupted(self: zipfile.ZipFile, info: zipfile.ZipInfo, data: bytes) -> None:
        if info.filename != MANIFEST:
            raise error
        writestr(self, info, data)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", interrupted)
    with pytest.raises(error):
        write_plan(plan, MANIFEST_VALUE, {"head.onnx": b"new"})
    assert plan.read_bytes() == before
    assert list(plan.parent.iterdir()) == [plan]
