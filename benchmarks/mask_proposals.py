"""Mask proposals: the CPU plan against the fully convolutional evaluation in PyTorch, in one process, interleaved.

    python -m benchmarks.mask_proposals [--arch resnet50] [--variant dual] [--rounds 5] [-o results/mask_proposals.json]

checks that both give the same best places, scores and masks, and reports seconds and ratios, of wall time and of
processor time, from a preprocessed image to masks and regions. Fresh weights and noise: the plan's rough scores are
closer together there than a trained model's, so that it takes more candidates. "dense" is the PyTorch model in eval
mode as its checkpoint has it: scores and masks everywhere, then the best; "dense, folded" has its batch norms folded
into convolutions.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.provenance import describe_run
from fpn_engine.backends.native.masks import make_native_masks
from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.masks.regions import Regions
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.masks.winners import select_winners
from fpn_engine.tasks import PaddedMasks
from fpn_export.batch_norm import fold_batch_norm
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.masks.variants import VARIANTS, make_variant
from fpn_export.native.parts import make_native_parts
from fpn_export.networks import cut_networks

SIZE = (800, 1216)
TOLERANCE = 1e-4
Taken = dict[str, list[tuple[float, float]]]


def evaluate_densely(model: FpnMasks, images: Tensor) -> PaddedMasks:
    """Scores and masks everywhere, then the best: what a fully convolutional model does by itself."""
    scores, masks = model.dense(images)
    winners = select_winners(scores, model.spec.masks_per_img)
    places, heads = winners.places.flatten(0, 1).tolist(), winners.heads.flatten().tolist()
    chosen = [masks[level][image, head, :, y, x] for (image, level, y, x), head in zip(places, heads, strict=True)]
    _, level, y, x = winners.places.unbind(dim=2)
    regions = Regions(model.spec).cover(level, winners.heads, y, x)
    size, count = model.spec.mask_size, torch.tensor([len(heads)])
    logits = torch.stack(chosen).view(1, -1, size, size)
    return PaddedMasks(regions, winners.logits.sigmoid(), logits, count, torch.zeros(1))


def make_plan(model: FpnMasks) -> MaskPipeline:
    """The model on the native backend, at fp32, as ``fpn-engine build`` makes it."""
    spec, path = model.spec, Path("masks.onnx")
    networks = cut_networks(export_mask_onnx(model), spec)
    parts = make_native_parts(path, networks, spec, "fp32", lambda step: None)
    return MaskPipeline(spec, *make_native_masks(parts, spec))


def compare(model: FpnMasks, plan: MaskPipeline, images: Tensor) -> dict[str, float]:
    """The largest differences of logits: of scores, rank by rank and at the plan's winners, and of masks there."""
    scores, masks = model.dense(images)
    k = plan.spec.masks_per_img
    winners, found = plan.choose(plan.trunk(images), k)
    of_scores = float((winners.logits - select_winners(scores, k).logits).abs().max())
    of_masks = 0.0
    for slot, (place, head) in enumerate(zip(winners.places[0].tolist(), winners.heads[0].tolist(), strict=True)):
        image, level, y, x = place
        there = masks[level][image, head, :, y, x].view_as(found[0, slot])
        of_masks = max(of_masks, float((found[0, slot] - there).abs().max()))
        of_scores = max(of_scores, abs(float(winners.logits[0, slot] - scores[level][image, head, y, x])))
    spread = float(torch.cat([level.flatten() for level in scores]).std())
    return {"scores": of_scores, "masks": of_masks, "standard deviation of scores": spread}


def take_turns(contestants: dict[str, Callable[[], Any]], rounds: int) -> Taken:
    """Wall and processor seconds of each round."""
    taken: Taken = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            taken[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return taken


@torch.no_grad()
def measure(arch: str, variant: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = FpnMasks(make_variant(MaskSpec(arch=arch), variant)).eval()
    folded, plan = fold_batch_norm(model), make_plan(model)
    images = torch.randn(1, 3, *SIZE)
    differences = compare(model, plan, images)
    if max(differences["scores"], differences["masks"]) > TOLERANCE:
        raise SystemExit(f"the plan and PyTorch differ: {differences}")
    taken = take_turns(
        {
            "plan": lambda: plan(images),
            "dense": lambda: evaluate_densely(model, images),
            "dense, folded": lambda: evaluate_densely(folded, images),
        },
        rounds,
    )
    seconds = {
        name: {
            kind: _describe(column) for kind, column in zip(("wall", "processor"), zip(*rows, strict=True), strict=True)
        }
        for name, rows in taken.items()
    }
    ratios = {
        rival: {
            kind: round(
                statistics.median(ours[i] / theirs[i] for ours, theirs in zip(taken["plan"], rows, strict=True)), 3
            )
            for i, kind in enumerate(("wall", "processor"))
        }
        for rival, rows in taken.items()
        if rival.startswith("dense")
    }
    return {
        "arch": arch,
        "variant": variant,
        "size": SIZE,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "largest differences": differences,
        "seconds": seconds,
        "plan / dense": ratios,
    }


def _describe(values: tuple[float, ...]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = ordered[int(0.2 * (len(ordered) - 1))], ordered[round(0.8 * (len(ordered) - 1))]
    return {"median": round(statistics.median(values), 3), "p20": round(low, 3), "p80": round(high, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mask_proposals", description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--variant", default="dual", choices=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    command = (
        f"python -m benchmarks.mask_proposals --arch {given.arch} --variant {given.variant} --rounds {given.rounds}"
    )
    text = json.dumps([{**describe_run(command), **measure(given.arch, given.variant, given.rounds)}], indent=1)
    if given.output:
        given.output.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
