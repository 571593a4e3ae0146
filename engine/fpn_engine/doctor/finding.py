"""One thing that the doctor has to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """A fact (ok), something worth knowing (note) or something that does not work (problem).

    Attributes:
        topic: a word or two: "python", "torch", "CUDA".
        message: one plain sentence, without a full stop.
        remedy: what to do, preferably a command; None where there is nothing to do.
    """

    kind: Kind
    topic: str
    message: str
    remedy: str | None = None
