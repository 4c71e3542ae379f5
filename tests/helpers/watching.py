"""An audit hook of the interpreter: what is opened, unpickled, executed or imported, and where."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class Watch:
    """What the interpreter's audit hook saw while it was on."""

    def __init__(self) -> None:
        self.root: str | None = None
        self.wrong: list[str] = []
        sys.addaudithook(self._see)  # it stays for the life of the process, and costs nothing while it is off

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if self.root is None:
            return
        if event in ("open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.link"):
            for path in arguments[: 2 if event in ("os.rename", "os.link") else 1]:
                if isinstance(path, str | bytes | os.PathLike):
                    name = os.path.realpath(os.fsdecode(path))
                    if not (name + "/").startswith(self.root + "/") and not name.startswith("/proc/"):
                        self.wrong.append(f"{event} {name}")
        elif event.startswith(
            ("pickle.", "subprocess.", "os.system", "os.exec", "os.spawn", "socket.", "ctypes.dlopen")
        ):
            self.wrong.append(event)
        elif event in ("exec", "import", "compile"):
            self.wrong.append(f"{event} {arguments[0]!r}")

    @contextlib.contextmanager
    def on(self, root: Path) -> Iterator[None]:
        self.wrong, self.root = [], str(root.resolve())
        try:
            yield
        finally:
            self.root = None
        assert not self.wrong, self.wrong
