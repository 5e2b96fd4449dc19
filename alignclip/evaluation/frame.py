"""The frame of all pictures: figure, colours, legend, and a PNG that is written whole."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignclip.evaluation.packages import library
from alignclip.storage import write_whole

# Okabe and Ito's, told apart with any colour vision; their yellow darkened, for lines on white.
# Blue and orange differ in grey as well; eight greys don't: hence the markers
OKABE_ITO = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89A00")
MARKERS = "osD^vPX<>"
GREY = "0.45"
DASHED, DOTTED, DASH_DOTTED = (0, (3, 1.5)), (0, (1, 1.5)), (0, (6, 1.5, 1.5, 1.5))
DPI = 130
SQUARES: Mapping[str, Any] = {"marker": "s", "linestyle": "none", "markersize": 8}  # of bars

Look = Mapping[str, Any]


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


def save_figure(
    figure: Any,
    path: str | Path,
    names: Collection[str],
    look: Look | None = None,
    more: Sequence[tuple[str, Look]] = (),
    side: str = "center",
) -> None:
    """Add the legend below the panels, where the figure grows, and write the PNG.

    Args:
        figure: with its panels drawn.
        path: the PNG to write.
        names: the entries of the legend, in the colours and with the markers of :func:`style`.
        look: how the entries' marks differ from :func:`style`.
        more: further entries, and how their lines look.
        side: where below the panels the legend is.
    """
    line = library("matplotlib.lines").Line2D
    handles = [line([], [], **{**style(index), **(look or {})}) for index in range(len(names))]
    handles += [line([], [], **drawn) for _, drawn in more]
    labels = [wrapped(name, 90) for name in [*names, *(name for name, _ in more)]]
    longest = max(len(part) for label in labels for part in label.split("\n"))
    columns = max(1, min(4, int(figure.get_figwidth() / (0.6 + 0.085 * longest))))
    rows = math.ceil(sum(1 + label.count("\n") for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * rows)
    place = f"outside lower {side}"
    figure.legend(handles, labels, loc=place, ncols=columns, frameon=False, fontsize=9)
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    with write_whole(Path(path), durable=False) as partial:
        figure.savefig(partial, dpi=DPI, format="png", backend="agg")


def chance_entry(chance: object) -> list[tuple[str, Look]]:
    """Return the legend's entry of dashed grey lines, where there is a chance to draw."""
    return [("chance", {"color": GREY, "linestyle": DASHED})] if chance else []
