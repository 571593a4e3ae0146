"""``fpn-engine infer``: what it prints and writes, and what its options change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fpn_engine.cli import report
from fpn_engine.engine import Engine
from fpn_engine.images import read_image
from tests.engine.conftest import Run, Tiny, make_picture, save_picture


@pytest.fixture
def infer(tiny: Tiny, run: Run) -> Run:
    return lambda *arguments: run("infer", "--plan", tiny.plan, "--threads", 1, *arguments)


@pytest.fixture
def images(workplace: Path) -> Path:
    """A folder with three good images of two sizes and one that is none."""
    folder = workplace / "images"
    for seed, (name, size) in enumerate({"a.png": (60, 80), "b.jpg": (90, 50), "d.png": (60, 80)}.items()):
        save_picture(folder / name, *size, seed)
    (folder / "c.png").write_bytes(b"no picture")
    return folder


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def detections(text: str) -> list[dict[str, Any]]:
    (result,) = json.loads(text)
    found: list[dict[str, Any]] = result["detections"]
    return found


def test_a_plan_is_found_and_named_on_stderr(
    tiny: Tiny, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_picture(workplace / "a.png")

    def chosen(*options: object) -> str:
        ran = run("infer", "a.png", "--json", *options)
        assert ran.code == 0
        assert len(json.loads(ran.out)) == 1
        return ran.err

    run("build", tiny.model, "-o", workplace.parent / "elsewhere.plan")
    assert chosen() == f"using {workplace.parent / 'elsewhere.plan'} (the last plan built)\n"
    (workplace / "here.plan").symlink_to(tiny.plan)
    assert chosen() == "using here.plan (the only plan in this folder)\n"
    monkeypatch.setenv("FPN_ENGINE_PLAN", str(tiny.plan))
    assert chosen() == f"using {tiny.plan} ($FPN_ENGINE_PLAN)\n"
    assert chosen("--plan", "here.plan") == ""


def test_table_of_one_image(infer: Run, workplace: Path, engine: Engine) -> None:
    path = save_picture(workplace / "a name that is long enough to be cut off by a table of a few columns only.png")
    ran = infer(path, "--max-detections", 60)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.splitlines()[0] == str(path)
    (found,) = engine(path, max_detections=60)
    for detection in found.filter(min_score=0.5):
        assert f"{detection.score:.2f}" in ran.out
        assert f"{detection.box[2]:.1f}" in ran.out
    rows = sum(ran.out.count(f"│ {name}") for name in ("cat", "dog", "bird"))
    assert rows == len(found.filter(min_score=0.5)) < len(found)


def test_table_of_several_images(infer: Run, images: Path, engine: Engine) -> None:
    ran = infer(images)
    assert ran.code == 3
    assert ran.err == (
        f"fpn-engine: '{images / 'c.png'}' is not an image in a known format (JPEG, PNG, WEBP, TIFF, BMP, GIF, PPM, "
        "JPEG2000, AVIF)\n1 of 4 images failed\n"
    )
    total = sum(len(found.filter(min_score=0.5)) for found in engine([images / n for n in ("a.png", "b.jpg", "d.png")]))
    assert "3 images" in ran.out
    assert ran.out.splitlines()[-2].split("│")[-2].strip() == str(total)


def test_tables_stay_on_stdout_while_a_bar_is_on_stderr(
    infer: Run, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "PAGE", 1)
    monkeypatch.setenv("FORCE_COLOR", "1")
    ran = infer(images)
    for name in ("a.png", "b.jpg", "d.png"):
        assert name in ran.out
    assert "detecting" in ran.err
    assert "detecting" not in ran.out


def test_json(infer: Run, images: Path, engine: Engine) -> None:
    ran = infer(images, "--json")
    results = json.loads(ran.out)
    assert ran.code == 3
    assert [Path(result["image"]).name for result in results] == ["a.png", "b.jpg", "c.png", "d.png"]
    assert set(results[2]) == {"image", "error"}
    (expected,) = engine(images / "a.png")
    assert (results[0]["height"], results[0]["width"]) == (60, 80)
    found = results[0]["detections"]
    np.testing.assert_array_equal(np.float32([each["box"] for each in found]), expected.boxes)
    np.testing.assert_array_equal(np.float32([each["score"] for each in found]), expected.scores)
    assert [each["name"] for each in found] == expected.names
    assert [each["category_id"] for each in found] == expected.category_ids.tolist()


def test_json_lines(infer: Run, images: Path) -> None:
    results = lines(infer(images, "--format", "jsonl").out)
    assert results == json.loads(infer(images, "--json").out)


def test_coco(infer: Run, images: Path, workplace: Path) -> None:
    results = json.loads(infer(images, "--format", "coco").out)
    assert {result["image_id"] for result in results} == {"a", "b", "d"}
    entries = [{"id": i, "file_name": name, "height": 1, "width": 1} for i, name in [(5, "a.png"), (9, "b.jpg")]]
    truth = {"images": entries, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (workplace / "truth.json").write_text(json.dumps(truth))
    ran = infer(images, "--format", "coco", "--annotations", "truth.json")
    assert {result["image_id"] for result in json.loads(ran.out)} == {5, 9}
    assert ran.code == 3
    assert "do not list the image" in ran.err  # d.png, beside the broken c.png
    assert ran.err.endswith("2 of 4 images failed\n")


def test_two_images_with_one_coco_id(infer: Run, workplace: Path) -> None:
    for folder in ("one", "two"):
        save_picture(workplace / folder / "a.png")
    ran = infer("one", "two", "--format", "coco")
    assert ran.code == 3
    assert "would share the COCO image id 'a'" in ran.err
    assert len(json.loads(ran.out)) > 0


@pytest.mark.parametrize("format", ["json", "jsonl", "coco"])
def test_output_file(format: str, infer: Run, images: Path, workplace: Path) -> None:
    path = workplace / "new" / "results"
    printed = infer(images, "--format", format)
    written = infer(images, "--format", format, "-o", path)
    assert (written.code, written.out) == (3, "")
    assert path.read_text() == printed.out
    assert [left.name for left in path.parent.iterdir()] == ["results"]


@pytest.mark.parametrize("output", ["folder", "file/results.json"])
@pytest.mark.parametrize("format", ["json", "jsonl"])
def test_an_output_that_cannot_be(output: str, format: str, infer: Run, images: Path, workplace: Path) -> None:
    (workplace / "folder").mkdir()
    (workplace / "file").write_text("mine")
    ran = infer(images, "--format", format, "-o", output)
    assert (ran.code, ran.out) == (1, "")
    assert f"cannot write {output}" in ran.err
    assert (workplace / "file").read_text() == "mine"


def test_a_refused_run_leaves_the_old_results(infer: Run, images: Path, workplace: Path) -> None:
    output = workplace / "results.json"
    output.write_text("old")
    assert infer(images, "--json", "-o", output, "--classes", "horse").code == 1
    assert infer(images, "--format", "jsonl", "-o", output, "--classes", "horse").code == 1
    assert infer("missing*.png", "--format", "jsonl", "-o", output).code == 1
    assert output.read_text() == "old"


def test_all_failed(infer: Run, images: Path) -> None:
    ran = infer(images / "c.png", "missing.jpg", images.parent, "--json")
    assert ran.code == 1  # a folder without images is a mistake in the call
    ran = infer(images / "c.png", "missing.jpg", "--json")
    assert ran.code == 4
    assert ran.err.endswith("2 of 2 images failed\n")
    assert ["error" in result for result in json.loads(ran.out)] == [True, True]
    assert infer("missing.jpg").code == 4
    assert infer("missing.jpg").out == ""


def test_not_a_number_fails_the_image(broken_plan: Path, images: Path, run: Run) -> None:
    ran = run("infer", "--plan", broken_plan, images / "a.png", "--json")
    assert ran.code == 4
    (result,) = json.loads(ran.out)
    assert "the network gave NaN or infinity" in result["error"]
    assert "detections" not in result


def test_score_and_nms(infer: Run, images: Path) -> None:
    path = images / "a.png"
    assert min(each["score"] for each in detections(infer(path, "--json").out)) < 0.85
    high = detections(infer(path, "--json", "--score", 0.85).out)
    assert high
    assert min(each["score"] for each in high) > 0.85
    assert detections(infer(path, "--json", "--score", 1).out) == []
    everything = detections(infer(path, "--json", "--score", 0, "--nms", 1, "--max-detections", 1000).out)
    apart = detections(infer(path, "--json", "--score", 0, "--nms", 0, "--max-detections", 1000).out)
    assert len(everything) == 120  # 40 proposals, 3 classes
    assert 0 < len(apart) < 60
    assert "nothing found" in infer(path, "--score", 1).out


def test_classes(infer: Run, images: Path) -> None:
    path = images / "a.png"
    everything = detections(infer(path, "--json", "--max-detections", 1000).out)
    birds = [each for each in everything if each["name"] == "bird"]
    assert 1 < len(birds) < len(everything)
    assert detections(infer(path, "--json", "--classes", "bird", "--max-detections", 1000).out) == birds
    assert detections(infer(path, "--json", "--classes", "7", "--max-detections", 1000).out) == birds
    both = detections(infer(path, "--json", "--classes", "bird, 1", "--max-detections", 1000).out)
    assert both == [each for each in everything if each["name"] in ("bird", "cat")]


def test_most_detections_are_counted_among_the_wanted_classes(infer: Run, images: Path) -> None:
    path = images / "a.png"
    everything = detections(infer(path, "--json", "--max-detections", 1000).out)
    assert detections(infer(path, "--json", "--max-detections", 2).out) == everything[:2]
    rarest = [each for each in everything if each["name"] == "bird"]
    assert rarest[1] not in everything[:2]
    assert detections(infer(path, "--json", "--max-detections", 2, "--classes", "bird").out) == rarest[:2]


@pytest.mark.parametrize("classes", ["horse", "", "cat,", "2"])
def test_unknown_class(classes: str, infer: Run, images: Path) -> None:
    ran = infer(images / "a.png", "--classes", classes)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith("fpn-engine: unknown class")
    assert ran.err.endswith("this model knows cat, dog, bird\n")


def test_batches_give_the_same(infer: Run, images: Path) -> None:
    alone, together = (lines(infer(images, "--format", "jsonl", "--batch", batch).out) for batch in (1, 3))
    assert [result["image"] for result in together] == [result["image"] for result in alone]
    for one, other in zip(alone, together, strict=True):
        assert len(one.get("detections", [])) == len(other.get("detections", []))
        for a, b in zip(one.get("detections", []), other.get("detections", []), strict=True):
            assert a["box"] == pytest.approx(b["box"], abs=1e-3)
            assert a["score"] == pytest.approx(b["score"], abs=1e-4)


def test_save(infer: Run, images: Path, workplace: Path) -> None:
    Image.fromarray(make_picture(60, 80)).save(images / "e.gif")
    ran = infer(images, "--save", "out/pictures")
    assert ran.code == 3
    folder = workplace / "out" / "pictures"
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.jpg", "d.png", "e.png"]
    picture = read_image(folder / "a.png")
    original = make_picture(60, 80)
    assert picture.shape == original.shape
    assert 0.05 < (picture != original).any(axis=2).mean() < 0.95
    clean = infer(images / "a.png", "--save", "clean", "--score", 1)
    assert clean.code == 0
    np.testing.assert_array_equal(read_image(workplace / "clean" / "a.png"), original)


def test_pictures_of_one_name_from_two_folders(infer: Run, workplace: Path) -> None:
    for seed, name in enumerate(["one/a.png", "two/a.png", "three/a-2.png", "two/a.PNG"]):
        save_picture(workplace / name, 40 + seed, 50)
    assert infer("one", "two", "three", "--save", "out").code == 0
    sizes = {path.name: read_image(path).shape for path in sorted((workplace / "out").iterdir())}
    assert sorted(sizes) == ["a-2-2.png", "a-2.png", "a-3.png", "a.png"]
    assert len(set(sizes.values())) == 4


def test_pictures_never_replace_the_images(infer: Run, images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in images.iterdir()}
    for folder in (images, images / ".." / "images", "images"):
        ran = infer(images / "a.png", "--save", folder)
        assert ran.code == 1
        assert "would replace the images themselves; name another folder" in ran.err
    linked = images.parent / "linked"
    linked.mkdir()
    (linked / "a.png").symlink_to(images / "a.png")
    assert "would replace the image behind" in infer(images / "a.png", "--save", linked).err
    monkeypatch.chdir(images)
    assert infer("a.png", "--save", ".").code == 1
    assert {path.name: path.read_bytes() for path in images.iterdir()} == before


def test_pictures_that_cannot_be_written(infer: Run, images: Path, workplace: Path) -> None:
    (workplace / "file").write_text("mine")
    ran = infer(images, "--save", "file/pictures", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert "cannot write file/pictures" in ran.err
    (workplace / "out" / "a.png").mkdir(parents=True)
    ran = infer(images / "a.png", images / "d.png", "--save", "out", "--json")
    assert ran.code == 3
    assert ["error" in result for result in json.loads(ran.out)] == [True, False]


def test_resume(infer: Run, images: Path, workplace: Path) -> None:
    output = workplace / "results.jsonl"
    options = (images, "--format", "jsonl", "-o", output)
    infer(*options)
    whole = output.read_text()
    first, *_ = whole.splitlines(keepends=True)

    output.write_text(first + whole[len(first) : len(first) + 40])  # killed while it wrote the second
    ran = infer(*options, "--resume")
    assert output.read_text() == whole
    assert ran.err.startswith(f"1 of 4 images are done already in {output}\n")
    assert ran.code == 3

    assert infer(*options, "--resume").code == 3  # only the broken one is left, but not all failed

    (images / "c.png").write_bytes((images / "a.png").read_bytes())  # mended meanwhile
    assert infer(*options, "--resume").code == 0
    results = lines(output.read_text())
    assert [Path(result["image"]).name for result in results] == ["a.png", "b.jpg", "c.png", "d.png", "c.png", "c.png"]
    assert results[5]["detections"] == results[0]["detections"]

    before = output.read_bytes()
    ran = infer(*options, "--resume")
    assert (ran.code, ran.err) == (0, f"4 of 4 images are done already in {output}\n")
    assert output.read_bytes() == before


def test_resume_gives_pictures_the_same_names(infer: Run, workplace: Path) -> None:
    for seed, name in enumerate(["one/a.png", "two/a.png"]):
        save_picture(workplace / name, 40 + seed, 50)
    options = ("one", "two", "--format", "jsonl", "-o", "results.jsonl", "--save", "out")
    infer(*options)
    first, _ = (workplace / "results.jsonl").read_text().splitlines(keepends=True)
    before = {path.name: path.read_bytes() for path in (workplace / "out").iterdir()}
    (workplace / "results.jsonl").write_text(first)
    infer(*options, "--resume")
    assert {path.name: path.read_bytes() for path in (workplace / "out").iterdir()} == before


@pytest.mark.parametrize("content", ["my thesis", "my\nthesis\n", '{"image": "a.png"}\nno\n', "[\n", "["])
def test_resume_never_cuts_what_is_not_ours(content: str, infer: Run, images: Path, workplace: Path) -> None:
    (workplace / "thesis").write_text(content)
    ran = infer(images, "--format", "jsonl", "-o", "thesis", "--resume")
    assert ran.code == 1
    assert "cannot resume thesis: line" in ran.err
    assert (workplace / "thesis").read_text() == content


@pytest.mark.parametrize(
    ("options", "name"),
    [
        (["--json", "--format", "coco"], "--json"),
        (["--resume"], "--resume"),
        (["--resume", "--json", "-o", "x"], "--resume"),
        (["--resume", "--format", "jsonl"], "--resume"),
        (["-o", "x"], "--output"),
        (["--annotations", "x"], "--annotations"),
        (["--score", "1.5"], "--score"),
        (["--score", "nan"], "--score"),
        (["--nms", "-1"], "--nms"),
        (["--batch", "0"], "--batch"),
        (["--batch", "10000000000000000000000"], "--batch"),
        (["--threads", "1000000"], "--threads"),
        (["--max-detections", "10000000000000000000000"], "--max-detections"),
        (["--format", "xml"], "--format"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_usage(options: list[str], name: str, infer: Run, images: Path) -> None:
    ran = infer(images, *options)
    assert (ran.code, ran.out) == (2, "")
    assert name in ran.err
