"""A headless Chromium that is driven by its DevTools protocol through two pipes, without further packages."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One page of a headless browser.

    Args:
        profile: an empty folder for its files.
    """

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None
        read, self._out = os.pipe()
        self._in, write = os.pipe()
        # Chromium reads commands from descriptor 3, and writes answers to 4.
        command = (
            f'exec "$0" --headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars '
            f"--no-first-run --disable-background-networking --disable-component-update --disable-sync "
            f'--user-data-dir="$1" --remote-debugging-pipe about:blank 3<&{read} 4>&{write}'
        )
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, str(profile)],
            pass_fds=(read, write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": str(profile)},
        )
        os.close(read), os.close(write)
        self._buffer, self._number = b"", 0
        self.events: list[dict[str, Any]] = []
        self.workers: list[str] = []
        attached = self.call("Target.attachToTarget", on_browser=True, targetId=self._page(), flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Target.setAutoAttach", autoAttach=True, waitForDebuggerOnStart=False, flatten=True)
        self.look((1000, 900), dark=False)

    def _page(self, seconds: float = 120.0) -> str:
        """The id of the first page, which a busy machine opens some time after the browser answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            targets = self.call("Target.getTargets", on_browser=True)["targetInfos"]
            pages: list[str] = [target["targetId"] for target in targets if target["type"] == "page"]
            if pages:
                return pages[0]
            time.sleep(0.1)
        raise TimeoutError(f"the browser opened no page within {seconds:g} seconds")

    def look(self, size: tuple[int, int], dark: bool) -> None:
        """Sets the size of the window in pixels, and whether the system prefers dark colours."""
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)

    def call(
        self, method: str, *, on_browser: bool = False, session: str | None = None, **params: Any
    ) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if not on_browser:
            message["sessionId"] = session or self.session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == message["id"]:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _receive(self, seconds: float = 120.0) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._in], [], [], seconds)[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._in, 1 << 16)
            if not part:
                raise RuntimeError(f"the browser ended, with status {self._process.wait()}")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        found = json.loads(message)
        if "method" in found:
            self.events.append(found)
            if found["method"] == "Target.attachedToTarget":
                self.workers.append(found["params"]["sessionId"])
        return found

    def evaluate(self, code: str, session: str | None = None) -> Any:
        """The value of an expression; a promise is awaited."""
        result = self.call(
            "Runtime.evaluate", session=session, expression=code, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{code}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait_for(self, code: str, seconds: float = 120.0) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.evaluate(code):
            if time.monotonic() > end:
                raise TimeoutError(f"{code} is not true: {self.said()}")
            time.sleep(0.2)

    def choose_file(self, selector: str, path: Path) -> None:
        """Gives a file to an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path) -> None:
        """Saves the whole page as a PNG."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def said(self) -> list[str]:
        """What the page wrote to the console, and its errors."""
        methods = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [str(event["params"])[:400] for event in self.events if event["method"] in methods]

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
        os.close(self._in), os.close(self._out)
