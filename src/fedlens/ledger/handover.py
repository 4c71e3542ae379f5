"""Work handed over to a thread of its own, as long as not too many bytes are on their way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

IN_FLIGHT = 256 << 20  # bytes handed over and not written yet: two chunks of a large cohort, or some whole small rounds


class Handover:
    """One thread that does what it is given, in order; who gives waits while it has too much.

    Attributes:
      in_flight: the bytes of what is waiting or being done.
    """

    def __init__(self, name: str) -> None:
        """Starts nothing yet; the thread, called `name`, begins with the first work."""
        self.in_flight = 0
        self._changed = threading.Condition()
        self._thread = ThreadPoolExecutor(1, name)

    def submit(self, work: Callable[[], None], size: int) -> None:
        """Hands over work that keeps `size` bytes in memory until it is done; it must not raise.

        Waits until it fits beside what is on its way in `IN_FLIGHT` bytes; work larger than that, until it is alone.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self.in_flight or self.in_flight + size <= IN_FLIGHT)
            self.in_flight += size
        self._thread.submit(self._do, [work], size)

    def wait(self) -> None:
        """Waits until all work is done."""
        self._thread.submit(lambda: None).result()

    def close(self) -> None:
        """Waits until all work is done, and ends the thread."""
        self._thread.shutdown()

    def _do(self, work: list[Callable[[], None]], size: int) -> None:
        try:
            work.pop()()  # popped: the arrays are free as soon as it is done
        finally:
            with self._changed:
                self.in_flight -= size
                self._changed.notify_all()
