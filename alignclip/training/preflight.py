"""Checks of this machine and its storage before anything is built, told in one line each."""

from __future__ import annotations

from pathlib import PurePath

from composer.core import Precision
from composer.devices import Device
from composer.utils import dist, get_device
from torch.compiler import list_backends

from alignclip.config.reading import to_yaml
from alignclip.config.schema import RunConfig
from alignclip.data.streams import check_streams
from alignclip.errors import UserError, few, nearest, one_line
from alignclip.ranks import errors_on_all_ranks, rank, run_on_rank_zero
from alignclip.runtime.distributed import join_ranks
from alignclip.storage import StorageError, open_file
from alignclip.training import plugins
from alignclip.training.run_identity import changes, identity_changes, nested
from alignclip.training.run_record import check_config, check_sets
from alignclip.training.save_folder import SaveFolder
from alignclip.training.trackers import check_login
from alignclip.weights import early
from alignclip.weights.locate import BY_NAME, LATEST, WEIGHT_FILES

# what another run may have, but not another rank: beside what makes the run
OF_ALL_RANKS = ("run_name", "max_duration", "save_folder", "save_interval", "precision")


def training_device(name: str | None) -> Device:
    """Return the device by its name in the YAML, or the best one there is.

    Raises:
        UserError: there is no such device here.
    """
    try:
        return get_device(name)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"device={name}: there is none on this machine ({one_line(error)}); device=cpu?"
        ) from None


def join(config: RunConfig) -> tuple[RunConfig, Device]:
    """Check a configuration against its classes and this machine, and meet the other ranks.

    Returns:
        the configuration with the classes' arguments converted, and the device of this rank.

    Raises:
        UserError: what doesn't fit; or the other ranks haven't come.
    """
    config = plugins.check(config)
    device = training_device(config.device)
    join_ranks(device.dist_backend, config.dist_timeout)
    check_same_settings(config)
    check_parallelism(config, device)
    return config, device


def check_same_settings(config: RunConfig) -> None:
    """Compare the settings that make the run with those of rank 0; on every rank.

    Raises:
        UserError: they differ: a machine has an older YAML, or another command.
    """
    own = nested(to_yaml(config))
    first = run_on_rank_zero(lambda: own)
    with errors_on_all_ranks():
        theirs, ours = ({key: one.get(key) for key in OF_ALL_RANKS} for one in (first, own))
        if changed := identity_changes(first, own) + changes(theirs, ours):
            raise UserError(
                f"rank {rank()} has other settings than rank 0: {few(changed)}; give all machines "
                "the same YAML and command"
            )


def check_parallelism(config: RunConfig, device: Device) -> None:
    """Compare settings with the number of processes and the device.

    Raises:
        UserError: they don't fit.
    """
    world, batch = dist.get_world_size(), config.global_train_batch_size
    if batch % world:
        raise UserError(
            f"global_train_batch_size={batch} can't be divided among {world} processes; "
            f"{batch // world * world or world} or {(batch // world + 1) * world} can"
        )
    check_compiling(config)
    if device.name == "cpu" and config.precision not in (
        Precision.FP32.value,
        Precision.AMP_BF16.value,
    ):
        raise UserError(f"precision={config.precision} needs a GPU; on a CPU use fp32 or amp_bf16")


def check_compiling(config: RunConfig) -> None:
    """Look at the arguments of torch.compile.

    Raises:
        UserError: an unknown backend, or settings that exclude one another.
    """
    compiled = config.compile_config
    if compiled is None:
        return
    if compiled.backend not in (known := list_backends(())):
        raise UserError(
            f"compile_config.backend={compiled.backend}: {nearest(compiled.backend, known)}"
        )
    if compiled.mode is not None and compiled.options is not None:
        raise UserError(
            f"compile_config.mode={compiled.mode} and compile_config.options exclude each other: "
            "take one of them out"
        )
    if compiled.regional and compiled.dynamic is False:
        raise UserError(
            "compile_config.dynamic=false with compile_config.regional=true would compile every "
            "length of texts anew; leave dynamic out"
        )


def check_inputs(config: RunConfig, folder: SaveFolder | None) -> dict[str, str]:
    """Look at what the run needs outside of this process: the sets and the save folder.

    Returns:
        the fingerprint of each stream's set.
    """
    check_login(config)
    sets = check_streams(config.data, semantic=config.loss.needs_semantic)
    for name, evaluator in config.evaluators.items():
        early.check_evaluator(name, evaluator, contents=True)
    if config.load_path:
        check_start(config.load_path)
    if folder is not None:
        folder.open()
        check_config(folder)
        check_sets(folder, sets)
    return sets


def check_start(place: str) -> None:
    """Look for the checkpoint that a run shall start from.

    Raises:
        UserError: there is none, it can't be reached, or is something else.
    """
    if "://" not in place:
        early.check_local_checkpoint(place)
        return
    store, name = open_file(place.rstrip("/").removesuffix(".symlink"))
    names = [name]
    if PurePath(name).suffix not in WEIGHT_FILES:
        names = [f"{name}/{LATEST}", f"{name}{BY_NAME}"]
    try:
        if early.any_is_there(store, [*names, *(f"{one}.symlink" for one in names)]):
            return
        why = "not found"
    except StorageError as error:
        why = error.why
    raise UserError(f"load_path={place}: {why}")
