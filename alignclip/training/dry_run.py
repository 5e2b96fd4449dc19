"""``--dry-run``: check a run and say what it will take, without training it.

``--dry-run=3`` also trains three steps that are measured, and says how many hours the run will
take. Nothing is written to the save folder, and the loggers hear of nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from composer.core import Precision
from composer.devices import Device
from torch.utils.data import DataLoader

from alignclip.config.reading import to_yaml
from alignclip.config.schema import RunConfig
from alignclip.data.dataset import ImageTextDataset
from alignclip.data.streams import local_folder
from alignclip.device import choose_device
from alignclip.model.composer_model import AlignCLIPModel
from alignclip.model.optimization import build_optimizer
from alignclip.ranks import (
    local_world_size,
    run_on_rank_zero,
    run_once_per_machine,
    wait_for_all_ranks,
    world_size,
)
from alignclip.storage.temporary import temporary_folder
from alignclip.training.build import (
    batches_an_epoch,
    build_data,
    build_model,
    build_scheduler,
    total_batches,
)
from alignclip.training.device_memory import pairs_of_a_rank
from alignclip.training.display import print_once
from alignclip.training.dry_run_page import (
    Disk,
    ExpectedData,
    ExpectedRun,
    Parameters,
    expected_text,
    measured_text,
)
from alignclip.training.dry_run_steps import measure_steps
from alignclip.training.footprint import Whole, empty_batch, footprint
from alignclip.training.network import step_bytes
from alignclip.training.preflight import check_inputs, join
from alignclip.training.resume import StartingPoint
from alignclip.training.save_folder import SaveFolder
from alignclip.training.speed import peak_flops
from alignclip.training.starting_weights import load_starting_weights


def dry_run(config: RunConfig, steps: int) -> int:
    """Check a run, print its configuration and what it will take; measure a few steps if asked to.

    Args:
        config: of the run.
        steps: to measure; 0 measures nothing.

    Returns:
        0.

    Raises:
        UserError: whatever a person would have to change before the run.
    """
    config, device = join(config)
    folder = SaveFolder(config) if config.save_folder else None
    run_on_rank_zero(lambda: check_inputs(config, folder))
    checkpoint = run_on_rank_zero(lambda: newest_checkpoint(config, folder))
    with caches_removed(config) as cached:
        expected = expect(config, cached, device, folder, checkpoint)
        print_once(f"{to_yaml(config)}\n{expected_text(config, expected)}")
        if steps:
            left = max(0, expected.data.batches - expected.trained)
            print_once(measured_text(config, measure_steps(cached, device, steps), left))
    return 0


def newest_checkpoint(config: RunConfig, folder: SaveFolder | None) -> str | None:
    """Return the name of the checkpoint that the run would go on from; None where it would start.

    Whether the checkpoint is whole isn't looked at.
    """
    if folder is None or not config.autoresume:
        return None
    names, target = folder.checkpoints(), folder.latest_target()
    # a key that may not list a bucket sees no names
    if target and (target in names or (folder.remote and not names)):
        return target
    return max(names, key=lambda name: names[name], default=None)


@contextlib.contextmanager
def caches_removed(config: RunConfig) -> Iterator[RunConfig]:
    """Put shards that are downloaded where no cache is so far into a folder that is removed.

    Call this on every rank.
    """
    with contextlib.ExitStack() as stack:
        folder = run_once_per_machine(lambda: stack.enter_context(temporary_folder()))
        streams = dict(config.data.streams)
        for stream, one in config.data.streams.items():
            if one.remote and not Path(local_folder(stream, one)).exists():
                streams[stream] = dataclasses.replace(one, local=str(folder / stream))
        yield dataclasses.replace(config, data=dataclasses.replace(config.data, streams=streams))
        wait_for_all_ranks()  # the other ranks of a machine read there


def expect(
    config: RunConfig,
    cached: RunConfig,
    device: Device,
    folder: SaveFolder | None,
    checkpoint: str | None,
) -> ExpectedRun:
    """Build data and model as the run would, and describe them.

    Args:
        config: of the run.
        cached: the same, with other folders for what is downloaded.
        device: of this rank.
        folder: of the run's checkpoints.
        checkpoint: that the run would go on from.
    """
    loader = build_data(cached, device)
    dataset = loader.dataset
    assert isinstance(dataset, ImageTextDataset)
    model = build_model(config, device)
    load_starting_weights(
        config, model.encoders, None, StartingPoint(goes_on=checkpoint is not None)
    )
    model.count_flops()
    optimizer = build_optimizer(config.optimizer, model.encoders, device.name == "gpu")
    build_scheduler(config, optimizer, batches_an_epoch(config, loader))
    dimension, chosen = dataset.dimension, choose_device(config.device)
    parameters, whole = count_parameters(model), Whole.of(config, model)
    batch = empty_batch(config, int(dataset.batch_size or 0), torch.device("cpu"), dimension)
    return ExpectedRun(
        data=describe_data(config, loader, dataset),
        parameters=parameters,
        footprint=footprint(config, model, whole, chosen, dimension),
        flops=model.flops_per_batch(batch),
        peak=peak_flops(Precision(config.precision)),
        network=step_bytes(
            parameters.trained,
            ranks=world_size(),
            pairs=pairs_of_a_rank(config),
            width=config.model.embed_dim,
            semantic=dimension,
            fsdp=config.parallelism_config.fsdp2 is not None,
        ),
        device=device.name if chosen.type != "cuda" else torch.cuda.get_device_name(chosen),
        memory=_memory(chosen),
        save_folder=folder.uri if folder is not None else None,
        save_room=_room_for(folder.uri) if folder is not None else None,
        checkpoint=checkpoint,
        trained=(folder.batch_of(checkpoint) or 0) if folder and checkpoint else 0,
        checkpoint_size=whole.checkpoint(config.save_weights_only),
    )


def describe_data(
    config: RunConfig, loader: DataLoader[Any], dataset: ImageTextDataset
) -> ExpectedData:
    """Describe the sets of a run."""
    streams = config.data.streams
    sizes = dict(zip(streams, dataset.stream_sizes(), strict=True))
    disks: dict[int, Disk] = {}
    for name, stream in streams.items():
        if stream.remote:
            cache = Path(local_folder(name, stream))
            there = _nearest_folder(cache)
            disk = disks.setdefault(there.stat().st_dev, Disk(shutil.disk_usage(there).free))
            disk.needed += max(0, sizes[name].stored - _bytes_in(cache))
    return ExpectedData(
        sets=sizes,
        an_epoch=batches_an_epoch(config, loader),
        batches=total_batches(config, loader),
        cache=min(disks.values(), key=lambda disk: disk.free - disk.needed, default=None),
    )


def count_parameters(model: AlignCLIPModel) -> Parameters:
    """Count the numbers of both encoders, of what they share, and of what isn't trained."""
    encoders = model.encoders
    sizes = {id(one): one.numel() for one in encoders.parameters()}
    image = {id(one) for one in encoders.visual.parameters()}
    text = {
        id(one)
        for name, one in encoders.named_parameters(remove_duplicate=False)
        if not name.startswith("visual.")
    }
    return Parameters(
        image=sum(sizes[one] for one in image - text),
        text=sum(sizes[one] for one in text - image),
        shared=sum(sizes[one] for one in image & text),
        locked=sum(one.numel() for one in encoders.parameters() if not one.requires_grad),
    )


def _memory(device: torch.device) -> int | None:
    """Return the bytes of a device's memory; on a CPU those of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or not hasattr(os, "sysconf"):
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // local_world_size()


def _room_for(place: str) -> int | None:
    """Return the bytes that are free where a folder is or will be; None of an object store."""
    if "://" in place:
        return None
    return shutil.disk_usage(_nearest_folder(Path(place))).free


def _nearest_folder(path: Path) -> Path:
    """Return a path, or the nearest folder above it that is there."""
    whole = path.absolute()
    return next(one for one in (whole, *whole.parents) if one.exists())


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.mds*") if path.is_file())
