"""Read, write, list and delete by names below a place, with errors in one line."""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from alignclip.errors import UserError
from alignclip.storage.patience import answered
from alignclip.storage.temporary import temporary_folder
from alignclip.storage.trouble import Right, is_absent, is_denied
from alignclip.storage.whole import check_folder_writable, write_whole
from alignclip.storage.words import StorageError, describe_storage_error


class Store(ABC):
    """The files below a place, by their names relative to the place.

    Every method raises :class:`StorageError`, one line of what, where and why, which keeps the
    library's own exception as its cause. So ``patiently(lambda: store.put(…), store.place)`` waits
    where that helps. A kind of store is a subclass with the methods ``_get`` to ``_delete``. Their
    exceptions are the libraries' own.

    Attributes:
        place: the folder or URL, without a slash at its end.
        is_remote: whether the place is a URL.
    """

    is_remote: bool

    def __init__(self, place: str) -> None:
        self.place = place.rstrip("/") or "/"

    @property
    def can_list(self) -> bool:
        """Return whether this kind of store can be listed, whatever the key may do."""
        return True

    def at(self, name: str) -> str:
        """Give the path or URL of a file."""
        return f"{self.place.rstrip('/')}/{name}"

    def download(self, name: str, path: Path) -> None:
        """Copy a file to ``path``, where it appears whole or not at all."""
        with self._told("read", name), write_whole(path, durable=False) as partial:
            self._get(name, partial)

    def read_bytes(self, name: str) -> bytes:
        """Read a file that is needed."""
        with temporary_folder() as folder:
            path = folder / "file"
            self.download(name, path)
            return path.read_bytes()

    def read_optional(self, name: str) -> bytes | None:
        """Read a file; None where there is none.

        A store answers 403 instead of 404 to a key that may not list. So a refusal counts as
        absent here.
        """
        try:
            return self.read_bytes(name)
        except StorageError as error:
            if is_absent(error) or is_denied(error):
                return None
            raise

    def read_text(self, name: str) -> str:
        """Read a text file that is needed."""
        return self._decode(name, self.read_bytes(name))

    def read_text_optional(self, name: str) -> str | None:
        """Read a text file; None where there is none, see :meth:`read_optional`."""
        content = self.read_optional(name)
        return None if content is None else self._decode(name, content)

    def write_text(self, name: str, text: str) -> None:
        """Write a small text file, which appears whole or not at all."""
        with temporary_folder() as folder:
            path = folder / "file"
            path.write_text(text, encoding="utf-8")
            self.put(path, name)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file to ``name``, where it appears whole or not at all."""
        with self._told("write", name):
            self._put(path, name)

    def names(self) -> set[str]:
        """List the names of all files below the place; none where :attr:`can_list` is false."""
        if not self.can_list:
            return set()
        with self._told("list"):
            # some stores list folders; what is being written has no name yet
            return {name for name in self._names() if name and not name.endswith("/")}

    def first_level(self) -> set[str]:
        """List the names of the files right below the place; of a local folder's folders, too."""
        with self._told("list"):
            return {name for name in self._first_level() if "/" not in name}

    def size(self, name: str) -> int | None:
        """Give the bytes of a file that is there; None where this kind of store doesn't tell."""
        with self._told("read", name):
            return self._size(name)

    def delete(self, name: str) -> None:
        """Remove a file; one that isn't there is no error."""
        with self._told("delete", name):
            self._delete(name)

    @abstractmethod
    def check_writable(self) -> None:
        """Write a real file, read it again and remove it: better known now than after hours.

        A key that may not delete leaves a small object behind. A local folder isn't made.
        """

    @contextmanager
    def _told(self, right: Right, name: str = "") -> Iterator[None]:
        """Say in one line what goes wrong."""
        where = self.at(name) if name else self.place
        try:
            yield
            answered(self.place)
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
    def _get(self, name: str, path: Path) -> None:
        """Write a file's content to a local file that doesn't exist yet."""

    @abstractmethod
    def _put(self, path: Path, name: str) -> None:
        """Write a file as a whole or not at all."""

    @abstractmethod
    def _names(self) -> Iterator[str]: ...

    def _first_level(self) -> Iterable[str]:
        return self.names()

    @abstractmethod
    def _size(self, name: str) -> int | None: ...

    @abstractmethod
    def _delete(self, name: str) -> None: ...


class Folder(Store):
    """A local folder, which need not exist yet."""

    is_remote = False

    def __init__(self, place: str) -> None:
        super().__init__(str(Path(place).expanduser()))
        self.path = Path(self.place)

    def check_writable(self) -> None:
        """See :class:`Store`."""
        check_folder_writable(self.path)

    def read_bytes(self, name: str) -> bytes:
        """See :class:`Store`; without a copy."""
        with self._told("read", name):
            return (self.path / name).read_bytes()

    def _get(self, name: str, path: Path) -> None:
        shutil.copyfile(self.path / name, path)

    def _put(self, path: Path, name: str) -> None:
        with write_whole(self.path / name, path.stat().st_size) as partial:
            shutil.copyfile(path, partial)

    def _names(self) -> Iterator[str]:
        for parent, _, names in os.walk(self.path):
            for name in names:
                yield Path(parent, name).relative_to(self.path).as_posix()

    def _first_level(self) -> Iterable[str]:
        """See :class:`Store`; what lies deeper, data sets and logs, is not looked at."""
        with suppress(FileNotFoundError, NotADirectoryError):
            return [path.name for path in self.path.iterdir()]
        return []

    def _size(self, name: str) -> int | None:
        return (self.path / name).stat().st_size

    def _delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
