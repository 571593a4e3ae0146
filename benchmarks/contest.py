"""Whole detectors that take turns: uint8 images in device memory to detections, the same weights in each."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.roofline import ITEMSIZES, Floors, count_floors
from benchmarks.rows import Row
from benchmarks.scene import Contestant, Maker, Scene, check
from benchmarks.suite import BASE, DeviceLostError, Effort, Measured, NotHereError, describe_error, is_device_alive
from fpn_engine.roofline import measure_peaks
from fpn_engine.ruler import FEWEST, Times, take_turns

LEFT_OUT = "left out, as it broke the device before"
RIVAL = "torchvision"  # what the names of its forms begin with


class Contest:
    """One row: contestants are made, checked and timed group after group; later groups with all that came before.

    Those that cannot fail stand in the first group, those that may take minutes or break the device in the last.
    """

    def __init__(self, scene: Scene, groups: Sequence[Mapping[str, Maker]], effort: Effort) -> None:
        self.scene, self.effort = scene, effort
        chosen = [{name: make for name, make in group.items() if effort.chooses(name)} for group in groups]
        self.groups = [group for group in chosen if group]
        self.about: dict[str, Row] = {}
        self._ready: dict[str, Contestant] = {}
        self._floors: dict[str, Floors] = {}

    def grow(self) -> Iterator[Measured]:
        """The row after each group; ``complete`` once all have had their turn.

        Raises: DeviceLostError after the row, which is complete then: another try would end the same way.
        """
        assert all(len(found.scores) for found in self.scene.expected.values()), "there is nothing to compare"
        kind = self.scene.device.type
        for number, group in enumerate(self.groups):
            is_last = number == len(self.groups) - 1
            if number and self.effort.is_over():
                return
            for name, make in group.items():
                if self._set_up(name, make):
                    continue
                yield Measured({"contestants": self.about, "complete": False})
                raise DeviceLostError(name)
            rounds = self.effort.rounds if is_last or self.effort.quick else FEWEST[kind]
            turns = {name: contestant.turn for name, contestant in self._ready.items()}
            try:
                times = take_turns(turns, kind, rounds=rounds, seconds=self.effort.seconds)
            except Exception as error:
                if is_device_alive(self.scene.device):
                    raise
                raise DeviceLostError(*group) from error  # the groups before were timed
            self._describe(times)
            is_complete = is_last and not self.effort.chosen
            yield Measured.of({**self._facts(), "contestants": self.about, "complete": is_complete}, times)

    def _set_up(self, name: str, make: Maker) -> bool:
        """Make and check one; False if that broke the device."""
        if name in self.effort.left_out:
            self.about[name] = {"error": LEFT_OUT}
            return True
        try:
            self._ready[name], self.about[name] = set_up(self.scene, make)
        except NotHereError as reason:
            self.about[name] = {"not_run": str(reason)}
        except Exception as error:  # of one contestant; the others can still be measured
            traceback.print_exc()
            self.about[name] = {"error": describe_error(error)}
            return is_device_alive(self.scene.device)
        return True

    def _describe(self, times: Times) -> None:
        """Times, throughput, floor, and the ratios to torchvision in float32 and to its fastest form."""
        rivals = {name: times.spread(name).median for name in times.seconds if name.startswith(RIVAL)}
        fastest = min(rivals, key=rivals.__getitem__, default=None)
        for name in times.seconds:
            spread, contestant = times.spread(name), self._ready[name]
            self.about[name] |= {
                "precision": contestant.precision,
                "how": contestant.turn.how,
                "milliseconds": spread.to_dict(),
                "images_per_s": float(f"{1e3 * self.scene.batch / spread.median:.4g}"),
            }
            for key, other in (("ratio_to_torchvision_fp32", BASE), ("ratio_to_fastest_torchvision", fastest)):
                if other in times.seconds:
                    self.about[name][key] = times.ratio(name, other)
            if floors := self._find_floors(contestant.precision):
                self.about[name] |= floors.beside(spread.median)

    def _facts(self) -> Row:
        """What the figures are to be read beside."""
        scene, quick = self.scene, self.effort.quick
        peaks = {name: measure_peaks(scene.device.type, name, quick).to_dict() for name in sorted(self._floors)}
        return {
            "arch": scene.arch,
            "batch": scene.batch,
            "size": list(scene.size),
            "classes": scene.spec.num_classes,
            "weights": "random",
            "tf32": False,
            "peaks": peaks,
        }

    def _find_floors(self, precision: str) -> Floors | None:
        """None where the device's rates in this precision are not known."""
        if precision in ITEMSIZES and precision not in self._floors:
            self._floors[precision] = find_floors(self.scene, precision, self.effort.quick)
        return self._floors.get(precision)


def find_floors(scene: Scene, precision: str, quick: bool) -> Floors:
    peaks = measure_peaks(scene.device.type, precision, quick)
    return count_floors(scene.subject.onnx_model, scene.spec, scene.size, scene.batch, ITEMSIZES[precision], peaks)


def set_up(scene: Scene, make: Maker) -> tuple[Contestant, dict[str, Any]]:
    """A contestant that is right, and what it found and needed."""
    before = 0
    if scene.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    contestant = make(scene)
    row: Row = {"agreement": check(scene, contestant)}
    if scene.device.type == "cuda":
        torch.cuda.synchronize()
        row["peak_memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return contestant, row


def name_scene(arch: str, size: tuple[int, int], batch: int) -> str:
    return f"{arch.replace('resnet', 'R')}-FPN, {size[0]}x{size[1]}, batch {batch}"
