"""What the plots of an evaluation show: the data against plain NumPy, and pictures in which nothing is covered."""

import math
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from alignclip.errors import UserError
from alignclip.evaluation import plots
from alignclip.evaluation.bars import accuracy_bars, recall_bars
from alignclip.evaluation.curves import Point, curves_of, draw_curves, records_of
from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.geometry import effective_rank
from alignclip.evaluation.history import EvaluationRecords

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.filterwarnings(
    "error::UserWarning"
)  # a layout that doesn't fit, a glyph that is missing

COLOUR = plots.COLOURS[0]
LONG = [
    "ViT-B-16 AlignCLIP alpha=1 beta=0.5 cc12m 30 epochs ep30-ba587700-rank0.pt · flickr30k-test",
    "runs/$HOME/a_name_without_any_blanks/"
    + "/".join(["that_goes_on_and_on"] * 5)
    + "/ep1-ba2$ · coco",
    "_underscored",
    *(f"epoch {epoch} · coco_val2017" for epoch in range(5)),
]


def pairs_of(mean=1.0, gap=1.0, noise=0.5, count=60, width=16, seed=0):
    """Two cones: of a common direction and one of each modality's own, and what a pair has in common."""
    generator = torch.Generator().manual_seed(seed)
    shared, own = (
        torch.randn(count, width, generator=generator),
        torch.randn(2, count, width, generator=generator),
    )
    images, texts = shared + noise * own
    images[:, 0] += mean * gap
    texts[:, 1] += mean * gap
    images[:, 2] += mean
    texts[:, 2] += mean
    return images, texts


def checkpoints(names):
    untrained, *others = [pairs_of(50, 1)] + [
        pairs_of(2, 0.3 * i, seed=i) for i in range(len(names) - 1)
    ]
    return dict(zip(names, [untrained, *others], strict=True))


def recalls(first=0.1):
    names = [f"{found}_retrieval_recall@{k}" for found in ("image", "text") for k in (1, 5, 10)]
    return {name: first + 0.1 * i for i, name in enumerate(names)}


def gap_curves(names, batches=(0, 1000, 250_000)):
    def point(i, batch):
        gap = {
            "alignment_score": 0.1 * i + batch / 1e6,
            "centroid_distance": 1 - batch / 1e6,
            "margin": batch / 1e6,
        }
        return Point(batch, gap | recalls(batch / 1e6), recalls(0.001))

    return {name: [point(i, batch) for batch in batches] for i, name in enumerate(names)}


DRAW = {
    "cosine_histograms": lambda names, path: plots.cosine_histograms(checkpoints(names), path),
    "embedding_maps": lambda names, path: plots.embedding_maps(checkpoints(names), path),
    "spectra": lambda names, path: plots.spectra(checkpoints(names), path),
    "curves": lambda names, path: draw_curves(gap_curves(names), path),
    "recall_bars": lambda names, path: recall_bars(
        {name: {"coco": recalls(), "a" * 120: recalls(0.0)} for name in names},
        path,
        {"coco": recalls(0.01)},
    ),
    "accuracy_bars": lambda names, path: accuracy_bars(
        {
            name: {f"set-{i}": {"mean_per_class_recall": 0.1 * i} for i in range(6)}
            for name in names
        },
        path,
        {f"set-{i}": {"mean_per_class_recall": 0.02} for i in range(6)},
    ),
}
every_plot = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved meanwhile."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def savefig(figure, *arguments, **options):
        saved.append(figure)
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return saved


@every_plot
@pytest.mark.parametrize(
    "names", [["model"], ["CLIP", "SharedCLIP", "AlignCLIP", "untrained"], LONG], ids=[1, 4, 8]
)
def test_pictures_in_which_nothing_is_covered_or_clipped(draw, names, tmp_path, figures):
    draw(names, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    with Image.open(tmp_path / "plot.png") as picture:
        width, height = picture.size
        assert picture.format == "PNG"
        assert 500 < width < 1700
        assert 500 < height < 2400
    # the layout is of the last drawing, at the PNG's resolution
    (figure,) = figures
    figure.set_dpi(plots.DPI)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    labels = [text.get_text().replace("\n", "").replace("\\$", "$") for text in legend.get_texts()]
    if draw is DRAW["embedding_maps"]:
        assert labels == ["image", "text", "pairs, 60 at most"]
    else:
        # lines break at blanks, or within a word
        if draw in (DRAW["recall_bars"], DRAW["accuracy_bars"]):
            assert labels.pop() == "chance"
        for label, name in zip(labels, names, strict=True):
            assert label.replace(" ", "").startswith(name.replace(" ", ""))
    panels = [panel for panel in figure.axes if panel.get_visible()]
    boxes = [legend.get_window_extent(), *(panel.get_tightbbox() for panel in panels)]
    for box in boxes:
        assert figure.bbox.x0 - 1 <= box.x0 < box.x1 <= figure.bbox.x1 + 1
        assert figure.bbox.y0 - 1 <= box.y0 < box.y1 <= figure.bbox.y1 + 1
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


@every_plot
def test_a_drawing_that_fails_leaves_what_was_there(draw, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    path = tmp_path / "plot.png"
    path.write_bytes(b"yesterday's")

    def savefig(figure, place, **_):
        place.write_bytes(b"half of a")
        raise OSError("no space left on device")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="no space"):
        draw(["model"], path)
    assert path.read_bytes() == b"yesterday's"
    assert list(tmp_path.iterdir()) == [path]


@every_plot
def test_pyplot_and_its_settings_are_left_alone(draw, tmp_path, monkeypatch):
    import matplotlib

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail
    before = matplotlib.rcParams.copy()
    draw(["model"], tmp_path / "plot.png")
    assert matplotlib.rcParams.copy() == before


@every_plot
def test_without_matplotlib_the_extra_is_named(draw, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"alignclip\[evaluate\]"):
        draw(["model"], tmp_path / "plot.png")


@pytest.mark.parametrize("draw", [plots.cosine_histograms, plots.embedding_maps, plots.spectra])
@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({}, "no checkpoints"),
        (
            {"good": pairs_of(), "bad": (torch.ones(4, 3), torch.ones(4, 2))},
            r"^bad: features must be.*\[4, 2\]",
        ),
        ({"bad": (torch.ones(1, 3), torch.ones(1, 3))}, "^bad: two pairs"),
        ({"bad": (torch.ones(4, 3) * torch.nan, torch.ones(4, 3))}, "^bad: .*NaN"),
    ],
)
def test_bad_features_are_an_error(draw, pairs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw(pairs, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_a_map_needs_two_dimensions(tmp_path):
    with pytest.raises(ValueError, match=r"^narrow: .*two dimensions"):
        plots.embedding_maps(
            {"narrow": (torch.ones(4, 1), torch.ones(4, 1))}, tmp_path / "plot.png"
        )


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "no checkpoints"),
        (
            {"run": [Point(7, {"alignment_score": 0.5, "centroid_distance": math.inf}, {})]},
            "run, batch 7: .* not inf",
        ),
        (
            {"run": [Point(7, {"centroid_distance": 1.0, "margin": math.nan}, {})]},
            "margin .* not nan",
        ),
    ],
)
def test_bad_points_are_an_error(curves, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        draw_curves(curves, tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("results", "message"),
    [
        ({}, "no evaluator has any of image_retrieval_recall@1"),
        ({"clip": {"imagenet": {"acc1": 0.3}}}, "no evaluator"),
        (
            {"clip": {"coco": {"text_retrieval_recall@5": 43.0}}},
            r"clip, coco: text_retrieval_recall@5 .* not 43.0",
        ),
        ({"clip": {"coco": {"image_retrieval_recall@1": math.nan}}}, "not nan"),
    ],
)
def test_bad_recalls_are_an_error(results, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recall_bars(results, tmp_path / "plot.png")


def test_a_folder_that_is_missing_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        recall_bars({"clip": {"coco": recalls()}}, tmp_path / "missing" / "plot.png")


def test_histograms_are_of_the_cosines(tmp_path, figures):
    images, texts = pairs_of(count=300)
    plots.cosine_histograms(
        {"a": (images, texts), "b": (images, 3 * images)}, tmp_path / "plot.png"
    )
    cosines = F.normalize(images.double(), dim=-1) @ F.normalize(texts.double(), dim=-1).T
    (panel,) = figures[0].axes
    pairs, others, same, _ = panel.patches
    heights, edges, _ = pairs.get_data()
    widths = np.diff(edges)
    assert len(heights) == plots.BINS
    assert widths == pytest.approx(widths[0])
    assert edges[-1] == 1  # b's pairs are one point each
    assert edges[0] >= -1
    assert (heights * widths).sum() == pytest.approx(1)
    for i in range(plots.BINS - 1):
        inside = (cosines.diagonal() >= edges[i]) & (cosines.diagonal() < edges[i + 1])
        assert heights[i] * widths[i] == pytest.approx(inside.double().mean().item())
    # 10,000 draws of 89,700 non-pairs, against all of them
    apart = cosines[~torch.eye(300, dtype=torch.bool)]
    share = np.array(
        [((apart >= low) & (apart < high)).double().mean() for low, high in pairwise(edges)]
    )
    assert others.get_data().values * widths == pytest.approx(share, abs=0.015)
    assert same.get_data().values[:-1] == pytest.approx(0)
    assert [patch.get_linestyle() for patch in (pairs, others)] == ["-", (0, (3, 1.5))]
    means = [line.get_xdata()[0] for line in panel.lines]
    assert means[0] == pytest.approx(cosines.diagonal().mean().item())
    assert means[1] == pytest.approx(apart.mean().item(), abs=0.02)
    marker = panel.lines[0]
    row = np.searchsorted(edges, means[0]) - 1
    assert marker.get_ydata()[0] == heights[row]
    labels = [
        text.get_text().replace("\N{NO-BREAK SPACE}", " ")
        for text in figures[0].legends[0].get_texts()
    ]
    margin = cosines.diagonal().mean() - apart.mean()
    assert labels[0] == f"a: alignment {cosines.diagonal().mean():.2f}, margin {margin:.2f}"
    assert labels[1].startswith("b: alignment 1.00")


def test_a_peak_that_would_flatten_the_rest_is_cut_and_told(tmp_path, figures):
    pairs = {"untrained": pairs_of(200), "trained": pairs_of(0.3, noise=1.0, count=2000)}
    plots.cosine_histograms(pairs, tmp_path / "plot.png")
    (panel,) = figures[0].axes
    peaks = [patch.get_data().values.max() for patch in panel.patches]
    assert max(peaks[2:]) < panel.get_ylim()[1] < min(peaks[:2])
    labels = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert labels[0].endswith(f"(peak of {max(peaks[:2]):.0f} cut)")
    assert "cut" not in labels[1]
    assert plots._top([[3.0, 2.0], [5.0, 24.0], [100.0, 90.0]]) == pytest.approx(1.08 * 24)
    assert plots._top([[100.0, 90.0]]) == pytest.approx(108)


@pytest.mark.parametrize("value", [-1.0, 0.3, 1.0])
def test_bins_of_cosines_that_are_all_the_same(value):
    values = np.full(5, value)
    edges = plots._edges([values, values])
    assert -1 <= edges[0] < edges[-1] <= 1
    assert (np.diff(edges) > 1e-5).all()
    assert (plots._density(values, edges) * np.diff(edges)).sum() == pytest.approx(1)


def test_spectra_are_the_squared_singular_values(tmp_path, figures):
    images, texts = pairs_of(width=8)
    texts[:, 4:] = 0  # four axes
    plots.spectra(
        {"a": (images, texts), "still": (torch.ones(60, 8), texts)}, tmp_path / "plot.png"
    )
    (panel,) = figures[0].axes
    solid, dashed, still, _ = panel.lines
    for line, features, rank in ((solid, images, 8), (dashed, texts, 4)):
        unit = F.normalize(features.double(), dim=-1).numpy()
        shares = np.linalg.svd(unit - unit.mean(0), compute_uv=False) ** 2
        assert list(line.get_xdata()) == list(range(1, rank + 1))
        assert line.get_ydata() == pytest.approx((shares / shares.sum())[:rank])
    assert solid.get_linestyle() == "-"
    assert dashed.get_linestyle() == "--"
    assert panel.get_yscale() == "log"
    assert not len(still.get_ydata())
    first, second = (text.get_text() for text in figures[0].legends[0].get_texts())
    assert (
        first == f"a: effective ranks {effective_rank(images):.1f} and {effective_rank(texts):.1f}"
    )
    assert second == "still (images don't vary)"


def test_spectra_of_nothing_that_varies(tmp_path):
    plots.spectra({"still": (torch.ones(4, 8), torch.ones(4, 8))}, tmp_path / "plot.png")
    plots.embedding_maps({"still": (torch.ones(4, 8), torch.ones(4, 8))}, tmp_path / "map.png")
    assert (tmp_path / "plot.png").exists()


def test_projection_is_on_the_principal_components():
    images, texts = (F.normalize(x.double(), dim=-1) for x in pairs_of(count=50))
    both = torch.cat([images, texts]).numpy()
    centred = both - both.mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
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
    labelled = [
        any(label.get_visible() for label in panel.get_xticklabels()) for panel in panels[:4]
    ]
    assert (
        labelled == [bool(panel.get_xlabel()) for panel in panels[:4]] == [False, True, True, True]
    )
    assert (
        len({panel.get_xlim() for panel in panels[:4]} | {panel.get_ylim() for panel in panels[:4]})
        == 1
    )
    for panel, (name, (images, texts)) in zip(panels, features.items(), strict=False):
        gap = modality_gap(images, texts, separability=False)
        title = (
            f"{name}\ngap {gap['centroid_distance']:.2f}, alignment {gap['alignment_score']:.2f}"
        )
        title += f", margin {gap['margin']:.2f}"
        assert panel.get_title() == title
        lines, scatter = panel.collections
        points = np.asarray(scatter.get_offsets())
        assert len(points) == 120
        assert np.abs(points).max() < panel.get_xlim()[1]
        # every line ends in an image and in its text
        expected = np.stack(
            plots._project(*(F.normalize(x.double(), dim=-1) for x in (images, texts))), axis=1
        )
        assert np.stack(lines.get_segments()) == pytest.approx(expected)
        blue = scatter.get_facecolors()[:, 2] > scatter.get_facecolors()[:, 0]
        assert np.sort(points[blue], axis=0) == pytest.approx(np.sort(expected[:, 0], axis=0))


def test_of_many_pairs_some_are_drawn(tmp_path, figures):
    pairs = pairs_of(count=2 * plots.POINTS + 1)
    plots.embedding_map(pairs, pairs, tmp_path / "plot.png", ("same", "same"))
    assert [panel.get_title().partition("\n")[0] for panel in figures[0].axes] == ["same", "same"]
    lines, scatter = figures[0].axes[1].collections
    assert plots.POINTS < len(scatter.get_offsets()) <= 2 * plots.POINTS
    assert plots.LINES / 2 < len(lines.get_segments()) <= plots.LINES


def test_curves_in_order_of_batches_with_their_chance(tmp_path, figures):
    draw_curves(gap_curves(["second", "first"], batches=(300, 20, 1000)), tmp_path / "plot.png")
    gap, margin, recall = figures[0].axes
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["second", "first"]
    for panel in (gap, margin, recall):
        assert panel.get_ylim()[0] <= 0
        for line in panel.lines:
            if line.get_linestyle() != "None":
                assert list(line.get_xdata()) == [20, 300, 1000]
    assert gap.lines[0].get_ydata() == pytest.approx([0.99998, 0.9997, 0.999])
    solid, dashed = (
        line
        for line in margin.lines
        if line.get_linestyle() != "None" and line.get_color() == COLOUR
    )
    assert solid.get_ydata() == pytest.approx([2e-5, 3e-4, 1e-3])
    assert dashed.get_ydata() == pytest.approx(
        [2e-5, 3e-4, 1e-3]
    )  # the alignment score of the first
    lines = [
        line
        for line in recall.lines
        if line.get_linestyle() != "None" and line.get_color() == COLOUR
    ]
    expected = [
        100 * (batch / 1e6 + 0.25) for batch in (20, 300, 1000)
    ]  # the mean over both directions
    assert lines[0].get_ydata() == pytest.approx(expected)
    assert lines[1].get_ydata() == pytest.approx([25.1] * 3)  # chance
    assert "gap" in gap.get_title()
    assert "lower is better" in gap.get_title()


def test_evaluations_of_a_collapse_are_hollow(tmp_path, figures):
    chance = recalls(0) | {"image_retrieval_recall@1": 0.001, "image_retrieval_recall@5": 0.005}
    chance["text_retrieval_recall@5"] = 0.005
    low = {name: 2 * value for name, value in chance.items()}
    collapsed = {"centroid_distance": 0.05, "alignment_score": 0.96, "margin": 0.02}
    ranks = {"effective_rank_image": 1.3, "effective_rank_text": 2.4}
    good = {"centroid_distance": 0.07, "alignment_score": 0.9, "margin": 0.9} | dict.fromkeys(
        ranks, 9.0
    )
    points = [Point(10, collapsed | ranks | low, chance), Point(20, good | recalls(0.4), chance)]
    draw_curves({"run": points}, tmp_path / "plot.png")
    marks = [line for line in figures[0].axes[0].lines if line.get_linestyle() == "None"]
    assert {line.get_markerfacecolor(): list(line.get_xdata()) for line in marks} == {
        COLOUR: [20],
        "white": [10],
    }
    assert figures[0].legends[0].get_texts()[0].get_text() == "run (hollow: collapsed)"


def test_curves_are_of_the_evaluations_in_training():
    history = EvaluationRecords(None)
    gap = {"centroid_distance": 0.5, "alignment_score": 0.25, "margin": 0.1}
    for batch in (10, 20):
        history.add(batch, "gap", gap | recalls(batch / 100), recalls(0.01))
        if batch == 20:  # of the same pairs, if not as often: no curve of its own
            history.add(batch, "coco", recalls(batch / 100), recalls(0.01))
        history.add(batch, "flickr", recalls(0.2), recalls(0.01))
        history.add(batch, "cifar10", {"acc1": 0.5}, {"acc1": 0.1})
    curves = curves_of(history.records, "first")
    assert curves.keys() == {"first · gap", "first · flickr"}
    assert [point.batch for point in curves["first · gap"]] == [10, 20]
    # a kept checkpoint tells its batch in its name
    records = list(
        records_of("s3://b/runs/first/ep1-ba200-rank0.pt", {"gap": gap}, {"gap": {"x": 0.5}})
    )
    assert [(record["batch"], record["evaluator"], record["chance"]) for record in records] == [
        (200, "gap", {"x": 0.5})
    ]
    assert not list(records_of("runs/first/latest-rank0.pt", {"gap": gap}, {}))


def test_bars_are_the_recalls_in_percent(tmp_path, figures):
    partly = {"image_retrieval_recall@1": 0.25, "closed_image_retrieval_recall@1": 0.9}
    results = {
        "clip": {"coco": recalls(), "imagenet": {"acc1": math.nan}},
        "probe only": {"imagenet": {"acc1": 0.4}},
        "alignclip": {
            "coco": partly,
            "flickr": {"text_retrieval_recall@10": 1.0},
            "gap": {"rmg": 2.0},
        },
    }
    recall_bars(results, tmp_path / "plot.png")
    coco, flickr = figures[0].axes
    assert [panel.get_title() for panel in (coco, flickr)] == ["coco", "flickr"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["clip", "alignclip"]
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
    assert [text.get_text() for text in coco.texts if text.get_text()] == [
        f"{10 * i}.0" for i in range(1, 7)
    ] + ["25.0"]
    assert flickr.containers[1][5].get_height() == pytest.approx(100)
    assert flickr.get_ylim()[1] >= 105


def test_chance_is_a_line_across_the_bars(tmp_path, figures):
    recall_bars(
        {"a": {"coco": recalls(), "gap": recalls()}}, tmp_path / "plot.png", {"coco": recalls(0.02)}
    )
    (panel,) = figures[0].axes  # the gap and the retrieval of one set have the same figures
    assert panel.get_title() == "coco, gap"
    assert [line.get_ydata()[0] for line in panel.lines] == pytest.approx([2, 12, 22, 32, 42, 52])
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["a", "chance"]
    accuracy_bars({"a": {"x": {"mean_per_class_recall": 0.4}}}, tmp_path / "plot.png", {})
    assert not figures[1].axes[0].lines


def test_many_bars_carry_no_values(tmp_path, figures):
    recall_bars({name: {"coco": recalls()} for name in "abcde"}, tmp_path / "plot.png")
    assert not figures[0].axes[0].texts


def test_checkpoints_differ_in_colour_or_marker():
    styles = [(plots.style(i)["color"], plots.style(i)["marker"]) for i in range(30)]
    assert len(set(styles)) == 30
    assert (
        len({colour for colour, _ in styles[:8]}) == len({marker for _, marker in styles[:8]}) == 8
    )


def test_names_are_shown_as_they_are_in_lines_that_fit():
    assert plots.wrapped("$a$_b · c", 90) == r"\$a\$_b · c"  # no formula
    assert plots.wrapped("ViT-B-16 of run-a", 12) == "ViT-B-16 of\nrun-a"
    assert plots.wrapped("x" * 25, 10) == "\n".join(["x" * 10, "x" * 10, "x" * 5])
    assert plots.wrapped("", 10) == ""
