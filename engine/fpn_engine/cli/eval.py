"""``fpn-engine eval``: the COCO score of a plan on annotated images."""

from __future__ import annotations

import json as json_module
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fpn_engine.cli.console import counting, emit, note, show
from fpn_engine.cli.options import (
    BatchOption,
    BucketOption,
    Decode,
    DecodeOption,
    DeviceOption,
    ModelOption,
    PlanOption,
    ThreadsOption,
)
from fpn_engine.cli.plans import choose_plan
from fpn_engine.cli.proposals import ProposalsOption, open_proposals
from fpn_engine.errors import FpnEngineError
from fpn_engine.files import refuse_replacing
from fpn_engine.ground_truth import check_images

if TYPE_CHECKING:
    from fpn_engine.annotations import CocoGroundTruth
    from fpn_engine.engine import Engine
    from fpn_engine.ground_truth import AnnotatedImage
    from fpn_engine.proposals import GivenProposals, ProposalBoxes


def evaluate(
    annotations: Annotated[
        Path, typer.Option(help="COCO instances JSON, a VOC folder, or a list of names in one.", show_default=False)
    ],
    images: Annotated[
        Path | None, typer.Option(help="Folder of the images that they name; a VOC folder has its own.")
    ] = None,
    plan: PlanOption = None,
    model: ModelOption = None,
    recall: Annotated[
        bool, typer.Option("--recall", help="Score the RPN's proposals: AR@100, AR@1k (table 1); an RPN has no other.")
    ] = False,
    proposals: ProposalsOption = None,
    save_proposals: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the RPN's proposals as .npz or .json; implies --recall.")
    ] = None,
    batch: BatchOption = 1,
    threads: ThreadsOption = None,
    device: DeviceOption = None,
    bucket: BucketOption = None,
    decode: DecodeOption = Decode.cpu,
    json: Annotated[bool, typer.Option("--json", help="The numbers as JSON on stdout.")] = False,
) -> None:
    """Score a plan with the COCO metric: AP, AP50, AP75, by size and class, and average recall.

    An RPN is scored by the average recall of its proposals; a Fast R-CNN needs the proposals of another plan. Mask
    proposals are scored by the average recall of segments: AR@10, AR@100, AR@1k, and AR@1k by size (table 6).
    """
    from fpn_engine.annotations import find_images, load_annotations
    from fpn_engine.engine import Engine
    from fpn_engine.masks.spec import MaskSpec
    from fpn_engine.proposal_file import check_suffix

    if save_proposals:
        check_suffix(save_proposals)
        refuse_replacing(save_proposals, "--save-proposals", [annotations, proposals])
    truth = load_annotations(annotations)
    files = find_files(truth, images or find_images(annotations))
    engine = Engine.load(
        choose_plan(plan, model),
        batch_size=batch,
        threads=threads,
        device=device,
        buckets=bucket,
        decode=decode.value,
    )
    given = open_proposals(engine.spec, proposals, truth.image_ids)
    if given:  # one that is missing shows before the long work
        for path in files.values():
            given(str(path))
    with counting("detecting", len(files)) as advance:
        if isinstance(engine.spec, MaskSpec):
            if recall or save_proposals:
                raise typer.BadParameter("is of an RPN", param_hint="--recall, --save-proposals")
            score = _score_segments(engine, annotations, files, advance)
        elif recall or save_proposals or not engine.spec.has_box_head:
            score = _score_proposals(engine, truth, files, save_proposals, advance)
        else:
            score = _score_detections(engine, truth, files, given, advance)
    if json:
        emit(json_module.dumps(score.to_dict()))
    else:
        show(score.to_table())


def find_files(truth: CocoGroundTruth, folder: Path) -> dict[int, Path]:
    """The file of each annotated image by its id. Raises FpnEngineError if one is missing."""
    if not os.path.isdir(folder):
        raise FpnEngineError(f"there is no folder {folder}; --images names the folder of the annotated images")
    files = {image.id: folder / image.file_name for image in truth.images}
    check_images(list(files.values()), folder)
    return files


def _score_detections(
    engine: Engine, truth: CocoGroundTruth, files: dict[int, Path], given: GivenProposals | None, advance: Any
) -> Any:
    from fpn_engine.detections import Detections
    from fpn_engine.evaluation import score_detections
    from fpn_engine.results import coco_results

    truth.check_categories(engine.spec.categories)
    results: list[dict[str, Any]] = []
    other_size: list[AnnotatedImage] = []
    for image, outcome in zip(truth.images, engine.stream(files.values(), proposals=given), strict=True):
        if not isinstance(outcome.result, Detections):
            raise outcome.result  # a score over the rest would not be the score
        if outcome.result.image_size != (image.height, image.width):
            other_size.append(image)
        results += coco_results(outcome.result, image.id)
        advance()
    _note_sizes(other_size, truth)
    return score_detections(truth, results)


def _score_segments(engine: Engine, annotations: Path, files: dict[int, Path], advance: Any) -> Any:
    from fpn_engine.detections import Detections
    from fpn_engine.masks.evaluation import Segments, score_segments
    from fpn_engine.masks.ground_truth import load_segments

    truth = load_segments(annotations)  # before the long work
    found = {}
    for image_id, outcome in zip(files, engine.stream(files.values()), strict=True):
        if not isinstance(outcome.result, Detections):
            raise outcome.result
        found[image_id] = Segments(outcome.result.run_lengths or (), outcome.result.scores)
        advance()
    return score_segments(truth, found)


def _score_proposals(
    engine: Engine, truth: CocoGroundTruth, files: dict[int, Path], target: Path | None, advance: Any
) -> Any:
    from fpn_engine.evaluation import score_proposals
    from fpn_engine.proposal_file import save_proposals
    from fpn_engine.proposals import ProposedImage

    found = {}
    other_size = []
    for image, (size, proposals) in zip(truth.images, _propose(engine, files.values()), strict=True):
        if size != (image.height, image.width):
            other_size.append(image)
        found[image.id] = proposals
        advance()
    _note_sizes(other_size, truth)
    if target:
        save_proposals(
            target,
            [
                ProposedImage(file_name=image.file_name, image_id=image.id, proposals=found[image.id])
                for image in truth.images
            ],
        )
        note(f"{target}: proposals of {len(found)} images")
    return score_proposals(truth, found)


def _propose(engine: Engine, paths: Iterable[Path]) -> Iterator[tuple[tuple[int, int], ProposalBoxes]]:
    """The (height, width) of each image, and its proposals."""
    remaining = iter(paths)
    while chunk := list(islice(remaining, engine.batch_size)):
        images = [engine.read(path) for path in chunk]
        yield from zip([(image.shape[0], image.shape[1]) for image in images], engine.propose(images), strict=True)


def _note_sizes(other_size: list[AnnotatedImage], truth: CocoGroundTruth) -> None:
    """Say that boxes may have been scored on the wrong pictures, if they were on some."""
    if other_size:
        note(
            f"{len(other_size)} of {len(truth.images)} images have another size than the annotations say, the first is "
            f"{other_size[0].file_name}; check --images"
        )
