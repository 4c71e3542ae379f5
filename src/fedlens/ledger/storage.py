"""Where a ledger's files lie: in a local folder, or anywhere that fsspec reaches (S3, GCS, HTTP, memory, ...).

Reading asks little of a place: list a folder, say what is there, hand out a whole small file, fill memory from ranges
of bytes. Only names that this package makes from round and part numbers are asked for, never one that stands in a file.
A remote place is asked for all ranges of one read at once: what a request costs there is its round trip.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedlens.errors import LedgerError
from fedlens.ledger import durable

Piece = tuple[str, int, memoryview]  # a file's name, the offset to read from, the memory to fill


class Store(Protocol):
    """A folder that files are read from, by names relative to it, with `/`. Errors are `LedgerError`s with the name."""

    def where(self, name: str = "") -> str:
        """The path or URL of a file, for messages."""

    def stamps(self, folder: str, suffix: str) -> dict[str, Hashable]:
        """The names in a folder that end so, as it is now, each with its file's stamp."""

    def stamp(self, name: str) -> Hashable | None:
        """Something that changes when the file does; None when there is no such file."""

    def size(self, name: str) -> int:
        """The bytes of a file."""

    def read(self, name: str) -> bytes:
        """The content of a file."""

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Fills each piece's memory from its file."""

    def total_size(self) -> int:
        """The bytes of all files."""

    def is_locked(self, name: str) -> bool | None:
        """Whether a writer holds the lock on a file; None where locks cannot be seen."""


def open_store(path: str | os.PathLike[str], options: Mapping[str, Any] | None = None) -> Store:
    """The place that a path or an fsspec URL names.

    Args:
      path: a path; a text with `://` in it is a URL, chained ones (`simplecache::s3://...`) too.
      options: what fsspec's file system takes, such as `{"anon": True}`; only for URLs.

    Raises:
      LedgerError: options for a path, a URL of an unknown kind, or a kind whose package is not installed.

    Example:
      >>> open_store("runs/digits").where("run.json")
      'runs/digits/run.json'
    """
    text = os.fspath(path)
    if not isinstance(path, str) or "://" not in text:
        if options:
            raise LedgerError(f"Expected storage_options with a URL, found them with a path, in {text}. Drop them.")
        return LocalStore(Path(text))
    try:
        import fsspec  # only ledgers elsewhere pay for the import
    except ImportError:
        raise LedgerError(
            f"Expected the package fsspec, which reads URLs, found none, for {text}. Run `pip install fsspec`, "
            "or `pip install 'fedlens[s3]'` for S3."
        ) from None
    try:
        files, root = fsspec.core.url_to_fs(text, **(options or {}))
    except Exception as error:  # each kind of storage has errors of its own
        raise LedgerError(
            f"Expected a URL that fsspec opens, found: {error}, in {text}. Check it and storage_options."
        ) from error
    if type(files).__module__ == "fsspec.implementations.local":
        return LocalStore(Path(root))
    return RemoteStore(text.rstrip("/"), files, root.rstrip("/"))


@dataclass(frozen=True)
class LocalStore:
    """A folder of this machine."""

    path: Path

    def where(self, name: str = "") -> str:
        """See `Store`."""
        return str(self.path / name)

    def stamps(self, folder: str, suffix: str) -> dict[str, Hashable]:
        """See `Store`."""
        with self._named(folder), os.scandir(self.path / folder) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix)]
        stamps = {name: self.stamp(f"{folder}/{name}") for name in names}
        return {name: stamp for name, stamp in stamps.items() if stamp is not None}

    def stamp(self, name: str) -> Hashable | None:
        """See `Store`."""
        with self._named(name):
            try:
                found = os.stat(self.path / name)
            except FileNotFoundError:
                return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def size(self, name: str) -> int:
        """See `Store`."""
        with self._named(name):
            found = os.stat(self.path / name)
        if not stat.S_ISREG(found.st_mode):  # a pipe in a file's place would wait for a writer for ever
            raise LedgerError(f"Expected a file, found something else, in {self.where(name)}.")
        return found.st_size

    def read(self, name: str) -> bytes:
        """See `Store`."""
        self.size(name)
        with self._named(name):
            return (self.path / name).read_bytes()

    def fill(self, pieces: Sequence[Piece]) -> None:
        """See `Store`."""
        with contextlib.ExitStack() as stack:
            files: dict[str, Any] = {}
            for name, start, memory in pieces:
                with self._named(name):
                    if name not in files:
                        self.size(name)
                        files[name] = stack.enter_context((self.path / name).open("rb", buffering=0))
                    files[name].seek(start)
                    remaining = memory
                    while remaining:
                        count = files[name].readinto(remaining)
                        if not count:
                            raise _cut(self.where(name), len(remaining))
                        remaining = remaining[count:]

    def total_size(self) -> int:
        """See `Store`."""
        return durable.size_below(self.path)

    def is_locked(self, name: str) -> bool | None:
        """See `Store`."""
        with self._named(name):
            return durable.is_locked(self.path / name)

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except LedgerError:
            raise
        except OSError as error:
            raise _unreadable(error.strerror or repr(error), self.where(name)) from error


@dataclass(frozen=True)
class RemoteStore:
    """A folder that fsspec reaches.

    Attributes:
      url: the folder, for messages.
      files: the file system, an `fsspec.AbstractFileSystem`.
      root: the folder's name in it.
    """

    url: str
    files: Any
    root: str

    def where(self, name: str = "") -> str:
        """See `Store`."""
        return f"{self.url}/{name}" if name else self.url

    def stamps(self, folder: str, suffix: str) -> dict[str, Hashable]:
        """See `Store`."""
        with self._named(folder):
            self.files.invalidate_cache(self._full(folder))  # a run that is being written grows
            entries = self.files.ls(self._full(folder), detail=True)
        found = {entry["name"].rstrip("/").rpartition("/")[2]: _stamp(entry) for entry in entries}
        return {name: stamp for name, stamp in found.items() if name.endswith(suffix)}

    def stamp(self, name: str) -> Hashable | None:
        """See `Store`."""
        with self._named(name):
            try:
                self.files.invalidate_cache(self._full(name).rpartition("/")[0])
                return _stamp(self.files.info(self._full(name)))
            except FileNotFoundError:
                return None

    def size(self, name: str) -> int:
        """See `Store`."""
        with self._named(name):
            return int(self.files.info(self._full(name))["size"])

    def read(self, name: str) -> bytes:
        """See `Store`."""
        with self._named(name):
            return bytes(self.files.cat_file(self._full(name)))

    def fill(self, pieces: Sequence[Piece]) -> None:
        """See `Store`."""
        wanted = [piece for piece in pieces if piece[2].nbytes]
        if not wanted:
            return
        with self._named(wanted[0][0]):
            found = self.files.cat_ranges(
                [self._full(name) for name, _, _ in wanted],
                [start for _, start, _ in wanted],
                [start + memory.nbytes for _, start, memory in wanted],
                on_error="raise",
            )
        for (name, _, memory), content in zip(wanted, found, strict=True):
            if len(content) != memory.nbytes:
                raise _cut(self.where(name), memory.nbytes - len(content))
            memory[:] = content

    def total_size(self) -> int:
        """See `Store`."""
        with self._named(""):
            self.files.invalidate_cache()
            return int(self.files.du(self.root))

    def is_locked(self, name: str) -> bool | None:
        """See `Store`."""
        return None

    def _full(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # each kind of storage has errors of its own
            raise _unreadable(str(error) or repr(error), self.where(name)) from error


def _stamp(entry: Mapping[str, Any]) -> Hashable:
    tag = entry.get("ETag") or entry.get("etag")
    if tag:
        return str(tag)
    return tuple(str(entry.get(mark)) for mark in ("LastModified", "last_modified", "mtime", "created", "size"))


def _unreadable(found: str, where: str) -> LedgerError:
    return LedgerError(f"Expected a readable file, found: {found}, in {where}. Check that it is there and may be read.")


def _cut(where: str, missing: int) -> LedgerError:
    return LedgerError(
        f"Expected a whole file, found its end {missing} bytes early, in {where}. "
        "The file was cut: restore it from a copy."
    )
