"""What the plots of an evaluation show: the data against plain NumPy, and pictures in which
nothing is covered.
"""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import figures, legend
from PIL import Image

from alignclip.errors import UserError
from alignclip.evaluation import frame, plots
from alignclip.evaluation.bars import accuracy_bars, recall_bars
from alignclip.evaluation.curves import Point, curves_of, draw_curves, of_records
from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.geometry import effective_rank
from alignclip.evaluation.history import EvaluationRecords

__all__ = ["figures"]
to_hex = pytest.importorskip("matplotlib.colors").to_hex
# a layout that doesn't fit, a glyph that is missing
pytestmark = pytest.mark.filterwarnings("error::UserWarning")

COLOUR = frame.OKABE_ITO[0]
NAMES = {
    1: ["model"],
    4: ["CLIP", "SharedCLIP", "AlignCLIP", "untrained"],
    8: [
        "ViT-B-16 AlignCLIP alpha=1 beta=0.5 cc12m 30 epochs ep30-ba587700-rank0.pt · "
        "flickr30k-test",
        f"runs/$HOME/a_name_without_any_blanks/{'that_goes_on_and_on/' * 5}ep1-ba2$ · coco",
        "_underscored",
        *(f"epoch {epoch} · coco_val2017" for epoch in range(5)),
    ],
}


def pairs_of(mean=1.0, gap=1.0, noise=0.5, count=60, width=16, seed=0):
    """Two cones: of a common direction and one of each modality's own, and what a pair has in
    common.
    """
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(count, width, generator=generator)
    images, texts = shared + noise * torch.randn(2, count, width, generator=generator)
    images[:, 0] += mean * gap
    texts[:, 1] += mean * gap
    images[:, 2] += mean
    texts[:, 2] += mean
    return images, texts


def checkpoints(names):
    trained = [pairs_of(2, 0.3 * i, seed=i) for i in range(len(names) - 1)]
    return dict(zip(names, [pairs_of(50, 1), *trained], strict=True))


def unit(features):
    return tuple(F.normalize(one.double(), dim=-1) for one in features)


def recalls(first=0.1):
    names = [f"{found}_retrieval_recall@{k}" for found in ("image", "text") for k in (1, 5, 10)]
    return {name: first + 0.1 * i for i, name in enumerate(names)}


def gap_curves(names, batches=(0, 1000, 250_000)):
    def point(i, batch):
        at = batch / 1e6
        gap = {"alignment_score": 0.1 * i + at, "centroid_distance": 1 - at, "margin": at}
        return Point(batch, gap | recalls(at), recalls(0.001))

    return {name: [point(i, batch) for batch in batches] for i, name in enumerate(names)}


def draw_recalls(names, path):
    found = {"coco": recalls(), "a" * 120: recalls(0.0)}
    recall_bars(dict.fromkeys(names, found), path, {"coco": recalls(0.01)})


def draw_accuracies(names, path):
    found, chance = (
        {f"set-{i}": {"mean_per_class_recall": value(i)} for i in range(6)}
        for value in (lambda i: 0.1 * i, lambda i: 0.02)
    )
    accuracy_bars(dict.fromkeys(names, found), path, chance)


DRAW = {
    "cosine_histograms": lambda names, path: plots.cosine_histograms(checkpoints(names), path),
    "embedding_maps": lambda names, path: plots.embedding_maps(checkpoints(names), path),
    "spectra": lambda names, path: plots.spectra(checkpoints(names), path),
    "curves": lambda names, path: draw_curves(gap_curves(names), path),
    "recall_bars": draw_recalls,
    "accuracy_bars": draw_accuracies,
}


@pytest.mark.parametrize("count", NAMES)
@pytest.mark.parametrize("kind", DRAW)
def test_pictures_in_which_nothing_is_covered_or_clipped(
    kind, count, tmp_path, figures, monkeypatch
):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    settings, names = matplotlib.rcParams.copy(), NAMES[count]
    DRAW[kind](names, tmp_path / "plot.png")
    assert matplotlib.rcParams.copy() == settings
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.format == "PNG"
        assert 500 < picture.width < 1700
        assert 500 < picture.height < 2400
    # the layout is of the last drawing, at the PNG's resolution
    (figure,) = figures
    figure.set_dpi(frame.DPI)
    figure.draw_without_rendering()
    labels = [label.replace("\n", "").replace("\\$", "$") for label in legend(figure)]
    if kind.endswith("bars"):
        assert labels.pop() == "chance"
    if kind == "embedding_maps":
        assert labels == ["image", "text", "pairs, 60 at most"]
    else:  # lines break at blanks, or within a word
        for label, name in zip(labels, names, strict=True):
            assert label.replace(" ", "").startswith(name.replace(" ", ""))
    panels = [panel for panel in figure.axes if panel.get_visible()]
    boxes = [figure.legends[0].get_window_extent(), *(one.get_tightbbox() for one in panels)]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1
        assert not any(box.overlaps(other) for other in boxes[:i])


@pytest.mark.parametrize("kind", DRAW)
def test_a_drawing_that_fails_leaves_what_was_there(kind, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "plot.png"
    path.write_bytes(b"yesterday's")

    def savefig(figure, place, **_):
        place.write_bytes(b"half of a")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises((OSError, UserError), match="no space"):
        DRAW[kind](["model"], path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"alignclip\[evaluate\]"):  # without matplotlib
        DRAW[kind](["model"], path)
    assert path.read_bytes() == b"yesterday's"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "draw",
    [*(getattr(plots, name) for name in dir(plots) if name in DRAW), draw_curves, recall_bars],
)
def test_nothing_to_draw_is_an_error(draw, tmp_path):
    with pytest.raises(ValueError, match="no checkpoints"):
        draw({}, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_histograms_are_of_the_cosines(tmp_path, figures):
    images, texts = pairs_of(count=300)
    given = {"a": (images, texts), "b": (images, 3 * images)}
    plots.cosine_histograms(given, tmp_path / "plot.png")
    v, t = unit((images, texts))
    cosines = v @ t.T
    own, apart = cosines.diagonal(), cosines[~torch.eye(300, dtype=torch.bool)]
    (panel,) = figures[0].axes
    pairs, others, same, _ = panel.patches
    heights, edges, _ = pairs.get_data()
    widths = np.diff(edges)
    assert len(heights) == plots.BINS
    assert widths == pytest.approx(widths[0])
    assert -1 <= edges[0] < edges[-1] == 1  # b's pairs are one point each

    def shares(values):
        return [
            ((values >= low) & (values < high)).double().mean() for low, high in pairwise(edges)
        ]

    assert heights * widths == pytest.approx(np.array(shares(own)))
    # 10,000 draws of 89,700 non-pairs, against all of them
    assert others.get_data().values * widths == pytest.approx(np.array(shares(apart)), abs=0.015)
    assert same.get_data().values[:-1] == pytest.approx(0)
    assert [patch.get_linestyle() for patch in (pairs, others)] == ["-", (0, (3, 1.5))]
    marker, other = panel.lines[:2]
    assert marker.get_xdata()[0] == pytest.approx(own.mean().item())
    assert other.get_xdata()[0] == pytest.approx(apart.mean().item(), abs=0.02)
    assert marker.get_ydata()[0] == heights[np.searchsorted(edges, own.mean()) - 1]
    first, second = (label.replace("\N{NO-BREAK SPACE}", " ") for label in legend(figures[0]))
    assert first == f"a: alignment {own.mean():.2f}, margin {own.mean() - apart.mean():.2f}"
    assert second.startswith("b: alignment 1.00")


def test_a_peak_that_would_flatten_the_rest_is_cut_and_told(tmp_path, figures):
    pairs = {"untrained": pairs_of(200), "trained": pairs_of(0.3, noise=1.0, count=2000)}
    plots.cosine_histograms(pairs, tmp_path / "plot.png")
    (panel,) = figures[0].axes
    peaks = [patch.get_data().values.max() for patch in panel.patches]
    assert max(peaks[2:]) < panel.get_ylim()[1] < min(peaks[:2])
    cut, whole = legend(figures[0])
    assert cut.endswith(f"(peak of {max(peaks[:2]):.0f} cut)")
    assert "cut" not in whole
    assert panel.get_ylim()[1] == pytest.approx(1.08 * max(peaks[2:]))


@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
def test_bins_of_cosines_that_are_all_the_same(value):
    values = np.full(5, value)
    edges = plots._edges([values, values])
    assert -1 <= edges[0] < edges[-1] <= 1
    assert (np.diff(edges) > 1e-5).all()
    assert edges[0] <= value <= edges[-1]


def test_spectra_are_the_squared_singular_values(tmp_path, figures):
    images, texts = pairs_of(width=8)
    texts[:, 4:] = 0  # four axes
    still = torch.ones(60, 8)
    plots.spectra({"a": (images, texts), "still": (still, texts)}, tmp_path / "plot.png")
    (panel,) = figures[0].axes
    solid, dashed, nothing, _ = panel.lines
    for line, features, rank, look in ((solid, images, 8, "-"), (dashed, texts, 4, "--")):
        (values,) = unit((features,))
        shares = np.linalg.svd(values - values.mean(0), compute_uv=False) ** 2
        assert list(line.get_xdata()) == list(range(1, rank + 1))
        assert line.get_ydata() == pytest.approx((shares / shares.sum())[:rank])
        assert line.get_linestyle() == look
    assert panel.get_yscale() == "log"
    assert not len(nothing.get_ydata())
    ranks = f"{effective_rank(images):.1f} and {effective_rank(texts):.1f}"
    assert legend(figures[0]) == [f"a: effective ranks {ranks}", "still (images don't vary)"]
    # nothing varies
    for draw in (plots.spectra, plots.embedding_maps):
        draw({"still": (still, still)}, tmp_path / "plot.png")


def test_projection_is_on_the_principal_components():
    images, texts = unit(pairs_of(count=50))
    both = torch.cat([images, texts]).numpy()
    u, s, _ = np.linalg.svd(both - both.mean(0), full_matrices=False)
    found = np.concatenate(plots._project(images, texts))
    assert np.abs(found) == pytest.approx(np.abs(u[:, :2] * s[:2]))
    # whichever modality lies where, images come first
    for a, b in ((images, texts), (texts, images)):
        image_points, text_points = plots._project(a, b)
        assert (image_points.mean(0) < text_points.mean(0)).all()


def test_maps_show_the_pairs_and_their_gap(tmp_path, figures):
    features = checkpoints(["a", "b", "c", "d"])
    plots.embedding_maps(features, tmp_path / "plot.png")
    panels = figures[0].axes
    assert [panel.get_visible() for panel in panels] == [True] * 4 + [False] * 2
    shown = panels[:4]
    ticks = [any(one.get_visible() for one in panel.get_xticklabels()) for panel in shown]
    assert ticks == [bool(panel.get_xlabel()) for panel in shown] == [False, True, True, True]
    assert len({limits for panel in shown for limits in (panel.get_xlim(), panel.get_ylim())}) == 1
    for panel, (name, pairs) in zip(shown, features.items(), strict=True):
        gap = modality_gap(*pairs, separability=False)
        said = ("gap", "centroid_distance"), ("alignment", "alignment_score"), ("margin", "margin")
        figures_ = ", ".join(f"{word} {gap[metric]:.2f}" for word, metric in said)
        assert panel.get_title() == f"{name}\n{figures_}"
        lines, scatter = panel.collections
        points = np.asarray(scatter.get_offsets())
        assert len(points) == 120
        assert np.abs(points).max() < panel.get_xlim()[1]
        # every line ends in an image and in its text
        expected = np.stack(plots._project(*unit(pairs)), axis=1)
        assert np.stack(lines.get_segments()) == pytest.approx(expected)
        blue = scatter.get_facecolors()[:, 2] > scatter.get_facecolors()[:, 0]
        assert np.sort(points[blue], axis=0) == pytest.approx(np.sort(expected[:, 0], axis=0))


def test_of_many_pairs_some_are_drawn(tmp_path, figures):
    plots.embedding_maps({"many": pairs_of(count=2 * plots.MOST_PAIRS + 1)}, tmp_path / "plot.png")
    lines, scatter = figures[0].axes[0].collections
    assert plots.MOST_PAIRS < len(scatter.get_offsets()) <= 2 * plots.MOST_PAIRS
    assert plots.LINES / 2 < len(lines.get_segments()) <= plots.LINES


def test_curves_in_order_of_batches_with_their_chance(tmp_path, figures):
    batches = (300, 20, 1000)
    draw_curves(gap_curves(["second", "first"], batches), tmp_path / "plot.png")
    assert legend(figures[0]) == ["second", "first"]
    drawn = []
    for panel in figures[0].axes:
        assert panel.get_ylim()[0] <= 0
        lines = [line for line in panel.lines if line.get_linestyle() != "None"]
        assert all(list(line.get_xdata()) == sorted(batches) for line in lines)
        drawn.append([line.get_ydata() for line in lines if line.get_color() == COLOUR])
    (gap,), (margin, alignment), (recall, chance) = drawn
    at = np.array(sorted(batches)) / 1e6
    assert gap == pytest.approx(1 - at)
    assert margin == pytest.approx(at)
    assert alignment == pytest.approx(at)  # of the first
    assert recall == pytest.approx(100 * (at + 0.25))  # the mean over both directions
    assert chance == pytest.approx([25.1] * 3)
    assert figures[0].axes[0].get_title() == "gap: distance of the two means\n↓ lower is better"


def test_evaluations_of_a_collapse_are_hollow(tmp_path, figures):
    chance = dict.fromkeys(recalls(), 0.005) | {"image_retrieval_recall@1": 0.001}
    low = {name: 2 * value for name, value in chance.items()}
    ranks = {"effective_rank_image": 1.3, "effective_rank_text": 2.4}
    collapsed = {"centroid_distance": 0.05, "alignment_score": 0.96, "margin": 0.02} | ranks
    good = {"centroid_distance": 0.07, "alignment_score": 0.9, "margin": 0.9}
    good |= dict.fromkeys(ranks, 9.0)
    points = [Point(10, collapsed | low, chance), Point(20, good | recalls(0.4), chance)]
    draw_curves({"run": points}, tmp_path / "plot.png")
    (marks,) = figures[0].axes[0].collections
    assert list(marks.get_offsets()[:, 0]) == [10, 20]
    assert [to_hex(face) for face in marks.get_facecolors()] == ["#ffffff", COLOUR.lower()]
    assert legend(figures[0]) == ["run (hollow: collapsed)"]
    level = [Point(None, collapsed | low, chance)]
    draw_curves({"level": level}, tmp_path / "plot.png")
    assert legend(figures[1]) == ["level (dash-dotted: at no known batch; collapsed)"]


def test_curves_are_of_the_evaluations_in_training():
    history = EvaluationRecords(None)
    gap = {"centroid_distance": 0.5, "alignment_score": 0.25, "margin": 0.1}
    for batch in (10, 20):
        history.add(batch, "gap", gap | recalls(batch / 100), recalls(0.01))
        if batch == 20:  # of the same pairs, if not as often: no curve of its own
            history.add(batch, "coco", recalls(batch / 100), recalls(0.01))
        history.add(batch, "flickr", recalls(0.2), recalls(0.01))
        history.add(batch, "cifar10", {"acc1": 0.5}, {"acc1": 0.1})
    curves = curves_of(of_records(history.records), "first")
    assert curves.keys() == {"first · gap", "first · flickr"}
    assert [point.batch for point in curves["first · gap"]] == [10, 20]


def test_bars_are_the_recalls_in_percent(tmp_path, figures):
    partly = {"image_retrieval_recall@1": 0.25, "closed_image_retrieval_recall@1": 0.9}
    flickr = {"flickr": {"text_retrieval_recall@10": 1.0}, "gap": {"rmg": 2.0}}
    results = {
        "clip": {"coco": recalls(), "imagenet": {"acc1": math.nan}},
        "probe only": {"imagenet": {"acc1": 0.4}},
        "alignclip": {"coco": partly, **flickr},
    }
    recall_bars(results, tmp_path / "plot.png")
    coco, flickr = figures[0].axes
    assert [panel.get_title() for panel in (coco, flickr)] == ["coco", "flickr"]
    assert legend(figures[0]) == ["clip", "alignclip"]
    assert not coco.lines
    clip, alignclip = ([bar.get_height() for bar in bars] for bars in coco.containers)
    assert clip == pytest.approx([10, 20, 30, 40, 50, 60])
    assert alignclip == pytest.approx([25, *[math.nan] * 5], nan_ok=True)
    ticks = [label.get_text() for label in coco.get_xticklabels()]
    assert ticks[0] == "text → image\nR@1"  # image retrieval: a text is given
    assert ticks[5] == "image → text\nR@10"
    first, second = (bars[0] for bars in coco.containers)
    assert first.get_x() < first.get_x() + first.get_width() <= second.get_x()
    assert (first.get_x() + second.get_x() + second.get_width()) / 2 == pytest.approx(0, abs=1e-9)
    values = [text.get_text() for text in coco.texts if text.get_text()]
    assert values == [*(f"{10 * i}.0" for i in range(1, 7)), "25.0"]
    assert flickr.containers[1][5].get_height() == pytest.approx(100)
    assert flickr.get_ylim()[1] >= 105


def test_chance_is_a_line_across_the_bars_and_many_bars_carry_no_values(tmp_path, figures):
    found = {"coco": recalls(), "gap": recalls()}  # of one set
    recall_bars({"a": found}, tmp_path / "plot.png", {"coco": recalls(0.02)})
    (panel,) = figures[0].axes
    assert panel.get_title() == "coco, gap"
    assert [line.get_ydata()[0] for line in panel.lines] == pytest.approx([2, 12, 22, 32, 42, 52])
    assert legend(figures[0]) == ["a", "chance"]
    accuracy_bars({"a": {"x": {"mean_per_class_recall": 0.4}}}, tmp_path / "plot.png", {})
    assert not figures[1].axes[0].lines
    recall_bars({name: {"coco": recalls()} for name in "abcde"}, tmp_path / "plot.png")
    assert not figures[2].axes[0].texts


def test_checkpoints_differ_in_colour_or_marker():
    colours, markers = zip(
        *((look["color"], look["marker"]) for look in map(frame.style, range(30))), strict=True
    )
    assert len(set(zip(colours, markers, strict=True))) == 30
    assert len(set(colours[:8])) == len(set(markers[:8])) == 8


def test_names_are_shown_as_they_are_in_lines_that_fit():
    assert frame.wrapped("$a$_b · c", 90) == r"\$a\$_b · c"  # no formula
    assert frame.wrapped("ViT-B-16 of run-a", 12) == "ViT-B-16 of\nrun-a"
    assert frame.wrapped("x" * 25, 10) == "\n".join(["x" * 10, "x" * 10, "x" * 5])
    assert frame.wrapped("", 10) == ""
