"""Named models on the command line: the bundled one without being asked, published ones fetched once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fpn_engine import download as download_module
from fpn_engine import named
from fpn_engine.named import NamedModel
from fpn_engine.plan import read_plan
from fpn_export import bundled as bundled_module
from fpn_export import published
from tests.contest import CHOICE
from tests.engine.conftest import SPEC, Bundled, Run, Tiny, export_at_once, save_picture
from tests.engine.test_cli_faults import COMMAND, PATIENCE, assert_one_sentence, size, wait_until
from tests.engine.web import Web, serving

DEMO_NOTE = (
    "using the demo model, which knows cat, dog, bird; for others: --model coco, or export and build a checkpoint of "
    "your own\n"
)


class Shelf(NamedTuple):
    """A server with a tiny published model, and where it is to lie here."""

    web: Web
    model: NamedModel
    place: Path


@pytest.fixture
def shelf(tiny: Tiny, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    content = tiny.checkpoint.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:8]
    model = NamedModel(name="tiny", about="a test", builder="tiny_fpn", file_name=f"tiny-{digest}.pth", megabytes=45)
    known = dataclasses.replace(published.PUBLISHED[0], name=model.file_name, digest=digest, categories=SPEC.categories)
    monkeypatch.setattr(named, "MODELS", (named.MODELS[0], model))
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    monkeypatch.setattr(download_module, "PAUSES", (0.0, 0.0, 0.0))
    for variable in ("TORCH_HOME", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace.parent / "xdg"))
    save_picture(workplace / "a.png")
    with serving() as web:
        web.files[f"models/{model.file_name}"] = content
        monkeypatch.setenv("FPN_ENGINE_MIRROR", f"{web.url}/models")
        yield Shelf(web, model, workplace.parent / "cache" / "checkpoints" / model.file_name)


def test_without_any_plan_the_bundled_model_is_used(bundled: Bundled, tiny: Tiny, workplace: Path, run: Run) -> None:
    save_picture(workplace / "a.png")
    ran = run("infer", "a.png", "--json")
    assert (ran.code, ran.err) == (0, DEMO_NOTE)
    assert json.loads(ran.out)[0]["detections"]
    assert sorted(path.name for path in workplace.iterdir()) == ["a.png"]
    assert not (workplace.parent / "cache" / "last-plan").exists()
    assert run("infer", "a.png", "--json", "--model", "demo") == (0, ran.out, "")

    for name in ("x.plan", "y.plan"):
        (workplace / name).symlink_to(tiny.plan)
    several = run("infer", "a.png")
    assert several.code == 1
    assert "several plans here (x.plan, y.plan); name one with --plan" in several.err
    (workplace / "y.plan").unlink()
    assert run("infer", "a.png").err == "using x.plan (the only plan in this folder)\n"


def test_first_use_writes_only_to_the_cache(
    bundled: Bundled, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    aside = bundled.plan.rename(workplace / "aside")
    calls: list[tuple[object, ...]] = []

    def make(*arguments: object, **options: object) -> Path:
        calls.append(arguments)
        return aside.rename(bundled.plan)

    monkeypatch.setattr("fpn_export.cached_plan.make_cached", make)
    save_picture(workplace / "a.png")
    assert run("infer", "a.png", "--json").err == DEMO_NOTE
    assert calls == [("demo", bundled_module.hash_bundled(), bundled.checkpoint)]
    assert run("infer", "a.png", "--json").err == DEMO_NOTE
    assert len(calls) == 1
    names = sorted(path.name for path in bundled.checkpoint.parent.iterdir())  # where the stand-in was really made
    assert names == ["demo.json", "demo.safetensors"]


def test_a_broken_installation(workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundled_module, "CHECKPOINT", workplace / "demo.safetensors")
    save_picture(workplace / "a.png")
    ran = run("infer", "a.png")
    assert ran.code == 1
    assert "install fpn-engine again" in ran.err
    assert_one_sentence(ran.err)


def test_only_infer_takes_the_bundled_model_unasked(bundled: Bundled, workplace: Path, run: Run) -> None:
    save_picture(workplace / "a.png")
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": 60, "width": 80}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 1, 20, 20]}],
    }
    (workplace / "truth.json").write_text(json.dumps(truth))
    given = ("eval", "--annotations", "truth.json", "--json")
    unasked = run(*given, "--images", ".")
    assert (unasked.code, unasked.out) == (1, "")
    assert "there is no plan to use; make one with: fpn-engine export model.pth" in unasked.err
    asked = run(*given, "--images", ".", "--model", "demo")
    assert (asked.code, asked.err) == (0, "")
    assert "AP" in json.loads(asked.out)
    nowhere = run(*given)
    assert nowhere.code == 1
    assert "truth.json does not say where its images are; name their folder with --images" in nowhere.err


def test_a_published_model_is_fetched_and_built_once(
    shelf: Shelf, tiny: Tiny, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = export_at_once(monkeypatch, tiny)
    url = f"{shelf.web.url}/models/{shelf.model.file_name}"
    first = run("infer", "a.png", "--model", "tiny", "--json")
    assert (first.code, first.err) == (0, f"downloading {url} (45 MB) to {shelf.place}, once\n{CHOICE}\n")
    assert shelf.web.served == shelf.place.stat().st_size
    (spec,) = specs
    assert (spec.categories, spec.batch_norm_eps) == (SPEC.categories, 0)
    shelf.place.unlink()
    shelf.web.files.clear()
    assert run("infer", "a.png", "--model", "tiny", "--json") == (0, first.out, "")
    assert run("infer", "a.png", "--model", "tiny_fpn", "--json") == (0, first.out, "")
    assert len(shelf.web.requests) == 1

    built = run("build", "--model", "tiny")
    assert (built.code, built.out) == (0, "")
    assert built.err.startswith("tiny.plan: onnxruntime fp32 on the CPU, ")
    assert read_plan(workplace / "tiny.plan").manifest.source == "--model tiny"
    assert (workplace.parent / "cache" / "last-plan").read_text() == str(workplace / "tiny.plan")
    assert run("build", "--model", "tiny", "-o", "new/x.plan").code == 0
    assert (workplace / "new" / "x.plan").read_bytes() == (workplace / "tiny.plan").read_bytes()
    failed = run("build", "--model", "tiny", "--force")  # what it is built from is gone
    assert failed.code == 1
    assert "404" in failed.err


@pytest.mark.parametrize("variable", ["TORCH_HOME", "XDG_CACHE_HOME"])
def test_what_torchvision_downloaded_is_used(
    variable: str, shelf: Shelf, tiny: Tiny, workplace: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(workplace.parent / "xdg" / ("torch" if variable == "TORCH_HOME" else "")))
    place = workplace.parent / "xdg" / "torch" / "hub" / "checkpoints" / shelf.model.file_name
    place.parent.mkdir(parents=True)
    shutil.copyfile(tiny.checkpoint, place)
    monkeypatch.setattr("fpn_export.cached_plan.make_cached", lambda *arguments, **options: tiny.plan)
    ran = run("infer", "a.png", "--model", "tiny")
    assert (ran.code, ran.err) == (0, f"using {place}\n")
    assert shelf.web.requests == []
    place.write_bytes(b"damaged")
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    ran = run("infer", "a.png", "--model", "tiny", "--json")
    assert ran.code == 0
    assert re.search(r"[0-9.]+/[0-9.]+ MB", ran.err)
    json.loads(ran.out)
    where = place if variable == "TORCH_HOME" else shelf.place
    assert where.read_bytes() == tiny.checkpoint.read_bytes()
    assert f"to {where}, once\n" in ran.err


def test_offline(shelf: Shelf, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("FPN_ENGINE_MIRROR", url)
        ran = run("infer", "a.png", "--model", "tiny", "--json")
    assert (ran.code, ran.out) == (1, "")
    _, sentence = ran.err.splitlines(keepends=True)
    assert_one_sentence(sentence)
    assert f"cannot download {url}/{shelf.model.file_name} (Connection refused)" in sentence
    assert f"put it at {shelf.place}" in sentence


def test_interrupted_while_downloading(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco = named.find_model("coco")
    save_picture(workplace / "a.png")
    monkeypatch.setenv("TORCH_HOME", str(workplace.parent / "torch"))
    part = workplace.parent / "torch" / "hub" / "checkpoints" / f"{coco.file_name}.part"
    with serving() as web:
        web.files[coco.file_name] = bytes(1_000_000)
        web.stalls = [300_000]
        monkeypatch.setenv("FPN_ENGINE_MIRROR", web.url)
        process = subprocess.Popen([*COMMAND, "infer", "a.png", "--model", "coco"], stderr=subprocess.PIPE, text=True)
        wait_until(lambda: size(part) == 300_000, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err.splitlines()[1:]) == (130, ["fpn-engine: interrupted"])
    assert list(part.parent.iterdir()) == [part]  # to go on from


def test_a_wrong_file(shelf: Shelf, run: Run) -> None:
    shelf.web.files[f"models/{shelf.model.file_name}"] = b"<html>Please log in</html>"
    ran = run("build", "--model", "tiny")
    assert ran.code == 1
    assert "gave another file than the published one" in ran.err
    assert_one_sentence(ran.err.splitlines(keepends=True)[1])
    assert list(shelf.place.parent.iterdir()) == []


@pytest.mark.parametrize("command", [("infer", "a.png"), ("build",)])
def test_models_that_are_not_there(command: tuple[str, ...], shelf: Shelf, run: Run) -> None:
    for name, reason in {"horse": "there is no model named 'horse'", "coco-v2": "the model coco-v2 is not sup"}.items():
        ran = run(*command, "--model", name)
        assert (ran.code, ran.out) == (1, "")
        assert reason in ran.err
        assert "there are demo, tiny" in ran.err
        assert_one_sentence(ran.err)


@pytest.mark.parametrize(
    "arguments",
    [
        ("infer", "a.png", "--model", "tiny", "--plan", "x.plan"),
        ("build", "x.onnx", "--model", "tiny"),
        ("build", "--force"),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...], shelf: Shelf, run: Run) -> None:
    ran = run(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert "model" in ran.err.lower()
