"""Input shards: what the patterns on the command line stand for, and how each is read.

An input shard is named by a string: a path or URL, with ``#`` and a part where one file is several: rows of a CSV file,
a shard of an MDS set. A new format is one function that yields samples, and a line in :func:`read`.
"""

from __future__ import annotations

import glob
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import urlparse

from alignclip.conversion import mds, tables, tars
from alignclip.conversion.samples import IMAGE_EXTENSIONS, PLAIN, Item, Reading
from alignclip.errors import UserError
from alignclip.near import did_you_mean
from alignclip.storage import is_passing
from alignclip.storage.copies import check_web, fetched
from alignclip.storage.staging import INDEX, list_remote

# What a folder stands for is decided by the first of these that it holds; img2dataset puts a parquet file beside a tar
GROUPS = ((".tar", ".tar.gz", ".tgz"), (".parquet",), (".csv", ".tsv"))
FORMATS = tuple(suffix for group in GROUPS for suffix in group)
WEB = ("http", "https")
SEVERAL = (".csv", ".tsv", f"/{INDEX}")  # files of which each is several input shards


def expand(
    patterns: Sequence[str], caption_key: str | None = None, how: Reading = PLAIN
) -> list[str]:
    """The input shards that ``patterns`` name, each once, in the order of the patterns.

    A pattern is a path or URL; a folder, which stands for its tars, or else its parquet or CSV files; with
    ``{00000..00123}`` or ``{a,b}`` each of these; with ``*``, ``?`` or ``[]`` those that exist; an MDS set's
    ``index.json``. Folders and wildcards also work in the object stores that Streaming can list (S3, GCS, OCI).
    ``caption_key`` and ``how`` are those of :func:`read`: tables are looked at.

    Raises:
        UserError: a pattern matches nothing, a file that is named does not exist, or a table can't be read.
    """
    from braceexpand import braceexpand

    found: list[str] = []
    missing: list[str] = []
    unseen: list[str] = []  # URLs of single files
    for pattern in patterns:
        try:
            names = list(braceexpand(pattern))
        except ValueError:
            raise UserError(f"unbalanced braces in '{pattern}'") from None
        for name in names:
            found += _expand_remote(name, unseen) if "://" in name else _expand_local(name, missing)
    missing += _missing_remote(unseen)
    if missing:
        near = "" if "://" in missing[0] else did_you_mean(missing[0])
        raise UserError(
            f"{len(missing)} of {len(found)} inputs do not exist, the first is {missing[0]}{near}"
        )
    if not found:
        raise UserError("no inputs")
    check_web(name for name in found if urlparse(name).scheme in WEB)
    return [part for file in dict.fromkeys(found) for part in _parts(file, caption_key, how)]


def _expand_local(name: str, missing: list[str]) -> list[str]:
    """What one path stands for; a single file that isn't there is put on the list ``missing``."""
    path = Path(name).expanduser().absolute()
    if path.is_dir():
        there = [file.name for file in path.iterdir()]
        files = of_one_format(there)
        if not files:
            _refuse_mds(path, there)
            loose = any(file.lower().endswith(IMAGE_EXTENSIONS) for file in there)
            way = (
                f"; for images with texts beside them: tar --sort=name -cf pairs.tar -C {path} ."
                if loose
                else ""
            )
            raise UserError(
                f"no {', '.join('*' + suffix for suffix in FORMATS)} in the folder {path}{way}"
            )
        _say_what_is_left_out(path, there, files)
        return [str(path / file) for file in files]
    if path.exists() or not glob.has_magic(name):
        if not path.exists():
            missing.append(str(path))
        return [str(path)]
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    files = sorted(str(file) for file in found if not file.name.startswith("."))
    if not files:
        raise UserError(f"no file matches '{name}'")
    return files


def _refuse_mds(folder: Path, names: Iterable[str]) -> None:
    """Say by which names a folder that is an MDS set, or holds some, is read.

    Raises:
        UserError: it is one, or holds some.
    """
    sets = [folder] if (folder / INDEX).is_file() else [folder / name for name in sorted(names)]
    there = [str(place / INDEX) for place in sets if (place / INDEX).is_file()]
    if there:
        more = ", …" if there[3:] else ""
        raise UserError(
            f"{folder} holds MDS, which is read by its index: name {', '.join(there[:3])}{more}"
        )


def _say_what_is_left_out(folder: Path, names: Sequence[str], taken: Sequence[str]) -> None:
    """Name the inputs of other formats in a folder, but for a table that describes a tar or another file beside it."""
    stems = {name.split(".")[0] for name in taken}
    inputs = [name for name in names if name.lower().endswith(FORMATS) and not name.startswith(".")]
    left = sorted(name for name in inputs if name not in taken and name.split(".")[0] not in stems)
    if left:
        print(
            f"not taken from {folder}: {', '.join(left[:3])}{', …' if left[3:] else ''}; name them",
            file=sys.stderr,
        )


def of_one_format(names: Iterable[str]) -> list[str]:
    """Those of a folder's files that it stands for: its tars, else its parquet files, else its CSV and TSV files."""
    seen = [
        name for name in names if not name.startswith(".")
    ]  # macOS puts ._00000.tar beside 00000.tar
    for group in GROUPS:
        if files := sorted(name for name in seen if name.lower().endswith(group)):
            return files
    return []


def _expand_remote(url: str, unseen: list[str]) -> list[str]:
    """What one URL stands for; a single file, which has not been looked for, is put on the list ``unseen``."""
    is_http = urlparse(url).scheme in WEB
    is_pattern = not is_http and glob.has_magic(url)
    if is_http or (
        not is_pattern and (url.lower().endswith((*FORMATS, ".gz")) or url.endswith(f"/{INDEX}"))
    ):
        if not is_http:
            unseen.append(url)
        return [url]
    folder, pattern = url.rsplit("/", 1) if is_pattern else (url.rstrip("/"), None)
    if glob.has_magic(folder):
        raise UserError(
            f"a wildcard in '{url}' may stand in the last part only; use braces for the folders"
        )
    there = [name for name in list_remote(folder) if "/" not in name and not name.startswith(".")]
    names = (
        sorted(name for name in there if fnmatch(name, pattern))
        if pattern
        else of_one_format(there)
    )
    if not names and not pattern and INDEX in there:
        raise UserError(f"{folder} holds MDS, which is read by its index: name {folder}/{INDEX}")
    if not names:
        raise UserError(f"nothing matches '{folder}/{pattern or '*.tar'}'")
    return [f"{folder}/{name}" for name in names]


def _missing_remote(urls: Sequence[str]) -> list[str]:
    """Which of these URLs a listing of their folders lacks; folders that can't be listed are taken on trust."""
    missing: list[str] = []
    for folder in dict.fromkeys(url.rsplit("/", 1)[0] for url in urls):
        try:
            names = list_remote(folder)
        except (
            UserError
        ) as error:  # Azure, or a public bucket that may be read but not listed: fetching will tell
            if error.__cause__ is not None and is_passing(error.__cause__):
                raise  # nobody is there: told at once, not after the minutes of an outage
            continue
        missing += [
            url
            for url in urls
            if url.rsplit("/", 1)[0] == folder and url.rsplit("/", 1)[1] not in names
        ]
    return missing


def _parts(file: str, caption_key: str | None, how: Reading) -> list[str]:
    """The input shards of a file."""
    if not _path(file).lower().endswith(SEVERAL):
        return [file]
    if file.endswith(f"/{INDEX}"):
        mds.forget()
        return [f"{file}#{shard}" for shard in mds.shards_of(file)]
    with fetched(file) as path:
        if "://" in file:
            raise UserError(
                f"{file}: a CSV file names local images, so it has to be a local file itself"
            )
        parts = tables.parts_of_csv(path, caption_key, how)
        return [f"{file}#{first}-{last}-{place}" for first, last, place in parts]


def _split(shard: str) -> tuple[str, str]:
    """The file, and the part of it where it is one of those that are several shards."""
    file, _, part = shard.rpartition("#")
    return (file, part) if _path(file).lower().endswith(SEVERAL) else (shard, "")


def _path(file: str) -> str:
    """Of a URL without its query."""
    return urlparse(file).path if "://" in file else file


def file_of(shard: str) -> str:
    """The file that an input shard is or is a part of."""
    file, part = _split(shard)
    return mds.file_of(file, part) if file.endswith(f"/{INDEX}") else file


def mds_sets(shards: Iterable[str]) -> set[str]:
    """The ``index.json`` of those of these input shards that are shards of an MDS set, and "" for others."""
    files = (_split(shard)[0] for shard in shards)
    return {file if file.endswith(f"/{INDEX}") else "" for file in files}


def mds_shard(shard: str) -> mds.Shard | None:
    """What is known of an input shard of an MDS set before it is read; None of others."""
    file, part = _split(shard)
    return mds.shard_of(file, part) if file.endswith(f"/{INDEX}") else None


def name_of(shard: str) -> str:
    """The output's sub-folder: the file name up to its first dot, and the part."""
    file, part = _split(shard)
    if file.endswith(f"/{INDEX}"):
        return part.replace("/", "-").replace(".mds", "").replace(".", "-")
    stem = _path(file).rsplit("/", 1)[1].split(".")[0]
    return f"{stem}-{int(part.partition('-')[0]) // tables.ROWS:05}" if part else stem


@contextmanager
def opened(
    shard: str, caption_key: str | None, how: Reading = PLAIN
) -> Iterator[tuple[Path, Iterator[Item]]]:
    """The local file of an input shard, fetched where it is remote, and its samples.

    Raises:
        UserError: it cannot be fetched, or has no such columns.
    """
    file, part = _split(shard)
    if file.endswith(f"/{INDEX}"):
        with mds.opened_mds(file, part) as both:
            yield both
        return
    with fetched(file) as path:
        yield path, read(shard, path, caption_key, how)


def read(shard: str, path: Path, caption_key: str | None, how: Reading = PLAIN) -> Iterator[Item]:
    """The samples of an input shard that is no MDS set's, in order, at most a few in memory at a time."""
    file, part = _split(shard)
    if _path(file).lower().endswith(".parquet"):
        return tables.read_parquet(path, caption_key, how)
    if part:
        first, last, place = map(int, part.split("-"))
        return tables.read_csv(path, first, last, place, caption_key, how)
    return tars.read_tar(path, caption_key, how)
