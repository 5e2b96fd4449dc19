"""Make a new folder, local or in object storage, that appears as a whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from alignclip.errors import UserError, few
from alignclip.storage.clouds import open_store
from alignclip.storage.patience import patiently
from alignclip.storage.store import Store
from alignclip.storage.temporary import temporary_folder
from alignclip.storage.words import StorageError


@contextmanager
def new_folder(place: str, last: str) -> Iterator[Path]:
    """Give an empty folder that becomes ``place`` at the end of the block; an error leaves nothing.

    Args:
        place: a path or URL where nothing is.
        last: the file without which nobody takes ``place`` for complete; it is uploaded last.

    Raises:
        UserError: ``place`` can't be written to.
        OSError: the folder can't get its name.
    """
    store = open_store(place)
    target = Path(store.place)
    below = None if store.is_remote else target.resolve().parent
    with temporary_folder(below, f".{target.name}-") as around:
        folder = around / "new"
        folder.mkdir()
        yield folder
        if store.is_remote:
            _upload(folder, store, last)
            return
        for file in folder.iterdir():  # safetensors writes for its owner alone
            file.chmod(folder.stat().st_mode & 0o666)
        folder.rename(target)


def _upload(folder: Path, store: Store, last: str) -> None:
    """Upload every file; after an error remove what was uploaded.

    Raises:
        UserError: the store can't be written to.
    """
    names = sorted((path.name for path in folder.iterdir()), key=lambda name: (name == last, name))
    for i, name in enumerate(names):
        try:
            patiently(partial(store.put, folder / name, name), store.place)
        except BaseException as error:  # Ctrl-C among them
            left = _remove(store, names[: i + 1])
            if not isinstance(error, StorageError):
                raise
            more = f"; what is there of it could not be removed: {few(left)}" if left else ""
            raise UserError(f"cannot write to {store.place}: {error.why}{more}") from error


def _remove(store: Store, names: Sequence[str]) -> list[str]:
    """Delete objects where the store's client can; return the names of those that may stay."""
    left = []
    for name in names:
        try:
            store.delete(name)
        except StorageError:
            left.append(name)
    return left
