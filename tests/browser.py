"""A page as a phone or a desk shows it: Chromium without a window, told what to do over its debugging protocol."""

import asyncio
import json
import shutil
import subprocess
import time
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from urllib.parse import urlsplit

from tornado.httpclient import AsyncHTTPClient
from tornado.websocket import websocket_connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_DOWNLOADS = 10  # that Chromium gives without asking the reader
SECONDS = 60  # for a browser to start, a page to load, a file to arrive

MISSING = "[...document.images].filter(image => !image.complete || !image.naturalWidth).map(image => image.src)"
SHOWN = "({images: document.images.length, background: parseInt(getComputedStyle(document.body).backgroundColor.match(/[0-9]+/))})"


@dataclass(frozen=True)
class Seen:
    """What a page came to.

    width: of all that is on it, in CSS pixels. errors: of console and network. missing: pictures. outside: addresses of other hosts.
    shown: how many images, and how bright the background is, 0 to 255. downloads: files that its links gave.
    answers: what the page's JavaScript gave for what it was asked.
    """

    width: int
    errors: list[str]
    missing: list[str]
    outside: list[str]
    shown: dict[str, int]
    downloads: list[str]
    answers: dict[str, object]


def visit(
    url: str,
    folder: Path,
    width: int = 375,
    dark: bool = False,
    screenshot: Path | None = None,
    asked: Mapping[str, str] = MappingProxyType({}),
) -> Seen:
    """Opens the page, clicks each of its links that download, and closes the browser.

    folder: empty, for its files. asked: expressions of JavaScript by name, answered before the clicks.
    """
    return asyncio.run(_visit(url, folder, width, dark, screenshot, asked))


async def _visit(url: str, folder: Path, width: int, dark: bool, screenshot: Path | None, asked: Mapping[str, str]) -> Seen:
    async with opened(url, folder, width, dark) as page:
        return await _look(page, url, folder / "downloads", screenshot, asked)


@asynccontextmanager
async def opened(url: str, folder: Path, width: int = 1280, dark: bool = False) -> "AsyncIterator[Page]":
    """A browser of its own with the page, loaded. folder: empty, for its files and downloads."""
    profile, downloads = folder / "profile", folder / "downloads"
    downloads.mkdir(parents=True)
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "about:blank",
    ]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        ports = profile / "DevToolsActivePort"
        await _until(lambda: ports.is_file() and ports.read_text().count("\n") >= 1)
        tabs = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{ports.read_text().split()[0]}/json", request_timeout=SECONDS)
        address = next(tab["webSocketDebuggerUrl"] for tab in json.loads(tabs.body) if tab["type"] == "page")
        page = Page(await websocket_connect(address, max_message_size=2**28))
        for domain in ("Runtime", "Log", "Network"):
            await page.do(f"{domain}.enable")
        await page.do("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600)
        await page.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        await page.do("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        await page.do("Page.navigate", url=url)
        await page.until(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        yield page
    finally:
        browser.kill()
        browser.wait()


async def _look(page: "Page", url: str, downloads: Path, screenshot: Path | None, asked: Mapping[str, str]) -> Seen:
    full = await page.value("document.documentElement.scrollWidth")
    missing, shown = await page.value(MISSING), await page.value(SHOWN)
    if screenshot:
        await page.screenshot(screenshot)
    answers = {name: await page.value(expression) for name, expression in asked.items()}
    wanted = await page.value("[...document.querySelectorAll('a[download]')].map(link => link.href.split('/').pop())")
    await page.value("document.querySelectorAll('a[download]').forEach(link => link.click())")
    await _until(lambda: all((downloads / name).is_file() for name in wanted[:MOST_DOWNLOADS]))
    return Seen(full, page.errors(), missing, page.outside(url), shown, sorted(path.name for path in downloads.iterdir()), answers)


class Page:
    """The debugging protocol's commands and events of one tab."""

    def __init__(self, socket):
        self.socket, self.number, self.events = socket, 0, []

    async def do(self, method: str, **parameters) -> dict:
        self.number += 1
        number = self.number
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = await self._next()
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    async def value(self, expression: str):
        result = await self.do("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Waits until an expression of JavaScript is true."""
        end = time.monotonic() + SECONDS
        while not await self.value(f"Boolean({expression})"):
            assert time.monotonic() < end, f"waited in vain for {expression}"
            await asyncio.sleep(0.05)

    async def drop(self, selector: str, files: Sequence[Path]) -> None:
        """Gives files to an element that takes some."""
        root = await self.do("DOM.getDocument")
        node = await self.do("DOM.querySelector", nodeId=root["root"]["nodeId"], selector=selector)
        await self.do("DOM.setFileInputFiles", files=[str(file) for file in files], nodeId=node["nodeId"])

    async def screenshot(self, file: Path) -> None:
        shot = await self.do("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(b64decode(shot["data"]))

    def outside(self, url: str) -> list[str]:
        """Addresses of other hosts than that of the page."""
        requested = [event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [address for address in requested if urlsplit(address).netloc not in (urlsplit(url).netloc, "")]

    def errors(self) -> list[str]:
        """A file that is downloaded breaks off the loading of its own page, which is none."""
        found = []
        for event in self.events:
            method, parameters = event["method"], event["params"]
            bad = method == "Runtime.exceptionThrown" or method == "Runtime.consoleAPICalled" and parameters["type"] == "error"
            bad = bad or method == "Log.entryAdded" and parameters["entry"]["level"] == "error"
            if bad or method == "Network.loadingFailed" and not parameters["canceled"]:
                found.append(json.dumps(parameters))
        return found

    async def _next(self) -> dict:
        text = await asyncio.wait_for(self.socket.read_message(), SECONDS)
        assert text is not None, "the browser is gone"
        message = json.loads(text)
        if "method" in message:
            self.events.append(message)
        return message


async def _until(true) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end, "waited in vain"
        await asyncio.sleep(0.05)
