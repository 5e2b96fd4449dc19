"""The words of a dry run: what a run will read, hold, compute and write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from alignclip.config.schema import RunConfig
from alignclip.data.dataset import StreamSize
from alignclip.data.streams import place_of
from alignclip.ranks import world_size
from alignclip.training.device_memory import advice, in_chunks, pairs_of_a_rank
from alignclip.training.dry_run_steps import MeasuredSteps
from alignclip.training.footprint import Footprint
from alignclip.training.network import StepBytes
from alignclip.training.pace import duration

TableRow = tuple[str, str]
COUNTED = ("EMA", "SAM")  # algorithms whose memory is a part
WITHOUT_MEMORY = ("GradientClipping", "LayerFreezing")
TIGHT = 0.95  # share of a device's memory; the allocator needs the rest


@dataclass
class Disk:
    """A disk of this machine: free bytes, and bytes of the shards that are not there so far."""

    free: int
    needed: int = 0


@dataclass(frozen=True)
class ExpectedData:
    """The data of a run.

    Attributes:
        sets: the size of each stream.
        an_epoch: batches of an epoch.
        batches: of the whole run.
        cache: the disk with the least room for remote shards; None where all sets are local.
    """

    sets: dict[str, StreamSize]
    an_epoch: int
    batches: int
    cache: Disk | None


@dataclass(frozen=True)
class Parameters:
    """Numbers of the image encoder alone, the text encoder alone, and both; and the locked ones."""

    image: int
    text: int
    shared: int
    locked: int

    @property
    def all(self) -> int:
        """Add the parts up; locked ones are among them."""
        return self.image + self.text + self.shared

    @property
    def trained(self) -> int:
        """The numbers that aren't locked."""
        return self.all - self.locked


@dataclass(frozen=True)
class ExpectedRun:
    """A run that was not begun.

    Attributes:
        data: what it will read.
        parameters: of its model.
        footprint: memory of a rank.
        flops: operations of a rank's batch, with texts of full length; 0 where they aren't known.
        peak: operations a second of the device; 0 where they aren't known.
        network: bytes that a rank gets in a step.
        device: of rank 0, by name.
        memory: bytes of the device, or a rank's share of a machine's; None where it isn't known.
        save_folder: path or URL; None where nothing is saved.
        save_room: bytes that are free there; None of an object store.
        checkpoint: that the run would go on from, by its name; None where it would begin.
        trained: batches, by the name of the checkpoint.
        checkpoint_size: bytes of one.
    """

    data: ExpectedData
    parameters: Parameters
    footprint: Footprint
    flops: float
    peak: float
    network: StepBytes
    device: str
    memory: int | None
    save_folder: str | None
    save_room: int | None
    checkpoint: str | None
    trained: int
    checkpoint_size: int


def expected_text(config: RunConfig, run: ExpectedRun) -> str:
    """Return the tables of a run that was not begun, and what to beware of."""
    sections = {
        "data": _data_rows(config, run.data),
        "model": _model_rows(config, run),
        "memory of a rank, estimated": _memory_rows(config, run),
        "save folder": _saving_rows(config, run),
    }
    title = f"dry run of '{config.run_name}': nothing is trained, nothing is saved"
    tables = [f"{name}\n{_aligned(rows)}" for name, rows in sections.items()]
    return "\n\n".join([title, *tables, *(f"beware: {one}" for one in _warnings(config, run))])


def measured_text(config: RunConfig, steps: MeasuredSteps, left: int) -> str:
    """Return the table of measured steps, and the hours that follow.

    Args:
        config: of the run.
        steps: measured.
        left: batches that are not trained so far.
    """
    seconds, size = max(steps.step, steps.loader), config.global_train_batch_size
    slower = "the workers" if steps.loader > steps.step else "the step"
    rows = [
        ("a step", f"{steps.step:.3g} s, {size / steps.step:,.0f} samples/s"),
        ("the workers alone", _rate(steps.loader, size)),
        ("most memory", f"{in_memory(steps.memory)} of this rank"),
        (
            "the run",
            f"{duration(left * seconds)} for the {_batches_in_words(left)} left, by {slower}; "
            "evaluation and checkpoints come on top",
        ),
    ]
    return f"\nmeasured, median of {_batches_in_words(steps.count)}\n{_aligned(rows)}"


def in_memory(number: float) -> str:
    """Return bytes of memory in GiB or MiB."""
    return f"{number / 2**30:,.2f} GiB" if number >= 2**30 else f"{number / 2**20:,.1f} MiB"


def with_prefix(number: float, unit: str = "") -> str:
    """Return a number of parameters or operations with the prefix that suits it: 31.2 M."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size and (unit or prefix == "M"):
            return f"{number / size:,.1f} {prefix}{unit}"
    return f"{number:,.0f} {unit}".rstrip()


def on_disk(number: float) -> str:
    """Return bytes on a disk in the unit that suits them."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number / 1e3:,.1f} kB"


def _data_rows(config: RunConfig, data: ExpectedData) -> list[TableRow]:
    rows = [
        (
            name,
            f"{size.samples:,} samples in {size.shards:,} shards, {on_disk(size.stored)}, "
            f"{place_of(config.data.streams[name], '').rstrip('/')}",
        )
        for name, size in data.sets.items()
    ]
    ranks, own = world_size(), pairs_of_a_rank(config)
    spread = f", {own:,} on each of {ranks} ranks" if ranks > 1 else ""
    rows += [
        (
            "an epoch",
            f"{_batches_in_words(data.an_epoch)} of {config.global_train_batch_size:,}{spread}",
        ),
        (
            "the whole run",
            f"{_batches_in_words(data.batches)} ({config.max_duration}), "
            f"{data.batches * config.global_train_batch_size:,} samples",
        ),
    ]
    if data.cache is not None:
        limit = f", at most {config.data.cache_limit} kept" if config.data.cache_limit else ""
        free, needed = on_disk(data.cache.free), on_disk(data.cache.needed)
        rows.append(("cache", f"{free} free on this machine, {needed} not there so far{limit}"))
    rows += [
        (f"evaluator {name}", f"{one.task}, every {one.interval}: its set is there")
        for name, one in config.evaluators.items()
    ]
    return rows


def _model_rows(config: RunConfig, run: ExpectedRun) -> list[TableRow]:
    sizes = run.parameters
    parts = {
        "of both encoders": sizes.shared,
        "of images alone": sizes.image,
        "of texts alone": sizes.text,
        "of these locked": sizes.locked,
    }
    rows = [("parameters", with_prefix(sizes.all))]
    rows += [(f"  {name}", with_prefix(number)) for name, number in parts.items() if number]
    length = config.model.text_cfg.context_length
    if run.flops:
        least = f"; {run.flops / run.peak:.3g} s at the device's peak" if run.peak else ""
        rows.append(
            (
                "a step of a rank",
                f"{with_prefix(run.flops, 'FLOP')}, where a text has {length} tokens{least}",
            )
        )
    sent = run.network
    if sent.all:
        rows.append(
            (
                "network",
                f"{on_disk(sent.all)} to each rank and step: parameters and gradients "
                f"{on_disk(sent.parameters)}, features {on_disk(sent.features)}, captions "
                f"{on_disk(sent.captions)}",
            )
        )
    return rows


def _memory_rows(config: RunConfig, run: ExpectedRun) -> list[TableRow]:
    needed, pairs = run.footprint, pairs_of_a_rank(config)
    at_once = f"{pairs:,} pairs"
    if in_chunks(config):
        at_once = f"{config.model.encode_chunk_size:,} of {pairs:,} pairs at a time"
    counted = " and ".join(name for name in COUNTED if name in config.algorithms)
    parts = {
        "weights": needed.weights,
        "gradients": needed.gradients,
        f"optimizer {config.optimizer.opt}": needed.optimizer,
        counted: needed.algorithms,
        "batch": needed.batch,
        "features and loss": needed.loss,
    }
    rows = [(name, in_memory(number)) for name, number in parts.items() if number]
    others = [name for name in config.algorithms if name not in (*COUNTED, *WITHOUT_MEMORY)]
    rows += [(name, "not counted") for name in others]
    kept = needed.activations
    settings = "not known before: parallelism_config.fsdp2 decides what is kept"
    rows.append((f"activations, {at_once}", settings if kept is None else in_memory(kept)))
    there = f" of {in_memory(run.memory)}" if run.memory else ""
    rows.append(("all", f"{in_memory(needed.total)}{there} ({run.device}, {config.precision})"))
    return rows


def _saving_rows(config: RunConfig, run: ExpectedRun) -> list[TableRow]:
    if run.save_folder is None:
        return [("none", "save_folder is not set: nothing is saved")]
    start = "the run would begin: no checkpoint is there"
    if config.load_path:
        start = f"the run would start from {config.load_path}, whose content isn't looked at here"
    if run.checkpoint is not None:
        of_all = f"{run.trained:,} of {_batches_in_words(run.data.batches)} are trained"
        start = f"the run would go on from {run.checkpoint}: {of_all}"
    keep = config.save_num_checkpoints_to_keep
    kept = {-1: "all are kept", 1: "the last one is kept"}.get(keep, f"the last {keep} are kept")
    free = "" if run.save_room is None else f", {on_disk(run.save_room)} free"
    return [
        (run.save_folder, f"can be written{free}"),
        ("a checkpoint", f"{on_disk(run.checkpoint_size)}, every {config.save_interval}; {kept}"),
        ("start", start),
    ]


def _warnings(config: RunConfig, run: ExpectedRun) -> list[str]:
    """Say what will end the run, though every setting is allowed."""
    said = []
    if run.memory and run.footprint.total > TIGHT * run.memory:
        said.append(f"the memory of a rank is too small: {advice(config)}")
    data, room = run.data, run.save_room
    if room is not None and room < 2 * run.checkpoint_size:
        said.append(
            f"{run.save_folder} has room for less than two checkpoints: {on_disk(room)} are free"
        )
    disk = data.cache
    if disk is not None and disk.needed > disk.free and config.data.cache_limit is None:
        said.append(
            f"{on_disk(disk.needed)} of shards are not in the cache so far, and "
            f"{on_disk(disk.free)} are free; a machine alone keeps all shards: set data.cache_limit"
        )
    return said


def _batches_in_words(number: int) -> str:
    return "1 batch" if number == 1 else f"{number:,} batches"


def _rate(seconds: float, size: int) -> str:
    if not seconds:
        return "not known: no workers, or too short an epoch"
    return f"{seconds:.3g} s a batch, {size / seconds:,.0f} samples/s"


def _aligned(rows: Sequence[TableRow]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:{width}}  {text}" for name, text in rows)
