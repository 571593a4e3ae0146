"""Files, folders and globs: order, filters, duplicates, and what is left for the reader to report."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from fpn_engine.errors import ImageError
from fpn_engine.image_file import FORMATS
from fpn_engine.sources import SUFFIXES, list_images


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: images at two depths beside things that are none."""
    for name in ("b.jpg", "a.PNG", "c.txt", ".hidden.jpg", "sub/d.jpg", "sub/deep/e.tif", ".git/f.jpg"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "folder.jpg" / "g.jpg").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(inputs: Iterable[str | os.PathLike[str]], **options: bool) -> list[str]:
    return [path.as_posix() for path in list_images(inputs, **options)]


def test_folder_is_sorted_and_filtered(folder: Path) -> None:
    assert names(["."]) == ["a.PNG", "b.jpg"]
    assert list(list_images([folder])) == [folder / "a.PNG", folder / "b.jpg"]


def test_recursive_goes_into_folders_but_not_hidden_ones(folder: Path) -> None:
    assert names(["."], recursive=True) == ["a.PNG", "b.jpg", "folder.jpg/g.jpg", "sub/d.jpg", "sub/deep/e.tif"]


def test_given_order_is_kept_and_duplicates_are_removed(folder: Path) -> None:
    given = ["sub/d.jpg", "b.jpg", Path("./b.jpg"), ".", str(folder / "a.PNG"), "sub"]
    assert names(given) == ["sub/d.jpg", "b.jpg", "a.PNG"]


def test_two_links_to_one_file_are_two(folder: Path) -> None:
    (folder / "link.jpg").symlink_to("b.jpg")
    assert names(["link.jpg", "b.jpg"]) == ["link.jpg", "b.jpg"]


def test_explicit_files_are_yielded_as_they_are(folder: Path) -> None:
    given = ["c.txt", "missing.jpg", ".hidden.jpg", "missing"]
    assert names(given) == given


def test_one_input_alone(folder: Path) -> None:
    assert names("b.jpg") == ["b.jpg"]
    assert names(Path("sub")) == ["sub/d.jpg"]  # type: ignore[arg-type]


def test_globs(folder: Path) -> None:
    assert names(["*"]) == ["a.PNG", "b.jpg"]
    assert names(["**/*.jpg"]) == ["b.jpg", "folder.jpg/g.jpg", "sub/d.jpg"]
    assert names(["s?b/**"]) == ["sub/d.jpg", "sub/deep/e.tif"]
    assert names([str(folder / "[ab].*")]) == [f"{folder.as_posix()}/a.PNG", f"{folder.as_posix()}/b.jpg"]


def test_a_name_that_exists_is_no_glob(folder: Path) -> None:
    (folder / "x[1].jpg").touch()
    (folder / "s*b").mkdir()
    (folder / "s*b" / "h.jpg").touch()
    assert names(["x[1].jpg", "s*b"]) == ["x[1].jpg", "s*b/h.jpg"]


@pytest.mark.parametrize("name", ["new\nline.jpg", "günther 図.jpg", "lone\udcff.jpg"])
def test_odd_names_survive(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    for given in (tmp_path, tmp_path / name, tmp_path / "*.jpg"):
        assert list(list_images([given])) == [tmp_path / name]


def test_in_a_folder_broken_files_are_left_to_the_reader(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to("absent.jpg")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    os.mkfifo(tmp_path / "fifo.jpg")
    assert [path.name for path in list_images([tmp_path])] == ["dangling.jpg", "fifo.jpg", "loop.jpg"]
    assert [path.name for path in list_images([tmp_path / "dangling.jpg"])] == ["dangling.jpg"]


def test_links_to_folders_are_not_followed(folder: Path) -> None:
    (folder / "sub" / "up").symlink_to(folder)
    assert names(["sub"], recursive=True) == ["sub/d.jpg", "sub/deep/e.tif"]
    (folder / "linked").symlink_to("sub")
    assert names(["linked"]) == ["linked/d.jpg"]  # given by name


@pytest.mark.parametrize("recursive", [False, True])
def test_empty_folder(tmp_path: Path, recursive: bool) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ImageError, match="holds no image") as caught:
        list(list_images([tmp_path], recursive=recursive))
    assert repr(str(tmp_path)) in str(caught.value)
    assert "--recursive" not in str(caught.value)


def test_empty_folder_with_subfolders_names_the_option(folder: Path) -> None:
    (folder / "outer").mkdir()
    (folder / "outer" / "inner").mkdir()
    with pytest.raises(ImageError, match="--recursive"):
        names(["outer"])
    with pytest.raises(ImageError, match=r"holds no image [^;]*$"):
        names(["outer"], recursive=True)


def test_glob_without_a_match(folder: Path) -> None:
    for pattern in ("*.webp", "*.txt", "nowhere/*"):
        with pytest.raises(ImageError, match="no image matches") as caught:
            names([pattern])
        assert repr(pattern) in str(caught.value)


def test_an_empty_name(folder: Path) -> None:
    with pytest.raises(ImageError, match="the name of an image is empty"):
        list(list_images([""]))


def test_errors_come_after_what_was_before_them(folder: Path) -> None:
    images = list_images(["b.jpg", "*.webp"])
    assert next(images) == Path("b.jpg")
    with pytest.raises(ImageError):
        next(images)


def test_unlistable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(path: str) -> None:  # permissions would not stop a test that runs as root
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ImageError, match="cannot be listed: Permission denied") as caught:
        list(list_images([tmp_path]))
    assert repr(str(tmp_path)) in str(caught.value)


def test_suffixes_are_those_of_the_formats_read() -> None:
    registered = Image.registered_extensions()
    assert {registered.get(suffix, "AVIF") for suffix in SUFFIXES} == {*FORMATS, "MPO"}
