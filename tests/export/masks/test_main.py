"""python -m fpn_export.masks: train, stop, score and export, and mistakes in one sentence."""

import json

import onnx
import pytest

from fpn_export.masks.__main__ import main

SPEC = {"arch": "resnet18", "body_width": 8, "fpn_channels": 16, "hidden_channels": 16, "min_size": 96, "max_size": 128}
SMALL = ["--scenes", "2", "--steps", "2", "--batch", "1", "--device", "cpu", "--spec", json.dumps(SPEC)]


def test_train_score_and_export(tmp_path, capsys):
    run = str(tmp_path / "run")
    assert main(["train", run, *SMALL, "--variant", "5x5", "--recipe", '{"warmup_steps": 0}', "--val-scenes", "1"]) == 0
    assert "2/2  segments_score" in capsys.readouterr().err
    assert main(["score", f"{run}/best.pth", "--scenes", "1"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["AR1000"] <= 1
    assert main(["export", f"{run}/best.pth", str(tmp_path / "masks.onnx")]) == 0
    assert {value.name for value in onnx.load(tmp_path / "masks.onnx").graph.output} == {
        "regions",
        "scores",
        "masks",
        "status",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "run", *SMALL, "--spec", '{"arch": "vgg"}'], "arch must be one of"),
        (["train", "run", *SMALL, "--recipe", '{"flip": 2}'], "flip must be from 0 to 1"),
        (["train", "run", *SMALL[2:], "--scenes", "0"], "nothing to learn in 0 scenes"),
        (["train", "run", *SMALL[2:], "--annotations", "a.json"], "name their folder with --images"),
        (
            ["train", "run", *SMALL[2:], "--annotations", "a.json", "--images", "."],
            "cannot read the annotations a.json",
        ),
        (["train", "run", *SMALL, "--recipe", '{"steeps": 2}'], "unknown key 'steeps'"),
        (["score", "absent.pth"], "absent.pth does not exist"),
        (["export", "absent.pth", "x.onnx"], "absent.pth does not exist"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
