"""A headless Chromium, driven over its DevTools protocol (https://chromedevtools.github.io/devtools-protocol)."""

import base64
import json
import pathlib
import shutil
import subprocess
import time
import urllib.request
from typing import Any

from websockets.sync.client import connect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-extensions"
FLAGS += " --no-first-run --disable-background-networking --disable-component-update --hide-scrollbars"
FLAGS += " --remote-debugging-port=0 --window-size=1100,800 --remote-allow-origins=*"
SECONDS = 20.0
KEYS = {"Enter": 13, "Escape": 27, "/": 191}


class Browser:
    """A browser with one page. `problems` are its console errors, uncaught exceptions and CSP violations."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Starts the browser with an empty profile in `folder`."""
        self.problems: list[str] = []
        command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = folder / "DevToolsActivePort"
        until = time.monotonic() + SECONDS
        while not (file.exists() and "\n" in file.read_text()):
            assert self._process.poll() is None and time.monotonic() < until, "chromium does not start"
            time.sleep(0.05)
        self.port = file.read_text().split()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/json") as reply:
            page = next(target for target in json.load(reply) if target["type"] == "page")
        self._socket = connect(page["webSocketDebuggerUrl"], max_size=None)
        self._last = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(10)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv(SECONDS))
            if message.get("id") == self._last:
                assert "error" not in message, message["error"]
                return message["result"]
            self._note(message)

    def _note(self, event: dict[str, Any]) -> None:
        params = event["params"]
        if event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.problems.append(str([argument.get("value") for argument in params["args"]]))
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['source']}: {params['entry']['text']}")

    def open(self, url: str) -> None:
        """Opens an address and waits until its scripts have run."""
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

    def reload(self) -> None:
        self.evaluate("window.isOld = true")
        self.call("Page.reload")
        self.wait_for("!window.isOld && document.readyState === 'complete'")

    def evaluate(self, script: str) -> Any:
        """Returns the JSON value of an expression or of the promise that it is."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Waits until an expression is true."""
        until = time.monotonic() + SECONDS
        while True:
            try:
                if self.evaluate(f"Boolean({script})"):
                    return
            except AssertionError:  # the page is being replaced
                pass
            assert time.monotonic() < until, f"never true: {script}\n{self.problems}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Returns the visible text of the last element that a selector finds."""
        return self.evaluate(
            f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''"
        )

    def wait_text(self, selector: str, part: str) -> None:
        """Waits until the last element that a selector finds has a text in it."""
        found = f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText.includes"
        self.wait_for(f"{found}({json.dumps(part)})")

    def click(self, selector: str, label: str = "") -> None:
        """Clicks the last visible element of a selector, with this text or ARIA label."""
        fits = f"(node.ariaLabel ?? node.innerText).includes({json.dumps(label)}) && node.checkVisibility()"
        found = f"[...document.querySelectorAll({json.dumps(selector)})].filter(node => {fits}).at(-1)"
        self.wait_for(found)
        self.evaluate(f"{found}.click()")

    def focus(self, selector: str) -> None:
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")

    def write(self, text: str) -> None:
        """Types into the focused field."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, shift: bool = False, control: bool = False) -> None:
        """Presses a key, with modifiers."""
        text = {"Enter": "\r", "/": "/"}.get(key, "")
        keys = dict(key=key, code=key, windowsVirtualKeyCode=KEYS[key], modifiers=8 * shift + 2 * control)
        self.call("Input.dispatchKeyEvent", type="keyDown", text="" if control else text, **keys)
        self.call("Input.dispatchKeyEvent", type="keyUp", **keys)

    def screenshot(self, path: pathlib.Path, width: int = 1100, height: int = 800) -> None:
        """Writes a PNG of the page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        time.sleep(0.3)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))
