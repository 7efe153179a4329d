"""An HTTP proxy on the loopback that does to S3's answers what networks and busy stores do.

One request per connection; bodies are passed through unread, so only the head is parsed. What to do
with a request is asked of `decide`, which a test changes while a run goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable

PASS = "pass"
ERRORS = {
    "503": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "500": ("500 Internal Server Error", "InternalError", "We encountered an internal error."),
    "expired": ("403 Forbidden", "ExpiredToken", "The provided token has expired."),
}
FAULTS = (*ERRORS, "reset", "cut", "hang", "slow")
HANG, SLOW = 60.0, 0.15  # seconds


class Proxy:
    """Runs in a thread of its own until `close`.

    Args:
        upstream: port of the real server on 127.0.0.1.
    """

    def __init__(self, upstream: int) -> None:
        self._upstream, self.injected = upstream, Counter()
        self.decide: Callable[[], str] = lambda: PASS
        self._loop = asyncio.new_event_loop()
        self._draw = random.Random(0)  # only for how much of a body is cut
        self._open: set[asyncio.Task] = set()  # the loop itself refers to its tasks weakly
        self.port = 0
        started = threading.Event()
        self._thread = threading.Thread(target=self._serve, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)

    def close(self) -> None:
        """No more connections."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._take, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        self._loop.run_forever()
        server.close()
        for task in self._open:
            task.cancel()
        self._loop.run_until_complete(asyncio.gather(*self._open, return_exceptions=True))
        self._loop.close()

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._one(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            fault = self.decide()
            if fault != PASS:
                self.injected[fault] += 1
            if fault in ERRORS:
                await self._refuse(fault, head, reader, writer)
            elif fault == "reset":
                _reset(writer)
            else:
                if fault in ("hang", "slow"):
                    await asyncio.sleep(HANG if fault == "hang" else SLOW)
                await self._pass_on(head, reader, writer, cut=fault == "cut")
        with contextlib.suppress(OSError):
            writer.close()

    async def _refuse(
        self, fault: str, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        fields = dict(_fields(head))
        if "100-continue" not in fields.get("expect", ""):
            await reader.readexactly(int(fields.get("content-length", 0)))
        status, code, text = ERRORS[fault]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{text}</Message></Error>"
        shown = b"" if head.startswith(b"HEAD") else body.encode()
        writer.write(
            f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            f"Content-Length: {len(shown)}\r\n\r\n".encode()
            + shown
        )
        await writer.drain()

    async def _pass_on(
        self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool
    ) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._upstream)
        lines = [
            line for line in head[:-4].split(b"\r\n") if not line.lower().startswith(b"connection:")
        ]
        back.write(b"\r\n".join([*lines, b"Connection: close", b"", b""]))
        sends = cut and lines[0].startswith(b"PUT") and self._draw.random() < 0.5
        up = asyncio.create_task(_pipe(reader, back, self._draw.randrange(4096) if sends else None))
        try:
            short = self._draw.randrange(400) if cut and not sends else None
            await _pipe(there, writer, short)
            if cut:
                _reset(writer)
        finally:
            up.cancel()
            back.close()


async def _pipe(
    source: asyncio.StreamReader, target: asyncio.StreamWriter, most: int | None
) -> None:
    """Copy; with `most` only so many bytes, then close `target` abruptly."""
    sent = 0
    while data := await source.read(1 << 16):
        if most is not None and sent + len(data) >= most:
            target.write(data[: most - sent])
            await target.drain()
            _reset(target)
            return
        target.write(data)
        sent += len(data)
        await target.drain()


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    plain = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _fields(head: bytes):
    for line in head.decode("latin-1").split("\r\n")[1:]:
        name, _, value = line.partition(":")
        yield name.lower(), value.strip()
