"""Job: everything that ``fpn-engine train`` was asked for, from files to a trained detector."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fpn_engine.annotations import CocoGroundTruth, load_annotations
from fpn_engine.errors import CheckpointError, FpnEngineError, ProposalError
from fpn_engine.ground_truth import check_objects
from fpn_engine.proposal_file import load_proposals
from fpn_engine.proposals import GivenProposals
from fpn_engine.spec import ModelSpec
from fpn_engine.voc import is_voc
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.training.examples import AnnotatedExamples, JoinedExamples
from fpn_export.training.initial_weights import Taken, load_initial_weights
from fpn_export.training.processes import Processes, join_processes, leave_processes
from fpn_export.training.randomness import INITIAL_WEIGHTS, random_state
from fpn_export.training.recipe import Recipe
from fpn_export.training.run_folder import STATE, STEP_FOLDERS, RunFolder
from fpn_export.training.trainer import Habits, Progress, Trainer
from fpn_export.training.validation import CocoValidation


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A training run.

    Attributes:
        annotations: what to learn, each as :func:`fpn_engine.annotations.load_annotations` takes it. images: the
            folder of those that each names. val_annotations, val_images: what to score on, or None; default images
            are the first's.
        output: folder of the run.
        spec: the model. representation_size: width of the box head's hidden layers.
        init: a file for :func:`load_initial_weights`, or None to start from scratch.
        proposals: files of them for a Fast R-CNN, each for images of any of the annotations, or if they are paired one
            for each of the annotations, then one of val_annotations.
        shared_frozen: fix backbone and pyramid (steps 3 and 4 of alternating training).
        device: "cpu", "cuda", or None for whichever is there.
        restart: forget the run in the folder.
    """

    annotations: Sequence[Path]
    images: Sequence[Path]
    val_annotations: Path | None = None
    val_images: Path | None = None
    output: Path
    spec: ModelSpec
    representation_size: int = 1024
    recipe: Recipe
    habits: Habits = field(default_factory=Habits)
    init: Path | None = None
    proposals: Sequence[Path] = ()
    paired_proposals: bool = False
    shared_frozen: bool = False
    device: str | None = None
    restart: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended: complete or stopped, after how many updates, and with what best figure of validation."""

    complete: bool
    step: int
    best: float | None


def train(
    job: Job,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Run ``job``, or take it up where it was stopped.

    Raises: FpnEngineError in one sentence for anything that the caller can put right.
    """
    if not job.restart and holds_alternating(job.output):
        raise CheckpointError(
            f"{job.output} holds an alternating run; go on with --alternating, or give another folder"
        )
    with joined(job.device, job.recipe.batch_size) as processes:
        return train_joined(job, processes, on_progress, should_stop, on_note)


def train_joined(
    job: Job,
    processes: Processes,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    on_note: Callable[[str], None],
) -> Outcome:
    """:func:`train` among processes that have joined already."""
    if job.proposals and job.spec.has_rpn:
        raise ProposalError(f"a {job.spec.model} finds its own proposals; they are given to a fast_rcnn only")
    with contextlib.closing(RunFolder(job.output, alone=processes.is_first)) as folder:
        model, taken = make_model(job)
        if taken and processes.is_first:
            on_note(f"{len(model.state_dict()) - len(taken.missing)} tensors from {job.init}")
        truths = [load_annotations(path) for path in job.annotations]
        parts, validation = make_examples(job, truths), make_validation(job)
        if job.restart:
            forget_run(folder, processes, job.init)
        trainer = Trainer(
            model,
            JoinedExamples(parts),
            job.recipe,
            folder,
            processes,
            data={
                "annotations": [identify(*each) for each in zip(job.annotations, truths, strict=True)],
                "init": taken.sha256 if taken else None,
                "proposals": [digest for part in parts if (digest := part.digest_proposals())],
                "representation_size": job.representation_size,
            },
            habits=job.habits,
            shared_frozen=job.shared_frozen,
            validation=validation,
            validated_on=_identify_validation(job),
        )
        if trainer.step and processes.is_first:
            on_note(f"going on after step {trainer.step} of {job.recipe.steps} in {job.output}")
        complete = trainer.run(on_progress, should_stop)
        return Outcome(complete=complete, step=trainer.step, best=trainer.best)


def holds_alternating(folder: Path) -> bool:
    """Whether an alternating run was begun there, whose steps have folders of their own."""
    return os.path.isdir(folder / STEP_FOLDERS[0]) and not os.path.exists(folder / STATE)


def make_model(job: Job) -> tuple[FpnDetector, Taken | None]:
    """The model with its initial weights, drawn from the recipe's seed or read from ``job.init``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(random_state(job.recipe.seed, INITIAL_WEIGHTS).randint(2**31)))
        model = make_detector(job.spec, representation_size=job.representation_size)
    return model, load_initial_weights(model, job.init) if job.init else None


def make_examples(job: Job, truths: Sequence[CocoGroundTruth]) -> list[AnnotatedExamples]:
    """What is to be learnt of each of ``truths``. Raises: FpnEngineError if some of it is missing."""
    # An RPN knows one category, "object", and learns all.
    categories = truths[0].categories if job.spec.model == "rpn" else job.spec.categories
    return [
        AnnotatedExamples(truth, images, categories, _find_proposals(job, truth, place))
        for place, (truth, images) in enumerate(zip(truths, job.images, strict=True))
    ]


def make_validation(job: Job) -> CocoValidation | None:
    """What the job's model is scored by. Raises: AnnotationError or ProposalError if that is nothing, or not there."""
    if job.val_annotations is None:
        return None
    val_truth = load_annotations(job.val_annotations)
    if job.spec.model != "rpn":
        val_truth.check_categories(job.spec.categories)
    check_objects(val_truth, job.val_annotations)
    proposals = _find_proposals(job, val_truth, len(job.annotations))
    if proposals:  # one that is missing shows before the long work
        for image in val_truth.images:
            proposals(image.file_name)
    return CocoValidation(val_truth, job.val_images or job.images[0], proposals)


def _find_proposals(job: Job, truth: CocoGroundTruth, place: int) -> GivenProposals | None:
    """Those for the images of ``truth``, which is at ``place`` of the annotations, or after them to be scored on."""
    if job.spec.has_rpn:
        return None
    if not job.proposals:
        raise ProposalError("a Fast R-CNN learns among given proposals; give a file of them with --proposals")
    files = [job.proposals[place]] if job.paired_proposals else job.proposals
    listed = [image for path in files for image in load_proposals(path)]
    return GivenProposals(files[0], listed, truth.image_ids)


@contextlib.contextmanager
def joined(device: str | None, batch_size: int) -> Iterator[Processes]:
    """This process among those of a job. Raises: FpnEngineError if they cannot share its batch."""
    processes = join_processes(device)
    try:
        if batch_size % processes.world_size:
            raise FpnEngineError(
                f"a batch of {batch_size} does not divide among {processes.world_size} processes; give another --batch"
            )
        yield processes
    finally:
        leave_processes(processes)


def forget_run(folder: RunFolder, processes: Processes, init: Path | None) -> None:
    """Clear the folder once no process reads anything in it. Raises: CheckpointError if ``init`` would be lost."""
    if init is not None and Path(os.path.realpath(init)).is_relative_to(os.path.realpath(folder.path)):
        raise CheckpointError(f"{init} is of the run that --restart forgets; move it, or give another --output")
    processes.wait()
    if processes.is_first:
        folder.clear()
    processes.wait()


def _identify_validation(job: Job) -> str | None:
    if job.val_annotations is None:
        return None
    proposals = job.proposals[len(job.annotations) :] if job.paired_proposals else job.proposals
    return " ".join([identify(job.val_annotations), *(_digest(path.read_bytes()) for path in proposals)])


def identify(path: Path, truth: CocoGroundTruth | None = None) -> str:
    """Digest of an annotation file; of VOC's, which are many, of what they say, ``truth`` if that is known."""
    return _digest(repr(truth or load_annotations(path)).encode() if is_voc(path) else path.read_bytes())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
