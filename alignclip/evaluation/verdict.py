"""The verdict: is the gap closed, did retrieval follow, or has the space collapsed?

The limits come from runs whose every 10th or 20th batch was evaluated; docs/evaluation.md has the
numbers and the way to measure them again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

# Untrained models have a gap of about 1.1, OpenAI's CLIP of 0.8; trained with one transformer 0.17,
# AlignCLIP 0.07
CLOSED_GAP = 0.3
# Of its value before: less of a change is that of one evaluation to the next
NARROWER, WIDER = 0.8, 1.25
VISIBLE = 0.02  # a small gap moves by hundredths, and two of them are seen in two decimals
# Retrieval works from so many times chance on. Collapsed models reach 3 times chance by the little
# that they tell apart
WORKS = 5.0
# … or from so much of what chance misses: 5 times chance is out of reach in a set of few pairs
SHARE = 0.25
# Pairs that are less than this closer than wrong ones, or variance on fewer axes: both only in
# models whose retrieval was within 3 times chance, and in others that had just left it
NO_MARGIN, FEW_AXES = 0.05, 3.0
ONE_CLASS = 0.9  # of the images that get one class
TOLD_APART, RELATED = (
    0.6,
    0.1,
)  # an auroc, of which chance is 0.5; a rank correlation, of which chance is 0
RECALLS = ("image_retrieval_recall@5", "text_retrieval_recall@5")

MetricValues = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """The meaning of an evaluator's figures.

    Attributes:
        success: whether the model does what the metrics are for: pairs find each other, classes are
            told apart.
        collapsed: whether the features lie on a point or on few axes, and tell nothing apart.
        text: the verdict in a sentence.
    """

    success: bool
    collapsed: bool
    text: str


def judge(
    metrics: MetricValues,
    chance: MetricValues,
    before: MetricValues | None = None,
    when: str = "before",
) -> Verdict | None:
    """Say what the figures of one evaluator mean.

    Args:
        metrics: what the task measured.
        chance: what features that say nothing would score.
        before: the same evaluator's figures at the beginning of the run, where there are such.
        when: what to call that time, e.g. ``batch 100``.

    Returns:
        None where the metrics hold nothing to judge.
    """
    if "centroid_distance" in metrics:
        return _judge_gap(metrics, chance, before, when)
    if not metrics.keys().isdisjoint(RECALLS):
        return _verdict(*_retrieval(metrics, chance, before, when))
    if "auroc" in metrics:
        auroc = metrics["auroc"]
        how = "tells" if auroc > TOLD_APART else "does not tell"
        text = f"confidence {how} outliers from known classes (auroc {auroc:.2f})"
        return _verdict(auroc > TOLD_APART, text)
    if "top_class_share" in metrics:
        return _judge_classes(metrics, chance)
    if "spearman" in metrics:
        spearman = metrics["spearman"]
        if math.isnan(spearman):
            return _verdict(False, "all sentence pairs are equally similar", collapsed=True)
        how = "follow" if spearman > RELATED else "say nothing of"
        return _verdict(spearman > RELATED, f"similarities {how} people's ({spearman:.2f})")
    return None


def _verdict(success: bool, text: str, collapsed: bool = False) -> Verdict:
    return Verdict(success, collapsed, f"COLLAPSED: {text}" if collapsed else text)


def _judge_gap(
    metrics: MetricValues, chance: MetricValues, before: MetricValues | None, when: str
) -> Verdict:
    closed, gap = _gap(metrics["centroid_distance"], before, when)
    axes = min(metrics.get(f"effective_rank_{of}", math.nan) for of in ("image", "text"))
    margin = metrics.get("margin", math.nan)
    signs = []
    if margin < NO_MARGIN:
        signs.append(f"pairs are no closer than wrong pairs (margin {margin:.3f})")
    if axes < min(FEW_AXES, _pairs(chance) / 4):
        signs.append(f"the variance of one modality lies on {axes:.1f} axes")
    collapsed, success = closed and bool(signs), closed and not signs
    if metrics.keys().isdisjoint(RECALLS):
        return _verdict(success, "; ".join([gap, "retrieval was not measured", *signs]), collapsed)
    works, retrieval = _retrieval(metrics, chance, before, when)
    if works:
        warning = f"; near a collapse: {'; '.join(signs)}" if signs else ""
        return _verdict(success, f"{gap}, and {retrieval}{warning}")
    words = f"{gap}, {'but' if closed else 'and'} {retrieval}"
    return _verdict(False, "; ".join([words, *signs]), collapsed)


def _gap(now: float, before: MetricValues | None, when: str) -> tuple[bool, str]:
    """Judge the gap: whether it is closed, and a sentence."""
    first = (before or {}).get("centroid_distance", math.nan)
    closed = now <= CLOSED_GAP
    if not first > 0:
        return closed, f"the gap is {'closed' if closed else 'open'} ({now:.2f})"
    ratio = now / first
    if ratio < NARROWER and first - now >= VISIBLE:
        how = "closed" if closed else "narrowed"
        return closed, f"the gap {how} (from {first:.2f} at {when} to {now:.2f})"
    if closed:  # whichever way it went: no word of a movement
        return closed, f"the gap is small ({now:.2f}; {first:.2f} at {when})"
    if ratio > WIDER:
        return closed, f"the gap widened (from {first:.2f} at {when} to {now:.2f})"
    return closed, f"the gap has not changed ({now:.2f}; {first:.2f} at {when})"


def _retrieval(
    metrics: MetricValues, chance: MetricValues, before: MetricValues | None, when: str
) -> tuple[bool, str]:
    """Judge the mean of both directions: does retrieval work, did it not fall; and a sentence."""
    known = [name for name in RECALLS if name in metrics]
    now = mean_recall(metrics)
    random = sum(chance.get(name, 0.0) for name in known) / len(known)
    enough = min(WORKS * random, random + SHARE * (1 - random))
    times = f"{now / random:.1f} × chance" if random else "chance unknown"
    numbers = f"{'mean ' if len(known) > 1 else ''}R@5 {now:.3f}, {times}"
    if now < enough:
        return False, f"retrieval is near chance ({numbers})"
    if before is None or any(name not in before for name in known):
        return True, f"retrieval works ({numbers})"
    first = sum(before[name] for name in known) / len(known)
    # two standard errors of a share, of as many queries as there are pairs
    noise = 2 * math.sqrt(max(first * (1 - first), now * (1 - now)) / _pairs(chance))
    if now < first - noise:
        return False, f"retrieval fell ({numbers}, {first:.3f} at {when})"
    how = "rose" if now > first + noise else "stayed"
    return True, f"retrieval {how} ({numbers}, {first:.3f} at {when})"


def mean_recall(metrics: MetricValues) -> float:
    """Return recall@5, the mean over the directions that were measured; NaN where none was."""
    known = [metrics[name] for name in RECALLS if name in metrics]
    return sum(known) / len(known) if known else math.nan


def _judge_classes(metrics: MetricValues, chance: MetricValues) -> Verdict:
    share, true = metrics["top_class_share"], chance.get("top_class_share", 0.0)
    recall, random = metrics["mean_per_class_recall"], chance.get("mean_per_class_recall", 0.0)
    if share >= ONE_CLASS and share > true + 0.05:
        text = f"{share:.0%} of the images get one class, which {true:.0%} have"
        return _verdict(False, text, collapsed=True)
    if recall < min(1.5 * random, random + SHARE * (1 - random)):
        figures = f"mean per class recall {recall:.3f}, chance {random:.3f}"
        return _verdict(False, f"classes are near chance ({figures})")
    text = f"classes are told apart (mean per class recall {recall / random:.1f} × chance)"
    if metrics["acc1"] <= chance.get("acc1", 0.0):
        text += f"; the most frequent class alone would have acc1 {chance['acc1']:.3f}"
    return _verdict(True, text)


def _pairs(chance: MetricValues) -> float:
    """Return the number of images, which the chance of a recall says."""
    return 1 / chance.get("image_retrieval_recall@1", 0.001)
