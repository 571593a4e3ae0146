"""A contest of backends that is settled beforehand, so that no test depends on which is faster at the moment."""

import pytest

from fpn_export.contest import Verdict

CHOICE = "taking onnxruntime: the test says so"


def settle_contest(patch: pytest.MonkeyPatch, winner: str = "onnxruntime") -> None:
    """Let automatic builds take ``winner``; of onnxruntime the line for people is ``CHOICE``."""
    verdict = Verdict(winner, CHOICE.replace("onnxruntime", winner))
    patch.setattr("fpn_export.build.hold_contest", lambda trunks, spec: verdict)
