"""What a build of lower precision says about itself: one line, on few images, in seconds."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from fpn_engine.errors import FpnEngineError
from fpn_engine.images import to_array
from fpn_engine.plan import Manifest, read_plan
from fpn_engine.sources import list_images
from fpn_export.onnx_file import read_onnx
from fpn_export.quantization.quantize import read_measured
from fpn_export.scenes import make_scene
from fpn_export.verification.comparison import Comparison, Read, compare
from fpn_export.verification.opening import open_cut, open_plan, open_subject
from fpn_export.verification.subject import PipelineSubject, Subject, replace_sizes
from fpn_export.verification.trace import BOX_DELTAS, CLASS_LOGITS, TRUNK
from fpn_export.verification.verdict import say_verdict

MOST_PICTURES = 4
SEED = 20_170_421  # of the scene that is drawn where no images are given
SHRINK = 2  # its sides, as a part of those that the model takes pictures at


class Pictures(NamedTuple):
    """What to compare on, in words, and how much smaller than usual they are run."""

    images: list[Read]
    what: str
    shrink: int


def summarize_build(model: Path, plan: Path, folder: Path | None = None) -> str:
    """One line on how far the plan is from what it was built from, run in float32.

    A quantised file says where its numbers are rounded: it is run with its pairs, and what these cost beside float32,
    as ``fpn-engine quantize`` measured it, is said too.

    Args: model: the ONNX file or checkpoint. folder: of images; its first four are taken, at full size. Without, a
        drawn scene at half the usual sides.
    Returns: a line that says so too where the plan does not run on this machine, or cannot be compared.
    """
    loaded = read_plan(plan)
    manifest = loaded.manifest
    command = f"fpn-engine verify {shlex.quote(str(model))} {shlex.quote(str(plan))} --images DIR"
    try:
        if not manifest.detector.has_rpn:
            return f"{manifest.precision} was not compared, as proposals are needed: {command} --proposals FILE"
        pictures = _read(folder) if folder else _draw()
        spec = replace_sizes(manifest.detector, pictures.shrink)
        theirs = open_plan(plan.name, loaded, spec=spec)  # first, as it says at once whether it runs here
        measured = _measured(model)
        comparison = compare(_open_reference(model, pictures.shrink), theirs, pictures.images)
    except FpnEngineError as error:
        reason = str(error).partition(";")[0]
        return f"{manifest.precision} was not compared, since {reason}; where it runs: {command}"
    if not comparison.images:
        return f"{manifest.precision} was not compared, as no image in {folder} can be read: {command}"
    return _say(comparison, manifest, pictures.what, command) + (f"; as quantised: {measured}" if measured else "")


def _measured(model: Path) -> str:
    """What ``fpn-engine quantize`` says of a quantised ONNX file."""
    return read_measured(read_onnx(model)[0]) if model.suffix == ".onnx" else ""


def _say(comparison: Comparison, manifest: Manifest, what: str, command: str) -> str:
    same = comparison.a.precision == manifest.precision
    title = f"{manifest.precision} against {'that of the file' if same else comparison.a.precision} on {what}"
    if not comparison.agrees:
        return f"{title} DEPARTS: {say_verdict(comparison)} More: {command}"
    parts = [_say_part(comparison, "trunk", TRUNK), _say_part(comparison, "box head", (CLASS_LOGITS, BOX_DELTAS))]
    detections = say_verdict(comparison).partition("; ")[2].rstrip(".")
    return f"{title}: {', '.join(filter(None, parts))}; {detections}"


def _say_part(comparison: Comparison, title: str, stages: tuple[str, ...]) -> str:
    records = [comparison.stages[stage] for stage in stages if stage in comparison.stages]
    if not records:
        return ""
    worst = max(records, key=lambda record: record.fed.value)
    return f"{title} within {worst.fed.value:.1g} ({worst.tolerance:.1g} allowed)"


def _open_reference(model: Path, shrink: int) -> Subject:
    if model.suffix == ".onnx":
        network, spec = read_onnx(model)
        return open_cut(model.name, network, spec, run_spec=replace_sizes(spec, shrink))
    subject = open_subject(model)
    assert isinstance(subject, PipelineSubject), "a checkpoint is one"
    subject.spec = replace_sizes(subject.spec, shrink)
    return subject


def _draw() -> Pictures:
    return Pictures([("drawn scene", make_scene(SEED, 0).image)], "a drawn scene at half size", SHRINK)


def _read(folder: Path) -> Pictures:
    images = list(islice(_readable(folder), MOST_PICTURES))
    return Pictures(images, f"{len(images)} image{'s' if len(images) != 1 else ''} of {folder}", 1)


def _readable(folder: Path) -> Iterator[Read]:
    for path in list_images([folder]):
        try:
            yield path.name, to_array(path)
        except FpnEngineError:
            continue
