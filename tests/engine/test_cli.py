"""The command line as a whole: help, export, build, eval and info, and the whole line in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fpn_engine
from fpn_engine.images import read_image
from fpn_engine.plan import read_plan
from tests.engine.conftest import Run, Tiny, save_picture
from tests.engine.dataset import dataset

__all__ = ["dataset"]

COMMANDS = ("demo", "export", "build", "infer", "eval", "train", "scenes", "info", "bench", "doctor")


def test_help_names_the_steps_and_the_exit_codes(run: Run) -> None:
    help = run("--help")
    assert help.code == 0
    for command in COMMANDS:
        assert command in help.out
    assert help.out.index("export model.pth") < help.out.index("build model.onnx") < help.out.index("infer image.jpg")
    assert "3 some images failed" in " ".join(help.out.split())
    assert help.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, run: Run) -> None:
    help = run(command, "--help")
    assert (help.code, help.err) == (0, "")
    assert len(help.out.splitlines()) > 5


@pytest.mark.parametrize("command", ["export", "build", "infer", "eval", "info"])
def test_a_command_without_arguments_explains_itself(command: str, run: Run) -> None:
    ran = run(command)
    assert ran.code == 2
    assert ran.out.strip() == run(command, "--help").out.strip()


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"fpn-engine {fpn_engine.__version__}\n", "")


def test_build(tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "new").mkdir()
    (workplace / "new" / "model.onnx").symlink_to(tiny.model)
    built = run("build", "new/model.onnx")
    assert (built.code, built.out) == (0, "")
    assert "new/model.plan: onnxruntime fp32 on the CPU" in built.err
    assert built.err.endswith("next: fpn-engine infer image.jpg\n")
    stamp = (workplace / "new" / "model.plan").stat().st_mtime_ns
    assert "new/model.plan is up to date" in run("build", "new/model.onnx").err
    assert (workplace / "new" / "model.plan").stat().st_mtime_ns == stamp
    assert "built in" in run("build", "new/model.onnx", "--force").err


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--set", "foo"], 2, "'foo' is not KEY=JSON"),
        (["--set", "foo=1"], 1, "unknown key 'foo'"),
        (["--set", "min_size=abc"], 1, "min_size"),
        (["--classes", "a,b"], 1, "the number of categories is 2"),
        (["--classes", "a,,b"], 2, "empty name"),
        (["--classes", "a,b,a"], 2, "one twice"),
        (["--min-size", "900"], 1, "min_size must be at most max_size (96), not 900"),
        (["--score", "1.5"], 2, "--score"),
        (["--spec", "missing.json"], 1, "missing.json cannot be read"),
        (["-o", "."], 1, "it is a folder"),
    ],
)
def test_wrong_export_options(options: list[str], code: int, message: str, tiny: Tiny, run: Run) -> None:
    ran = run("export", tiny.checkpoint, *options)
    assert ran.code == code
    assert message in ran.err.replace("\n", "")
    assert ran.out == ""


def test_export_never_replaces_the_checkpoint(tiny: Tiny, run: Run) -> None:
    before = tiny.checkpoint.read_bytes()
    ran = run("export", tiny.checkpoint, "-o", tiny.checkpoint.parent / "." / tiny.checkpoint.name)
    assert ran.code == 1
    assert "would replace the checkpoint" in ran.err
    assert tiny.checkpoint.read_bytes() == before


def test_eval(dataset: Path, tiny: Tiny, run: Run) -> None:
    given = ("eval", "--annotations", dataset, "--images", "images", "--plan", tiny.plan)
    table = run(*given)
    assert (table.code, table.err) == (0, "")
    for word in ("AP50", "AR100", "cat", "dog", "bird"):
        assert word in table.out
    score = run(*given, "--json")
    assert (score.code, score.err) == (0, "")
    numbers = json.loads(score.out)
    assert len(numbers) == 13
    assert numbers["AR100"] == 1
    assert 0 < numbers["AP"] <= 1
    assert set(numbers["per_class"]) == {"cat", "dog", "bird"}


def test_eval_asks_for_the_right_images(dataset: Path, tiny: Tiny, workplace: Path, run: Run) -> None:
    given = ("eval", "--annotations", dataset, "--plan", tiny.plan, "--json", "--images")
    assert "there is no folder nowhere" in run(*given, "nowhere").err
    save_picture(workplace / "images" / "extra.png")  # more than is annotated is fine
    save_picture(workplace / "images" / "2.png", 50, 90)
    other = run(*given, "images")
    assert other.code == 0
    assert other.err == (
        "1 of 2 images have another size than the annotations say, the first is 2.png; check --images\n"
    )
    json.loads(other.out)
    recall = run(*given, "images", "--recall")
    assert (recall.code, recall.err) == (other.code, other.err)
    (workplace / "images" / "2.png").write_bytes(b"no picture")
    broken = run(*given, "images")
    assert (broken.code, broken.out) == (1, "")
    assert "2.png' is not an image" in broken.err
    (workplace / "images" / "2.png").unlink()
    missing = run(*given, "images")
    assert (missing.code, missing.out) == (1, "")
    assert "1 of 2 annotated images are not in images, the first is 2.png; check --images" in missing.err


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"images": 3}'])
def test_eval_with_wrong_annotations(content: str, tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "truth.json").write_text(content)
    ran = run("eval", "--annotations", "truth.json", "--images", ".", "--plan", tiny.plan)
    assert (ran.code, ran.out) == (1, "")
    assert "the annotations truth.json are not" in ran.err


def test_eval_refuses_other_classes(dataset: Path, tiny: Tiny, run: Run) -> None:
    dataset.write_text(dataset.read_text().replace("dog", "horse"))
    ran = run("eval", "--annotations", dataset, "--images", "images", "--plan", tiny.plan)
    assert ran.code == 1
    assert "category 3 is 'dog' to the model but 'horse' in the annotations" in ran.err


def test_info(tiny: Tiny, run: Run) -> None:
    kinds = {tiny.checkpoint: "checkpoint", tiny.model: "ONNX model", tiny.plan: "plan"}
    for path, kind in kinds.items():
        table = run("info", path)
        assert (table.code, table.err) == (0, "")
        assert table.out.startswith(kind)
        assert "1 cat, 3 dog, 7 bird" in table.out
        facts = json.loads(run("info", path, "--json").out)
        assert (facts["kind"], facts["file"], facts["bytes"]) == (kind, str(path), path.stat().st_size)
        assert facts["spec"]["categories"][1] == {"id": 3, "name": "dog"}
    assert facts["spec"] == json.loads(read_plan(tiny.plan).manifest.to_json())["spec"]


def test_info_knows_a_plan_by_its_contents(tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "renamed").symlink_to(tiny.plan)
    assert run("info", "renamed").out.startswith("plan")
    (workplace / "bogus.bin").write_bytes(b"junk" * 9 + b"PK\x05\x06" + b"\x01" * 18)  # ends like an archive
    done = run("info", "bogus.bin")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "is no checkpoint" in done.err


def test_the_whole_line_in_processes_of_its_own(dataset: Path, tiny: Tiny, workplace: Path) -> None:
    script = str(Path(sys.executable).with_name("fpn-engine"))

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run([script, *arguments], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done

    (workplace / "model.pth").symlink_to(tiny.checkpoint)
    (workplace / "model.json").symlink_to(tiny.checkpoint.with_suffix(".json"))
    options = ["--classes", "cat, dog,bird", "--min-size", "48", "--max-size", "80", "--score", "0.2", "--nms", "0.4"]
    export = command("export", "model.pth", *options, "--set", "box_detections_per_img=7")
    assert export.stdout == ""
    assert "model.onnx: faster_rcnn resnet18, pyramid of 16 channels, 3 classes, 48/80 pixels" in export.stderr
    assert export.stderr.endswith("next: fpn-engine build model.onnx\n")
    assert command("build", "model.onnx").stdout == ""
    infer = command("infer", "images", "--json", "--save", "out")
    assert infer.stderr == "using model.plan (the only plan in this folder)\n"
    assert [result["image"] for result in json.loads(infer.stdout)] == ["images/1.png", "images/2.png"]
    assert read_image("out/1.png").shape == (60, 80, 3)
    truth = json.loads(dataset.read_text())
    truth["categories"] = [{"id": i, "name": name} for i, name in enumerate(("cat", "dog", "bird"), start=1)]
    dataset.write_text(json.dumps(truth | {"annotations": []}))
    assert "AP" in json.loads(command("eval", "--annotations", "truth.json", "--images", "images", "--json").stdout)
    spec = json.loads(command("info", "model.plan", "--json").stdout)["spec"]
    assert spec["categories"] == truth["categories"]
    assert (spec["min_size"], spec["max_size"], spec["box_score_thresh"]) == (48, 80, 0.2)
    assert (spec["box_nms_thresh"], spec["box_detections_per_img"]) == (0.4, 7)
