"""Table 6: rows in order, a stopped run that goes on, outputs of another scale; the limit of bundled files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import bundle as bundle_module
from benchmarks import mask_table6
from benchmarks.mask_proposals import make_plan
from benchmarks.mask_screening import measure
from benchmarks.mask_table6 import BASE, ROWS, Scale, main, run_table
from benchmarks.replay_masks import compare, normalise
from fpn_engine.backends.native.cpu_convolution import has_bfloat16, has_fused_convolution
from fpn_engine.errors import CheckpointError
from fpn_export.bundled import find_bundled
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.variants import make_variant
from fpn_export.scenes.dataset import IMAGES, write_coco
from tests.export.masks.tiny import tiny_model
from tests.test_figures import PROVENANCE

SCALE = Scale(steps=1, batch=1, scenes=1, val_scenes=1)


def run(output: Path, steps: list[str], rows: int = 99) -> bool:
    """A table whose rows take no time; stops before row ``rows``."""

    def row(name: str, scale: Scale, folder: Path, should_stop: Callable[[], bool]) -> dict[str, Any]:
        steps.append(name)
        return {"row": name}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mask_table6, "run_row", row)
        return run_table(SCALE, output.parent, output, lambda: len(steps) >= rows, "command")


def test_rows_are_the_papers_and_none_is_run_twice(tmp_path: Path) -> None:
    output, steps = tmp_path / "table.json", list[str]()
    assert not run(output, steps, rows=2)
    assert run(output, steps)
    assert steps == ["5x5", "7x7", "dual", "dual, 2x masks", "dual, 2x masks, 2x schedule"]
    rows = json.loads(output.read_text())
    assert [row["row"] for row in rows] == steps
    assert all(row.keys() >= PROVENANCE for row in rows)


def test_an_output_of_another_scale_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "table.json"
    output.write_text(json.dumps([{"row": "5x5", "scale": {"steps": 2}}]))
    with pytest.raises(SystemExit, match="of another scale"):
        run(output, [])


def test_a_call_of_no_minutes_begins_nothing(tmp_path: Path) -> None:
    assert main([str(tmp_path), "-o", str(tmp_path / "table.json"), "--minutes", "0"]) == 75
    assert list(tmp_path.iterdir()) == []


def test_seconds_are_those_of_all_runs(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss,seconds\n1,5.0,2.25\n2,4.0,7.75\n")
    assert mask_table6._training_seconds(tmp_path) == 8


@pytest.mark.skipif(not (has_fused_convolution() and has_bfloat16()), reason="no bfloat16 in oneDNN here")
def test_rough_scores_miss_no_place(tmp_path: Path) -> None:
    """The bundled model on two scenes: the places that exact scores choose, and by a margin."""
    write_coco(tmp_path, 7, 2)
    found = measure(sorted((tmp_path / IMAGES).iterdir()), find_bundled("scene-masks"), 480)
    assert found["images"] == 2
    assert found["places missed"] == 0
    assert sum(found["settled by candidates"].values()) == 2
    assert 1e-4 < found["largest difference, in deviations of scores"] < 0.1


@torch.no_grad()
def test_the_yardstick_of_a_replay_sees_wrong_scores() -> None:
    model = tiny_model(masks_per_img=20)
    image = normalise(torch.randint(0, 256, (96, 128, 3), dtype=torch.uint8).numpy(), model.spec, torch.device("cpu"))
    assert compare(model, make_plan(model), image) < 1e-4
    other = tiny_model(1, masks_per_img=20)
    assert compare(other, make_plan(model), image) > 0.1


def test_a_model_of_the_table_is_small_enough_to_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        largest = FpnMasks(make_variant(BASE, ROWS["dual, 2x masks"][0]))
    halves = 2 * sum(tensor.numel() for tensor in largest.state_dict().values())
    assert halves < bundle_module.LIMITS["fpn_masks"]
    model = tiny_model()
    torch.save(model.state_dict(), tmp_path / "tiny.pth")
    (tmp_path / "tiny.json").write_text(json.dumps({"spec": model.spec.to_dict(), "about": {}}))
    bundle_module.bundle(tmp_path / "tiny.pth", tmp_path / "small.safetensors")
    monkeypatch.setitem(bundle_module.LIMITS, "fpn_masks", 1000)
    with pytest.raises(CheckpointError, match="bundle a smaller model"):
        bundle_module.bundle(tmp_path / "tiny.pth", tmp_path / "large.safetensors")
    assert not (tmp_path / "large.safetensors").exists()
