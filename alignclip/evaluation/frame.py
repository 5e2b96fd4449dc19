"""The frame of all pictures: figure, colours, legend, and a PNG that is written whole."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from alignclip.evaluation.packages import library
from alignclip.storage import write_whole

# Okabe and Ito's, told apart with any colour vision; their yellow darkened, for lines on white.
# Blue and orange differ in grey as well; eight greys don't: hence the markers
OKABE_ITO = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89A00")
MARKERS = "osD^vPX<>"
MID_GREY = "0.45"
DASHED, DOTTED, DASH_DOTTED = (0, (3, 1.5)), (0, (1, 1.5)), (0, (6, 1.5, 1.5, 1.5))
DPI = 130

Entry = tuple[str, dict[str, Any]]  # of a legend: the words, and how the line looks


def new_panels(
    names: Collection[str], width: float, height: float, rows: int = 1, columns: int = 1, **how: Any
) -> Any:
    """Make the panels of an empty figure that pyplot doesn't know.

    Args:
        names: of the checkpoints, one at least.
        width: of the figure, in inches.
        height: of the figure, in inches.
        rows: of panels.
        columns: of panels.
        **how: matplotlib's ``subplots`` arguments.

    Returns:
        [rows, columns] of matplotlib's axes.

    Raises:
        ValueError: no checkpoints.
        UserError: matplotlib is not installed.
    """
    if not names:
        raise ValueError("no checkpoints to draw")
    figure = library("matplotlib.figure", "plots need").Figure(
        figsize=(width, height), layout="constrained"
    )
    return figure.subplots(rows, columns, squeeze=False, **how)


def wrapped(name: str, width: int) -> str:
    """Wrap a name at so many characters, shown as it is: no formulas between dollar signs."""
    return "\n".join(textwrap.wrap(name, width, break_on_hyphens=False)).replace("$", r"\$")


def style(index: int) -> dict[str, Any]:
    """Return colour and marker of a checkpoint, the same in all plots."""
    return {
        "color": OKABE_ITO[index % len(OKABE_ITO)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 7,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def entries(names: Iterable[str], **look: Any) -> list[Entry]:
    """Return the legend's entries of checkpoints: their :func:`style`, but for ``look``."""
    return [(name, style(index) | look) for index, name in enumerate(names)]


def chance_entry(chance: object) -> list[Entry]:
    """Return the legend's entry of dashed grey lines, where there is a chance to draw."""
    return [("chance", {"color": MID_GREY, "linestyle": DASHED})] if chance else []


def add_legend(figure: Any, shown: Sequence[Entry], side: str = "center") -> None:
    """Add the legend below the panels, where the figure grows.

    Args:
        figure: with its panels drawn.
        shown: the entries.
        side: where below the panels the legend is.
    """
    line = library("matplotlib.lines").Line2D
    fitting = int((figure.get_figwidth() - 0.6) / 0.075)  # characters, beside a line of the legend
    labels = [wrapped(name, min(90, fitting)) for name, _ in shown]
    longest = max(len(part) for label in labels for part in label.split("\n"))
    columns = max(1, min(4, int(figure.get_figwidth() / (0.6 + 0.085 * longest))))
    rows = math.ceil(sum(1 + label.count("\n") for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * rows)
    place = {"loc": f"outside lower {side}", "ncols": columns}
    handles = [line([], [], **look) for _, look in shown]
    figure.legend(handles, labels, **place, frameon=False, fontsize=9)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)


def add_panel_legends(figure: Any, shown: Sequence[Sequence[Entry]]) -> None:
    """Add a legend below each panel, where the figure grows.

    Args:
        figure: with its panels drawn, in rows of two.
        shown: the entries of each panel.
    """
    line, rows = library("matplotlib.lines").Line2D, 0
    for panel, own in zip(figure.axes, shown, strict=True):
        handles, labels = [line([], [], **look) for _, look in own], [name for name, _ in own]
        below = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.16)}
        panel.legend(handles, [wrapped(name, 85) for name in labels], **below, frameon=False)
        panel.spines[["top", "right"]].set_visible(False)
    for at in range(0, len(shown), 2):
        rows += max(len(own) for own in shown[at : at + 2])
    figure.set_figheight(figure.get_figheight() + 0.22 * rows)


def save_figure(
    figure: Any, path: str | Path, shown: Sequence[Entry], side: str = "center"
) -> None:
    """Add the legend, and write the PNG."""
    add_legend(figure, shown, side)
    write_png(figure, path)


def write_png(figure: Any, path: str | Path) -> None:
    """Write a figure, which appears whole or not at all."""
    with write_whole(Path(path), durable=False) as partial:
        figure.savefig(partial, dpi=DPI, format="png", backend="agg")


def count_batches(panel: Any) -> None:
    """Have whole batches on the horizontal axis, few enough to be read."""
    ticker = library("matplotlib.ticker")
    panel.set_xlabel("batch")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(nbins=6, integer=True))
    panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
