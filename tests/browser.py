"""Headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol): no driver, no port, no library."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLAGS = (
    "--headless",
    "--no-sandbox",  # a container has no user name spaces for it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
PHONE = (390, 844)
DESKTOP = (1280, 900)
A4_PX = (718, 1046)
"""Between margins of 1 cm, at 96 px an inch."""


class Browser:
    """One page of a browser of its own; every event is kept in `events` as (method, parameters)."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        assert program, "the report is tested in a real browser: apt-get install chromium"
        # The browser reads commands from descriptor 3 and writes answers to 4.
        wired = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null'
        self._process = subprocess.Popen(
            ["sh", "-c", wired, "sh", program, *FLAGS, f"--user-data-dir={profile}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={**os.environ, "HOME": str(profile)},
        )
        assert self._process.stdin and self._process.stdout
        self._commands, self._answers = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._buffer, self._number, self._session = b"", 0, ""
        self.events: list[tuple[str, dict[str, Any]]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command and its result."""
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def open(self, file: Path, size: tuple[int, int], media: str = "screen", scheme: str = "light") -> None:
        """Show a file, and wait until all of it is there."""
        phone = size[0] < 600
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0], height=size[1], deviceScaleFactor=2 if phone else 1, mobile=phone,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.events.clear()
        self.call("Page.navigate", url=file.resolve().as_uri())
        while not any(method == "Page.loadEventFired" for method, _ in self.events):
            self._receive()

    def value(self, script: str) -> Any:
        """What an expression of JavaScript gives, as JSON; the page's own policy does not bind the debugger."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def complaints(self) -> list[Mapping[str, Any]]:
        """Everything that would stand in the console."""
        told = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        return [parameters for method, parameters in self.events if method in told]

    def requests(self) -> list[str]:
        """URLs that were asked for; `data:` ones are in the page itself."""
        asked = [p["request"]["url"] for method, p in self.events if method == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith("data:")]

    def picture(self, path: Path) -> None:
        """The whole page as a PNG."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self) -> bytes:
        """The page in print, on A4."""
        self.call("Emulation.setEmulatedMedia", media="print")
        inch = 1 / 2.54
        margins = {f"margin{side}": inch for side in ("Top", "Bottom", "Left", "Right")}
        made = self.call("Page.printToPDF", paperWidth=21 * inch, paperHeight=29.7 * inch, **margins)
        return base64.b64decode(made["data"])

    def _receive(self) -> dict[str, Any]:
        """The next message; events are kept."""
        while b"\0" not in self._buffer:
            data = os.read(self._answers, 1 << 20)
            assert data, f"the browser ended with status {self._process.wait()}"
            self._buffer += data
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        if "method" in message and message.get("sessionId") == self._session:
            self.events.append((message["method"], message.get("params", {})))
        return message
