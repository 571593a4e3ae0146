"""One replay of captured mask proposals on a GPU, kernel by kernel, beside the fully convolutional model.

    python -m benchmarks.replay_masks -o benchmarks/results/replay.json [--arch resnet50] [--batch 1] [--precision fp16]

From uint8 pixels on the device to masks and regions there: what the paper gives as 0.25 s on an M40 (Lin et al. 2017,
section 6). Before anything is timed, the best scores are checked against PyTorch's fully convolutional evaluation in
float32 of the same image. A row is added to the file as by benchmarks.replay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from benchmarks.native_stages import executors_as_tuned
from benchmarks.plans import build_model
from benchmarks.replay import run, time_replays, trace_replays
from benchmarks.scene import SIZE
from benchmarks.suite import prepare_device
from fpn_engine.backends.native.masks import make_native_masks
from fpn_engine.masks.pipeline import MaskPipeline
from fpn_engine.masks.spec import MaskSpec
from fpn_engine.masks.winners import select_winners
from fpn_engine.ruler import Spread
from fpn_engine.runtime.cuda import make_cuda_runner
from fpn_engine.tasks import Group, PaddedMasks, Task, Thresholds
from fpn_export.masks.model import FpnMasks
from fpn_export.masks.onnx_export import export_mask_onnx
from fpn_export.masks.variants import make_variant
from fpn_export.native.tactics import TuneFor

VARIANT = "dual"
# Of a score's logit, in deviations of scores: what rounding in the whole network makes of random weights.
TOLERANCES = {"fp32": 0.01, "fp16": 0.1, "bf16": 0.5}


@torch.no_grad()
def measure(arch: str, batch: int, precision: str, seconds: float) -> dict[str, Any]:
    """Raises: AssertionError if the scores of the best places are too far from the fully convolutional model's."""
    device = torch.device("cuda", torch.cuda.current_device())
    prepare_device(device)
    torch.manual_seed(0)
    model = FpnMasks(make_variant(MaskSpec(arch=arch), VARIANT)).eval()
    tune_for = TuneFor(shapes=((batch, *SIZE),), seconds=seconds)
    plan = build_model(export_mask_onnx(model), precision, "native", tune_for)
    parts = make_native_masks(plan.parts, model.spec, make_executor=executors_as_tuned(plan), device=device)
    pipeline = MaskPipeline(model.spec, *parts, device)
    runner = make_cuda_runner(pipeline, batch_size=batch)
    random = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (*SIZE, 3), dtype=torch.uint8, generator=random).numpy() for _ in range(batch)]
    group = Group(images, [SIZE] * batch)
    task = Task(padded_size=SIZE, thresholds=Thresholds.of(model.spec))
    graph = runner.capture(group, task)
    found = runner.submit(group, task).wait()
    assert isinstance(found, PaddedMasks)
    assert found.status.tolist() == [0] * batch
    assert found.counts.tolist() == [model.spec.masks_per_img] * batch
    rival = copy.deepcopy(model).to(device)
    normalised = normalise(images[0], model.spec, device)
    off = compare(rival, pipeline, normalised)
    assert off <= TOLERANCES[precision], f"scores differ by {off:.3g} deviations"
    times = time_replays(graph.replay)
    kernels = trace_replays(graph.replay)
    half = rival.to(torch.float16).to(memory_format=torch.channels_last)
    dense = time_replays(lambda: half.dense(normalised.half()))
    return {
        "what": f"{arch} masks, {VARIANT}, {SIZE[0]}x{SIZE[1]}, batch {batch}, native {precision}",
        "largest difference of the best scores, in deviations": round(off, 4),
        "milliseconds": Spread.of(times).to_dict(),
        "fully convolutional PyTorch fp16, channels_last, one image, masks everywhere": Spread.of(dense).to_dict(),
        "kernels": kernels,
        "busy_us": round(sum(spent for _, spent, _ in kernels), 1),
        "span_us": round(max(start + spent for start, spent, _ in kernels), 1),
    }


def normalise(image: Any, spec: MaskSpec, device: torch.device) -> Tensor:
    """(1, 3, H, W) float32 of uint8 pixels, whose size the model takes as it is."""
    pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (spec.image_mean, spec.image_std))
    return (pixels - mean) / std


def compare(model: FpnMasks, pipeline: MaskPipeline, image: Tensor) -> float:
    """The largest difference of the best scores' logits, rank by rank, in deviations of all scores."""
    scores, _ = model.dense(image)
    spread = torch.cat([level.flatten() for level in scores]).std()
    dtype = getattr(pipeline.trunk, "input_dtype", torch.float32)
    ours, _ = pipeline.choose(pipeline.trunk(image.to(dtype)), model.spec.masks_per_img)
    theirs = select_winners(scores, model.spec.masks_per_img)
    return float((ours.logits - theirs.logits).abs().max() / spread)


def main() -> None:
    row = run("benchmarks.replay_masks", __doc__ or "", measure)
    print(f"{row['what']} on {row['device']}: {row['milliseconds']}")
    for start, spent, name in row["kernels"]:
        print(f"{start:9.1f} {spent:7.1f}  {name[:110]}")


if __name__ == "__main__":
    main()
