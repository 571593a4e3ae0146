"""Mask proposals chosen by rough scores against those by exact ones, on real images and a trained model.

    python -m benchmarks.mask_screening images/ [--model FILE] [--min-size 800] [-o results/mask_screening.json]

For every image: how many candidates settled the choice, how wide the margin was beside the largest difference between
a rough and an exact score that the candidates showed, what that difference is over all places, and whether the chosen
places are the ones that exact scores everywhere choose. See fpn_engine.masks.screening.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_run
from fpn_engine.backends.native.masks import make_native_masks
from fpn_engine.engine import Engine
from fpn_engine.masks.pipeline import MaskPipeline, MaskTrunkOutput
from fpn_engine.masks.screening import LEAST, MARGIN, RESERVES
from fpn_engine.masks.winners import Winners, select_winners
from fpn_export.bundled import find_bundled
from fpn_export.masks.checkpoint import load_mask_model
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.native.parts import make_native_parts
from fpn_export.networks import cut_networks


class Watched(MaskPipeline):
    """Notes of every choice how it went beside the exact one."""

    def choose(self, out: MaskTrunkOutput, k: int) -> tuple[Winners, Tensor]:
        found = super().choose(out, k)
        if out.exact is None:
            raise SystemExit("the image is so small that it is scored exactly at once: raise --min-size")
        self.noted = compare(out.scores, out.exact(), found[0], k)
        return found


def compare(rough: Sequence[Tensor], exact: Sequence[Tensor], chosen: Winners, k: int) -> dict[str, Any]:
    """Of one image; see the module."""
    right = select_winners(exact, k)
    off = torch.cat([(a - b).abs().flatten() for a, b in zip(rough, exact, strict=True)])
    margins = {}
    for reserve in RESERVES:
        candidates = select_winners(rough, max(round(k * reserve), LEAST))
        at = zip(candidates.places[0].tolist(), candidates.heads[0].tolist(), strict=True)
        scores = torch.stack([exact[level][0, head, y, x] for (_, level, y, x), head in at])
        outside = float(right.logits[0, -1] - candidates.logits[0, -1])
        margins[len(scores)] = outside / float((scores - candidates.logits[0]).abs().max())
    return {
        "missed": len(_names(right) - _names(chosen)),
        "margins": margins,
        "largest difference": float(off.max()),
        "deviation of scores": float(torch.cat([level.flatten() for level in exact]).std()),
    }


def _names(winners: Winners) -> set[tuple[int, ...]]:
    rows = torch.cat([winners.places[0], winners.heads[0, :, None]], dim=1)
    return {tuple(row) for row in rows.tolist()}


def make_pipeline(path: Path, min_size: int) -> Watched:
    """The model on the native backend at fp32, for images larger than it was trained on."""
    model = load_mask_model(path)
    model.spec = dataclasses.replace(model.spec, min_size=min_size, max_size=2 * min_size)
    networks = cut_networks(export_mask_onnx(model), model.spec)
    parts = make_native_parts(path, networks, model.spec, "fp32", lambda step: None)
    return Watched(model.spec, *make_native_masks(parts, model.spec, screens=True))


def measure(images: Sequence[Path], path: Path, min_size: int) -> dict[str, Any]:
    pipeline = make_pipeline(path, min_size)
    engine, noted = Engine(pipeline), []
    for number, image in enumerate(images, 1):
        engine(image)
        noted.append(pipeline.noted)
        print(f"{number}/{len(images)} {image.name}: {pipeline.noted}", file=sys.stderr, flush=True)
    settled = Counter(
        next((str(count) for count, width in one["margins"].items() if width > MARGIN), "all") for one in noted
    )
    first = sorted(next(iter(one["margins"].values())) for one in noted)
    return {
        "images": len(images),
        "min_size": min_size,
        "places": pipeline.spec.masks_per_img,
        "places missed": sum(one["missed"] for one in noted),
        "settled by candidates": dict(settled),
        "margin of the fewest candidates, in differences": {
            "least": round(first[0], 2),
            "median": round(first[len(first) // 2], 2),
        },
        "largest difference, in deviations of scores": round(
            max(one["largest difference"] / one["deviation of scores"] for one in noted), 4
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_screening", description=__doc__.partition("\n")[0])
    parser.add_argument("images", type=Path, help="folder")
    parser.add_argument("--model", type=Path, default=find_bundled("scene-masks"))
    parser.add_argument("--min-size", type=int, default=800)
    parser.add_argument("--count", type=int, help="the first of them alone")
    parser.add_argument("-o", "--output", type=Path, help="a row is added to it")
    given = parser.parse_args()
    paths = sorted(p for p in given.images.iterdir() if p.suffix in (".jpg", ".png"))[: given.count]
    name = "/".join(given.images.absolute().parts[-2:])
    command = ["python", "-m", "benchmarks.mask_screening", name, "--min-size", str(given.min_size)]
    row = {
        **describe_run(shlex.join(command)),
        "what": name,
        **measure(paths, given.model, given.min_size),
    }
    print(json.dumps(row, indent=1))
    if given.output:
        rows = json.loads(given.output.read_text()) if given.output.exists() else []
        given.output.write_text(json.dumps([*rows, row], indent=1) + "\n")


if __name__ == "__main__":
    main()
