"""What must be right on this machine and in its storage before anything is built: told in seconds, in one line."""

from __future__ import annotations

from pathlib import PurePath

from composer.core import Precision
from composer.devices import Device
from composer.utils import dist, get_device
from torch.compiler import list_backends

from alignclip.config.schema import DEVICES, RunConfig
from alignclip.data.streams import check_streams
from alignclip.errors import UserError, nearest, one_line
from alignclip.storage import StorageError, Store, is_absent, is_denied, open_file
from alignclip.training.save_folder import SaveFolder
from alignclip.training.trackers import check_login
from alignclip.weights import early
from alignclip.weights.locate import BY_NAME, LATEST, WEIGHT_FILES


def choose_device(name: str | None) -> Device:
    """The device by its name in the YAML, or the best one there is.

    Raises:
        UserError: there is no such device here.
    """
    if name not in (None, *DEVICES):
        raise UserError(f"device={name}: {nearest(str(name), DEVICES)}")
    try:
        return get_device(name)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"device={name}: there is none on this machine ({one_line(error)}); device=cpu?"
        ) from None


def check_parallelism(config: RunConfig, device: Device) -> None:
    """Settings against the number of processes and the device.

    Raises:
        UserError: they don't fit.
    """
    world, batch = dist.get_world_size(), config.global_train_batch_size
    if batch % world:
        raise UserError(
            f"global_train_batch_size={batch} can't be divided among {world} processes; "
            f"{batch // world * world or world} or {(batch // world + 1) * world} can"
        )
    if (compiled := config.compile_config) is not None and compiled.backend not in (
        known := list_backends(())
    ):
        raise UserError(
            f"compile_config.backend={compiled.backend}: {nearest(compiled.backend, known)}"
        )
    if device.name == "cpu" and config.precision not in (
        Precision.FP32.value,
        Precision.AMP_BF16.value,
    ):
        raise UserError(f"precision={config.precision} needs a GPU; on a CPU use fp32 or amp_bf16")


def check_inputs(config: RunConfig, folder: SaveFolder | None) -> None:
    """Everything outside this process that the run needs: the sets and the save folder."""
    check_login(config)
    check_streams(config.data, semantic=config.loss.needs_semantic)
    for name, evaluator in config.evaluators.items():
        early.check_evaluator(name, evaluator, contents=True)
    if config.load_path:
        check_load_path(config.load_path)
    if folder is not None:
        folder.open()
        folder.check_config()
        folder.remove_partial()


def check_load_path(place: str) -> None:
    """There is such a checkpoint.

    Raises:
        UserError: there is none, it can't be reached, or is something else.
    """
    if "://" not in place:
        early.check_local_checkpoint(place)
        return
    store, name = open_file(place.rstrip("/").removesuffix(".symlink"))
    names = (
        [name]
        if PurePath(name).suffix in WEIGHT_FILES
        else [f"{name}/{LATEST}", f"{name}{BY_NAME}"]
    )
    why = [_why_not_there(store, one) for one in names]
    if all(why):
        raise UserError(f"load_path={place}: {why[0]}")


def _why_not_there(store: Store, name: str) -> str | None:
    """Why an object or a bucket's link to one can't be read; None where it can."""
    try:
        store.size(name)
    except StorageError as error:
        if (
            not (is_absent(error) or is_denied(error))
            or store.read_optional(f"{name}.symlink") is None
        ):
            return error.why
    return None
