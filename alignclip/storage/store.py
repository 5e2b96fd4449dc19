"""One store for folders and URLs alike: read, write, list and delete by names, with errors in one line."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignclip.errors import UserError
from alignclip.storage.clouds import Cloud, cloud_at
from alignclip.storage.trouble import Right, is_absent, is_denied
from alignclip.storage.whole import check_folder_writable, write_whole
from alignclip.storage.words import StorageError, describe_storage_error

PROBE = (
    ".alignclip-probe-" + hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
)


def open_store(place: str) -> Store:
    """The folder or URL ``place``; nothing is asked of it yet.

    Raises:
        UserError: nobody knows the URL's scheme.
    """
    return Bucket(place) if "://" in place else Folder(place)


def open_file(place: str) -> tuple[Store, str]:
    """The store that the file at a path or URL lies in, and the file's name there."""
    if "://" in place:
        folder, _, name = place.rpartition("/")
        return Bucket(folder), name
    path = Path(place).expanduser()
    return Folder(str(path.parent)), path.name


def read_text(place: str) -> str:
    """Read a small text file at a path or URL.

    Raises:
        UserError: the file isn't there, can't be read, or is no text.
    """
    store, name = open_file(place)
    return store.read_text(name)


class Store(ABC):
    """Files by their names below a place.

    Every method raises :class:`StorageError`, one line of what, where and why, which keeps the library's
    own exception as its cause. So ``patiently(lambda: store.put(…), store.place)`` waits where that helps.

    Attributes:
        place: the folder or URL, without a slash at its end.
        is_remote: whether the place is a URL.
    """

    is_remote: bool

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/") or "/"

    def at(self, name: str) -> str:
        """The path or URL of a file."""
        return f"{self.place.rstrip('/')}/{name}"

    def download(self, name: str, path: Path) -> None:
        """Copy a file to ``path``, where it appears whole or not at all."""
        with self._told("read", name), write_whole(path, durable=False) as partial:
            self._get(name, partial)

    def download_optional(self, name: str, path: Path) -> bool:
        """Copy a file to ``path`` if it is there, and say whether it is.

        A store answers 403 instead of 404 to a key that may not list. So a refusal counts as absent here.
        """
        try:
            self.download(name, path)
        except StorageError as error:
            if is_absent(error) or (self.is_remote and is_denied(error)):
                return False
            raise
        return True

    def read_bytes(self, name: str) -> bytes:
        """The content of a file that is needed."""
        with tempfile.TemporaryDirectory(prefix="alignclip-") as folder:
            path = Path(folder, "file")
            self.download(name, path)
            return path.read_bytes()

    def read_optional(self, name: str) -> bytes | None:
        """The content of a file, or None where there is none; see :meth:`download_optional`."""
        with tempfile.TemporaryDirectory(prefix="alignclip-") as folder:
            path = Path(folder, "file")
            return path.read_bytes() if self.download_optional(name, path) else None

    def read_text(self, name: str) -> str:
        """The text of a file that is needed."""
        return self._decode(name, self.read_bytes(name))

    def read_text_optional(self, name: str) -> str | None:
        """The text of a file, or None where there is none; see :meth:`download_optional`."""
        content = self.read_optional(name)
        return None if content is None else self._decode(name, content)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file, which appears whole or not at all."""
        with tempfile.TemporaryDirectory(prefix="alignclip-") as folder:
            path = Path(folder, "file")
            path.write_text(text, encoding="utf-8")
            self.put(path, name)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to ``name``, where it appears whole or not at all."""
        with self._told("write", name):
            self._put(path, name)

    def names(self) -> set[str]:
        """The names of all files below, relative to the place."""
        with self._told("list", ""):
            # some stores list folders; what is being written has no name yet
            return {name for name in self._names() if name and not name.endswith("/")}

    def size(self, name: str) -> int | None:
        """Return the bytes of a file that is there; None where this kind of store doesn't tell."""
        with self._told("read", name):
            return self._size(name)

    def delete(self, name: str) -> None:
        """Remove a file; one that isn't there is no error."""
        with self._told("delete", name):
            self._delete(name)

    @property
    @abstractmethod
    def can_list(self) -> bool:
        """Whether this kind of store can be listed; whether the key may is another question."""

    @property
    @abstractmethod
    def can_delete(self) -> bool:
        """Whether this kind of store can delete."""

    @abstractmethod
    def check_writable(self) -> None:
        """Write a real file, read it again and remove it: better known now than after hours.

        A key that may not delete leaves a small object behind.
        """

    @contextmanager
    def _told(self, right: Right, name: str) -> Iterator[None]:
        """Say in one line what goes wrong."""
        where = self.at(name) if name else self.place
        try:
            yield
        except StorageError as error:
            raise StorageError(right, where, error.why) from (error.__cause__ or error)
        except UserError:
            raise
        except Exception as error:  # every provider has its own
            raise StorageError(right, where, describe_storage_error(error, right)) from error

    def _decode(self, name: str, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.at(name)} is no text file") from None

    @abstractmethod
    def _get(self, name: str, path: Path) -> None: ...

    @abstractmethod
    def _put(self, path: Path, name: str) -> None: ...

    @abstractmethod
    def _names(self) -> Iterator[str]: ...

    @abstractmethod
    def _size(self, name: str) -> int | None: ...

    @abstractmethod
    def _delete(self, name: str) -> None: ...


class Folder(Store):
    """A local folder, which need not exist yet."""

    is_remote = False
    can_list = can_delete = True

    def __init__(self, place: str) -> None:
        super().__init__(str(Path(place).expanduser()))
        self.path = Path(self.place)

    def check_writable(self) -> None:
        """See :class:`Store`. The folder isn't made."""
        check_folder_writable(self.path)

    def read_bytes(self, name: str) -> bytes:
        """See :class:`Store`; without a copy."""
        with self._told("read", name):
            return (self.path / name).read_bytes()

    def read_optional(self, name: str) -> bytes | None:
        """See :class:`Store`; without a copy."""
        try:
            return self.read_bytes(name)
        except StorageError as error:
            if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
                return None
            raise

    def _get(self, name: str, path: Path) -> None:
        shutil.copyfile(self.path / name, path)

    def _put(self, path: Path, name: str) -> None:
        with write_whole(self.path / name, path.stat().st_size) as partial:
            shutil.copyfile(path, partial)

    def _names(self) -> Iterator[str]:
        for parent, _, names in os.walk(self.path):
            for name in names:
                yield Path(parent, name).relative_to(self.path).as_posix()

    def _size(self, name: str) -> int | None:
        return (self.path / name).stat().st_size

    def _delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)


class Bucket(Store):
    """What lies below a URL of an object store.

    Args:
        url: of a folder, or what stands for one.
        cloud: the library that reaches it; by default the one that :func:`cloud_at` chooses.
    """

    is_remote = True

    def __init__(self, url: str, cloud: Cloud | None = None) -> None:
        super().__init__(url)
        self.cloud = cloud if cloud is not None else cloud_at(self.place)

    @property
    def can_list(self) -> bool:
        """See :class:`Store`."""
        with self._told("list", ""):
            return self.cloud.can_list

    @property
    def can_delete(self) -> bool:
        """See :class:`Store`."""
        with self._told("delete", ""):
            return self.cloud.can_delete

    def check_writable(self) -> None:
        """See :class:`Store`."""
        self.write_text(PROBE, "written to see whether the key may write; it can be removed\n")
        try:
            self.read_bytes(PROBE)
        except StorageError as error:
            if not is_absent(error):  # another process has removed it
                raise StorageError("read", self.place, _refused_what_is_there(error)) from error
        finally:
            self._try_to_delete(PROBE)

    def _try_to_delete(self, name: str) -> None:
        try:
            if self.can_delete:
                self.delete(name)
        except UserError:
            pass  # the right to delete is only needed where old files are removed

    def _get(self, name: str, path: Path) -> None:
        self.cloud.download(name, path)

    def _put(self, path: Path, name: str) -> None:
        self.cloud.upload(path, name)

    def _names(self) -> Iterator[str]:
        return iter(self.cloud.names())

    def _size(self, name: str) -> int | None:
        return self.cloud.size(name)

    def _delete(self, name: str) -> None:
        self.cloud.delete(name)


def _refused_what_is_there(error: StorageError) -> str:
    """Why a file that was just written can't be read: that it isn't there is no reason."""
    if is_denied(error):
        return "access denied: the key may write, and may not read (s3:GetObject)"
    return error.why
