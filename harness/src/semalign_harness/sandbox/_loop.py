"""Event loops for a process that can make neither sockets nor epoll descriptors.

asyncio is imported where it is used: it is slow to load, few programs need it, and this file cannot be read any more
once the process is confined.
"""

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any
else:  # typing would take a quarter of the time that a program takes
    Any = object


class Waker:
    """A pipe with the methods of the two sockets through which threads wake a loop."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        """The end that becomes readable."""
        return self.reader

    def recv(self, size: int) -> bytes:
        """What has been sent.

        Raises:
            BlockingIOError: nothing.
        """
        import select

        if not select.select([self.reader], [], [], 0)[0]:
            raise BlockingIOError
        return os.read(self.reader, size)

    def send(self, data: bytes) -> None:
        """Wake the loop."""
        os.write(self.writer, data)

    def close(self) -> None:
        """Close both ends."""
        if self.reader >= 0:
            os.close(self.reader)
            os.close(self.writer)
            self.reader = -1


def _make_self_pipe(loop: Any) -> None:
    loop._ssock = loop._csock = Waker()
    loop._internal_fds += 1
    loop._add_reader(loop._ssock.fileno(), loop._read_from_self)


def prepare() -> None:
    """Let asyncio work in this process."""
    import selectors
    from asyncio import selector_events

    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[assignment,misc]
    selector_events.BaseSelectorEventLoop._make_self_pipe = _make_self_pipe  # type: ignore[attr-defined]


def run(awaitable: Any) -> Any:
    """The result of something to await, also inside a loop that runs."""
    from asyncio import events

    async def wait() -> Any:
        return await awaitable

    prepare()
    running = events._get_running_loop()
    events._set_running_loop(None)
    loop = events.new_event_loop()
    try:
        return loop.run_until_complete(wait())
    finally:
        loop.close()
        events._set_running_loop(running)
