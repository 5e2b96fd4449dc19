"""Fill an output folder, local or in object storage, one complete sub-folder at a time.

The protocol, by which a run that was killed goes on and nobody reads half a set:

- A sub-folder has shards, ``index.json`` that names them, and ``counts.json``. It is complete
  where it has both files: ``index.json`` is written after the shards, and ``counts.json`` last.
- A sub-folder that is replaced loses its ``counts.json`` first. So it is incomplete after a kill.
  The root's index must not name its shards any more by then.
- A local sub-folder is made in a hidden folder beside its place, on the same file system. A rename
  is all that is left to do then. What killed runs have left there goes with the next run.
- One command at a time writes to a local folder: it holds a lock.
- A run marks the folder as its own. A task that works for the run elsewhere looks at the mark
  before its files appear: a cluster goes on with the tasks of a run that was killed, beside the
  run that the user has started since.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import uuid
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

from alignclip.checked_json import parse_json
from alignclip.errors import UserError
from alignclip.storage.clouds import open_store
from alignclip.storage.patience import patiently
from alignclip.storage.store import Store
from alignclip.storage.temporary import temporary_folder
from alignclip.storage.trouble import is_absent, is_passing
from alignclip.storage.whole import to_disk
from alignclip.storage.words import StorageError, cannot

INDEX = "index.json"
COUNTS = "counts.json"  # in each sub-folder, beside its index
PARTIAL = ".partial-"  # a local sub-folder in the making
VAL = "val"  # the held-out split: a sub-folder of its own, with an index
LOCK = ".lock"  # of a local folder that is being written
MARK = ".run"  # has the mark of the run that writes to the folder


def list_remote(url: str) -> set[str]:
    """List the names of all objects under a URL, relative to it.

    Raises:
        UserError: the URL cannot be reached, or Streaming cannot list that kind of storage.
    """
    with cannot(f"reach {url}"):
        store = open_store(url)
        if not store.can_list:
            raise UserError(f"Streaming cannot list {url}; name the files")
        return store.names()


def shown(listing: Iterable[str]) -> set[str]:
    """Choose the files that are not hidden, nor lie in a hidden folder."""
    return {name for name in listing if not any(part.startswith(".") for part in name.split("/"))}


class OutputFolder:
    """The folder ``out``: a local path, or a URL that Streaming can write to.

    Args:
        out: the path or URL.
        mark: of the run that this process works for elsewhere; see :meth:`marked`.
    """

    def __init__(self, out: str, mark: str | None = None) -> None:
        self.is_remote = "://" in out
        self.files = open_store(out if self.is_remote else str(Path(out).expanduser().resolve()))
        self.out = self.files.place
        self._mark = mark

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other conversions out of a local ``out``: each removes what others have begun.

        Raises:
            UserError: another conversion is at work, or ``out`` can't be written.
        """
        if self.is_remote:
            yield
            return
        lock = Path(self.out, LOCK)
        with cannot(f"write to {self.out}"):
            lock.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            while True:
                with cannot(f"write to {self.out}"):
                    file = stack.enter_context(lock.open("ab"))
                if not self._is_ours(file) or self._is_still_there(file, lock):
                    break  # a file system without locks, or the file that others will look at
            try:
                yield
            finally:
                with suppress(OSError):  # the set is complete; the next conversion takes the file
                    lock.unlink()

    def _is_ours(self, file: IO[bytes]) -> bool:
        """Lock an open file; False where the file system has no locks, as Lustre may be mounted.

        Raises:
            UserError: another conversion has the lock.
        """
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion into {self.out} is running") from None
        except OSError:
            return False
        return True

    @staticmethod
    def _is_still_there(file: IO[bytes], lock: Path) -> bool:
        """Say whether a path is still this file: a conversion that ends removes its lock."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), lock.stat())
        except FileNotFoundError:
            return False

    def clear(self, names: Iterable[str], *files: str) -> None:
        """Remove these sub-folders of a local ``out`` and its held-out split, and these files."""
        self.remove_partial()
        for name in names:
            for split in ("", VAL):
                shutil.rmtree(Path(self.out, split, name), ignore_errors=True)
        for file in files:
            Path(self.out, file).unlink(missing_ok=True)
        with suppress(OSError):
            Path(self.out, VAL).rmdir()

    def remove_partial(self) -> None:
        """Remove from a local ``out`` what killed runs have left in the making."""
        if not self.is_remote:
            for path in Path(self.out).glob(f"{PARTIAL}*"):
                if path.is_file():
                    path.unlink(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def marked(self) -> Iterator[str]:
        """Mark ``out`` as this run's while the block runs, and give the mark.

        Call this once nothing can refuse the run any more: a run at work would lose its mark.

        Raises:
            UserError: ``out`` can't be written.
        """
        mark = uuid.uuid4().hex
        with cannot(f"write to {self.out}"):
            patiently(lambda: self.files.write_text(MARK, mark), self.out)
        try:
            yield mark
        finally:
            # a key may have no right to delete: the file is tiny
            with suppress(UserError):
                if self.files.read_text_optional(MARK) == mark:  # and not the next run's
                    self.files.delete(MARK)

    def check_mark(self) -> None:
        """Make sure that ``out`` is still the run's that this process works for.

        Raises:
            UserError: the run is over, or another one has begun; this machine's folder is another
                one; or ``out`` cannot be reached.
        """
        if self._mark is None:
            return
        found = ""
        with cannot(f"reach {self.out}"):
            try:
                found = patiently(lambda: self.files.read_text(MARK), self.out)
            except StorageError as error:
                if not is_absent(error):
                    raise
        if found == self._mark:
            return
        if self.is_remote:
            raise UserError(
                f"the conversion into {self.out} that asked for this is over: nothing is written"
            )
        raise UserError(
            f"the worker on {socket.gethostname()} does not see {self.out}, where the command "
            "writes, or the command is over: a local --out has to be a folder that all workers "
            "share; or write to a bucket"
        )

    def listing(self) -> set[str]:
        """List the files in ``out`` and two folders below, relative to ``out``.

        Nothing is found in Azure, which can't be listed. There all is written again.

        Raises:
            UserError: ``out`` cannot be reached.
        """
        if self.is_remote:
            with cannot(f"reach {self.out}"):
                return self.files.names()
        root = Path(self.out)
        paths = chain.from_iterable(root.glob(depth) for depth in ("*", "*/*", "*/*/*"))
        names = {path.relative_to(root).as_posix() for path in paths if path.is_file()}
        return {name for name in names if not name.startswith(PARTIAL)}

    def check_writable(self) -> None:
        """Write a real file and remove it again: better known now than after hours.

        Raises:
            UserError: ``out`` cannot be written to.
        """
        with cannot(f"write to {self.out}"):
            self.files.check_writable()

    @contextmanager
    def staged(self, name: str = "", replace: bool = True) -> Iterator[Path]:
        """Give an empty folder whose files appear in ``out/name`` when the block ends.

        They don't appear at all where the block raises.

        Args:
            name: the sub-folder; the root itself where there is no name.
            replace: whether a sub-folder that is there loses its files first.

        Raises:
            UserError: ``out`` cannot be reached or written; see also :meth:`check_mark`.
        """
        below, prefix = None, None
        if not self.is_remote:
            below, prefix = Path(self.out), f"{PARTIAL}{name.replace('/', '-')}-"
        with temporary_folder(below, prefix) as folder:
            yield folder
            self.check_mark()
            publish = self._upload if self.is_remote else self._move
            publish(folder, open_store(f"{self.out}/{name}"), replace=bool(name) and replace)

    def _upload(self, folder: Path, target: Store, replace: bool) -> None:
        with cannot(f"write to {target.place}"):
            if replace:
                patiently(lambda: _remove_ours(target), self.out)
            for file in _in_order(folder):
                patiently(partial(target.put, folder / file, file), self.out)

    def _move(self, folder: Path, target: Store, replace: bool) -> None:
        for path in folder.iterdir():
            to_disk(path)  # a rename may survive a power cut that the file does not
        _check_whole(folder)
        place = Path(target.place)
        place.mkdir(parents=True, exist_ok=True)
        if replace:
            for file in _ours(path.name for path in place.iterdir()):
                # another task may be about to replace the file, too
                (place / file).unlink(missing_ok=True)
        for file in _in_order(folder):
            if file == COUNTS:
                to_disk(place)
            (folder / file).replace(place / file)
        to_disk(place)

    def read_json(self, names: Sequence[str]) -> list[Any]:
        """Read these JSON files, in this order; None stands for what is no JSON.

        Raises:
            UserError: one of them cannot be fetched.
        """

        def read(name: str) -> Any:
            with cannot(f"read {self.files.at(name)}"):
                content = patiently(lambda: self.files.read_bytes(name), self.out)
            return _parsed_json(content)

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(read, names))


def _parsed_json(content: bytes) -> Any:
    try:
        return parse_json(content)
    except ValueError:
        return None


def _check_whole(folder: Path) -> None:
    """See that every file which the folder's own index names is there.

    Raises:
        UserError: names a file that another process has removed.
    """
    path = folder / INDEX
    index = _parsed_json(path.read_bytes()) if path.exists() else None
    for shard in (index or {}).get("shards", []):
        name = (shard.get("zip_data") or shard["raw_data"])["basename"]
        if "/" not in name and not (folder / name).exists():
            raise UserError(
                f"{folder / name} was removed by another process; is there a second conversion?"
            )


def _remove_ours(store: Store) -> None:
    """Delete a sub-folder's objects where Streaming's client can: S3 and GCS.

    Elsewhere, or where the key may not delete, they stay and are overwritten or named by no index.
    """
    names = _ours(store.names())
    try:
        for name in names:
            store.delete(name)
    except StorageError as error:
        # counts.json would stay, and after a kill say that a mixture is complete
        if is_passing(error):
            raise


def _ours(files: Iterable[str]) -> list[str]:
    """Choose the files that a converter writes, ``counts.json`` first."""
    ours = [name for name in files if name in (COUNTS, INDEX) or fnmatch(name, "shard.*.mds*")]
    return sorted(ours, key=lambda name: name != COUNTS)


def _in_order(folder: Path) -> list[str]:
    names = (path.name for path in folder.iterdir())
    return sorted(names, key=lambda name: (name == COUNTS, name == INDEX, name))
