"""Fetch, check and decompress the shards of a set into a local folder.

A folder is a :class:`alignclip.data.shard_cache.ShardCache`: the files in it that somebody else has
put there stay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streaming import Stream
from streaming.base.format import FileInfo, Reader
from streaming.base.hashing import get_hash
from streaming.base.world import World

from alignclip.data.mds_index import INDEX, read_shards
from alignclip.data.mds_reader import decompress_to
from alignclip.data.shard_cache import CachedShard, ShardCache
from alignclip.errors import UserError
from alignclip.storage import PATIENCE, open_store, patiently, slowness_said


class CachedStream(Stream):
    """A Stream whose folder is a :class:`ShardCache`; with Streaming's arguments.

    Args:
        is_own: whether the whole local folder is this program's own, whatever lies there.
    """

    def __init__(self, *, is_own: bool = False, **arguments: Any) -> None:
        # the other ranks of a machine wait for the index, which the first one waits for
        super().__init__(**arguments, download_timeout=2 * PATIENCE)
        self.is_own = is_own

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Fetch the index and check it; return its shards.

        Raises:
            ValueError: a shard can't be read, or not safely.
        """
        super().get_shards(world, allow_unsafe_types)
        path = Path(self.local, self.split, INDEX)
        source = None if self.remote is None else f"{self.remote}/{self.split}".rstrip("/")
        self.cache = ShardCache(path.parent, source, self.is_own)
        if world.is_local_leader:
            self.cache.forget_what_is_gone()
        try:
            entries = read_shards(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
        shards = [CachedShard.from_json(self.local, self.split, {**entry}) for entry in entries]
        for shard in shards:
            shard.cache = self.cache
        return [*shards]

    def get_index_size(self) -> int:
        """Return the bytes of the index that count towards the limit: none without a remote."""
        return 0 if self.remote is None else super().get_index_size()

    def prepare_shard(self, shard: Reader) -> int:
        """Fetch and decompress a shard as far as its files aren't there.

        Returns:
            bytes by which the cache has grown.

        Raises:
            UserError: a file isn't what the index says, and one that was fetched is gone again; or
                as :meth:`_download_file`.
        """
        assert isinstance(shard, CachedShard)
        grown = 0
        raw, compressed = shard.raw_data, shard.zip_data
        stored = compressed or raw
        if not self._is_there(raw):
            if not self._is_there(stored):
                grown += self._fetch(stored)
            if compressed:
                grown += self._decompress(raw, compressed, str(shard.compression))
        if compressed and not self.safe_keep_zip and compressed in shard.deletable():
            grown -= shard.delete(compressed)
        return grown

    def _is_there(self, info: FileInfo) -> bool:
        """Return whether a file is there; remove one of the cache that was cut off.

        Raises:
            UserError: the file has another size than the index says, and can't be fetched again.
        """
        path = self.cache.folder / info.basename
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            return False
        if size == info.bytes:
            return True
        if not self.cache.may_delete(info.basename):
            raise UserError(f"{path} {_wrong_size(size, info)}; remove the file")
        path.unlink(missing_ok=True)
        return False

    def _fetch(self, info: FileInfo) -> int:
        """Download a file, once more where it arrives damaged; return its bytes."""
        path, where = self._place_for(info), f"{self.cache.source}/{info.basename}"
        for is_last in (False, True):
            self._download_file(info.basename)
            if (why := self._damage(info, path)) is None:
                break
            path.unlink(missing_ok=True)  # or the next run would take it for whole
            if is_last:
                raise UserError(f"{where} is damaged, fetched twice: {why}")
        self.cache.add(info.basename)
        return info.bytes

    def _download_file(self, from_basename: str, to_basename: str | None = None) -> str:
        """Download a file of the set, and wait where its store is away.

        Streaming asks so many times, whatever is wrong: minutes for a shard that isn't there, and
        two minutes only for a store that is away.

        Raises:
            UserError: the file isn't there or may not be read; or the store is away for too long.
        """
        path = Path(self.local, self.split, to_basename or from_basename)
        if path.exists():
            return str(path)
        if self.remote is None:
            raise UserError(f"{path} is not there, and the set has no remote")
        store = open_store(f"{self.remote}/{self.split}")

        def download() -> None:
            with slowness_said(store.place):
                store.download(from_basename, path)

        patiently(download, store.place)
        return str(path)

    def _decompress(self, raw: FileInfo, compressed: FileInfo, algorithm: str) -> int:
        """Decompress a shard beside its compressed file; return the bytes written."""
        source, target = self.cache.folder / compressed.basename, self._place_for(raw)
        if why := self._damage(compressed, source):
            raise UserError(f"{source} is damaged: {why}")
        try:
            data = decompress_to(raw.bytes, algorithm, source.read_bytes())
        except ValueError as error:
            raise UserError(f"{source} {error}") from None
        partial = Path(f"{target}.tmp")
        partial.write_bytes(data)
        partial.replace(target)
        self.cache.add(raw.basename)
        return raw.bytes

    def _damage(self, info: FileInfo, path: Path) -> str | None:
        """Say how a file differs from what the index says, or None.

        Raises:
            UserError: the index has no such hash.
        """
        if (size := path.stat().st_size) != info.bytes:
            return _wrong_size(size, info)
        if not self.validate_hash:
            return None
        if (expected := info.hashes.get(self.validate_hash)) is None:
            raise UserError(
                f"the set has no hashes {self.validate_hash} (data.validate_hash) "
                f"but {sorted(info.hashes)}"
            )
        is_whole = get_hash(self.validate_hash, path.read_bytes()) == expected
        return None if is_whole else f"its {self.validate_hash} is not the index's"

    def _place_for(self, info: FileInfo) -> Path:
        """Return the path of a file to write, through no link that leads out of the folder.

        Raises:
            UserError: the folder of the file is a link to another folder.
        """
        path = self.cache.folder / info.basename
        if not path.parent.resolve().is_relative_to(self.cache.folder.resolve()):
            raise UserError(f"{path.parent} is a link to another folder; nothing is written there")
        Path(f"{path}.tmp").unlink(missing_ok=True)
        return path


def _wrong_size(size: int, info: FileInfo) -> str:
    return f"has {size:,} bytes, and the set's index says {info.bytes:,}"
