"""The report as one HTML page that needs nothing else, and its tables as Markdown."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

from benchmarks.report.charts import DARK, LIGHT, STYLE
from benchmarks.report.ledger import find_headline, make_sections
from benchmarks.report.section import Section, Table
from benchmarks.rows import Row

TITLE = "fpn-engine: benchmarks"
QUICK = "These rows come from a quick try of the suites on tiny models. They are no measurements."


def _variables(colours: Mapping[str, str]) -> str:
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


PAGE_STYLE = f"""
:root {{ {_variables(LIGHT)} --card: #f6f8fa; color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} --card: #1b2127; }} }}
@media print {{ :root {{ {_variables(LIGHT)} --card: #ffffff; color-scheme: light; }} }}
{STYLE}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif; }}
h1 {{ font-size: 1.5rem; margin: .4rem 0; }} h2 {{ font-size: 1.2rem; margin: 2.6rem 0 .3rem; }}
h2.device {{ font-size: 1.35rem; border-top: 2px solid var(--ink); padding-top: .8rem; }}
h3 {{ font-size: .95rem; margin: 0 0 .4rem; font-weight: 600; text-wrap: balance; }}
p {{ margin: .3rem 0 .9rem; max-width: 44rem; }} .muted {{ color: var(--muted); }}
nav {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .6rem 0; font-size: .92rem; }}
a {{ color: var(--ours); text-decoration: none; }} a:hover {{ text-decoration: underline; }}
.warning {{ border-left: 4px solid var(--bad); padding: .5rem .8rem; background: var(--card); max-width: none; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .8rem; margin: 1rem 0; }}
.tile {{ background: var(--card); border-radius: 8px; padding: .8rem 1rem; }}
.tile b {{ display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }}
.tile span {{ color: var(--muted); font-size: .88rem; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr));
  gap: 1rem; align-items: start; }}
figure {{ margin: 0; background: var(--card); border-radius: 8px; padding: .9rem .9rem .5rem; break-inside: avoid; }}
figure svg {{ display: block; width: 100%; height: auto; max-width: 30rem; }}
.scroll {{ overflow-x: auto; margin: .9rem 0; }}
table {{ border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }}
caption {{ text-align: left; font-weight: 600; padding: .3rem 0; }}
th, td {{ text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }}
th {{ color: var(--muted); font-weight: 500; }}
td.met {{ color: var(--ours); }} td.missed, td.failed {{ color: var(--bad); font-weight: 600; }}
tr {{ break-inside: avoid; }} details summary {{ cursor: pointer; color: var(--muted); font-size: .92rem; }}
@media print {{ body {{ max-width: none; font-size: 11pt; padding: 0; }} nav {{ display: none; }}
  figure, .tile {{ border: 1px solid var(--grid); }} h2 {{ break-after: avoid; }}
  details::details-content {{ content-visibility: visible; }} .scroll {{ overflow: visible; }} }}
"""


def group_by_device(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["device"], []).append(row)
    return groups


def write_page(rows: Sequence[Row]) -> str:
    """``rows``: of suites, of any number of devices."""
    groups = group_by_device(rows)
    body = [f"<h1>{TITLE}</h1>"]
    body.append(
        "<p>Outputs are checked before anything is timed; contestants take turns on rotating inputs; figures are "
        "medians with their 20th and 80th percentiles.</p>"
    )
    if any(row.get("quick") for row in rows):
        body.append(f'<p class="warning">{QUICK}</p>')
    for number, (device, found) in enumerate(groups.items()):
        body.append(f'<h2 class="device">{html.escape(device)}</h2>')
        tiles = "".join(
            f'<div class="tile"><b>{html.escape(figure)}</b><span>{html.escape(what)}</span></div>'
            for figure, what in find_headline(found)
        )
        body.append(f'<div class="tiles">{tiles}</div>' if tiles else "")
        sections = make_sections(found)
        links = (f'<a href="#{_anchor(number, each)}">{html.escape(each.title)}</a>' for each in sections)
        body.append(f"<nav>{''.join(links)}</nav>")
        body += [_write_section(each, _anchor(number, each)) for each in sections]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{TITLE}</title><style>{PAGE_STYLE}</style>"
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def write_markdown(rows: Sequence[Row]) -> str:
    """The tables."""
    lines = [f"# {TITLE}", ""]
    if any(row.get("quick") for row in rows):
        lines += [f"**{QUICK}**", ""]
    for device, found in group_by_device(rows).items():
        lines += [f"## {device}", ""]
        for section in make_sections(found):
            lines += [f"### {section.title}", ""]
            lines += [section.text, ""] if section.text else []
            for table in section.tables:
                lines += [f"**{table.title}**", ""] if table.title else []
                lines += [_write_cells(table.columns), "|" + "---|" * len(table.columns)]
                lines += [_write_cells(row) for row in table.rows] + [""]
    return "\n".join(lines)


def _write_section(section: Section, anchor: str) -> str:
    parts = [f'<h2 id="{anchor}">{html.escape(section.title)}</h2>']
    parts += [f"<p>{html.escape(section.text)}</p>"] if section.text else []
    if section.charts:
        figures = (f"<figure><h3>{html.escape(chart.title)}</h3>{chart.svg}</figure>" for chart in section.charts)
        parts.append(f'<div class="charts">{"".join(figures)}</div>')
    tables = "".join(_write_table(table) for table in section.tables)
    if section.charts and tables:
        tables = f"<details><summary>The figures</summary>{tables}</details>"
    return "\n".join([*parts, tables])


def _write_table(table: Table) -> str:
    caption = f"<caption>{html.escape(table.title)}</caption>" if table.title else ""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    lines = "".join(
        "<tr>" + "".join(f"<td{_mark(cell)}>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows
    )
    return f'<div class="scroll"><table>{caption}<tr>{head}</tr>{lines}</table></div>'


def _mark(cell: str) -> str:
    return f' class="{cell}"' if cell in ("met", "missed", "failed") else ""


def _write_cells(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _anchor(number: int, section: Section) -> str:
    return f"d{number}-{section.title.lower().replace(' ', '-')}"
