"""The page's plots as PNG and SVG files by matplotlib, from the same geometry: for slides, papers and README files."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.reporting.charts import Chart, Figure
from mambacus.reporting.panels import Panel
from mambacus.reporting.radar_shape import Radar

if TYPE_CHECKING:
    from mambacus.reporting.page import Page

COLOURS = ("#6b7683", "#0b6fc2", "#c8500f", "#0a8a64", "#a23f8f", "#b07a00", "#3b8ea5", "#7a5cc2")
MARKERS = "os^D"
INK, SOFT, LINE, GOOD, BAD = "#1c2127", "#5b6672", "#d9dde2", "#0a7a55", "#b5401f"
DPI = 200
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "mambacus",
}


def draw(page: Page, folders: Mapping[str, Path]) -> list[Path]:
    """Write every plot of the page and return the files, in the page's order.

    Args:
        page: what is drawn.
        folders: format (``png`` or ``svg``) -> folder; several formats are drawn from one figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []
    with plt.rc_context(_STYLE):  # type: ignore[arg-type]
        for name, make in _drawings(page):
            figure = make()
            for kind in sorted(folders, reverse=True):  # SVG first: after a PNG its last digits would differ
                path = folders[kind] / f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', name).strip('-')}.{kind}"
                metadata = {"Date": None} if kind == "svg" else None  # the same page gives the same file
                figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15, metadata=metadata)
                files.append(path)
            plt.close(figure)
    return files


def _drawings(page: Page) -> Iterator[tuple[str, Callable[[], Any]]]:
    for radar in page.radars:
        yield f"radar {radar.title}".strip(), partial(_radar, radar)
    for pair in page.pairs:
        if pair.panels:
            title = f"{pair.base} → {pair.tuned}: right is better, bars are 95 % intervals"
            yield f"change {pair.base} {pair.tuned}", partial(_panels, pair.panels, title)
    for section in page.sections:
        if section.panels:
            title = f"{section.title}: right is better, bars are 95 % intervals"
            yield section.name, partial(_panels, section.panels, title)
        for figure in section.figures:
            yield figure.name, partial(_figure, figure)


def _radar(radar: Radar) -> Any:
    import matplotlib.pyplot as plt

    figure, plot = plt.subplots(figsize=(6.4, 6.4))
    plot.set_xlim(0, 100)
    plot.set_ylim(100, 0)
    plot.set_aspect("equal")
    plot.axis("off")
    for ring in radar.rings:
        plot.plot(*zip(*ring, ring[0], strict=True), color=LINE, linewidth=0.8, zorder=1)
    for spoke in radar.spokes:
        plot.plot([50, spoke.x], [50, spoke.y], color=LINE, linewidth=0.8, zorder=1)
        sideways = {"start": "left", "end": "right"}.get(spoke.anchor, "center")
        upright = {"top": "bottom", "bottom": "top"}.get(spoke.anchor, "center")
        label = f"{spoke.axis.title}\n{spoke.axis.ends}"
        plot.text(spoke.label_x, spoke.label_y, label, ha=sideways, va=upright, fontsize=8.5, linespacing=1.35)
    for polygon in radar.polygons:
        colour = COLOURS[polygon.colour]
        xs, ys = [mark.x for mark in polygon.marks], [mark.y for mark in polygon.marks]
        if polygon.closed:
            plot.fill(xs, ys, color=colour, alpha=0.08, zorder=2)
            xs, ys = [*xs, xs[0]], [*ys, ys[0]]
        marker = MARKERS[polygon.colour % len(MARKERS)]
        plot.plot(xs, ys, color=colour, linewidth=1.8, marker=marker, markersize=5, label=polygon.label, zorder=3)
        xs, ys = [mark.x for mark in polygon.published], [mark.y for mark in polygon.published]
        plot.plot(xs, ys, color=colour, linestyle="", marker=marker, markersize=9, fillstyle="none", zorder=3)
    plot.legend(loc="upper center", bbox_to_anchor=(0.5, 0.04), ncols=3, frameon=False)
    words = "outward is better on every axis; centre → rim under each name"
    if any(polygon.published for polygon in radar.polygons):
        words += "\n" + radar.notes[-1]
    figure.text(0.5, 0.045, words, ha="center", va="top", color=SOFT, fontsize=8)
    if radar.title:
        plot.set_title(radar.title, fontsize=11)
    return figure


def _panels(panels: Sequence[Panel], title: str) -> Any:
    import matplotlib.pyplot as plt

    heights = [len(panel.bars) + 1.2 for panel in panels]
    figure, plots = plt.subplots(
        len(panels),
        1,
        figsize=(7.2, 0.36 * sum(heights) + 0.6),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    colours = {"better": GOOD, "worse": BAD, "open": COLOURS[0]}
    for panel, plot in zip(panels, plots[:, 0], strict=True):
        places = range(len(panel.bars))
        for place, bar in zip(places, panel.bars, strict=True):
            colour = colours[bar.row.verdict]
            plot.plot(bar.dots, [place] * len(bar.dots), "o", color=INK, markersize=2.5, alpha=0.5)
            plot.plot([bar.low, bar.high], [place, place], color=colour, linewidth=3, alpha=0.5, solid_capstyle="round")
            plot.plot(bar.middle, place, "o", color=colour, markersize=6)
            plot.text(103, place, bar.row.text, va="center", fontsize=8.5)
        plot.axvline(panel.zero, color=SOFT, linewidth=0.8, zorder=0)
        plot.set_yticks(list(places), [bar.row.title for bar in panel.bars])
        plot.set_xticks([at for at, _ in panel.ticks], [text for _, text in panel.ticks], fontsize=8)
        plot.set_xlim(-1, 101)
        plot.set_ylim(len(panel.bars) - 0.4, -0.6)
        plot.spines["left"].set_visible(False)
        plot.tick_params(axis="y", length=0)
        plot.set_title(f"{panel.title}: {panel.note}", fontsize=8.5, loc="left", color=SOFT)
    return figure


def _figure(figure: Figure) -> Any:
    import matplotlib.pyplot as plt

    columns = min(2, len(figure.charts))
    lines = -(-len(figure.charts) // columns)
    size = (7.2, 3.2) if columns == 1 else (9.6, 2.9 * lines)
    drawn, plots = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    drawn.suptitle(figure.title, fontsize=10, x=0.01, ha="left")
    for plot in plots.flat[len(figure.charts) :]:
        plot.axis("off")
    for chart, plot in zip(figure.charts, plots.flat, strict=False):
        _chart(chart, plot)
    handles = dict(zip(*reversed(plots.flat[0].get_legend_handles_labels()), strict=True))
    drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False)
    return drawn


def _chart(chart: Chart, plot: Any) -> None:
    for curve in chart.curves:
        style: dict[str, Any] = {"color": COLOURS[curve.colour], "clip_on": False, "in_layout": False}
        marker = MARKERS[curve.colour % len(MARKERS)] if curve.dots else ""
        xs, ys = [point.x for point in curve.points], [point.y for point in curve.points]
        line = "--" if curve.dashed else "-"
        plot.plot(xs, ys, linestyle=line, linewidth=1.6, marker=marker, markersize=4, label=curve.label, **style)
        for point in curve.points:
            if point.span:
                plot.plot([point.x, point.x], point.span, linewidth=1.2, alpha=0.6, **style)
        plot.plot([p.x for p in curve.crosses], [p.y for p in curve.crosses], "x", markersize=6, **style)
    for mark in chart.crossings:
        plot.axvline(mark.x, color=SOFT, linewidth=0.8, linestyle=":")
        plot.text(mark.x, 98, f" {mark.text} ", fontsize=7, color=SOFT, ha="right" if mark.x > 60 else "left")
    plot.set_xticks([at for at, _ in chart.x_ticks], [text for _, text in chart.x_ticks], fontsize=8)
    plot.set_yticks([at for at, _ in chart.y_ticks], [text for _, text in chart.y_ticks], fontsize=8)
    plot.set_xlim(0, 100)
    plot.set_ylim(100, 0)
    plot.grid(axis="y", color=LINE, linewidth=0.6)
    plot.set_title(
        f"{chart.title}{f', {chart.y_title}' if chart.y_title else ''}", fontsize=8.5, loc="left", color=SOFT
    )
    plot.set_xlabel(chart.x_title, fontsize=8)
