"""Trainer: the loop from initial weights to a trained detector, which can be stopped and taken up anywhere."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_engine.errors import FpnEngineError, NonFiniteError
from fpn_export.detector import FpnDetector
from fpn_export.training.batches import Batch, load_batches, readers_named
from fpn_export.training.examples import Examples
from fpn_export.training.freezing import freeze_shared, set_training_mode
from fpn_export.training.losses import Loss
from fpn_export.training.processes import Processes
from fpn_export.training.randomness import SAMPLING, torch_generator
from fpn_export.training.recipe import Recipe
from fpn_export.training.run_folder import BEST, LAST, LOG, SCORES, RunFolder, State
from fpn_export.training.step import compute_losses
from fpn_export.training.validation import Score, Validation, main_figure

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What is known after an update: how many are done of how many, their losses, and a score if one was taken."""

    step: int
    steps: int
    losses: Mapping[str, float]
    rate: float
    seconds: float
    score: Score | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """What a run does besides learning; none of it changes the weights.

    Attributes:
        validate_every, save_every: updates between scores and between saved states; the last is always both.
        workers: processes that read images ahead; 0 reads in this one.
    """

    validate_every: int = 1000
    save_every: int = 200
    workers: int = 0


class Trainer:
    """Trains ``model`` in ``folder``; takes the run there up if one was begun under the same settings.

    Everything random depends on the seed and the step alone, so a run that was stopped ends with the same weights as
    one that was not (on one CPU and number of threads, in at most two processes).

    Args:
        model: with initial weights; trained in place.
        examples: what it learns from. data: what identifies them and the initial weights, JSON-ready.
        shared_frozen: fix backbone and pyramid (steps 3 and 4 of alternating training).
        validation: scores the model; None keeps only the last one. validated_on: what identifies its images; a best
            model so far by other ones is no longer the best.
    """

    def __init__(
        self,
        model: FpnDetector,
        examples: Examples,
        recipe: Recipe,
        folder: RunFolder,
        processes: Processes,
        *,
        data: Mapping[str, Any],
        habits: Habits | None = None,
        shared_frozen: bool = False,
        validation: Validation | None = None,
        validated_on: str | None = None,
    ) -> None:
        self.model = model.to(processes.device).to(memory_format=_memory_format(model, processes.device))
        self._examples, self._recipe, self.folder, self._processes = examples, recipe, folder, processes
        self._habits = habits or Habits()
        self._validation, self._validated_on = validation, validated_on
        self._settings: dict[str, Any] = {
            "spec": model.spec.to_dict(),
            "recipe": recipe.to_dict(),
            "data": dict(data),
            "processes": processes.world_size,
        }
        set_training_mode(model, recipe)
        if shared_frozen:
            freeze_shared(model)
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in model.parameters() if parameter.requires_grad],
            lr=recipe.rate,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            nesterov=recipe.nesterov,
        )
        self.step, self._seconds, self._score_due = 0, 0.0, False
        self.best: float | None = None
        state = folder.load_state(self._settings)
        if state is not None:
            self._restore(state)
        if processes.is_first:
            folder.rewind_log(self.step)
        processes.wait()

    @readers_named("; the same command goes on from the last saved state")
    def run(
        self,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Train to the end, or until ``should_stop`` says so after an update; the state is saved either way.

        Returns: whether the run is complete. The models are ``best.pth`` and ``last.pth`` in the folder.
        Raises: NonFiniteError if a loss is NaN or infinite, or a model in validation gives such values; the last saved
            state remains. FpnEngineError for an image that cannot be read; the state is saved before, so that the run
            goes on once the image is mended. FpnEngineError for a reader that was killed; the state is saved before if
            this process was about to read, otherwise the last saved one remains.
        """
        recipe, processes, habits = self._recipe, self._processes, self._habits
        losses_of = self._wrap(self._make_losses())
        if self._score_due:
            self._take_score()
            if processes.is_first:
                self._save()
        batches = self._load_batches()
        trained = self.step < recipe.steps
        while self.step < recipe.steps:
            began = time.perf_counter()
            batch = self._read(batches)
            losses = self._update(losses_of, batch.to(processes.device))
            self.step += 1
            self._seconds += time.perf_counter() - began
            done = self.step == recipe.steps
            rate = recipe.rate_at(self.step - 1)
            if processes.is_first:
                self.folder.log(LOG, {"step": self.step, "rate": rate, **losses, "seconds": round(self._seconds, 2)})
            score = self._take_score() if done or self.step % habits.validate_every == 0 else None
            if processes.is_first:
                on_progress(
                    Progress(
                        step=self.step,
                        steps=recipe.steps,
                        losses=losses,
                        rate=rate,
                        seconds=self._seconds,
                        score=score,
                    )
                )
            stopping = self._processes.agree(should_stop())
            if processes.is_first and (done or stopping or score or self.step % habits.save_every == 0):
                self._save()
            if stopping:
                break
        if self.step == recipe.steps and processes.is_first:
            self.folder.save_model(LAST, self._eval_copy(), self._about())
            if self._validation is None and (trained or not self.folder.has_model(BEST)):
                self.folder.save_model(BEST, self._eval_copy(), self._about())
        processes.wait()
        return self.step == recipe.steps

    def _make_losses(self) -> nn.Module:
        return _Losses(self.model, self._recipe)

    def _load_batches(self) -> Iterator[Any]:
        return load_batches(
            self._examples,
            self.model.spec,
            self._recipe,
            first_step=self.step,
            rank=self._processes.rank,
            world_size=self._processes.world_size,
            workers=self._habits.workers,
        )

    def _wrap(self, losses: nn.Module) -> nn.Module:
        if self._processes.world_size == 1:
            return losses
        return DistributedDataParallel(losses, find_unused_parameters=not self._reaches_all_weights())

    def _reaches_all_weights(self) -> bool:
        """Whether every weight gets a gradient at each step: of a level that no RoI falls on, from an RPN alone."""
        return self.model.has_rpn

    def _update(self, losses_of: nn.Module, batch: Batch) -> dict[str, float]:
        recipe, processes = self._recipe, self._processes
        for group in self._optimizer.param_groups:
            group["lr"] = recipe.rate_at(self.step)
        generator = torch_generator(processes.device, recipe.seed, SAMPLING, self.step, processes.rank)
        parts = losses_of(batch, generator)
        total = torch.stack([loss.classification + recipe.box_weight * loss.box for loss in parts.values()]).sum()
        self._optimizer.zero_grad(set_to_none=True)
        total.backward()
        if recipe.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        values = {
            f"{head}_{name}": part.item() for head, loss in parts.items() for name, part in loss._asdict().items()
        }
        values["loss"] = total.item()
        is_finite = bool(torch.isfinite(total))
        if processes.agree(not is_finite):
            loss = "another process's loss became NaN or infinite" if is_finite else f"the loss became {values['loss']}"
            raise NonFiniteError(
                f"{loss} at step {self.step + 1}; a lower --learning-rate, a longer --warmup or --clip-norm helps"
            )
        self._optimizer.step()
        return values

    def _read(self, batches: Iterator[Any]) -> Any:
        """The next batch.

        Raises: FpnEngineError, after the state is saved, if an image cannot be read by this process or another one.
        """
        batch, failure = None, None
        try:
            batch = next(batches)
        except FpnEngineError as error:
            failure = error
        if self._processes.agree(failure is not None):
            raise self._saved_despite(failure or FpnEngineError("another process cannot read its images and says why"))
        return batch

    def _take_score(self) -> Score | None:
        """The first process's score of the model, if it is to be scored. Raises: FpnEngineError, the state saved."""
        if self._validation is None:
            return None
        score, failure = None, None
        if self._processes.is_first:
            self._score_due = True
            try:
                score = self._validate(self._validation)
            except FpnEngineError as error:
                failure = error
        if self._processes.agree(failure is not None):
            failure = failure or FpnEngineError("the first process cannot score the model and says why")
            raise failure if isinstance(failure, NonFiniteError) else self._saved_despite(failure)
        self._score_due = False
        return score

    def _saved_despite(self, error: FpnEngineError) -> FpnEngineError:
        """``error``, with the word that the run goes on; saves the state for it, if there is anything to save."""
        if self.step == 0:
            return error
        if self._processes.is_first:
            self._save()
        return type(error)(f"{error}; stopped after step {self.step}, the same command goes on once that is mended")

    def _validate(self, validation: Validation) -> Score:
        score = validation(self._eval_copy())
        name, figure = main_figure(score)
        if self.best is None or figure > self.best:
            self.folder.save_model(BEST, self._eval_copy(), {**self._about(), "validation": {name: round(figure, 4)}})
            self.best = figure
        figures = {key: value for key, value in score.to_dict().items() if not isinstance(value, dict)}
        self.folder.log(
            SCORES, {"step": self.step, **{k: float("nan") if v is None else v for k, v in figures.items()}}
        )
        return score

    def _eval_copy(self) -> FpnDetector:
        """The model as it stands, ready to detect; the one in training keeps its mode."""
        return copy.deepcopy(self.model).eval()

    def _about(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "minutes": round(self._seconds / 60, 1),
            "recipe": self._recipe.to_dict(),
            "data": self._settings["data"],
        }

    def _save(self) -> None:
        self.folder.save_state(
            State(
                step=self.step,
                weights=self.model.state_dict(),
                optimizer=self._optimizer.state_dict(),
                settings=self._settings,
                best=self.best,
                seconds=self._seconds,
                score_due=self._score_due,
                validated_on=self._validated_on,
            )
        )

    def _restore(self, state: State) -> None:
        self.model.load_state_dict(dict(state.weights))
        self._optimizer.load_state_dict(dict(state.optimizer))
        self.step, self._seconds = state.step, state.seconds
        self.best = state.best if state.validated_on in (None, self._validated_on) else None
        unscored = self._validation is not None and self.best is None
        self._score_due = state.score_due or (unscored and self.step == self._recipe.steps)


def _memory_format(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which convolutions compute in on CUDA and in oneDNN; but on the CPU not for very narrow models.

    oneDNN's backward pass of a strided 1x1 convolution of fewer than 16 channels writes beyond its memory in that
    format (torch 2.15: with 8 channels at 60x80 and more, the process dies).
    """
    narrow = any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and part.stride != (1, 1) and part.in_channels < 16
        for part in model.modules()
    )
    return torch.contiguous_format if narrow and device.type == "cpu" else torch.channels_last


class _Losses(nn.Module):
    """A detector whose forward pass gives its losses, as DistributedDataParallel wants it."""

    def __init__(self, model: FpnDetector, recipe: Recipe) -> None:
        super().__init__()
        self.model, self._recipe = model, recipe

    def forward(self, batch: Batch, generator: torch.Generator) -> dict[str, Loss]:
        return compute_losses(
            self.model,
            batch.images,
            batch.image_sizes,
            batch.objects,
            generator,
            samples=self._recipe.samples,
            given=batch.proposals,
            precision=DTYPES[self._recipe.precision],
        )
