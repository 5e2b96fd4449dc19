"""An entry of ``evaluators:``: a task on its sets, for any model, in training and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alignclip.config.metrics import sets_of
from alignclip.config.plugged import TASKS, plugged
from alignclip.config.schema import EvaluatorConfig
from alignclip.errors import UserError, one_line
from alignclip.evaluation.encoding import Encoder, Interrupted
from alignclip.evaluation.sets import EvaluationSet, OpenSets, read_classes
from alignclip.evaluation.verdict import Verdict, judge
from alignclip.evaluation.zero_shot import build_classifier
from alignclip.losses.precision import full_precision
from alignclip.model.encoders import CLIP
from alignclip.ranks import raise_on_all_ranks, rank, world_size

MetricFigures = dict[str, float]


@dataclass
class TaskResult:
    """The findings of a task.

    Attributes:
        metrics: the figures, by the names that the task's ``METRICS`` declares.
        chance: what features that say nothing would score, of the metrics that have such a number.
        pairs: the features of image–text pairs, [N, d] each, where the task has pairs: what plots
            are made of.
        note: in what the set differs from the one that published figures are of, where that is
            known.
    """

    metrics: MetricFigures
    chance: MetricFigures
    pairs: tuple[Tensor, Tensor] | None = None
    note: str | None = None

    @property
    def verdict(self) -> Verdict | None:
        """Return what the metrics mean, in words: :func:`alignclip.evaluation.verdict.judge`."""
        return judge(self.metrics, self.chance)


class Evaluator:
    """A task and its sets; every rank has one, and calls it at the same time.

    Attributes:
        encoder: the model that is measured; set as long as the task runs.
        classes: class names and prompt templates of the sets that have labels, by the key of the
            set: ``""`` is the evaluator's own, others are keys of the task, such as ``train``.
        settings: the task's own keys.
        prepared: what the task's ``prepare`` returned.
        note: see :class:`TaskResult`.

    Raises:
        UserError: a set is not there, or not what the task needs.
    """

    encoder: Encoder

    def __init__(self, name: str, config: EvaluatorConfig, opened: OpenSets) -> None:
        self.name, self.config = name, config
        self.note: str | None = None
        self.classes: dict[str, tuple[list[str], list[str]]] = {}
        self._task: Any = plugged(TASKS, config.task, f"evaluators.{name}.task")
        self.settings: Any = config.settings or self._task.Settings()
        column = self._task.COLUMN
        streams = sets_of(config) if column else {}
        self._sets = {key: EvaluationSet(stream, column, opened) for key, stream in streams.items()}
        if column == "label":  # after all ranks have opened all sets, which they do together
            self.classes = {key: read_classes(stream) for key, stream in streams.items()}
        prepare = getattr(self._task, "prepare", None)
        self.prepared: Any = prepare(self) if prepare else None

    def __call__(self, encoder: Encoder) -> TaskResult:
        """Evaluate a model; every rank encodes its share, and every rank gets the result.

        Raises:
            UserError: a rank can't read or encode a sample; the metrics can't be computed: features
                that are not finite, a package that is missing. On every rank alike.
            Interrupted: as ``encoder.interrupted`` says.
        """
        self.encoder, failure = encoder, None
        encoder.batch_size = self.config.batch_size
        try:
            result: TaskResult = self._task.run(self)
        except Interrupted:
            raise
        except Exception as error:  # hours of training or of other evaluations are at stake
            failure = _as_user_error(error, f"{type(error).__name__}: ")
        raise_on_all_ranks(failure)
        return result

    def images(self, key: str = "") -> tuple[Tensor, list[Any]]:
        """Encode the images of a set, which another evaluator may have encoded already.

        Returns:
            [N, d] features, and N labels or captions.
        """
        one, label = self._sets[key], f"{self.name}: images" + (f" ({key})" if key else "")
        one.image_size = self.encoder.image_size
        if one.key not in self.encoder.known:
            try:
                found = self.encoder.images(one, self.config.num_workers, label)
                self.encoder.known[one.key] = found
            except UserError:
                one.recover()
                raise
        known: tuple[Tensor, list[Any]] = self.encoder.known[one.key]
        return known

    def labelled_images(self, key: str = "") -> tuple[Tensor, Tensor]:
        """Encode the images of a set with labels: [N, d] features and [N] integers on the CPU."""
        features, labels = self.images(key)
        return features, torch.tensor(labels)

    def classifier(self, key: str = "") -> Tensor:
        """Encode the classes' prompts to a classifier, [C, d]."""
        names, templates = self.classes[key]
        return build_classifier(
            lambda texts: self.encoder.texts(texts, f"{self.name}: prompts"), names, templates
        )

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Encode images and captions: [N, d], [M, d], and the row of each caption's image, [M].

        Raises:
            UserError: an image has no caption: which.
        """
        images, values = self.images()
        captions = [_captions(value) for value in values]
        if [] in captions:
            sample = captions.index([])
            raise UserError(f"evaluators.{self.name}: the image of sample {sample} has no caption")
        key = (*self._sets[""].key, "captions")
        if key not in self.encoder.known:
            texts = [caption for several in captions for caption in several]
            self.encoder.known[key] = self.encoder.texts(texts, f"{self.name}: captions")
        counts = torch.tensor([len(several) for several in captions])
        owner = torch.arange(len(captions)).repeat_interleave(counts)
        return images, self.encoder.known[key], owner

    def result(
        self,
        metrics: Callable[[], MetricFigures],
        chance: MetricFigures,
        pairs: tuple[Tensor, Tensor] | None = None,
    ) -> TaskResult:
        """Compute the metrics on rank 0, and return the same result on every rank.

        In full precision: the third digit of a cosine is noise in TF32.

        Raises:
            UserError: the computation failed; on every rank.
        """
        found: list[Any] = [None]
        if rank() == 0:
            try:
                with full_precision("cuda" if torch.cuda.is_available() else "cpu"):
                    found = [metrics()]
            except Exception as error:  # of all libraries that compute
                found = [_as_user_error(error)]
        if world_size() > 1:
            dist.broadcast_object_list(found, group=_patient_group())
        if isinstance(found[0], UserError):
            raise found[0]
        return TaskResult(found[0], chance, pairs, self.note)


def evaluate_model(
    model: CLIP,
    evaluators: Mapping[str, EvaluatorConfig],
    *,
    dtype: torch.dtype | None = None,
    progress: bool = True,
    opened: OpenSets | None = None,
) -> dict[str, TaskResult]:
    """Measure one model by some evaluators; on every rank, at the same time.

    Args:
        model: on any device and in any mode; it is left in that mode.
        evaluators: what to measure, by names of one's own.
        dtype: of autocast while encoding, e.g. ``torch.bfloat16``; None runs in the model's own.
        progress: show bars on rank 0.
        opened: the sets that this process has opened so far.

    Returns:
        figures, chance and verdict by the names of the evaluators.

    Raises:
        UserError: a set is not there or not what its task needs, before anything is encoded; a
            sample can't be read.
    """
    encoder = Encoder(model, model.logit_scale.device, dtype, progress=progress)
    opened = OpenSets() if opened is None else opened
    # all of them first: one that is not there should not be found out after the others
    tasks = [Evaluator(name, config, opened) for name, config in evaluators.items()]
    return {task.name: task(encoder) for task in tasks}


def _captions(value: Any) -> list[str]:
    """Return an image's captions without empty ones; no captions where the value is no text."""
    captions = value if isinstance(value, list) else [value]
    return [caption for caption in captions if isinstance(caption, str) and caption.strip()]


def _as_user_error(error: Exception, prefix: str = "") -> UserError:
    return error if isinstance(error, UserError) else UserError(f"{prefix}{one_line(error)}")


@cache
def _patient_group() -> Any:
    """Return a group to wait for rank 0: a large probe takes longer than collectives may."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=2))
