"""The claim on a ledger: whoever changes one holds its lock meanwhile, and starts from whole rounds.

The lock is an exclusive `flock` on `run.json`. It is given up by closing its descriptor, and goes with the process.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from fedlens.errors import LedgerError
from fedlens.ledger import durable, format
from fedlens.ledger import folder as folders
from fedlens.ledger.format import FORMAT_VERSION, Run


def claim(folder: Path) -> tuple[Run, int]:
    """Locks a ledger, and removes what an interrupted round left behind; one of format version 1 becomes version 2.

    Returns:
      What `run.json` says, and its locked descriptor.

    Raises:
      LedgerError: there is no ledger, it is damaged or cannot be written, or another writer has it.
    """
    run = format.read_run(folder)
    try:
        lock = os.open(folder / folders.RUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            if not durable.lock(lock):
                raise LedgerError(
                    f"Expected a ledger that nobody writes, found a running writer ({durable.holder_of(lock)}), "
                    f"in {folder}. Wait for it."
                )
            folders.clear_torn(folder)
            if run.format_version != FORMAT_VERSION:
                run = replace(run, format_version=FORMAT_VERSION)
                lock = folders.replace_run(folder, format.to_json(run), lock)
        except BaseException:
            os.close(lock)
            raise
    except LedgerError:
        raise
    except OSError as error:
        raise LedgerError(f"Expected to open a ledger for writing, found: {error.strerror}, in {folder}.") from error
    return run, lock
