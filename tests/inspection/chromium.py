"""Controls headless Chromium through its DevTools pipe: it acts on a page as a person does, and
reads what is then visible."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import os
import pathlib
import select
import shutil
import subprocess
import time

import numpy as np
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT = 60  # seconds, for one answer


def find() -> str | None:
    """The browser's program: the variable CHROMIUM, or the first that is installed."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """One tab of one browser; close it when done.

    Attributes:
      console: every message of the console and every uncaught exception, since the page was opened.
      requests: the addresses of all files that the page requested.
    """

    def __init__(self, program: str, profile: pathlib.Path, *, width: int = 1200, height: int = 760):
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads commands from descriptor 3 and answers on descriptor 4.
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "sh", program, "--headless", "--no-sandbox", "--disable-gpu",
             "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe", f"--user-data-dir={profile}",
             f"--window-size={width},{height}", "about:blank"],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.console: list[str] = []
        self.requests: list[str] = []
        target = next(each for each in self.send("Target.getTargets")["targetInfos"] if each["type"] == "page")
        self._session = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(width, height)

    def close(self) -> None:
        self._session = None
        with contextlib.suppress(EOFError):  # it may end before it answers
            self.send("Browser.close")
        self._process.wait(TIMEOUT)
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **parameters: object) -> dict:
        """Gives a command and waits for its result."""
        number = next(self._numbers)
        command = {"id": number, "method": method, "params": parameters}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]

    def _receive(self) -> dict:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], TIMEOUT)[0]:
                raise TimeoutError(f"no answer of the browser in {TIMEOUT} s")
            read = os.read(self._read, 1 << 20)
            if not read:
                raise EOFError("the browser has ended")
            self._buffer += read
        text, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(text)
        self._note(message.get("method"), message.get("params"))
        return message

    def _note(self, method: str | None, event: dict) -> None:
        if method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(part.get("value")) for part in event["args"]))
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded":
            self.console.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def open(self, address: str, ready: str = "document.documentElement?.dataset.ready !== undefined") -> float:
        """Opens an address; returns the seconds until the page is ready and painted."""
        self.console.clear()
        self.requests.clear()
        begin = time.perf_counter()
        self.send("Page.navigate", url=address)
        self.until(ready)
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return time.perf_counter() - begin

    def run(self, script: str) -> object:
        """The value of a JavaScript expression, awaited where it is a promise."""
        result = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(result["exceptionDetails"]["exception"]["description"])
        return result["result"].get("value")

    def until(self, condition: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not self.run(condition):
            if time.monotonic() > end:
                raise TimeoutError(f"never true: {condition}")
            time.sleep(0.005)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the window, in pixels, and whether its system is dark."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])

    def box(self, selector: str, index: int = 0) -> dict[str, float]:
        """Where an element is: x, y, width and height in pixels."""
        return self.run(f"document.querySelectorAll({json.dumps(selector)})[{index}].getBoundingClientRect().toJSON()")

    def hover(self, selector: str, index: int = 0, *, at: tuple[float, float] = (0.5, 0.5)) -> tuple[float, float]:
        """Moves the mouse to an element, ``at`` fractions of its width and height."""
        box = self.box(selector, index)
        x, y = box["x"] + at[0] * box["width"], box["y"] + at[1] * box["height"]
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, selector: str, index: int = 0, *, at: tuple[float, float] = (0.5, 0.5)) -> None:
        x, y = self.hover(selector, index, at=at)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, *, shift: bool = False) -> None:
        code = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
                "ArrowDown": 40}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code,
                      modifiers=8 * shift, **(text if kind == "keyDown" else {}))

    def choose(self, selector: str, value: object) -> None:
        """Chooses an option as a user does: the page receives an event."""
        self.run(f"""(() => {{
            const select = document.querySelector({json.dumps(selector)});
            select.value = {json.dumps(str(value))};
            for (const name of ["input", "change"]) select.dispatchEvent(new Event(name, {{bubbles: true}}));
        }})()""")

    def screenshot(self, selector: str | None = None) -> np.ndarray:
        """A screenshot of the page, or of an element: ``[height, width, 3]``, from 0 to 255."""
        clip = {}
        if selector:
            box = self.box(selector)
            clip = {"clip": {name: box[name] for name in ("x", "y", "width", "height")} | {"scale": 1}}
        png = self.send("Page.captureScreenshot", format="png", **clip)["data"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
