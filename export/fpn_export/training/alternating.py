"""Alternating training in four steps with shared features (Ren et al. 2015, sec. 3.2; Lin et al. 2017, table 5)."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fpn_engine.annotations import load_annotations
from fpn_engine.engine import Engine
from fpn_engine.errors import CheckpointError, ProposalError, SpecError
from fpn_engine.proposal_file import save_proposals
from fpn_engine.proposals import ProposedImage
from fpn_engine.spec import OBJECT
from fpn_export.checkpoint import load_checkpoint
from fpn_export.detector import FpnDetector, make_detector
from fpn_export.training.job import (
    Job,
    Outcome,
    forget_run,
    identify,
    joined,
    make_examples,
    make_model,
    make_validation,
    train_joined,
)
from fpn_export.training.processes import Processes
from fpn_export.training.run_folder import BEST, LAST, STATE, STEP_FOLDERS, RunFolder
from fpn_export.training.step import with_proposals
from fpn_export.training.trainer import Progress
from fpn_export.training.validation import main_figure, propose


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One of the four: which model it trains, from which step's weights and among which step's proposals."""

    name: str
    model: str
    starts_from: str | None = None
    proposals_of: str | None = None

    @property
    def shared_frozen(self) -> bool:
        return self.starts_from is not None


_RPN, _FAST_RCNN, _RPN_AGAIN, _FAST_RCNN_AGAIN = STEP_FOLDERS
STEPS = (
    Step(name=_RPN, model="rpn"),
    Step(name=_FAST_RCNN, model="fast_rcnn", proposals_of=_RPN),
    Step(name=_RPN_AGAIN, model="rpn", starts_from=_FAST_RCNN),
    Step(name=_FAST_RCNN_AGAIN, model="fast_rcnn", starts_from=_FAST_RCNN, proposals_of=_RPN_AGAIN),
)
MODEL = f"{LAST}.pth"


def train_alternating(
    job: Job,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    should_stop: Callable[[], bool] = lambda: False,
    on_note: Callable[[str], None] = lambda sentence: None,
) -> Outcome:
    """Train a Faster R-CNN whose RPN and box head share backbone and pyramid, each step under the job's recipe.

    1. an RPN; 2. a Fast R-CNN of its own features on the RPN's proposals; 3. an RPN head on the fixed features of step
    2; 4. the box head on these features and the new proposals. Each step is a run in a folder of its own within the
    job's output, so all of it may be stopped and taken up. The joined model is ``best.pth`` and ``last.pth`` there.

    Raises: as :func:`fpn_export.training.job.train`; SpecError if the job's model is no Faster R-CNN.
    """
    if job.spec.model != "faster_rcnn":
        raise SpecError(f"alternating training makes a faster_rcnn, not a {job.spec.model}")
    if job.proposals:
        raise ProposalError("alternating training makes its own proposals; leave out --proposals")
    with (
        joined(job.device, job.recipe.batch_size) as processes,
        contextlib.closing(RunFolder(job.output, alone=processes.is_first)) as folder,
    ):
        return _train_steps(job, processes, folder, on_progress, should_stop, on_note)


def _train_steps(
    job: Job,
    processes: Processes,
    folder: RunFolder,
    on_progress: Callable[[Progress], None],
    should_stop: Callable[[], bool],
    on_note: Callable[[str], None],
) -> Outcome:
    if job.restart:  # what cannot be trained again is not forgotten
        make_model(job)
        make_examples(job, [load_annotations(path) for path in job.annotations])
        make_validation(job)
        forget_run(folder, processes, job.init)
    if os.path.exists(job.output / STATE):
        raise CheckpointError(f"{job.output} holds a run that is not alternating; give another folder, or --restart")
    job = dataclasses.replace(job, restart=False)
    for step in STEPS:
        if processes.is_first:
            on_note(f"step {step.name}")
        outcome = train_joined(_job_of(step, job), processes, on_progress, should_stop, on_note)
        if not outcome.complete:
            return outcome
        if step.model == "rpn":
            done = not processes.is_first or _write_proposals(step, job, processes.device, should_stop)
            if processes.agree(not done):
                return Outcome(complete=False, step=outcome.step, best=None)
    return _save_joined_model(job, processes.device, folder) if processes.is_first else outcome


def _save_joined_model(job: Job, device: torch.device, folder: RunFolder) -> Outcome:
    model = join_models(job, job.output / STEPS[2].name / MODEL, job.output / STEPS[3].name / MODEL).to(device)
    validation = make_validation(job)
    score = validation(model) if validation else None
    about = {"recipe": job.recipe.to_dict(), "schedule": "alternating, four steps"}
    for name in (BEST, LAST):
        folder.save_model(name, model, about)
    return Outcome(complete=True, step=job.recipe.steps, best=main_figure(score)[1] if score else None)


def join_models(job: Job, rpn: Path, fast_rcnn: Path) -> FpnDetector:
    """The Faster R-CNN of an RPN and a Fast R-CNN that were trained on the same fixed features."""
    weights = load_checkpoint(fast_rcnn).model.state_dict()
    weights |= {name: t for name, t in load_checkpoint(rpn).model.state_dict().items() if name.startswith("rpn.")}
    model = make_detector(job.spec, representation_size=job.representation_size)
    model.load_state_dict(weights)
    return model.eval()


def _job_of(step: Step, job: Job) -> Job:
    changes: dict[str, Any] = {"model": step.model}
    if step.model == "rpn":
        changes |= {"categories": (OBJECT,), "box_detections_per_img": job.spec.rpn_post_nms_top_n_test}
    proposals = (
        [path for path, _, _ in _proposal_files(job.output / step.proposals_of, job)] if step.proposals_of else []
    )
    return dataclasses.replace(
        job,
        spec=dataclasses.replace(job.spec, **changes),
        output=job.output / step.name,
        init=job.output / step.starts_from / MODEL if step.starts_from else job.init,
        proposals=proposals,
        paired_proposals=True,
        shared_frozen=step.shared_frozen,
    )


def _proposal_files(folder: Path, job: Job) -> list[tuple[Path, Path, Path]]:
    """Of each annotation file: where its images' proposals go, the file itself, and the folder of its images."""
    sources = list(zip(job.annotations, job.images, strict=True))
    if job.val_annotations is not None:
        sources.append((job.val_annotations, job.val_images or job.images[0]))
    names = [f"proposals-{place}-{identify(source)[:12]}.npz" for place, (source, _) in enumerate(sources)]
    return [(folder / name, *source) for name, source in zip(names, sources, strict=True)]


def _write_proposals(step: Step, job: Job, device: torch.device, should_stop: Callable[[], bool]) -> bool:
    """As many as a step draws its RoIs from; what is there already stays. Returns: whether all are there."""
    model = load_checkpoint(job.output / step.name / MODEL).model.to(device)
    model.spec = with_proposals(model.spec, job.recipe.proposals_per_image)
    for path, source, images in _proposal_files(job.output / step.name, job):
        if os.path.exists(path):
            continue
        truth = load_annotations(source)
        found = []
        for image, proposals in propose(Engine(model.pipeline, graphs=False), truth, images):
            found.append(ProposedImage(file_name=image.file_name, image_id=image.id, proposals=proposals))
            if should_stop():
                return False
        save_proposals(path, found)
    return True
