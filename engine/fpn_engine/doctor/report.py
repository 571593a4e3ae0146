"""Findings as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fpn_engine.doctor.finding import Finding

STYLES = {"ok": "green", "note": "yellow", "problem": "bold red"}


def findings_table(findings: Sequence[Finding]) -> Table:
    """Facts first, then notes, then problems, each with its remedy below."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for finding in sorted(findings, key=lambda finding: list(STYLES).index(finding.kind)):
        text = Text(finding.message)
        if finding.remedy:
            text.append(f"\nremedy: {finding.remedy}", style="bold")
        table.add_row(Text(finding.kind, style=STYLES[finding.kind]), Text(finding.topic), text)
    return table
