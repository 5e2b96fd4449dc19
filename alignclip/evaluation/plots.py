"""One picture of the modality gap: image and text embeddings before and after training."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from alignclip.evaluation.gap import modality_gap

# Okabe and Ito's blue and orange: told apart with any colour vision, and in grey
IMAGE_COLOUR, TEXT_COLOUR = "#0072B2", "#E69F00"
LINES = 60  # pairs that are joined by a line


def embedding_map(
    before: tuple[Tensor, Tensor],
    after: tuple[Tensor, Tensor],
    path: str | Path,
    titles: tuple[str, str] = ("before training", "after training"),
) -> None:
    """Draw image and text embeddings before and after training side by side, as one PNG.

    Each panel shows its own two first principal components of images and texts together, at the same scale; lines
    join some of the pairs. The gap, ‖mean image − mean text‖, is in the title, measured in the whole space.

    Args:
        before: image and text features, [N, d] each, row i of both being pair i; need not be normalised.
        after: the same pairs, by the trained model.
        path: the PNG to write; its folder must exist.
        titles: what to call the panels.

    Raises:
        ValueError: from :func:`alignclip.evaluation.gap.modality_gap`, shapes that differ or features not finite.
        ImportError: matplotlib is not installed (it comes with the extra ``quickstart``).
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    extent = 0.0
    for panel, (images, texts), title in zip(panels, (before, after), titles, strict=True):
        gap = modality_gap(images, texts)
        image_points, text_points = _project(images, texts)
        ends = torch.stack([image_points, text_points], dim=1)
        some = ends[:: max(1, len(ends) // LINES)]
        panel.add_collection(LineCollection(list(some.numpy()), colors="0.6", linewidths=0.5, zorder=1))
        for points, colour, name in ((image_points, IMAGE_COLOUR, "image"), (text_points, TEXT_COLOUR, "text")):
            panel.scatter(*points.T.numpy(), s=9, c=colour, alpha=0.7, linewidths=0, label=name, zorder=2)
        panel.set_title(
            f"{title}: gap {gap['centroid_distance']:.2f}, alignment {gap['alignment_score']:.2f}", fontsize=11
        )
        extent = max(extent, 1.05 * ends.abs().max().item())
        panel.set_aspect("equal")
        panel.set_xlabel("first principal component")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("second principal component")
    panels[0].set(xlim=(-extent, extent), ylim=(-extent, extent))
    panels[1].legend(frameon=False, markerscale=2, loc="upper right")
    figure.savefig(path, dpi=130, format="png")


def _project(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 2] each: the two principal components of normalised images and texts together."""
    points = F.normalize(torch.cat([images, texts]).detach().float().cpu(), dim=-1)
    centred = points - points.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ directions[:2].T).split([len(images), len(texts)])
