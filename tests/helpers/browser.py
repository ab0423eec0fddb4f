"""A headless Chromium driven over a pipe, with what a page logged and asked for: no driver, no port, no dependency."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32}
SECONDS = 30
LAUNCH = "import os, sys; [os.dup2(int(sys.argv[n]), n + 2) for n in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"


class Browser:
    """One page of a browser; its parameters, results and events are those of the DevTools protocol."""

    def __init__(self, sending: int, receiving: int) -> None:
        self.sending = sending
        self.receiving = receiving
        self.left = b""
        self.number = 0
        self.session = ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; what happens before it comes is kept in `events`."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.sending, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer["error"]
        return answer["result"]

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.left:
            read = os.read(self.receiving, 1 << 20)
            assert read, "the browser has ended"
            self.left += read
        message, self.left = self.left.split(b"\0", 1)
        return json.loads(message)

    def open(self, page: Path, *, width: int = 1280, height: int = 800, dark: bool = False) -> None:
        """Loads a page; narrow ones are those of a phone."""
        phone = width < 500
        self.events.clear()
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1 + phone, mobile=phone
        )
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.media(**{"prefers-color-scheme": "dark" if dark else "light"})
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState === 'complete'")

    def media(self, kind: str = "", **features: str) -> None:
        """Emulates a medium and what the reader prefers."""
        named = [{"name": name, "value": value} for name, value in features.items()]
        self.call("Emulation.setEmulatedMedia", media=kind, features=named)

    def run(self, expression: str) -> Any:
        """The value of an expression on the page, awaited when it is a promise."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns once an expression is true on the page."""
        end = time.monotonic() + SECONDS
        while not self.run(expression):
            assert time.monotonic() < end, f"never true: {expression}"
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Presses a key of the keyboard and lets it go."""
        named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": KEYS[key]}
        text = {" ": {"text": " "}, "Enter": {"text": "\r"}}.get(key, {})
        self.call("Input.dispatchKeyEvent", type="keyDown", **named, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def picture(self, path: Path, **params: Any) -> None:
        """Writes what is on the screen as a PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **params)["data"]))

    def pdf(self) -> bytes:
        """The page as it is printed."""
        return base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"])

    def errors(self) -> list[str]:
        """What the page threw and what was logged as an error or a warning."""
        self.run("0")
        thrown = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        logged = [e["params"] for e in self.events if e["method"] in ("Runtime.consoleAPICalled", "Log.entryAdded")]
        bad = [entry for entry in logged if (entry.get("entry") or entry).get("level", entry.get("type")) != "info"]
        return [json.dumps(entry) for entry in thrown + bad]

    def requests(self) -> list[str]:
        """Addresses that the page asked for, other than its own and those inside it."""
        self.run("0")
        sent = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in sent if not url.startswith(("file:", "data:", "blob:"))]


@contextlib.contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """Starts a browser with an empty folder for its profile, and ends it."""
    ends = [end for _ in range(2) for end in os.pipe()]
    # The browser reads from 3 and writes to 4; numbers from 10 on are in the way of neither.
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in ends]
    read, send, receive, write = moved
    for end in ends:
        os.close(end)
    started = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(read), str(write), str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}"],
        pass_fds=(read, write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(read)
    os.close(write)
    try:
        yield Browser(send, receive)
    finally:
        os.close(send)  # which ends it
        try:
            started.wait(10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        os.close(receive)
