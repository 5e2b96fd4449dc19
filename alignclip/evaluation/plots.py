"""Pictures of the modality gap, one PNG each, written whole or not at all: maps, cosines, spectra."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from alignclip.errors import UserError, one_line
from alignclip.evaluation.geometry import pair_cosines, spectrum, unit_pairs, wrong_pairs_cosine
from alignclip.storage import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Array = np.ndarray
Features = tuple[Tensor, Tensor]  # of images and of texts

# Okabe and Ito's, told apart with any colour vision; their yellow darkened, for lines on white. Blue and orange differ
# in grey as well; eight greys don't: hence the markers
COLOURS = ("#0072B2", "#E69F00", "#000000", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#A89A00")
MARKERS = "osD^vPX<>"
GREY = "0.45"
DASHED, DOTTED = (0, (3, 1.5)), (0, (1, 1.5))
DPI = 130
LINES, POINTS = 60, 1500  # pairs of a map that are joined by a line, and that are drawn at all
BINS = 80
NBSP = "\N{NO-BREAK SPACE}"
FLOOR = 1e-8  # a share of the variance below it is rounding


def embedding_map(
    before: Features,
    after: Features,
    path: str | Path,
    titles: tuple[str, str] = ("before training", "after training"),
) -> None:
    """Draw image and text embeddings before and after training side by side: :func:`embedding_maps` of two.

    Args:
        before: image and text features, [N, d] each, row i of both being pair i; need not be normalised.
        after: the same pairs, by the trained model.
        path: the PNG to write; its folder must exist.
        titles: what to call the panels.

    Raises:
        ValueError: features that are not two of [N ≥ 2, d ≥ 2], or not finite.
        UserError: matplotlib is not installed.
    """
    _maps([(titles[0], before), (titles[1], after)], path)


def embedding_maps(pairs: dict[str, Features], path: str | Path) -> None:
    """Draw image and text embeddings, a panel a checkpoint, in rows of three.

    Each panel shows its own two first principal components of images and texts together, images to the left and below,
    all at the same scale; lines join some of the pairs. The gap, ‖mean image − mean text‖, and the alignment score are
    in the title, measured in the whole space and on all pairs, of which 1,500 at most are drawn.

    Args:
        pairs: image and text features by checkpoint, [N, d] each, row i of both being pair i; need not be normalised.
        path: the PNG to write; its folder must exist.

    Raises:
        ValueError: no checkpoints; features of one that are not two of [N ≥ 2, d ≥ 2], or not finite: which.
        UserError: matplotlib is not installed.
    """
    _maps(list(pairs.items()), path)


def cosine_histograms(pairs: dict[str, Features], path: str | Path) -> None:
    """Draw how the cosines of pairs (solid) and of non-pairs (dashed) are distributed, all checkpoints in one panel.

    Each curve has area 1, over the same bins, and a marker at its mean; that of the pairs, the alignment score, is in
    the legend. Peaks of more than eight times the flattest checkpoint's, as the narrow cones of an untrained model have
    them, are cut, and the legend has their height. Arguments and errors: those of :func:`embedding_maps`.
    """
    panel = new_figure(pairs, 8.5, 4.6).subplots()
    # rounding may leave [-1, 1], where the bins end
    cosines = {
        name: [x.clamp(-1, 1).numpy() for x in pair_cosines(*_unit(name, pairs[name]))]
        for name in pairs
    }
    edges = _edges([values for both in cosines.values() for values in both])
    curves = [[_density(values, edges) for values in both] for both in cosines.values()]
    top = _top([[curve.max() for curve in both] for both in curves])
    labels = []
    for index, (name, both) in enumerate(cosines.items()):
        peak = max(curve.max() for curve in curves[index])
        cut = f" (peak of {peak:.0f} cut)" if peak > top else ""
        margin = both[0].mean() - wrong_pairs_cosine(*unit_pairs(*pairs[name])).item()
        labels.append(f"{name}: alignment{NBSP}{both[0].mean():.2f}, margin{NBSP}{margin:.2f}{cut}")
        for values, curve, line in zip(both, curves[index], ("-", DASHED), strict=True):
            look = style(index)
            panel.stairs(curve, edges, color=look["color"], linestyle=line, linewidth=1.5)
            height = curve[
                np.clip(np.searchsorted(edges, values.mean(), side="right") - 1, 0, BINS - 1)
            ]
            panel.plot(values.mean(), min(height, top), **look, linestyle="none", clip_on=False)
    panel.margins(x=0.01)
    panel.set(ylim=(0, top), xlabel="cosine of image and text", ylabel="density")
    panel.set_title(
        "cosines of pairs (solid) and of wrong pairs (dashed); markers: their means",
        fontsize=11,
        pad=10,
    )
    finish(panel.figure, path, labels)


def spectra(pairs: dict[str, Features], path: str | Path) -> None:
    """Draw the eigenvalues of the covariance of images (solid) and of texts (dashed), all checkpoints in one panel.

    Those of a modality sum to 1: :func:`alignclip.evaluation.geometry.spectrum`. A curve that falls early is of
    features on few axes. Shares below 1e-8 are rounding and not drawn; features that don't vary have no curve, and the
    legend says so. Arguments and errors: those of :func:`embedding_maps`.
    """
    panel = new_figure(pairs, 8.5, 4.6).subplots()
    labels = []
    for index, (name, features) in enumerate(pairs.items()):
        both = [spectrum(x).numpy() for x in _unit(name, features)]
        still = [
            modality
            for modality, values in zip(("images", "texts"), both, strict=True)
            if not values.any()
        ]
        ranks = " and ".join(f"{_effective(values):.1f}" for values in both)
        labels.append(
            f"{name} ({' and '.join(still)} don't vary)"
            if still
            else f"{name}: effective ranks {ranks}"
        )
        for values, line in zip(both, ("-", DASHED), strict=True):
            drawn = values[values > FLOOR]
            # markers of different checkpoints at different places
            every = (0.015 * (index + 1), 0.14)
            axes = np.arange(1, len(drawn) + 1)
            panel.plot(axes, drawn, **style(index), linestyle=line, linewidth=1.5, markevery=every)
    panel.set(
        yscale="log", xlabel="principal axis, from the largest", ylabel="share of the variance"
    )
    panel.set_title(
        "spectra of images (solid) and of texts (dashed): early falls are few axes", fontsize=11
    )
    finish(panel.figure, path, labels)


def _maps(pairs: Sequence[tuple[str, Features]], path: str | Path) -> None:
    columns = max(1, min(3, len(pairs)))
    titles = [wrapped(name, 42 if columns == 3 else 56) for name, _ in pairs]
    rows = [titles[row : row + columns] for row in range(0, len(titles), columns)]
    side = 3.7 if columns == 3 else 4.6
    height = sum(side + 0.6 + 0.17 * max(title.count("\n") for title in row) for row in rows)
    panels = new_figure(titles, side * columns, height).subplots(
        len(rows), columns, sharex=True, sharey=True, squeeze=False
    )
    from matplotlib.collections import LineCollection

    extent = 1e-6
    for panel, title, (name, features) in zip(panels.flat, titles, pairs, strict=False):
        images, texts = _unit(name, features)
        if images.shape[1] < 2:
            raise ValueError(f"{name}: features must have two dimensions at least, not 1")
        points = np.stack(_project(images, texts), axis=1)
        extent = max(extent, 1.05 * abs(points).max())
        points = points[:: math.ceil(len(points) / POINTS)]
        some = points[:: math.ceil(len(points) / LINES)]
        panel.add_collection(LineCollection(list(some), colors="0.6", linewidths=0.5, zorder=1))
        # in random order: neither modality covers the other
        order = np.random.default_rng(0).permutation(2 * len(points))
        colours = np.array(COLOURS)[order % 2]
        panel.scatter(
            *points.reshape(-1, 2)[order].T, s=9, c=colours, alpha=0.7, linewidths=0, zorder=2
        )
        distance, alignment, margin = _gap(images, texts)
        panel.set_title(
            f"{title}\ngap {distance:.2f}, alignment {alignment:.2f}, margin {margin:.2f}",
            fontsize=10,
        )
        panel.set_aspect("equal")
    panels[0, 0].set(xlim=(-extent, extent), ylim=(-extent, extent))
    for panel in panels.flat[len(pairs) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("second principal component")
    # the lowest of each column
    for panel in panels.flat[len(pairs) - columns : len(pairs)]:
        panel.set_xlabel("first principal component")
        panel.tick_params(labelbottom=True)
    lines = [({"color": "0.6", "linewidth": 0.8}, f"pairs, {LINES} at most")]
    finish(
        panels[0, 0].figure,
        path,
        ["image", "text"],
        "right",
        more=lines,
        marker="o",
        linestyle="none",
    )


def _unit(name: str, features: Features) -> Features:
    """The features of a checkpoint L2-normalised, on the CPU, in fp64."""
    try:
        images, texts = unit_pairs(*features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return images.cpu(), texts.cpu()


def _gap(images: Tensor, texts: Tensor) -> tuple[float, float, float]:
    """``centroid_distance``, ``alignment_score`` and ``margin`` of unit vectors, without any N×N figures."""
    alignment = (images * texts).sum(-1).mean()
    margin = alignment - wrong_pairs_cosine(images, texts)
    return (images.mean(0) - texts.mean(0)).norm().item(), alignment.item(), margin.item()


def _effective(shares: Array) -> float:
    """The effective rank of a spectrum, :func:`alignclip.evaluation.geometry.effective_rank`."""
    some = shares[shares > 0]
    return float(np.exp(-np.sum(some * np.log(some))))


def _project(images: Tensor, texts: Tensor) -> tuple[Array, Array]:
    """[N, 2] each: two principal components of both together, the mean image to the left of the text's and below."""
    points = torch.cat([images, texts])
    centred = points - points.mean(0)
    # of [d, d] rather than of [2N, d]; eigenvalues ascend
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, [-1, -2]]
    image_points, text_points = (centred @ directions).split(len(images))
    sign = 1 - 2 * (image_points.mean(0) > text_points.mean(0)).double()
    return (image_points * sign).numpy(), (text_points * sign).numpy()


def _edges(cosines: Sequence[Array]) -> Array:
    """[BINS + 1] edges of equal bins that span all values, within −1 and 1."""
    low, high = min(x.min() for x in cosines), max(x.max() for x in cosines)
    if high - low < 1e-3:
        # all but constant: bins that can be told apart
        low, high = max(-1.0, low - 0.01), min(1.0, high + 0.01)
    return np.linspace(low, high, BINS + 1)


def _density(values: Array, edges: Array) -> Array:
    """[BINS] heights of a histogram of area 1."""
    heights: Array = np.histogram(values, edges, density=True)[0]
    return heights


def _top(peaks: list[list[float]]) -> float:
    """Where the y axis ends, by the peaks of each checkpoint: above all but those that would flatten the others."""
    limit = 8 * min(max(both) for both in peaks)
    return 1.08 * max(peak for both in peaks for peak in both if peak <= limit)


def new_figure(names: Collection[str], width: float, height: float) -> Figure:
    """An empty figure of so many inches, for some checkpoints at least, which pyplot doesn't know."""
    if not names:
        raise ValueError("no checkpoints to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            f"plots need matplotlib: pip install 'alignclip[evaluate]' ({one_line(error)})"
        ) from None
    return Figure(figsize=(width, height), layout="constrained")


def wrapped(name: str, width: int) -> str:
    """A name in lines of so many characters at most, shown as it is: no formulas between dollar signs."""
    return "\n".join(textwrap.wrap(name, width, break_on_hyphens=False)).replace("$", r"\$")


def style(index: int) -> dict[str, Any]:
    """Colour and marker of a checkpoint, the same in all plots."""
    colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
    return {
        "color": colour,
        "marker": marker,
        "markersize": 7,
        "markeredgecolor": "white",
        "markeredgewidth": 0.6,
    }


def finish(
    figure: Any,
    path: str | Path,
    names: Collection[str],
    side: str = "center",
    chance: bool = False,
    more: Sequence[tuple[dict[str, Any], str]] = (),
    **look: Any,
) -> None:
    """Add the legend below the panels, where the figure grows, and write the PNG: beside its place, then renamed.

    Args:
        figure: with its panels drawn.
        path: the PNG to write.
        names: the entries of the legend, in the colours and with the markers of :func:`style`.
        side: where below the panels the legend is.
        chance: whether a dashed grey line is what chance would score.
        more: further entries: how they look, and what they say.
        look: what differs from :func:`style`.
    """
    from matplotlib.lines import Line2D

    if chance:
        more = [*more, ({"color": GREY, "linestyle": DASHED}, "chance")]
    labels = [wrapped(name, 90) for name in [*names, *(text for _, text in more)]]
    longest = max(len(line) for label in labels for line in label.split("\n"))
    columns = max(1, min(4, int(figure.get_figwidth() / (0.6 + 0.085 * longest))))
    lines = math.ceil(sum(1 + label.count("\n") for label in labels) / columns)
    figure.set_figheight(figure.get_figheight() + 0.2 + 0.2 * lines)
    handles = [Line2D([], [], **{**style(index), **look}) for index in range(len(names))]
    handles += [Line2D([], [], **drawn) for drawn, _ in more]
    figure.legend(
        handles, labels, loc=f"outside lower {side}", ncols=columns, frameon=False, fontsize=9
    )
    for panel in figure.axes:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    with write_whole(Path(path), durable=False) as partial:
        figure.savefig(partial, dpi=DPI, format="png", backend="agg")
