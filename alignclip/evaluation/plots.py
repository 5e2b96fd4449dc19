"""Pictures of the modality gap, one PNG each: maps of the embeddings, cosines, spectra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from alignclip.evaluation.frame import (
    DASHED,
    OKABE_ITO,
    entries,
    new_panels,
    save_figure,
    style,
    wrapped,
)
from alignclip.evaluation.gap import pair_figures
from alignclip.evaluation.geometry import (
    effective_rank,
    pair_cosines,
    spectrum,
    unit_pairs,
)

Numbers = np.ndarray
PairFeatures = tuple[Tensor, Tensor]  # of images and of texts

LINES, MOST_PAIRS = 60, 1500  # pairs of a map that are joined by a line, and that are drawn at all
BINS = 80
MOST_PEAK = 8  # times the flattest checkpoint's peak; a higher one would flatten the others
NBSP = "\N{NO-BREAK SPACE}"
FLOOR = 1e-8  # a share of the variance below it is rounding


def embedding_maps(pairs: Mapping[str, PairFeatures], path: str | Path) -> None:
    """Draw image and text embeddings, a panel a checkpoint, in rows of three.

    Each panel shows its own two first principal components of images and texts together, images to
    the left and below, all at the same scale; lines join some of the pairs. The gap, ‖mean image −
    mean text‖, and the alignment score are in the title, measured in the whole space and on all
    pairs, of which 1,500 at most are drawn.

    Args:
        pairs: image and text features by checkpoint, [N ≥ 2, d] each, on the CPU, row i of both
            being pair i; need not be normalised.
        path: the PNG to write; its folder must exist.

    Raises:
        ValueError: no checkpoints.
        UserError: matplotlib is not installed.
    """
    columns = max(1, min(3, len(pairs)))
    titles = [wrapped(name, 42 if columns == 3 else 56) for name in pairs]
    rows = math.ceil(len(titles) / columns)
    side = 3.7 if columns == 3 else 4.6
    height = side + 0.6 + 0.17 * max((title.count("\n") for title in titles), default=0)
    shape = (side * columns, rows * height, rows, columns)
    panels = new_panels(titles, *shape, sharex=True, sharey=True)
    extents = [
        _draw_map(panel, title, *unit_pairs(*features))
        for panel, title, features in zip(panels.flat, titles, pairs.values(), strict=False)
    ]
    extent = max(1e-6, *extents)
    panels[0, 0].set(xlim=(-extent, extent), ylim=(-extent, extent))
    for panel in panels.flat[len(pairs) :]:
        panel.set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("second principal component")
    for panel in panels.flat[len(pairs) - columns : len(pairs)]:  # the lowest of each column
        panel.set_xlabel("first principal component")
        panel.tick_params(labelbottom=True)
    dots = entries(["image", "text"], marker="o", linestyle="none")
    lines = (f"pairs, {LINES} at most", {"color": "0.6", "linewidth": 0.8})
    save_figure(panels[0, 0].figure, path, [*dots, lines], side="right")


def _draw_map(panel: Any, title: str, images: Tensor, texts: Tensor) -> float:
    """Draw the map of one checkpoint's unit vectors, and return how far from 0 its points reach."""
    from matplotlib.collections import LineCollection

    points = np.stack(_project(images, texts), axis=1)
    extent = 1.05 * float(abs(points).max())
    points = points[:: math.ceil(len(points) / MOST_PAIRS)]
    some = points[:: math.ceil(len(points) / LINES)]
    panel.add_collection(LineCollection(list(some), colors="0.6", linewidths=0.5, zorder=1))
    # in random order: neither modality covers the other
    order = np.random.default_rng(0).permutation(2 * len(points))
    colours = np.array(OKABE_ITO)[order % 2]
    dots = points.reshape(-1, 2)[order].T
    panel.scatter(*dots, s=9, c=colours, alpha=0.7, linewidths=0, zorder=2)
    found = pair_figures(images, texts)
    said = [f"gap {found['centroid_distance']:.2f}"]
    said += [f"alignment {found['alignment_score']:.2f}", f"margin {found['margin']:.2f}"]
    panel.set_title(f"{title}\n{', '.join(said)}", fontsize=10)
    panel.set_aspect("equal")
    return extent


def cosine_histograms(pairs: Mapping[str, PairFeatures], path: str | Path) -> None:
    """Draw how the cosines of pairs (solid) and of non-pairs (dashed) are distributed.

    Each curve has area 1, over the same bins, and a marker at its mean; that of the pairs, the
    alignment score, is in the legend. Peaks of more than eight times the flattest checkpoint's, as
    the narrow cones of an untrained model have them, are cut, and the legend has their height.
    Arguments and errors: those of :func:`embedding_maps`.
    """
    panel = new_panels(pairs, 8.5, 4.6)[0, 0]
    units = {name: unit_pairs(*features) for name, features in pairs.items()}
    # rounding may leave [-1, 1], where the bins end
    cosines = [[x.clamp(-1, 1).numpy() for x in pair_cosines(*unit)] for unit in units.values()]
    edges = _edges([values for both in cosines for values in both])
    curves = [[np.histogram(values, edges, density=True)[0] for values in both] for both in cosines]
    peaks = [max(float(curve.max()) for curve in both) for both in curves]
    limit = MOST_PEAK * min(peaks)
    heights = [float(curve.max()) for both in curves for curve in both]
    top = 1.08 * max(height for height in heights if height <= limit)
    labels = []
    for index, (name, unit) in enumerate(units.items()):
        color = style(index)["color"]
        for values, curve, line in zip(cosines[index], curves[index], ("-", DASHED), strict=True):
            panel.stairs(curve, edges, color=color, linestyle=line, linewidth=1.5)
            mean = values.mean()
            height = curve[np.searchsorted(edges[1:-1], mean, side="right")]
            mark = {**style(index), "linestyle": "none", "clip_on": False}
            panel.plot(mean, min(height, top), **mark)
        found = pair_figures(*unit)
        cut = f" (peak of {peaks[index]:.0f} cut)" if peaks[index] > top else ""
        said = f"alignment{NBSP}{found['alignment_score']:.2f}, margin{NBSP}{found['margin']:.2f}"
        labels.append(f"{name}: {said}{cut}")
    panel.margins(x=0.01)
    panel.set(ylim=(0, top), xlabel="cosine of image and text", ylabel="density")
    title = "cosines of pairs (solid) and of wrong pairs (dashed); markers: their means"
    panel.set_title(title, fontsize=11, pad=10)
    save_figure(panel.figure, path, entries(labels))


def spectra(pairs: Mapping[str, PairFeatures], path: str | Path) -> None:
    """Draw the eigenvalues of the covariance of images (solid) and of texts (dashed).

    Those of a modality sum to 1: :func:`alignclip.evaluation.geometry.spectrum`. A curve that falls
    early is of features on few axes. Shares below 1e-8 are rounding and not drawn; features that
    don't vary have no curve, and the legend says so. Arguments and errors: those of
    :func:`embedding_maps`.
    """
    panel = new_panels(pairs, 8.5, 4.6)[0, 0]
    labels = []
    for index, (name, features) in enumerate(pairs.items()):
        unit = unit_pairs(*features)
        ranks = [effective_rank(one) for one in unit]
        still = [kind for kind, rank in zip(("images", "texts"), ranks, strict=True) if not rank]
        said = f": effective ranks {ranks[0]:.1f} and {ranks[1]:.1f}"
        labels.append(name + (f" ({' and '.join(still)} don't vary)" if still else said))
        for one, line in zip(unit, ("-", DASHED), strict=True):
            shares = spectrum(one).numpy()
            drawn = shares[shares > FLOOR]
            # markers of different checkpoints at different places
            look = {**style(index), "linewidth": 1.5, "markevery": (0.015 * (index + 1), 0.14)}
            panel.plot(np.arange(1, len(drawn) + 1), drawn, linestyle=line, **look)
    axes = {"xlabel": "principal axis, from the largest", "ylabel": "share of the variance"}
    panel.set(yscale="log", **axes)
    title = "spectra of images (solid) and of texts (dashed): early falls are few axes"
    panel.set_title(title, fontsize=11)
    save_figure(panel.figure, path, entries(labels))


def _project(images: Tensor, texts: Tensor) -> tuple[Numbers, Numbers]:
    """Project on two principal components of both, images to the left and below: [N, 2] each."""
    points = torch.cat([images, texts])
    centred = points - points.mean(0)
    # of [d, d] rather than of [2N, d]; eigenvalues ascend
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, [-1, -2]]
    image_points, text_points = (centred @ directions).split(len(images))
    sign = 1 - 2 * (image_points.mean(0) > text_points.mean(0)).double()
    return (image_points * sign).numpy(), (text_points * sign).numpy()


def _edges(cosines: Sequence[Numbers]) -> Numbers:
    """Return [BINS + 1] edges of equal bins that span all values, within −1 and 1."""
    low, high = min(x.min() for x in cosines), max(x.max() for x in cosines)
    if high - low < 1e-3:  # all but constant: bins that can be told apart
        low, high = max(-1.0, low - 0.01), min(1.0, high + 0.01)
    return np.linspace(low, high, BINS + 1)
