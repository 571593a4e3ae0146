"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fpn_engine.errors import FpnEngineError
from fpn_engine.files import cache_folder, remove_stale, replacing

ODD_NAMES = ["model.plan", "a*b?.plan", "[x].plan", "new\nline", "späße 模型.plan", "-o", ".hidden", "a b"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_file_takes_its_place_when_the_block_ends(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            temporary.write_text(content)
        assert path.read_text() == content
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), ValueError("x"), FpnEngineError("x")])
def test_old_file_stays_when_the_block_fails(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EIO])
def test_what_the_disk_says_is_one_sentence(tmp_path: Path, number: int) -> None:
    path = tmp_path / "file"
    with pytest.raises(FpnEngineError) as caught, replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise OSError(number, os.strerror(number))
    expected = f"cannot write {path}: {os.strerror(number)}; give a place that is writable and has space"
    assert str(caught.value) == expected
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    with replacing(path) as temporary:
        temporary.write_text("x")
    assert path.read_text() == "x"


def test_folder_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    expected = r"cannot write .*/file/new: a part of its path is a file, not a folder; give"
    with pytest.raises(FpnEngineError, match=expected), replacing(tmp_path / "file" / "new"):
        pytest.fail("the block must not run")
    assert (tmp_path / "file").read_text() == "x"


@pytest.mark.parametrize("name", ["", ".", "/", "folder", "link"])
def test_folder_is_not_replaced(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("folder")
    with pytest.raises(FpnEngineError, match="it is a folder; give the name of a file"), replacing(Path(name)):
        pytest.fail("the block must not run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link"]


def test_pipe_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FpnEngineError, match="it is a device or pipe"), replacing(tmp_path / "pipe"):
        pytest.fail("the block must not run")


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there/file")
    for content in ("first", "second"):
        with replacing(link) as temporary:
            temporary.write_text(content)
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").read_text() == "second"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "there"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_only_temporaries_of_this_file_are_stale(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "[f]*"
    folder.mkdir()
    mine = [folder / f".{name}.{number}.tmp" for number in (1, 4194304)]
    others = [f".{name}.old.12.tmp", f".{name}.tmp", f"{name}.12.tmp", ".other.plan.12.tmp", ".aXb1.plan.12.tmp", name]
    for path in (*mine, *(folder / other for other in others)):
        path.touch()
    remove_stale(folder / name)
    assert sorted(path.name for path in folder.iterdir()) == sorted(others)


def test_nothing_stale_where_there_is_no_folder(tmp_path: Path) -> None:
    remove_stale(tmp_path / "missing" / "model.plan")
    assert list(tmp_path.iterdir()) == []


def test_cache_folder_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FPN_ENGINE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "fpn-engine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fpn-engine"
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    assert (tmp_path / "mine").is_dir()
    monkeypatch.setenv("FPN_ENGINE_CACHE", "")
    assert cache_folder() == tmp_path / "xdg" / "fpn-engine"


def test_no_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FPN_ENGINE_CACHE", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    with pytest.raises(FpnEngineError, match="there is no home folder to cache in; set FPN_ENGINE_CACHE to a folder"):
        cache_folder()


def test_cache_folder_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        monkeypatch.setenv("FPN_ENGINE_CACHE", str(folder))
        with pytest.raises(FpnEngineError) as caught:
            cache_folder()
        assert str(caught.value).startswith(f"cannot use the cache folder {folder}: ")
        assert str(caught.value).endswith("; set FPN_ENGINE_CACHE to a folder that is writable")
