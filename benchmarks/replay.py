"""One replay of a captured detector on a GPU, kernel by kernel, with the tactic, time and floor of each layer.

    python -m benchmarks.replay -o benchmarks/results/replay.json [--arch resnet50] [--batch 1] [--precision fp16]

Where the time of an image goes, which the suites' sums cannot say. The detector is the one of ``bench_engine``, its
layers tuned first, its detections and maps checked before anything is timed. A row is added to the file, in place of
the one of the same detector, device and commit.
"""

from __future__ import annotations

import argparse
import json
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contest import name_scene
from benchmarks.native_stages import describe_layers, load_as_tuned
from benchmarks.ours import DTYPES, run_pipeline
from benchmarks.plans import build
from benchmarks.provenance import describe_run
from benchmarks.rows import read_rows
from benchmarks.scene import SIZE, check, make_scene
from benchmarks.suite import prepare_device
from fpn_engine.backends.native.cuda.choices import PART, TunedTactics
from fpn_engine.backends.native.cuda.gpu import Gpu
from fpn_engine.backends.native.cuda.loading import find_work
from fpn_engine.backends.native.cuda.timing_cache import TimingCache
from fpn_engine.files import replacing
from fpn_engine.ruler import Spread
from fpn_export.native.tactics import TuneFor

WARM_UP, ROUNDS, TRACED = 20, 100, 5  # replays
Replay = Callable[[], object]
Measure = Callable[[str, int, str, float], dict[str, Any]]


def main() -> None:
    print(describe(run("benchmarks.replay", __doc__ or "", measure)))


def run(module: str, about: str, measure: Measure) -> dict[str, Any]:
    """The row that ``measure(arch, batch, precision, seconds)`` makes for the command line, put into its file."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="fp16", choices=DTYPES)
    parser.add_argument("--seconds", type=float, default=60.0, help="after which no further layer is tuned")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    words = ["--arch", given.arch, "--batch", str(given.batch), "--precision", given.precision]
    row = measure(given.arch, given.batch, given.precision, given.seconds)
    row |= describe_run(shlex.join(["python", "-m", module, "-o", "FILE", *words]))
    put(given.output, row)
    return row


def measure(arch: str, batch: int, precision: str, seconds: float) -> dict[str, Any]:
    """Raises: AssertionError if what is found is too far from torchvision's."""
    device = torch.device("cuda", torch.cuda.current_device())
    prepare_device(device)
    scene = make_scene(arch, batch, SIZE, device)
    plan = build(scene.subject, precision, "native", TuneFor(shapes=((batch, *SIZE),), seconds=seconds))
    contestant = run_pipeline(scene, *load_as_tuned(plan), precision)
    agreement = check(scene, contestant)
    works = find_work(plan.parts, scene.subject.spec, TunedTactics.read(plan.parts[PART]))
    layers = describe_layers(works, TimingCache(Gpu.of_device(device)))
    times = time_replays(contestant.turn.run)
    kernels = trace_replays(contestant.turn.run)
    return {
        "what": f"{name_scene(arch, batch=batch, size=SIZE)}, native {precision}",
        "agreement": agreement,
        "milliseconds": Spread.of(times).to_dict(),
        "kernels": kernels,
        "busy_us": round(sum(spent for _, spent, _ in kernels), 1),
        "span_us": round(max(start + spent for start, spent, _ in kernels), 1),
        "layers": layers,
    }


def time_replays(replay: Replay) -> list[float]:
    """Seconds of each of ROUNDS replays, by events around it."""
    for _ in range(WARM_UP):
        replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(ROUNDS)]
    for begin, end in events:
        begin.record()
        replay()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in events]


def trace_replays(replay: Replay) -> list[tuple[float, float, str]]:
    """Start and time in microseconds and name of each kernel, in order of their starts; medians of TRACED replays.

    Kernels beside each other may change places from replay to replay, so that a name is that of the middle one.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch warn of what they keep
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as trace:
            for _ in range(TRACED):
                replay()
            torch.cuda.synchronize()
    events = [event for event in trace.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    each = len(events) // TRACED
    rows, middle = [], TRACED // 2
    for number in range(each):
        same = [events[number + each * again] for again in range(TRACED)]
        starts = sorted(one.time_range.start - events[each * i].time_range.start for i, one in enumerate(same))
        spans = sorted(one.time_range.elapsed_us() for one in same)
        rows.append((round(starts[middle], 1), round(spans[middle], 1), same[middle].name))
    return rows


def put(path: Path, row: dict[str, Any]) -> None:
    key = [row[name] for name in ("what", "device", "commit")]
    rows = read_rows(path) if path.exists() else []
    rows = [other for other in rows if [other.get(name) for name in ("what", "device", "commit")] != key] + [row]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")


def describe(row: dict[str, Any]) -> str:
    """For whoever watches: the layers with the largest gaps to their floor, then every kernel."""
    lines = [f"{row['what']} on {row['device']}: {row['milliseconds']['median']} ms, {row['agreement']}"]
    lines += [f"{e['us']:8.1f} us, floor {e['floor_us']:6.1f}  {e['tactic']:44} {e['layer']}" for e in row["layers"]]
    lines += [f"{start:9.1f} {spent:7.1f}  {name[:110]}" for start, spent, name in row["kernels"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
