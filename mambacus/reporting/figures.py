"""The page's plots as PNG files by matplotlib, from the same geometry: for slides, papers and README files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mambacus.reporting.plots import Chart, Panel, Radar

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
}


def draw(page: Page, folder: Path) -> list[Path]:
    """Write every plot of the page as PNG and return the files, in the page's order."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files: list[Path] = []

    def save(figure: Any, name: str) -> None:
        path = folder / f"{re.sub(r'[^A-Za-z0-9._+-]+', '-', name).strip('-')}.png"
        figure.savefig(path, dpi=DPI, bbox_inches="tight", pad_inches=0.15)
        plt.close(figure)
        files.append(path)

    with plt.rc_context(_STYLE):  # type: ignore[arg-type]
        for radar in page.radars:
            save(_radar(radar), f"radar {radar.title}" if radar.title else "radar")
        for pair in page.pairs:
            if pair.panels:
                save(_changes(pair.panels, f"{pair.base} → {pair.tuned}"), f"change {pair.base} {pair.tuned}")
        if page.chart is not None:
            save(_training(page.chart), "training")
    return files


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
    plot.legend(loc="upper center", bbox_to_anchor=(0.5, 0.04), ncols=3, frameon=False)
    figure.text(
        0.5, 0.045, "outward is better on every axis; centre → rim under each name", ha="center", color=SOFT, fontsize=8
    )
    if radar.title:
        plot.set_title(radar.title, fontsize=11)
    return figure


def _changes(panels: Sequence[Panel], title: str) -> Any:
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
    figure.suptitle(f"{title}: right is better, bars are 95 % intervals", fontsize=10, x=0.01, ha="left")
    colours = {"better": GOOD, "worse": BAD, "open": COLOURS[0]}
    for panel, plot in zip(panels, plots[:, 0], strict=True):
        places = range(len(panel.bars))
        for place, bar in zip(places, panel.bars, strict=True):
            colour = colours[bar.row.verdict]
            plot.plot([bar.low, bar.high], [place, place], color=colour, linewidth=3, alpha=0.5, solid_capstyle="round")
            plot.plot(bar.middle, place, "o", color=colour, markersize=6)
            plot.text(103, place, bar.text, va="center", fontsize=8.5)
        plot.axvline(panel.zero, color=SOFT, linewidth=0.8, zorder=0)
        plot.set_yticks(list(places), [bar.title for bar in panel.bars])
        plot.set_xticks([at for at, _ in panel.ticks], [text for _, text in panel.ticks], fontsize=8)
        plot.set_xlim(-1, 101)
        plot.set_ylim(len(panel.bars) - 0.4, -0.6)
        plot.spines["left"].set_visible(False)
        plot.tick_params(axis="y", length=0)
        plot.set_title(f"{panel.title}: {panel.note}", fontsize=8.5, loc="left", color=SOFT)
    return figure


def _training(chart: Chart) -> Any:
    import matplotlib.pyplot as plt

    figure, plot = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
    for curve in chart.curves:
        xs, ys = [x for x, *_ in curve.points], [y for _, y, _ in curve.points]
        plot.plot(xs, ys, color=COLOURS[curve.colour], linewidth=1.6, label=curve.label)
    plot.set_xticks([at for at, _ in chart.x_ticks], [text for _, text in chart.x_ticks])
    plot.set_yticks([at for at, _ in chart.y_ticks], [text for _, text in chart.y_ticks])
    plot.set_xlim(0, 100)
    plot.set_ylim(100, 0)
    plot.grid(axis="y", color=LINE, linewidth=0.6)
    plot.set_xlabel("optimiser step")
    plot.set_ylabel("training loss")
    plot.legend(frameon=False)
    return figure
