"""What ``evaluators:`` names: a task on a set, for any model; in training and after it alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignclip.config.schema import EvaluatorConfig, SetConfig
from alignclip.errors import UserError, one_line
from alignclip.evaluation.chance import accuracy_chance, detection_chance, recall_chance
from alignclip.evaluation.encoding import Encoder, Interrupted
from alignclip.evaluation.gap import modality_gap
from alignclip.evaluation.geometry import close_gap
from alignclip.evaluation.linear_probe import linear_probe
from alignclip.evaluation.retrieval import recall
from alignclip.evaluation.sets import EvaluationSet, OpenSets, read_classes
from alignclip.evaluation.shift import max_softmax, out_of_distribution
from alignclip.evaluation.sts import read_sts, similarity, split_note, unique
from alignclip.evaluation.verdict import Verdict, judge
from alignclip.evaluation.zero_shot import accuracy, build_classifier
from alignclip.losses.precision import full_precision
from alignclip.model.encoders import CLIP
from alignclip.ranks import raise_on_all_ranks

Metrics = dict[str, float]


@dataclass
class Result:
    """What a task found.

    Attributes:
        metrics: by clip_benchmark's names where it has them; :data:`alignclip.config.metrics.TASKS` says what they are.
        chance: what features that say nothing would score, of the metrics that have such a number.
        pairs: the features of image–text pairs, [N, d] each, where the task has such: what plots are made of.
        note: in what the set is not the one that published figures are of, where that is known.
    """

    metrics: Metrics
    chance: Metrics
    pairs: tuple[Tensor, Tensor] | None = None
    note: str | None = None

    @property
    def verdict(self) -> Verdict | None:
        """What the metrics mean, in words: :func:`alignclip.evaluation.verdict.judge`."""
        return judge(self.metrics, self.chance)


class Evaluator:
    """One entry of ``evaluators``: its sets and its task. On every rank, at the same time.

    Attributes:
        note: in what its set is not the one that published figures are of, where that is known.

    Raises:
        UserError: a set is not there, or not what the task needs.
    """

    def __init__(
        self, name: str, config: EvaluatorConfig, image_size: int, opened: OpenSets
    ) -> None:
        self.name, self.config = name, config
        self.note: str | None = None
        self._sets: dict[str, EvaluationSet] = {}
        self._classes: dict[str, tuple[list[str], list[str]]] = {}
        if config.task == "sts":
            self._sentences = read_sts(str(config.remote or config.local))
            self.note = split_note(len(self._sentences[0]))
            return
        column = "caption" if config.task in ("retrieval", "gap") else "label"
        parts: dict[str, SetConfig | None] = {
            "": config,
            "train": config.train,
            "outliers": config.outliers,
        }
        for part, stream in parts.items():
            if stream is not None:
                self._sets[part] = EvaluationSet(stream, image_size, column, opened)
        for (
            part,
            stream,
        ) in parts.items():  # when all ranks have opened all sets: that, they do together
            if stream is not None and column == "label":
                self._classes[part] = read_classes(stream)
        if config.task == "linear_probe":
            _check_same(self._classes["train"][0], self._classes[""][0], name)

    def __call__(self, encoder: Encoder) -> Result:
        """Evaluate a model; every rank encodes its share, and every rank gets the result.

        Raises:
            UserError: a sample can't be read or encoded, on whichever rank; the metrics can't be computed: features
                that are not finite, a package that is missing. On every rank alike.
            Interrupted: as ``encoder.interrupted`` says.
        """
        failure = result = None
        try:
            result = self._run(encoder)
        except UserError as error:
            failure = error
        except Interrupted:
            raise
        except Exception as error:  # of any of the libraries: hours of training or of other evaluations are at stake
            failure = UserError(f"{type(error).__name__}: {one_line(error)}")
        raise_on_all_ranks(failure)
        assert result is not None
        return result

    def _run(self, encoder: Encoder) -> Result:
        tasks: dict[str, Callable[[Encoder], Result]] = {
            "zero_shot": self._zero_shot,
            "out_of_distribution": self._out_of_distribution,
            "linear_probe": self._linear_probe,
            "retrieval": self._retrieval,
            "gap": self._gap,
            "sts": self._sts,
        }
        return tasks[self.config.task](encoder)

    def _images(self, encoder: Encoder, part: str = "") -> tuple[Tensor, list[Any]]:
        """Features and what belongs to them of a set, which another evaluator may have wanted, too."""
        one, label = self._sets[part], f"{self.name}: images" + (f" ({part})" if part else "")
        if one.key not in encoder.known:
            try:
                encoder.known[one.key] = encoder.images(one, self.config.num_workers, label)
            except UserError:
                one.recover()
                raise
        found: tuple[Tensor, list[Any]] = encoder.known[one.key]
        return found

    def _classifier(self, encoder: Encoder, part: str = "") -> Tensor:
        names, templates = self._classes[part]
        return build_classifier(
            lambda texts: encoder.texts(texts, f"{self.name}: prompts"), names, templates
        )

    def _zero_shot(self, encoder: Encoder) -> Result:
        classifier = self._classifier(encoder)
        features, labels = self._images(encoder)
        targets = torch.tensor(labels)
        return Result(
            _computed(lambda: accuracy(features, classifier, targets)), accuracy_chance(targets)
        )

    def _out_of_distribution(self, encoder: Encoder) -> Result:
        """Known classes against unknown ones, and what a classifier of the outliers' own labels gets right.

        Where the outliers' classes are some of the set's, as ImageNet-O's are of ImageNet's, the set is cut down to
        these, as its authors do it.
        """
        names, other = self._classes[""][0], self._classes["outliers"][0]
        classifier, own = self._classifier(encoder), self._classifier(encoder, "outliers")
        inside, labels = self._images(encoder)
        outside, outside_labels = self._images(encoder, "outliers")
        scale = encoder.logit_scale
        if set(other) < set(names):
            kept = [names.index(name) for name in other]
            classifier = classifier[kept]
            inside = inside[torch.isin(torch.tensor(labels), torch.tensor(kept)).to(inside.device)]

        targets = torch.tensor(outside_labels)

        def compute() -> Metrics:
            scores = [max_softmax(features, classifier, scale) for features in (inside, outside)]
            return out_of_distribution(*scores) | accuracy(outside, own, targets)

        return Result(
            _computed(compute),
            detection_chance(len(inside), len(outside)) | accuracy_chance(targets),
        )

    def _linear_probe(self, encoder: Encoder) -> Result:
        train, train_labels = self._images(encoder, "train")
        test, labels = self._images(encoder)
        fitted, targets = torch.tensor(train_labels), torch.tensor(labels)
        metrics = _computed(
            lambda: linear_probe(train, fitted, test, targets, progress=encoder.progress)
        )
        return Result(metrics, accuracy_chance(targets))

    def _retrieval(self, encoder: Encoder) -> Result:
        images, texts, owner = self._pairs(encoder)
        metrics = _computed(lambda: recall(images, texts, owner, progress=encoder.progress))
        return Result(metrics, recall_chance(owner))

    def _gap(self, encoder: Encoder) -> Result:
        """The geometry of images and their first captions, and retrieval over all captions.

        Retrieval is measured as it is, since a gap may close by collapse, and once the two means are moved together.
        """
        images, texts, owner = self._pairs(encoder)
        first = texts[torch.searchsorted(owner, torch.arange(len(images))).to(texts.device)]

        def compute() -> Metrics:
            closed = recall(*close_gap(images, texts), owner, progress=encoder.progress)
            return {
                **modality_gap(images, first, progress=encoder.progress),
                **recall(images, texts, owner, progress=encoder.progress),
                **_closed(closed),
            }

        chance = recall_chance(owner)
        return Result(
            _computed(compute),
            {"linear_separability": 0.5, **chance, **_closed(chance)},
            (images, first),
        )

    def _pairs(self, encoder: Encoder) -> tuple[Tensor, Tensor, Tensor]:
        """Image features, caption features, and the row of the image that each caption belongs to."""
        images, captions = self._images(encoder)
        several = [_captions(c) for c in captions]
        if not all(several):
            raise UserError(
                f"evaluators.{self.name}: the image of sample {several.index([])} has no caption"
            )
        owner = torch.tensor([row for row, one in enumerate(several) for _ in one])
        key = (*self._sets[""].key, "captions")
        if key not in encoder.known:
            encoder.known[key] = encoder.texts(
                [c for one in several for c in one], f"{self.name}: captions"
            )
        return images, encoder.known[key], owner

    def _sts(self, encoder: Encoder) -> Result:
        first, second, scores = self._sentences
        # on all ranks, and the rest on one
        features = encoder.texts(unique(first, second), f"{self.name}: sentences")
        metrics = _computed(lambda: similarity(lambda _: features, (first, second, scores)))
        return Result(metrics, {"spearman": 0.0}, note=self.note)


def evaluate_model(
    model: CLIP,
    evaluators: Mapping[str, EvaluatorConfig],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> dict[str, Result]:
    """Measure one model by some evaluators; on every rank, at the same time.

    Args:
        model: where it is, in whatever mode; it is left in that mode.
        evaluators: what to measure, by names of one's own.
        dtype: of autocast while encoding, e.g. ``torch.bfloat16``; None runs in the model's own.
        progress: show bars on rank 0.

    Returns:
        Metrics, chance and verdict by the names of the evaluators.

    Raises:
        UserError: a set is not there or not what its task needs, before anything is encoded; a sample can't be read.
    """
    encoder = Encoder(model, next(model.parameters()).device, dtype, progress=progress)
    opened = OpenSets()
    tasks = [
        Evaluator(name, config, encoder.image_size, opened) for name, config in evaluators.items()
    ]
    results = {}
    for task in tasks:
        encoder.batch_size = task.config.batch_size
        results[task.name] = task(encoder)
    return results


def _closed(recalls: Metrics) -> Metrics:
    """Recalls under the names that they have once the two means are moved together."""
    return {f"closed_{name}": value for name, value in recalls.items()}


def _captions(value: Any) -> list[str]:
    """An image's captions, those that say nothing left out; an empty list where that is no text at all."""
    captions = value if isinstance(value, list) else [value]
    return [caption for caption in captions if isinstance(caption, str) and caption.strip()]


def _check_same(train: list[str], test: list[str], name: str) -> None:
    """The labels of both sets mean the same."""
    if train == test:
        return
    at = next(
        (i for i, pair in enumerate(zip(train, test, strict=False)) if pair[0] != pair[1]), None
    )
    how = (
        f"{len(train)} and {len(test)}"
        if at is None
        else f"label {at} is '{train[at]}' and '{test[at]}'"
    )
    raise UserError(f"evaluators.{name}: train and test set have different classes ({how})")


def _computed(metrics: Callable[[], Metrics]) -> Metrics:
    """Compute on rank 0, so that all ranks go on with the same numbers; an error there is everybody's.

    In full precision: of cosines in TF32, the third digit is already noise.

    Raises:
        UserError: the computation failed.
    """
    found: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            with full_precision("cuda" if torch.cuda.is_available() else "cpu"):
                found = [metrics()]
        except Exception as error:  # of any of the libraries that compute
            found = [error if isinstance(error, UserError) else UserError(one_line(error))]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(found, group=_patient_group())
    if isinstance(found[0], Exception):
        raise found[0]
    result: Metrics = found[0]
    return result


@cache
def _patient_group() -> Any:
    """All ranks, for waiting on one that computes: a probe of a large set takes longer than other collectives may."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))
