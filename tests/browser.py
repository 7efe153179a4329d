"""A headless Chromium, spoken to over its own protocol (CDP): open a page, ask it, print it."""

from __future__ import annotations

import asyncio
import base64
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import Any

import aiohttp

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-port=0",
)  # fmt: skip
LIMIT = 30.0  # seconds for any one answer


def chromium() -> str | None:
    """Its program; None where there is none."""
    return shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """`async with Browser(folder) as browser:`; one page at a time.

    Attributes:
        said: console errors and warnings, uncaught exceptions, and requests that are not of the
            page itself, since `open`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._numbers = folder, itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.said: list[str] = []

    async def __aenter__(self) -> Browser:
        command = [
            chromium() or "chromium",
            *FLAGS,
            f"--user-data-dir={self._folder}",
            "about:blank",
        ]
        self._program = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._client = aiohttp.ClientSession()
        base = f"http://127.0.0.1:{await self._port()}"
        async with self._client.get(f"{base}/json/list") as reply:
            pages = [page for page in await reply.json() if page["type"] == "page"]
        self._socket = await self._client.ws_connect(
            pages[0]["webSocketDebuggerUrl"], max_msg_size=0
        )
        self._reader = asyncio.create_task(self._read())
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._reader.cancel()
        await self._client.close()
        self._program.kill()
        self._program.wait(LIMIT)

    async def _port(self) -> int:
        """The port that it chose, which it writes into its folder."""
        path = self._folder / "DevToolsActivePort"
        for _ in range(int(LIMIT * 20)):
            if path.exists() and (lines := path.read_text().split()):
                return int(lines[0])
            await asyncio.sleep(0.05)
        raise TimeoutError("Chromium did not start")

    async def _read(self) -> None:
        async for message in self._socket:
            told = message.json()
            if "id" in told:
                self._answers.pop(told["id"]).set_result(told)
            self._note(told.get("method", ""), told.get("params", {}))

    def _note(self, method: str, told: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.said.append(str(told["exceptionDetails"]))
        elif method == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.said.append(told["entry"]["text"])
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning"):
            self.said.append(str(told["args"]))
        elif method == "Network.requestWillBeSent":
            address = told["request"]["url"]
            if not address.startswith(("file:", "data:", "blob:")):
                self.said.append(f"asks for {address}")

    async def call(self, method: str, **given: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": given})
        told = await asyncio.wait_for(self._answers[number], LIMIT)
        if "error" in told:
            raise RuntimeError(f"{method}: {told['error']}")
        return told["result"]

    async def ask(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        told = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in told:
            raise RuntimeError(str(told["exceptionDetails"]))
        return told["result"].get("value")

    async def open(self, page: Path, width: int = 1100, *, dark: bool = False) -> None:
        """Load a file and wait until its charts are drawn."""
        self.said.clear()
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=900, deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        await self.dark(dark)
        await self.call("Page.navigate", url=page.as_uri())
        for _ in range(int(LIMIT * 20)):
            if await self.ask("document.documentElement?.dataset.drawn ?? ''") == "yes":
                return
            await asyncio.sleep(0.05)
        raise TimeoutError(f"the charts were not drawn; {self.said}")

    async def dark(self, on: bool) -> None:
        """Prefer dark pages, or light ones."""
        value = "dark" if on else "light"
        feature = {"name": "prefers-color-scheme", "value": value}
        await self.call("Emulation.setEmulatedMedia", features=[feature])
        await self.frame()

    async def frame(self) -> None:
        """Two frames later: what the page does upon a change is done."""
        await self.ask("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")

    async def picture(self) -> bytes:
        """The whole page as a PNG."""
        height = await self.ask("document.documentElement.scrollHeight")
        width = await self.ask("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        told = await self.call("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(told["data"])

    async def pdf(self) -> bytes:
        """The page as it prints on A4."""
        told = await self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(told["data"])
