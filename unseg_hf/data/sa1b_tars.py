"""The tars of SA-1B's layout: where they are, and which pairs of an image and its annotations they hold."""

import contextlib
import functools
import glob
import os
import tarfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple


class Shard(NamedTuple):
    """A tar: what errors call it (no URL's signature), and where it is."""

    name: str
    location: str


class Member(NamedTuple):
    """A file in a tar: where its bytes lie, and, out of a stream, the bytes themselves."""

    name: str
    offset: int
    size: int
    data: bytes | None


class Pair(NamedTuple):
    """An image and its annotations; `tar` is the path of a local tar, and the name of a streamed one."""

    tar: str
    image: Member
    annotations: Member


def read_member(tar: str, member: Member) -> bytes:
    """The bytes of a member of `tar`.

    Raises:
        OSError: a local tar is gone, or not the one that was looked through.
    """
    if member.data is not None:
        return member.data
    with open(tar, "rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
        raise OSError(f"{tar}/{member.name} is cut, as the tar was changed after the run began; begin again")
    return data


def shown(location: str) -> str:
    """A location without what is no one's business: the signature of a URL."""
    return location.partition("?")[0] if "://" in location else location


def is_remote(shard: Shard) -> bool:
    """Whether its pairs carry their bytes, as they can only be read in passing."""
    return "://" in shard.location


def find_shards(location: str) -> Iterator[Shard]:
    """The tars of a location of [`unseg_hf.data.sa1b.Sa1bSource`], in stored order.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the list has a line that is none of its kind.
    """
    if "://" in location or not location.endswith((".txt", ".tsv")):
        yield from (Shard(shown(where), where) for where in _matches(location))
        return
    found = False
    for line in Path(location).read_text().splitlines():
        fields = line.strip().split("\t")
        if fields in ([""], ["file_name", "cdn_link"]):
            continue
        if len(fields) > 2:
            raise ValueError(f"{location}: {line!r} must be a location, or a name, a tab and a location")
        for where in _matches(fields[-1]):
            found = True
            # The address of a link of Meta's says nothing; the name beside it does. A local tar is read by its name.
            yield Shard(fields[0] if len(fields) == 2 and "://" in where else shown(where), where)
    if not found:
        raise FileNotFoundError(f"{location} lists no tars; write a location in each line")


def _matches(location: str) -> list[str]:
    if location.startswith(("http://", "https://")):
        return [location]
    if "://" in location:
        import fsspec

        system, path = fsspec.core.url_to_fs(location)
        found = [system.unstrip_protocol(match) for match in system.glob(path)] if "*" in path else [location]
    else:
        # A name may hold what a pattern means otherwise.
        found = filter(os.path.isfile, [location] if os.path.exists(location) else glob.glob(location))
    found = sorted(found)
    if not found:
        raise FileNotFoundError(f"{location}: no such tar; for those of a folder write folder/*.tar")
    return found


def read_pairs(shard: Shard) -> Iterator[Pair]:
    """The pairs of a tar, in stored order.

    Raises:
        ValueError: the tar is damaged or holds no pairs, or a member has no partner beside it; names both.
        OSError: the tar cannot be opened, or its connection broke.
    """
    if is_remote(shard):
        with contextlib.closing(_Stream(shard)) as file:
            yield from _paired(shard.name, _members(shard.name, file, "r|*"))
    else:
        yield from _local_pairs(shard.location, os.stat(shard.location).st_mtime_ns)


def count_pairs(shard: Shard) -> int:
    """Pairs of a local tar; raises as `read_pairs` does."""
    return _count(shard.location, os.stat(shard.location).st_mtime_ns)


@functools.cache
def _count(path: str, changed_ns: int) -> int:
    return len(_local_pairs(path, changed_ns))


# A pair takes about 500 bytes, and those of SA-1B's 1000 tars would take gigabytes in each process: some are kept.
@functools.lru_cache(maxsize=32)
def _local_pairs(path: str, changed_ns: int) -> tuple[Pair, ...]:
    with open(path, "rb") as file:
        return tuple(_paired(path, _members(path, file, "r:")))


def _paired(tar: str, members: Iterable[Member]) -> Iterator[Pair]:
    held, empty = None, True
    for member in members:
        if held is None:
            held = member
            continue
        image, annotations = sorted((held, member), key=lambda m: m.name.endswith(".json"))
        stem = image.name.removesuffix(".jpg")
        if annotations.name != f"{stem}.json" or image.name != f"{stem}.jpg":
            raise _alone(tar, held)
        yield Pair(tar, image, annotations)
        held, empty = None, False
    if held is not None:
        raise _alone(tar, held)
    if empty:
        raise ValueError(f"{tar} holds no sa_N.jpg with its sa_N.json; is it one of SA-1B's tars?")


def _alone(tar: str, member: Member) -> ValueError:
    stem, suffix = os.path.splitext(member.name)
    partner = stem + (".json" if suffix == ".jpg" else ".jpg")
    return ValueError(
        f"{tar}: {member.name} has no {partner} beside it; put both into this tar, one after the other "
        "(tar --sort=name does), or leave both out"
    )


class WholeTarInfo(tarfile.TarInfo):
    """Says so where tarfile takes a cut archive for the end of one: nothing, or no header, where one must be."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _members(name: str, file: Any, mode: str) -> Iterator[Member]:
    """The images and annotations of a tar, with their data if `mode` is one of a stream."""
    last = "its beginning"
    try:
        with tarfile.open(fileobj=file, mode=mode, tarinfo=WholeTarInfo) as tar:
            for info in tar:
                last = info.name
                path = PurePosixPath(info.name)
                if info.isdir() or path.name.startswith("."):
                    continue
                if not info.isfile() or path.suffix not in (".jpg", ".json"):
                    raise ValueError(
                        f"{name}: {info.name} is neither a .jpg nor a .json file; leave it out of the tar"
                    )
                data = tar.extractfile(info).read() if mode.startswith("r|") else None
                yield Member(str(path), info.offset_data, info.size, data)
    except tarfile.TarError as error:
        raise ValueError(
            f"{name} is damaged, or no tar without compression, at {last}: {error}; download or write it again"
        ) from error


class _Stream:
    """A remote tar, as far as tarfile needs it; all that goes wrong is a ConnectionError that names it."""

    def __init__(self, shard: Shard):
        self.name, self.position, self.pauses = shard.name, 0, (1, 5, None)
        try:
            self.file = self._opened(shard.location)
        except Exception as error:  # each of fsspec's file systems has its own
            raise ConnectionError(f"{self.name} cannot be opened ({error!r}); is its link still valid?") from error

    def _opened(self, location: str) -> Any:
        import fsspec

        options = {}
        if location.startswith(("http://", "https://")):
            import aiohttp

            request = urllib.request.Request(location, headers={"Range": "bytes=0-0"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                in_parts = answer.status == 206
            # A connection that waits while a model trains may be closed by the server; one for each part is not. Where
            # the server knows no parts, all comes in one answer, which may take hours and cannot be asked for again.
            if not in_parts:
                options["block_size"], self.pauses = 0, (None,)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)
            options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
        system, path = fsspec.core.url_to_fs(location, **options)
        return system.open(path, "rb")

    def read(self, size: int) -> bytes:
        for pause in self.pauses:
            try:
                data = self.file.read(size)
                break
            except Exception as error:
                if pause is None:
                    raise ConnectionError(
                        f"{self.name}: the connection broke after {self.position} bytes ({error!r}); resume "
                        "from the last checkpoint, or download the tar"
                    ) from error
                time.sleep(pause)
        self.position += len(data)
        return data

    def close(self) -> None:
        self.file.close()
