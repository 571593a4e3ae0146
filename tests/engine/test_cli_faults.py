"""The command line under a hostile or impatient user: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import onnx
import pytest
from onnx import TensorProto, helper

from tests.engine.conftest import Run, Tiny, save_picture

COMMAND = [sys.executable, "-m", "fpn_engine"]
PATIENCE = 60.0  # seconds for a process to get somewhere
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="only Linux has a device that is always full")


@pytest.fixture
def stream(workplace: Path) -> Path:
    """A folder of more images than a test waits for: names of one picture."""
    picture = save_picture(workplace / "picture.png")
    folder = workplace / "stream"
    folder.mkdir()
    for number in range(400):
        (folder / f"{number:04}.png").symlink_to(picture)
    return folder


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < end
        time.sleep(0.01)


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def assert_one_sentence(text: str) -> None:
    assert text.startswith("fpn-engine: ")
    assert text.count("\n") == 1
    for word in ("Traceback", "internal error", "Errno", "Error:"):
        assert word not in text


def break_plan(source: Path, target: Path, **changes: object) -> None:
    """A copy whose manifest says something else."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "manifest.json":
                data = json.dumps(json.loads(data) | changes).encode()
            new.writestr(name, data)


def make_foreign_model(path: Path) -> None:
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", value[:1], value[1:])
    onnx.save(helper.make_model(graph), str(path))


def make_bad_files(tiny: Tiny) -> dict[str, str]:
    """Files in the current folder that are none of ours, and what the commands say of each."""
    Path("folder.onnx").mkdir()
    os.mkfifo("pipe.onnx")
    for suffix in ("pth", "onnx", "plan"):
        Path(f"empty.{suffix}").touch()
        Path(f"text.{suffix}").write_text("just text\n")
    Path("cut.onnx").write_bytes(tiny.model.read_bytes()[:100_000])
    Path("cut.plan").write_bytes(tiny.plan.read_bytes()[:100_000])
    damaged = bytearray(tiny.plan.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    Path("bit.plan").write_bytes(damaged)
    break_plan(tiny.plan, Path("future.plan"), format_version=99)
    make_foreign_model(Path("foreign.onnx"))
    return {
        "folder.onnx": "is not a file",
        "pipe.onnx": "is not a file",
        "empty.pth": "is empty",
        "text.pth": "not a PyTorch checkpoint",
        "empty.onnx": "is empty",
        "text.onnx": "is not an ONNX file or is damaged",
        "cut.onnx": "is not an ONNX file or is damaged",
        "foreign.onnx": "is not an fpn-engine model",
        "empty.plan": "is not a plan or is damaged",
        "text.plan": "is not a plan or is damaged",
        "cut.plan": "is not a plan or is damaged",
        "bit.plan": "does not match its sha256; build it again with: fpn-engine build tiny.onnx",
        "future.plan": "has plan format 99, this fpn-engine reads format 2; build it again with",
        "missing.pth": "missing.pth does not exist",
        "missing.onnx": "write one with: fpn-engine export checkpoint.pth",
        "missing.plan": "make one with: fpn-engine build model.onnx",
        "missing": "there is no file missing",
        "picture.png": "is no checkpoint (.pth, .pt, .safetensors), ONNX file (.onnx) or plan",
        ".": "is not a file",
        "": "is not a file",
    }


def test_files_that_are_not_ours(tiny: Tiny, workplace: Path, run: Run) -> None:
    save_picture(workplace / "picture.png")
    for name, message in make_bad_files(tiny).items():
        before = sorted(workplace.iterdir())
        commands = [["info", name], ["info", name, "--json"]]
        if name.endswith(".pth"):
            commands.append(["export", name])
        if name.endswith(".onnx"):
            commands += [["build", name], ["build", name, "-o", "new.plan"]]
        if name.endswith(".plan"):
            commands += [["infer", "picture.png", "--plan", name, "--json"]]
        for command in commands:
            ran = run(*command)
            assert (ran.code, ran.out) == (1, ""), command
            assert message in ran.err, command
            assert_one_sentence(ran.err)
        assert sorted(workplace.iterdir()) == before


def test_images_that_are_none(tiny: Tiny, workplace: Path, run: Run) -> None:
    folder = workplace / "images"
    good = [save_picture(folder / name) for name in ("a.png", "new\nline.png", "ünï 漢字 [red].png", "-z.png")]
    whole = good[0].read_bytes()
    (folder / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("just text")
    (folder / "dangling.png").symlink_to("nowhere.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.png")
    with (folder / os.fsdecode(b"not \xff utf-8.png")).open("wb") as file:
        file.write(whole)

    ran = run("infer", folder, "--plan", tiny.plan, "--json", "--max-pixels", 100_000)
    assert ran.code == 3
    results = json.loads(ran.out)
    failed = {Path(result["image"]).name for result in results if "error" in result}
    assert failed == {"truncated.png", "empty.png", "text.png", "dangling.png", "loop.png", "pipe.png"}
    assert {str(path) for path in good} < {result["image"] for result in results}
    *sentences, count = ran.err.splitlines(keepends=True)
    assert count == "6 of 11 images failed\n"
    assert len(sentences) == 6
    for sentence in sentences:
        assert_one_sentence(sentence)

    table = run("infer", folder, "--plan", tiny.plan)
    assert table.code == 3
    assert r"new\nline.png" in table.out
    assert "ünï 漢字 [red].png" in table.out


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("empty", "the folder 'empty' holds no image (.jpg, .png, .tif, .webp, .bmp, .gif, ...)"),
        ("nested", "add --recursive"),
        ("*.jpg", "no image matches '*.jpg'"),
    ],
)
def test_nothing_to_look_at(given: str, message: str, tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "empty").mkdir()
    save_picture(workplace / "nested" / "deep" / "a.png")
    ran = run("infer", given, "--plan", tiny.plan, "--json")
    assert (ran.code, ran.out) == (1, "")
    assert message in ran.err
    assert_one_sentence(ran.err)
    assert run("infer", "nested", "-r", "--plan", tiny.plan).code == 0


def test_largest_image(tiny: Tiny, workplace: Path, run: Run) -> None:
    path = save_picture(workplace / "a.png")
    ran = run("infer", path, "--plan", tiny.plan, "--max-pixels", 1000)
    assert ran.code == 4
    assert "60 = 4,800 pixels, above the limit of 1,000; raise the limit with --max-pixels" in ran.err
    assert run("infer", path, "--plan", tiny.plan, "--max-pixels", 10**30).code == 0


@pytest.mark.parametrize("output", ["folder", "file/new.plan", "model.onnx"])
def test_build_writes_only_where_it_may(output: str, tiny: Tiny, workplace: Path, run: Run) -> None:
    (workplace / "model.onnx").symlink_to(tiny.model)
    (workplace / "folder").mkdir()
    (workplace / "file").write_text("mine")
    before = tiny.model.read_bytes()
    ran = run("build", "model.onnx", "-o", output)
    assert (ran.code, ran.out) == (1, "")
    assert_one_sentence(ran.err)
    assert (workplace / "file").read_text() == "mine"
    assert tiny.model.read_bytes() == before


def test_an_unusable_cache(tiny: Tiny, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "file").touch()
    monkeypatch.setenv("FPN_ENGINE_CACHE", str(workplace / "file" / "cache"))
    ran = run("build", tiny.model, "-o", "new.plan")
    assert ran.code == 1
    assert "set FPN_ENGINE_CACHE to a folder that is writable" in ran.err
    assert not (workplace / "new.plan").exists()
    save_picture(workplace / "a.png")
    assert run("infer", "a.png", "--plan", tiny.plan).code == 0


def test_an_error_of_our_own_says_how_to_report_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fall(named: Path | None) -> None:
        raise ZeroDivisionError("one\nover none")

    monkeypatch.setattr("fpn_engine.discovery.find_plan", fall)
    ran = run("infer", __file__)
    assert ran.code == 1
    assert ran.err.startswith("fpn-engine: internal error: ZeroDivisionError: one over none; FPN_ENGINE_DEBUG=1 shows")
    assert ran.err.count("\n") == 1
    monkeypatch.setenv("FPN_ENGINE_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        run("infer", __file__)


def test_interrupted_while_writing_json_lines(tiny: Tiny, stream: Path, workplace: Path) -> None:
    output = workplace / "results.jsonl"
    command = [*COMMAND, "infer", str(stream), "--plan", str(tiny.plan), "--format", "jsonl", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: size(output) > 10_000, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (130, "fpn-engine: interrupted\n")
    text = output.read_text()
    assert text.endswith("\n")
    assert all("detections" in json.loads(line) for line in text.splitlines())


def test_terminated_while_writing_one_document(tiny: Tiny, stream: Path, workplace: Path) -> None:
    output = workplace / "results" / "all.json"
    output.parent.mkdir()
    output.write_text("old")
    command = [*COMMAND, "infer", str(stream), "--plan", str(tiny.plan), "--json", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: any(size(path) > 10_000 for path in output.parent.iterdir()), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (143, "fpn-engine: terminated\n")
    assert [(path.name, path.read_text()) for path in output.parent.iterdir()] == [("all.json", "old")]


def test_killed_and_resumed(tiny: Tiny, stream: Path, workplace: Path) -> None:
    output = workplace / "results.jsonl"
    command = [*COMMAND, "infer", str(stream), "--plan", str(tiny.plan), "--format", "jsonl", "-o", str(output)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: size(output) > 10_000, process)
    process.kill()
    process.wait()
    for path in sorted(stream.iterdir())[20:]:
        path.unlink()
    with output.open("ab") as file:
        file.write(b'{"image": "half')
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0
    assert "images are done already" in done.stderr
    names = [Path(json.loads(line)["image"]).name for line in output.read_text().splitlines()]
    assert len(names) == len(set(names))
    assert set(names) >= {f"{number:04}.png" for number in range(20)}


def test_the_reader_of_a_pipe_has_seen_enough(tiny: Tiny, stream: Path) -> None:
    command = [*COMMAND, "infer", str(stream), "--plan", str(tiny.plan), "--format", "jsonl"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    json.loads(process.stdout.readline())
    process.stdout.close()
    assert process.wait(timeout=PATIENCE) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def run_with(stdout: IO[str] | None, *arguments: str, shell: str = "") -> subprocess.CompletedProcess[str]:
    if shell:
        line = 'exec "$@" ' + shell
        return subprocess.run(["sh", "-c", line, "sh", *COMMAND, *arguments], capture_output=True, text=True)
    return subprocess.run([*COMMAND, *arguments], stdout=stdout, stderr=subprocess.PIPE, text=True)


@needs_full
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_full_disk_under_stdout(options: list[str], tiny: Tiny) -> None:
    with FULL.open("w") as full:
        done = run_with(full, "info", str(tiny.plan), *options)
    assert done.returncode == 1
    assert done.stderr == "fpn-engine: cannot write to stdout: No space left on device; free some space\n"


@needs_full
def test_a_full_disk_under_results(tiny: Tiny, workplace: Path, run: Run) -> None:
    save_picture(workplace / "a.png")
    ran = run("infer", "a.png", "--plan", tiny.plan, "--format", "jsonl", "-o", FULL)
    assert ran.code == 1
    assert ran.err == (
        "fpn-engine: cannot write the results: No space left on device; free some space or choose another output\n"
    )
    assert "it is a device or pipe" in run("infer", "a.png", "--plan", tiny.plan, "--json", "-o", FULL).err
    assert "not a regular file" in (
        run("infer", "a.png", "--plan", tiny.plan, "--format", "jsonl", "-o", FULL, "--resume").err
    )


def test_closed_stdout_and_stderr(tiny: Tiny, workplace: Path) -> None:
    assert run_with(None, "info", str(tiny.plan), "--json", shell=">&-").returncode == 0
    save_picture(workplace / "a.png")
    (workplace / "here.plan").symlink_to(tiny.plan)  # what is said of it must not go to stdout instead
    done = run_with(None, "infer", "a.png", "--json", shell="2>&-")
    assert done.returncode == 0
    assert len(json.loads(done.stdout)) == 1


def test_a_current_folder_that_is_gone(workplace: Path) -> None:
    gone = workplace / "gone"
    gone.mkdir()
    line = 'cd "$0" && rmdir "$0" && exec "$@"'
    done = subprocess.run(["sh", "-c", line, str(gone), *COMMAND, "infer", "a.png"], capture_output=True, text=True)
    assert done.returncode == 1
    assert_one_sentence(done.stderr)
