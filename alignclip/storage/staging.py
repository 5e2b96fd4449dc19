"""An output folder, local or in object storage, that is filled one complete sub-folder at a time."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from itertools import chain
from pathlib import Path
from typing import Any

from alignclip import storage
from alignclip.errors import UserError
from alignclip.storage import StorageError, is_passing, open_store, patiently, to_disk
from alignclip.storage.copies import TEMPORARY

INDEX = "index.json"
COUNTS = "counts.json"  # in each sub-folder, beside its index
PARTIAL = ".partial-"  # a local sub-folder in the making
VAL = "val"  # the held-out split: a sub-folder of its own, with an index
LOCK = ".lock"  # of a local folder that is being written


def list_remote(url: str) -> set[str]:
    """The names of all objects under a URL, relative to it.

    Raises:
        UserError: it cannot be reached, or Streaming cannot list that kind of storage (S3, GCS and OCI it can).
    """
    try:
        bucket = open_store(url)
        if not bucket.can_list:
            raise UserError(f"Streaming cannot list {url}; name the files")
        return bucket.names()
    except StorageError as error:
        raise UserError(f"cannot reach {url}: {error.why}") from error


def _empty(bucket: storage.Store) -> None:
    """Delete a sub-folder's objects where Streaming's client can: S3 and GCS.

    Elsewhere, or where the credentials don't allow it, they stay and are overwritten or named by no index.
    """
    if not (bucket.can_list and bucket.can_delete):
        return
    names = bucket.names()
    try:
        for name in _ours(names):
            bucket.delete(name)
    except StorageError as error:
        if is_passing(
            error
        ):  # counts.json would stay, and after a kill say that a mixture is complete
            raise


def shown(listing: Iterable[str]) -> set[str]:
    """Those of these files that are not hidden, nor lie in a hidden folder."""
    return {name for name in listing if not any(part.startswith(".") for part in name.split("/"))}


class OutputFolder:
    """The folder ``out``: a local path, or a URL that Streaming can write to."""

    def __init__(self, out: str) -> None:
        self.is_remote = "://" in out
        self.out = out.rstrip("/") if self.is_remote else str(Path(out).expanduser().resolve())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other conversions out of a local ``out``: each removes what it takes for another's remains.

        Raises:
            UserError: there is one at work, or ``out`` can't be written.
        """
        if self.is_remote:
            yield
            return
        import fcntl

        lock = Path(self.out) / LOCK
        with ExitStack() as stack:
            while True:
                try:
                    Path(self.out).mkdir(parents=True, exist_ok=True)
                    file = stack.enter_context(lock.open("w"))
                except OSError as error:
                    raise UserError(f"cannot write to {self.out}: {error.strerror}") from None
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"another conversion into {self.out} is running") from None
                except OSError:  # a file system without locks
                    break
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                        break
                # one that was about to end has removed it in between
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)

    def clear(self, names: Iterable[str], *files: str) -> None:
        """Remove these sub-folders of a local ``out``, those of its held-out split, and these files."""
        self.remove_partial()
        for name in names:
            for split in ("", VAL):
                shutil.rmtree(Path(self.out) / split / name, ignore_errors=True)
        for file in files:
            (Path(self.out) / file).unlink(missing_ok=True)
        with suppress(OSError):
            (Path(self.out) / VAL).rmdir()

    def remove_partial(self) -> None:
        """Remove what killed runs have left in the making; remotely there is no such thing."""
        if not self.is_remote:
            for path in Path(self.out).glob(f"{PARTIAL}*"):
                if path.is_file():
                    path.unlink(missing_ok=True)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def witness(self) -> Iterator[str | None]:
        """A file in a local ``out`` by which a process elsewhere tells whether it sees the same folder."""
        if self.is_remote:
            yield None
            return
        with tempfile.NamedTemporaryFile(prefix=f"{PARTIAL}witness-", dir=self.out) as file:
            yield file.name

    def listing(self) -> set[str]:
        """The names of the files here and two folders below, relative to ``out``; none where nothing is there yet.

        Raises:
            UserError: ``out`` cannot be reached.
        """
        if not self.is_remote:
            root = Path(self.out)
            files = chain.from_iterable(root.glob(pattern) for pattern in ("*", "*/*", "*/*/*"))
            return {
                str(file)
                for file in (path.relative_to(root) for path in files if path.is_file())
                if not file.parts[0].startswith(PARTIAL)
            }
        try:
            listable = open_store(self.out).can_list
        except StorageError as error:
            raise UserError(f"cannot reach {self.out}: {error.why}") from error
        # Azure's is missing in Streaming: nothing is found to be done before, and all is written again
        return list_remote(self.out) if listable else set()

    def check_writable(self) -> None:
        """Write a real file and remove it again: better known now than after hours.

        Raises:
            UserError: ``out`` cannot be written to.
        """
        try:
            open_store(self.out).check_writable()
        except StorageError as error:
            raise UserError(f"cannot write to {self.out}: {error.why}") from error

    @contextmanager
    def staged(self, name: str = "", replace: bool = True) -> Iterator[Path]:
        """An empty folder whose files appear in ``out/name`` when the block ends, and not at all when it raises.

        ``index.json`` follows what it names and ``counts.json`` goes last: where there are both, a sub-folder is
        complete. One that is there already is replaced as a whole, its ``counts.json`` going first: after a kill in
        between it is incomplete. The root's index must not name its shards any more by then.

        Raises:
            UserError: ``out`` cannot be reached or written.
        """
        if self.is_remote:
            with tempfile.TemporaryDirectory(prefix=TEMPORARY) as temporary:
                folder = Path(temporary)
                bucket = open_store(f"{self.out}/{name}")
                yield folder
                try:
                    if name and replace:
                        patiently(lambda: _empty(bucket), self.out)
                    for file in _in_order(folder):
                        patiently(lambda file=file: bucket.put(folder / file, file), self.out)  # type: ignore[misc]
                except StorageError as error:
                    raise UserError(f"cannot write to {self.out}/{name}: {error.why}") from error
            return
        try:
            Path(self.out).mkdir(parents=True, exist_ok=True)
            # on the same file system, so that a rename is all it takes
            folder = Path(
                tempfile.mkdtemp(prefix=f"{PARTIAL}{name.replace('/', '-')}-", dir=self.out)
            )
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}") from None
        try:
            yield folder
            for path in folder.iterdir():
                to_disk(path)  # a rename may survive a power cut that what it names does not
            _check_whole(folder)
            target = Path(self.out) / name
            target.mkdir(parents=True, exist_ok=True)
            if name and replace:
                for file in _ours(path.name for path in target.iterdir()):
                    (target / file).unlink(
                        missing_ok=True
                    )  # another task may be about to replace it, too
            for file in _in_order(folder):
                if file == COUNTS:
                    to_disk(target)
                (folder / file).replace(target / file)
            to_disk(target)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def read_json(self, names: Sequence[str], broken: bool = False) -> list[Any]:
        """The contents of these JSON files, in the same order; with ``broken``, None of what is no JSON.

        Raises:
            UserError: one of them cannot be fetched.
            OSError: one is not in the local folder.
            ValueError: one is no JSON.
        """

        def parse(content: bytes) -> Any:
            return _parse(content) if broken else json.loads(content.decode("utf-8"))

        if not self.is_remote:
            return [parse((Path(self.out) / name).read_bytes()) for name in names]
        bucket = open_store(self.out)

        def fetch(name: str) -> Any:
            try:
                return parse(patiently(lambda: bucket.read_bytes(name), self.out))
            except StorageError as error:
                raise UserError(f"cannot read {bucket.at(name)}: {error.why}") from error

        with ThreadPoolExecutor(16) as pool:
            return list(pool.map(fetch, names))


def _parse(content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except ValueError:
        return None


def _check_whole(folder: Path) -> None:
    """Whatever the folder's own index names is there: nobody has removed it meanwhile.

    Raises:
        UserError: names what is missing.
    """
    for shard in (
        (_parse((folder / INDEX).read_bytes()) or {}).get("shards", [])
        if (folder / INDEX).exists()
        else []
    ):
        name = (shard.get("zip_data") or shard["raw_data"])["basename"]
        if "/" not in name and not (folder / name).exists():
            raise UserError(
                f"{folder / name} was removed by another process; is there a second conversion?"
            )


def _ours(files: Iterable[str]) -> list[str]:
    """Those of a sub-folder's files that a converter has written, ``counts.json`` first."""
    ours = [name for name in files if name in (COUNTS, INDEX) or fnmatch(name, "shard.*.mds*")]
    return sorted(ours, key=lambda name: name != COUNTS)


def _in_order(folder: Path) -> list[str]:
    return sorted(
        (path.name for path in folder.iterdir()),
        key=lambda name: (name == COUNTS, name == INDEX, name),
    )
