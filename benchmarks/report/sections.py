"""The sections with charts, each made of one suite's rows of one device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.report.charts import Series, Stack, draw_bars, draw_lines, draw_stacks
from benchmarks.report.section import USUAL, Chart, Section, Table, bar_of, measured, rows_of
from benchmarks.report.words import write_bytes, write_ms, write_number, write_percent, write_rate, write_spread
from benchmarks.roofline import POOLING, PREPROCESS, TRUNK
from benchmarks.rows import Row
from benchmarks.suite import OURS
from fpn_export.onnx_cost import HEAD

STAGE_ORDER = (TRUNK, HEAD, PREPROCESS, "proposals", POOLING, "final selection and NMS")


def compare_peers(rows: Sequence[Row]) -> Section | None:
    charts, tables = [], []
    for row in rows_of(rows, "peers"):
        if not (timed := measured(row)):
            continue
        bars = [bar_of(name, about) for name, about in timed.items()]
        title = f"{row['what']}: time of a batch"
        name = "peers" if row["what"] == USUAL else ""
        charts.append(Chart(title=title, svg=draw_bars(bars, write_ms, title), name=name))
        columns = ("", "median (p20 to p80)", "images/s", "to torchvision fp32", "to its fastest", "floor", "of floor")
        lines = [
            (
                name,
                write_spread(about["milliseconds"]),
                write_rate(about["images_per_s"]),
                write_number(about.get("ratio_to_torchvision_fp32")),
                write_number(about.get("ratio_to_fastest_torchvision")),
                write_ms(about.get("floor_ms")),
                write_percent(about.get("share_of_floor")),
            )
            for name, about in timed.items()
        ]
        tables.append(Table(title=row["what"], columns=columns, rows=lines))
    if not charts:
        return None
    text = (
        "From uint8 images in device memory to detections, the same random weights in each, in turns on the same "
        "images. Bars are medians, the line on each spans from the fifth of the rounds that was quicker to the fifth "
        "that was slower. Ratios are medians over rounds; below 1 is faster."
    )
    return Section(title="Peers side by side", text=text, charts=charts, tables=tables)


def show_stages(rows: Sequence[Row]) -> Section | None:
    charts, tables = [], []
    for row in rows_of(rows, "stages"):
        if "stages" not in row:
            continue
        medians = {name: row["stages"][name]["milliseconds"]["median"] for name in STAGE_ORDER}
        floors = row.get("floors_ms", {})
        stacks = [Stack(label="measured", parts=list(medians.items()))]
        if floors:
            parts = [(name, floors[name]) for name in STAGE_ORDER if name in floors]
            stacks.append(Stack(label="floor", parts=parts))
        outside = write_percent(row["share_outside_network"])
        title = f"{row['what']}; {outside} outside trunk and head"
        name = f"stages-{row['what'].rpartition(', ')[2].replace(' ', '-')}" if row["what"].startswith(USUAL) else ""
        charts.append(Chart(title=title, svg=draw_stacks(stacks, write_ms, title), name=name))
        lines = [
            (
                name,
                write_spread(row["stages"][name]["milliseconds"]),
                write_percent(medians[name] / row["sum_ms"]),
                write_ms(floors.get(name)),
            )
            for name in row["stages"]
        ]
        lines.append(("outside trunk and head", "", outside, ""))
        lines.append(("sum", write_ms(row["sum_ms"]), "", write_ms(sum(floors.values()) if floors else None)))
        tables.append(Table(title=row["what"], columns=("stage", "median (p20 to p80)", "share", "floor"), rows=lines))
    if not charts:
        return None
    text = (
        "Each stage runs on what the one before it made. The floor is the least time that this device needs for the "
        "stage's products and bytes, operation by operation, at the rates that it reaches on large matrices and copies "
        "(measured in the same run); where a stage is selection and comparison it has none."
    )
    return Section(title="Latency by stage against the floor", text=text, charts=charts, tables=tables)


def show_throughput(rows: Sequence[Row]) -> Section | None:
    engine = [row for row in rows_of(rows, "engine") if measured(row)]
    charts = []
    for arch, size in dict.fromkeys((row["arch"], tuple(row["size"])) for row in engine):
        chosen = sorted(
            (row for row in engine if (row["arch"], tuple(row["size"])) == (arch, size)), key=lambda row: row["batch"]
        )
        if len(chosen) < 2:
            continue
        names = dict.fromkeys(name for row in chosen for name in measured(row))
        series = []
        for name in names:
            points = [
                (row["batch"], row["contestants"][name]["images_per_s"]) for row in chosen if name in measured(row)
            ]
            if len(points) > 1:
                label = name.removeprefix("fpn-engine, ")
                series.append(Series(label=label, points=points, ours=name.startswith(OURS)))
        title = f"{chosen[0]['what'].rpartition(',')[0]}: images a second against batch"
        options: dict[str, Any] = {"x_title": "images at once", "y_title": "images/s", "write_y": write_number}
        name = "throughput" if chosen[0]["what"] == USUAL else ""
        charts.append(Chart(title=title, svg=draw_lines(series, title, **options), name=name))
    lines = [
        (
            row["what"],
            name,
            write_spread(about["milliseconds"]),
            write_rate(about["images_per_s"]),
            write_number(about.get("ratio_to_torchvision_fp32")),
            write_percent(about.get("share_of_floor")),
        )
        for row in engine
        for name, about in measured(row).items()
    ]
    if not lines:
        return None
    columns = ("", "", "median (p20 to p80)", "images/s", "to torchvision fp32", "of floor")
    text = "Every backend and precision that runs here, end to end, beside torchvision in float32 in the same rounds."
    return Section(
        title="Backends, sizes and batches", text=text, charts=charts, tables=[Table(columns=columns, rows=lines)]
    )


def show_precisions(rows: Sequence[Row]) -> Section | None:
    charts, tables = [], []
    for row in rows_of(rows, "precision"):
        if not (timed := measured(row)):
            continue
        bars = [
            bar_of(name, about, f"AP {100 * about['AP']:.1f} ({100 * about['AP_difference']:+.2f})")
            for name, about in timed.items()
        ]
        title = f"{row['what']}: time of an image, and AP"
        charts.append(Chart(title=title, svg=draw_bars(bars, write_ms, title), name="precision"))
        lines = [
            (
                name,
                f"{100 * about['AP']:.2f}",
                f"{100 * about['AP_difference']:+.2f}",
                write_spread(about["milliseconds"]),
                write_number(about["ratio_to_fp32"]),
            )
            for name, about in timed.items()
        ]
        columns = ("", "AP", "points to fp32", "median (p20 to p80)", "time to fp32")
        tables.append(Table(title=f"{row['what']}, {row['images']} images", columns=columns, rows=lines))
    if not charts:
        return None
    text = "The COCO metric on photographs that the model was not trained on, and what an image takes in it."
    return Section(title="AP beside every precision", text=text, charts=charts, tables=tables)


def show_scaling(rows: Sequence[Row]) -> Section | None:
    charts, lines = [], []
    for row in rows_of(rows, "scaling"):
        if "points" not in row:
            continue
        fit, points = row["time"], [(each["size"], each["milliseconds"]["median"]) for each in row["points"]]
        title = f"{row['what']}: time grows with {row['axis']} to the power {fit['exponent']:.2f}"
        series = [Series(label="time", points=points, ours=True)]
        y_title = "ms, both axes logarithmic; dashed: the fit"
        svg = draw_lines(
            series,
            title,
            x_title=row["axis"] + (", pixels" if row["axis"] == "image area" else ""),
            y_title=y_title,
            write_y=write_number,
            log_y=True,
            fits=[(fit["scale"], fit["exponent"])],
        )
        charts.append(Chart(title=title, svg=svg, name=f"scaling-{row['axis'].replace(' ', '-').lower()}"))
        memory = row.get("memory")
        if memory:
            charts.append(_chart_memory(row))
        last = row["points"][-1]
        lines.append(
            (
                row["what"],
                f"{fit['exponent']:.2f} ({fit['low']:.2f} to {fit['high']:.2f})",
                f"{memory['exponent']:.2f} ({memory['low']:.2f} to {memory['high']:.2f})" if memory else "",
                f"{write_ms(last['milliseconds']['median'])}, {write_bytes(last['peak_memory_bytes'])}",
            )
        )
    if not charts:
        return None
    text = "Exponents are slopes of least squares through the logarithms, with 95 % confidence: 1 is linear."
    columns = ("", "exponent of time", "exponent of memory", "at the largest")
    return Section(title="Scaling", text=text, charts=charts, tables=[Table(columns=columns, rows=lines)])


def _chart_memory(row: Row) -> Chart:
    fit, points = row["memory"], [(each["size"], each["peak_memory_bytes"]) for each in row["points"]]
    title = f"{row['what']}: memory grows with {row['axis']} to the power {fit['exponent']:.2f}"
    svg = draw_lines(
        [Series(label="memory", points=points, ours=True)],
        title,
        x_title=row["axis"] + (", pixels" if row["axis"] == "image area" else ""),
        y_title="bytes at the peak, both axes logarithmic; dashed: the fit",
        write_y=write_bytes,
        log_y=True,
        fits=[(fit["scale"], fit["exponent"])],
    )
    return Chart(title=title, svg=svg)


def show_kernels(rows: Sequence[Row]) -> Section | None:
    kernels = [row for row in rows_of(rows, "kernels") if measured(row)]
    if not kernels:
        return None
    lines = []
    for row in kernels:
        rivals = ", ".join(f"{write_number(ratio)} of {name}" for name, ratio in row["ratios"].items())
        ours = row["contestants"]["fpn_kernels"]["milliseconds"]
        rate = f"{row['GB_per_s']:.4g} GB/s" + (f", {row['TFLOP_per_s']:.3g} TFLOP/s" if "TFLOP_per_s" in row else "")
        floor = f"{write_ms(row['floor_ms'])} ({write_percent(row['share_of_floor'])})"
        lines.append((row["what"], row["precision"], write_spread(ours), rivals, rate, floor))
    text = (
        f"{kernels[0]['implementation']}, at the shapes of R50-FPN on 800x1216. Ratios are our time over the rival's."
    )
    columns = ("op", "", "median (p20 to p80)", "ratio", "achieved", "floor (share reached)")
    return Section(title="Kernels", text=text, tables=[Table(columns=columns, rows=lines)])


def show_cold(rows: Sequence[Row]) -> Section | None:
    charts, tables = [], []
    for row in rows_of(rows, "cold"):
        if timed := measured(row):
            bars = [
                bar_of(
                    name, about, f"{write_ms(about['overhead_ms'])} beyond inference" if "overhead_ms" in about else ""
                )
                for name, about in timed.items()
            ]
            title = f"{row['what']}: process start to exit"
            charts.append(Chart(title=title, svg=draw_bars(bars, write_ms, title)))
            lines = [
                (name, write_spread(each["milliseconds"]), write_ms(each.get("overhead_ms")))
                for name, each in timed.items()
            ]
            columns = ("", "median (p20 to p80)", "beyond a warm detection")
            tables.append(Table(title=row["what"], columns=columns, rows=lines))
        if steps := row.get("steps_ms"):
            stacks = [Stack(label=name.rpartition(", ")[2], parts=list(each.items())) for name, each in steps.items()]
            charts.append(Chart(title=row["what"], svg=draw_stacks(stacks, write_ms, row["what"])))
    if not charts:
        return None
    return Section(title="Cold start", text="Whole processes, in turns.", charts=charts, tables=tables)
