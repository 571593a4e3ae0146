"""Every backend and precision against torchvision eager: same weights and inputs, R50 at 800x1216, one image at a time.

    pytest benchmarks/bench_backends.py

All contestants take turns within one run, so that ratios hold on a machine whose speed drifts. What they find is
checked before they are timed. Set FPN_ENGINE_BENCH_JSON to a path to keep the figures with their provenance.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from benchmarks.bench_engine import SIZE, clock, compare, run_torchvision, summarise
from benchmarks.provenance import describe_run
from fpn_engine.backends.native.cpu_convolution import has_bfloat16
from fpn_engine.backends.native.parts import plan_trunk_memory
from fpn_engine.engine import Engine
from fpn_engine.plan import Plan
from fpn_engine.spec import ModelSpec, numbered_categories
from tests.parity.random_detector import make_picture
from tests.parity.subject import Subject, random_subject
from tests.parity.torchvision_oracle import Found, match

ROUNDS = 7
# Of what fp32 finds, bf16 must find this share within these bounds: random weights are not as clear as trained ones.
BF16_SHARE, BF16_CORNER, BF16_SCORE = 0.4, 8.0, 0.1
FULL_SIZE = {"min_size": 800, "max_size": 1333}
Image = NDArray[np.uint8]


@pytest.fixture(scope="module")
def subject() -> Subject:
    """As large as the COCO model; calibrated on small pictures, run at full size."""
    small = ModelSpec(categories=numbered_categories(90), min_size=160, max_size=256)
    return random_subject("resnet50", small, representation_size=1024)


@pytest.fixture(scope="module")
def plans(subject: Subject) -> dict[str, Plan]:
    found = {"onnxruntime fp32": subject.plan, "native fp32": subject.native_plan}
    return found | {"native bf16": subject.build("native", "bf16")} if has_bfloat16() else found


def test_backends_against_torchvision(
    subject: Subject, plans: dict[str, Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = subject.oracle(**FULL_SIZE).model
    engines = {name: subject.engine(plan=plan, **FULL_SIZE) for name, plan in plans.items()}
    images = [make_picture(*SIZE, seed) for seed in range(ROUNDS + 1)]
    agreement = {name: agree(name, engine, engines, theirs, images[0]) for name, engine in engines.items()}

    contestants: dict[str, Callable[[Image], Any]] = {
        "torchvision eager": lambda image: run_torchvision(theirs, image),
        **engines,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for image in images[1:]:
        for name, run in contestants.items():
            seconds[name].append(clock(lambda run=run, image=image: run(image)))  # type: ignore[misc]
    rows = [
        {
            "what": "R50-FPN, 800x1216, batch 1, 91 classes, random weights, uint8 array to detections",
            "contestant": name,
            "seconds": summarise(spent),
            "median_ratio_to_torchvision": round(ratio(spent, seconds["torchvision eager"]), 3),
            "rounds": ROUNDS,
            "agreement": agreement.get(name, {}),
            **memory_of(plans.get(name)),
            **describe_run("pytest benchmarks/bench_backends.py"),
        }
        for name, spent in seconds.items()
    ]
    with capsys.disabled():
        for row in rows:
            print(f"\n{row['contestant']}: {row['seconds']}, ratio {row['median_ratio_to_torchvision']}", end="")
    if path := os.environ.get("FPN_ENGINE_BENCH_JSON"):
        Path(path).write_text(json.dumps(rows, indent=1) + "\n")


def agree(
    name: str, engine: Engine, engines: dict[str, Engine], theirs: torch.nn.Module, image: Image
) -> dict[str, float]:
    """fp32 finds what torchvision finds; bf16 most of what fp32 finds."""
    if "fp32" in name:
        return compare(engine, theirs, image)
    ours, wanted = (Found.of(one(image)[0]) for one in (engine, engines["onnxruntime fp32"]))
    pairs = match(ours, wanted, corner_tolerance=BF16_CORNER, score_tolerance=BF16_SCORE)[0]
    share = len(pairs) / len(wanted.scores)
    assert share >= BF16_SHARE
    return {"detections": len(ours.scores), "share_of_fp32_found": round(share, 3)}


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(o / t for o, t in zip(ours, theirs, strict=True))


def memory_of(plan: Plan | None) -> dict[str, int]:
    """Bytes of a native trunk's inner values at this size."""
    if plan is None or plan.manifest.backend != "native":
        return {}
    memory = plan_trunk_memory(plan, 1, SIZE)
    return {"trunk_arena_bytes": memory.arena_bytes, "trunk_bytes_without_reuse": memory.total_bytes}
