"""The sections of tables alone: the paper's times, targets, what was not run, provenance; and all of them in order."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import sections
from benchmarks.report.section import USUAL, Section, Table, measured, rows_of
from benchmarks.report.words import write_ms, write_number
from benchmarks.rows import Row
from benchmarks.suite import BASE, OURS
from benchmarks.targets import Targets

# Lin et al. 2017, sec. 5.2.2 and 6.1, one image on an NVIDIA M40: seconds, and the suite and row that stand beside it.
PAPER = (
    ("Faster R-CNN with FPN, ResNet-50", 0.148, "engine", USUAL),
    ("Faster R-CNN with FPN, ResNet-101", 0.172, "engine", "R101-FPN, 800x1216, batch 1"),
    ("Faster R-CNN on C4, ResNet-50", 0.32, "paper", "R50-C4, 800x1216, batch 1"),
    ("mask proposals with FPN, ResNet-50", 0.24, "paper", "R50-FPN masks, 800x1216, batch 1"),
)


def make_sections(rows: Sequence[Row]) -> list[Section]:
    """Those that there are rows for."""
    makers = (
        sections.compare_peers,
        sections.show_stages,
        sections.show_throughput,
        sections.show_precisions,
        sections.show_scaling,
        sections.show_kernels,
        sections.show_cold,
        compare_paper,
        judge_targets,
        list_not_run,
        tell_provenance,
    )
    return [section for make in makers if (section := make(rows))]


def compare_paper(rows: Sequence[Row]) -> Section | None:
    known = {(row["suite"], row["what"]): row for row in rows}
    lines = []
    for system, seconds, suite, what in PAPER:
        row = known.get((suite, what), {})
        best = next((each for each in measured(row).items() if each[0].startswith(OURS)), None)
        if best:
            took = best[1]["milliseconds"]["median"]
            here = (f"{took / 1e3:.3g} s", f"{seconds * 1e3 / took:.3g} times", best[0].removeprefix("fpn-engine, "))
        else:
            here = ("not run", "", row.get("not_run", "not measured yet"))
        lines.append((system, f"{seconds} s", *here))
    if all(line[2] == "not run" for line in lines):
        return None
    text = "Lin et al. 2017 give times per image on an NVIDIA M40. Ours are at 800x1216, from pixels to boxes."
    columns = ("system", "the paper, M40", "here", "as fast", "form")
    return Section(title="Beside the paper", text=text, tables=[Table(columns=columns, rows=lines)])


def judge_targets(rows: Sequence[Row]) -> Section | None:
    verdicts = Targets.load_all().judge(rows)
    if not verdicts:
        return None
    lines = []
    for verdict in sorted(verdicts, key=lambda each: not each.is_here):
        target = verdict.target
        who = " or ".join(name.removeprefix("fpn-engine, ") for name in target.contestants)
        bound = f"at most {target.at_most:g}" if target.at_most is not None else f"at least {target.at_least:g}"
        found = "" if verdict.figure is None else write_number(verdict.figure)
        place = "here" if verdict.is_here else verdict.target_device
        what = f"{target.suite}: {target.what}"
        lines.append((verdict.word, what, who, f"{target.figure} {bound}", found, f"{place}, {target.step}"))
    text = "A target is for one device. Elsewhere the figure stands beside it for information, and nothing fails."
    columns = ("", "row", "best of", "target", "found", "for")
    return Section(title="Targets", text=text, tables=[Table(columns=columns, rows=lines)])


def list_not_run(rows: Sequence[Row]) -> Section | None:
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if "not_run" in row:
            reasons.setdefault((row["not_run"], "not run"), []).append(f"{row['suite']}: {row['what']}")
        if "error" in row:
            reasons.setdefault((row["error"], "failed"), []).append(f"{row['suite']}: {row['what']}")
        for name, about in row.get("contestants", {}).items():
            for key, word in (("not_run", "not run"), ("error", "failed")):
                if key in about:
                    reasons.setdefault((about[key], word), []).append(f"{row['suite']}: {name}")
    if not reasons:
        return None
    lines = [(", ".join(dict.fromkeys(whats)), word, reason) for (reason, word), whats in reasons.items()]
    text = "Nothing is left out silently."
    return Section(title="Not run", text=text, tables=[Table(columns=("what", "", "why"), rows=lines)])


def tell_provenance(rows: Sequence[Row]) -> Section:
    seen: dict[tuple[str, ...], int] = {}
    for row in rows:
        packages = ", ".join(f"{name} {version}" for name, version in row.get("packages", {}).items())
        driver = f", driver {row['driver']}" if "driver" in row else ""
        machine = f"{row.get('threads', '?')} threads, Python {row.get('python', '?')}{driver}, {packages}"
        key = (row["command"], row["commit"], row["date"], machine)
        seen[key] = seen.get(key, 0) + 1
    lines = [(*key, str(count)) for key, count in seen.items()]
    columns = ("command", "commit", "date", "machine", "rows")
    return Section(title="Provenance", text="", tables=[Table(columns=columns, rows=lines)])


def find_headline(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """At most four figures that say the most, each with what it is."""
    found: list[tuple[str, str]] = []
    usual = next((row for row in (*rows_of(rows, "peers"), *rows_of(rows, "engine")) if row["what"] == USUAL), {})
    ours = [item for item in measured(usual).items() if item[0].startswith(OURS)]
    if ours:
        name, about = ours[0]
        form = name.removeprefix("fpn-engine, ")
        found.append((write_ms(about["milliseconds"]["median"]), f"an image of 800x1216, R50, {form}"))
        if ratio := about.get("ratio_to_torchvision_fp32"):
            found.append((write_number(ratio), f"of {BASE}'s time"))
    exponents = [row for row in rows_of(rows, "scaling") if row.get("axis") == "boxes" and "time" in row]
    found += [(f"{row['time']['exponent']:.2f}", "exponent of NMS time against boxes") for row in exponents[:1]]
    for row in rows_of(rows, "cold"):
        beyond = [about["overhead_ms"] for about in measured(row).values() if "overhead_ms" in about]
        if beyond:
            found.append((write_ms(min(beyond)), "start of fpn-engine infer beyond inference"))
    return found[:4]
