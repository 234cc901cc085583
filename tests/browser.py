"""Headless Chromium for tests, driven by the WebDriver protocol (W3C) over plain HTTP: no package is needed.

    with Browser(folder) as browser:
        browser.go("http://127.0.0.1:8000/")
        browser.click("#undo")

What the browser logs and every request that a page sends are kept (`messages`, `requests`).
"""

from __future__ import annotations

import base64
import http.client
import json
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
WHY_NOT = (
    None if CHROMIUM and DRIVER else "there is no Chromium to drive: apt-get install chromium chromium-driver adds it"
)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root, and open pages of their own server only
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol gives to elements
REPLY_LIMIT_S = 60.0


class Browser:
    """One window with a profile of its own. `folder` gets the profile; `language` is the browser's."""

    def __init__(self, folder: Path, *, language: str = "en-US") -> None:
        self._driver = subprocess.Popen(
            [str(DRIVER), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._port = self._port_of_driver()
        arguments = [*FLAGS, f"--user-data-dir={folder}", f"--accept-lang={language}", "--window-size=1400,900"]
        wanted = {
            "goog:chromeOptions": {"binary": CHROMIUM, "args": arguments},
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self._session = ""
        try:
            made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        except BaseException:
            self.close()
            raise
        self._session = f"/session/{made['sessionId']}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        try:
            if self._session:
                self._ask("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.wait(10)
            assert self._driver.stdout is not None
            self._driver.stdout.close()

    def go(self, address: str) -> None:
        self._post("/url", {"url": address})

    def run(self, script: str, *values: Any) -> Any:
        """What the body of a function returns, with `arguments`; a promise is awaited."""
        return self._post("/execute/sync", {"script": script, "args": list(values)})

    def until(self, expression: str, *, seconds: float = 20.0) -> Any:
        """The value of an expression once it is truthy; fails when that takes too long."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {expression}")):
            if time.monotonic() > end:
                raise AssertionError(f"never came true: {expression}\n{self.run('return document.body.innerText')}")
            time.sleep(0.05)
        return found

    def find(self, selector: str) -> dict[str, str]:
        """An element, which can be a value for `run`."""
        return self._post("/element", {"using": "css selector", "value": selector})

    def find_all(self, selector: str) -> list[dict[str, str]]:
        return list(self._post("/elements", {"using": "css selector", "value": selector}))

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return str(self._get(f"/element/{self.find(selector)[ELEMENT]}/text"))

    def click(self, selector: str) -> None:
        self._post(f"/element/{self.find(selector)[ELEMENT]}/click", {})

    def write(self, selector: str, text: str) -> None:
        """Types into an element; for a file input, paths, one a line."""
        self._post(f"/element/{self.find(selector)[ELEMENT]}/value", {"text": text})

    def draw(self, selector: str, strokes: list[list[tuple[float, float]]], *, pointer: str = "mouse") -> None:
        """Strokes with a mouse or a finger ("touch"); points are shares of the element's width and height."""
        self.run("arguments[0].scrollIntoView({block: 'center'})", self.find(selector))
        box = self.run("return arguments[0].getBoundingClientRect().toJSON()", self.find(selector))
        actions: list[dict[str, Any]] = []
        for stroke in strokes:
            places = [(round(box["x"] + x * box["width"]), round(box["y"] + y * box["height"])) for x, y in stroke]
            moves = [{"type": "pointerMove", "x": x, "y": y, "duration": 10} for x, y in places]
            actions += [
                moves[0],
                {"type": "pointerDown", "button": 0},
                *moves[1:],
                {"type": "pointerUp", "button": 0},
            ]
        source = {"type": "pointer", "id": pointer, "parameters": {"pointerType": pointer}, "actions": actions}
        self._post("/actions", {"actions": [source]})

    def press(self, *keys: str) -> None:
        """Keys, wherever the focus is: all are held, one after the other, then all are let go."""
        actions = [{"type": "keyDown", "value": key} for key in keys]
        actions += [{"type": "keyUp", "value": key} for key in reversed(keys)]
        self._post("/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._get("/screenshot")))

    def devtools(self, command: str, **values: Any) -> Any:
        """A command of Chromium's own protocol, for what WebDriver has no word for: colours, sizes, networks."""
        return self._post("/goog/cdp/execute", {"cmd": command, "params": values})

    def size(self, width: int, height: int) -> None:
        """The size of the page in CSS pixels, which may be smaller than any window."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def messages(self) -> list[str]:
        """Warnings and errors of the console since the last call."""
        return [e["message"] for e in self._log("browser") if e["level"] in ("WARNING", "SEVERE")]

    def requests(self) -> list[str]:
        """The addresses that pages asked for since the last call."""
        events = [json.loads(entry["message"])["message"] for entry in self._log("performance")]
        sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _log(self, kind: str) -> list[dict[str, Any]]:
        return list(self._post("/se/log", {"type": kind}))

    def _get(self, path: str) -> Any:
        return self._ask("GET", self._session + path)

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        return self._ask("POST", self._session + path, content)

    def _ask(self, method: str, path: str, content: dict[str, Any] | None = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REPLY_LIMIT_S)
        try:
            connection.request(method, path, None if content is None else json.dumps(content))
            reply = connection.getresponse()
            value = json.loads(reply.read())["value"]
        finally:
            connection.close()
        if reply.status != 200:
            raise AssertionError(f"{value['error']}: {value['message'].splitlines()[0]}")
        return value

    def _port_of_driver(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise AssertionError("chromedriver ended before it had a port")
