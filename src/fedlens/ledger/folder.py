"""A ledger's folder: which files it has, and how it is started, found and cleared of what was not committed."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from fedlens.errors import LedgerError
from fedlens.ledger import durable

RUN = "run.json"
ROUNDS = "rounds"
CHECKPOINTS = "checkpoints"

_SCRATCH = re.compile(r"[0-9]{6,}\.[0-9]+\.scratch\.tmp")


def weights_file(folder: Path, number: int, part: int = 0) -> Path:
    """A file with local models of a round; part 0 has the global model too."""
    return folder / ROUNDS / (f"{number:06d}.safetensors" if part == 0 else f"{number:06d}.{part}.safetensors")


def scratch_file(folder: Path, number: int, part: int) -> Path:
    """Where weights wait that are read once more before the round ends, and are not stored."""
    return folder / ROUNDS / f"{number:06d}.{part}.scratch{durable.TEMPORARY}"


def clients_file(folder: Path, number: int) -> Path:
    """The file with a round's table of clients, which is its commit marker."""
    return folder / ROUNDS / f"{number:06d}.parquet"


def checkpoint_file(folder: Path, number: int) -> Path:
    """The file with what resuming after a round needs."""
    return folder / CHECKPOINTS / f"{number:06d}.safetensors"


def committed_rounds(folder: Path) -> list[int]:
    """The rounds that have their commit marker, in order.

    Raises:
      LedgerError: the folder of rounds cannot be listed.
    """
    try:
        names = [entry.name for entry in (folder / ROUNDS).iterdir()]
    except OSError as error:
        raise LedgerError(f"Expected a folder of rounds, found: {error.strerror}, in {folder / ROUNDS}.") from error
    return sorted(number for name in names if (number := number_of(name, ".parquet")) is not None)


def part_of(name: str) -> tuple[int, int] | None:
    """The round and the part whose weights a file called `name` holds, or None when it is no such file."""
    match = re.fullmatch(r"([0-9]{6,})(?:\.([1-9][0-9]*))?\.safetensors", name)
    if match is None or match[1] != f"{int(match[1]):06d}":
        return None
    return int(match[1]), int(match[2] or 0)


def number_of(name: str, suffix: str) -> int | None:
    """The round whose file is called `name`, or None when it is no such file: `000012.parquet` is of round 12."""
    match = re.fullmatch(r"([0-9]{6,})" + re.escape(suffix), name)
    if match is None or name != f"{int(match[1]):06d}{suffix}":
        return None
    return int(match[1])


def start(folder: Path, text: bytes) -> int:
    """Makes the folder of a new ledger, with `text` as its `run.json`, whose locked descriptor is returned.

    Raises:
      LedgerError: the folder is not empty, or somebody else is starting a ledger there.
      OSError: what the operating system reports.
    """
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / (RUN + durable.TEMPORARY)
    # What an earlier `create` that was killed can have left is no reason to refuse the folder.
    others = {entry.name for entry in folder.iterdir()} - {temporary.name, ROUNDS, CHECKPOINTS}
    if RUN in others:
        raise LedgerError(f"Expected no ledger yet, found one, in {folder}. Resume it, or choose another folder.")
    subfolders = [folder / ROUNDS, folder / CHECKPOINTS]
    if others or any(subfolder.is_dir() and any(subfolder.iterdir()) for subfolder in subfolders):
        raise LedgerError(f"Expected an empty folder, found files, in {folder}. Choose another folder.")
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        # The lock is taken under the temporary name and goes along with the rename: no second writer fits in between.
        if not durable.lock(descriptor) or (folder / RUN).exists():
            raise LedgerError(
                f"Expected no other writer, found one ({durable.holder_of(descriptor)}), in {folder}. "
                "Choose another folder."
            )
        for subfolder in subfolders:
            subfolder.mkdir(exist_ok=True)
        _put_in_place(folder, descriptor, text)
        durable.sync_folder(folder.parent)
    except OSError as error:
        if not isinstance(error, LedgerError):
            with contextlib.suppress(OSError):
                temporary.unlink()
        os.close(descriptor)
        raise
    return descriptor


def replace_run(folder: Path, text: bytes, lock: int) -> int:
    """Puts another `run.json` in place for the writer that holds `lock`; returns the new file's locked descriptor.

    Raises:
      OSError: what the operating system reports; the old file, and its lock, are as they were.
    """
    temporary = folder / (RUN + durable.TEMPORARY)
    descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        durable.lock(descriptor)  # nobody else has it: a writer that creates here finds a ledger first
        _put_in_place(folder, descriptor, text)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        os.close(descriptor)
        raise
    os.close(lock)
    return descriptor


def _put_in_place(folder: Path, descriptor: int, text: bytes) -> None:
    os.ftruncate(descriptor, 0)
    remaining = memoryview(text)
    while remaining:
        remaining = remaining[os.write(descriptor, remaining) :]
    os.fsync(descriptor)
    os.replace(folder / (RUN + durable.TEMPORARY), folder / RUN)
    durable.sync_folder(folder)


def clear_torn(folder: Path) -> None:
    """Removes the files of rounds that were not committed, and checkpoints other than the last committed one's.

    Raises:
      OSError: what the operating system reports.
      LedgerError: the folder of rounds cannot be listed.
    """
    committed = committed_rounds(folder)
    for path in (folder / ROUNDS).iterdir():
        part = part_of(path.name)
        half_table = number_of(path.name, ".parquet" + durable.TEMPORARY) is not None
        if half_table or _SCRATCH.fullmatch(path.name) or (part is not None and part[0] not in committed):
            path.unlink()
    clear_checkpoints(folder, committed[-1] if committed else None)


def clear_checkpoints(folder: Path, keep: int | None) -> None:
    """Removes all checkpoints but that of round `keep`.

    Raises:
      OSError: what the operating system reports.
    """
    for path in (folder / CHECKPOINTS).iterdir():
        number = number_of(path.name, ".safetensors")
        if number is not None and number != keep:
            path.unlink()


def find_ledgers(folder: str | os.PathLike[str]) -> list[Path]:
    """The ledgers in a folder: the folder itself, or those one or two levels below it, by name.

    Raises:
      LedgerError: the folder cannot be listed.
    """
    root = Path(folder)
    if not root.is_dir():
        raise LedgerError(f"Expected a folder, found none, at {root}.")
    if _is_ledger(root):
        return [root]
    found = []
    for child in _subfolders(root):
        found += [child] if _is_ledger(child) else [below for below in _subfolders(child) if _is_ledger(below)]
    return found


def _is_ledger(folder: Path) -> bool:
    return (folder / RUN).is_file() and (folder / ROUNDS).is_dir()


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise LedgerError(f"Expected a folder that can be listed, found: {error.strerror}, in {folder}.") from error
