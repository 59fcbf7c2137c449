"""Event loops for a process that can make neither sockets nor epoll descriptors.

asyncio is imported where it is used: its import is slow, few programs need it, and a confined
process cannot read this file any more.
"""

import os

from ._typing import Any


class _Waker:
    """A pipe with the methods of the two sockets through which threads wake a loop."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()

    def fileno(self) -> int:
        return self.reader

    def recv(self, size: int) -> bytes:
        import select

        if not select.select([self.reader], [], [], 0)[0]:
            raise BlockingIOError
        return os.read(self.reader, size)

    def send(self, data: bytes) -> None:
        os.write(self.writer, data)

    def close(self) -> None:
        if self.reader >= 0:
            os.close(self.reader)
            os.close(self.writer)
            self.reader = -1


def _make_self_pipe(loop: Any) -> None:
    loop._ssock = loop._csock = _Waker()
    loop._internal_fds += 1
    loop._add_reader(loop._ssock.fileno(), loop._read_from_self)


def prepare() -> None:
    """Let asyncio work in this process."""
    import selectors
    from asyncio import selector_events

    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[assignment,misc]
    selector_events.BaseSelectorEventLoop._make_self_pipe = _make_self_pipe  # type: ignore[attr-defined]


def run(awaitable: Any) -> Any:
    """Return the result of something to await, also inside a loop that runs."""
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
