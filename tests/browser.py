"""A headless Chromium, driven through its debugging pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def chromium() -> str | None:
    """The browser's path, where there is one."""
    return next(
        (p for name in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(name))), None
    )


class Page:
    """One tab: ``run`` evaluates JavaScript, ``click``, ``move`` and ``press`` are a person's; requests,
    errors and messages are kept."""

    def __init__(self, to: int, back: int):
        self.to, self.back, self.number, self.waiting = to, back, 0, b""
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.read()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def read(self) -> dict[str, Any]:
        """The next answer or event; events are noted."""
        while b"\0" not in self.waiting:
            part = os.read(self.back, 1 << 16)
            if not part:
                raise RuntimeError("the browser is gone")
            self.waiting += part
        text, self.waiting = self.waiting.split(b"\0", 1)
        event: dict[str, Any] = json.loads(text)
        values = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(values["exceptionDetails"]))
        elif event.get("method") == "Log.entryAdded":
            self.errors.append(values["entry"]["text"])
        return event

    def open(self, page: Path) -> None:
        self.call("Page.navigate", url=page.as_uri())
        while self.read().get("method") != "Page.loadEventFired":
            pass

    def run(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise AssertionError(found["exceptionDetails"])
        return found["result"].get("value")

    def place(self, script: str) -> tuple[float, float]:
        """The middle of an element, after scrolling it into view and waiting until the page stands still."""
        found = self.run(
            f"(async () => {{ const e = {script}, top = () => e.getBoundingClientRect().top; let still = 0,"
            " last = NaN; e.scrollIntoView({block: 'center'}); while (still < 4) { await new"
            " Promise(requestAnimationFrame); still = top() === last ? still + 1 : 0; last = top(); } const"
            " b = e.getBoundingClientRect(); return [b.left + b.width / 2, b.top + b.height / 2]; })()"
        )
        return float(found[0]), float(found[1])

    def move(self, script: str) -> tuple[float, float]:
        x, y = self.place(script)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        return x, y

    def click(self, script: str) -> None:
        x, y = self.move(script)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        for kind in ("keyDown", "keyUp"):
            more = {"text": "\r"} if key == "Enter" and kind == "keyDown" else {}
            code = {"Enter": 13, "ArrowDown": 40, "ArrowUp": 38, "Escape": 27}[key]
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more
            )

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def screenshot(self, file: Path, whole: bool = False) -> None:
        found = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def opened(folder: Path, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A tab of a browser whose profile lies in ``folder``."""
    commands_read, commands_write = os.pipe()
    answers_read, answers_write = os.pipe()
    flags = (
        "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
        f" --disable-component-update --disable-sync --disable-dev-shm-usage --window-size={width},{height}"
        " --remote-debugging-pipe"
    )
    ends = [
        fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands_read, answers_write)
    ]  # clear of 3 and 4, which the browser takes
    actions = [(os.POSIX_SPAWN_OPEN, n, os.devnull, os.O_RDWR, 0) for n in (1, 2)]
    pipes = [(os.POSIX_SPAWN_DUP2, end, n) for end, n in zip(ends, (3, 4), strict=True)]
    browser = str(chromium())
    process = os.posix_spawn(
        browser,
        [browser, *flags.split(), f"--user-data-dir={folder}"],
        os.environ,
        file_actions=[*actions, *pipes],
    )
    for end in (commands_read, answers_write, *ends):
        os.close(end)
    try:
        yield Page(commands_write, answers_read)
    finally:
        os.close(commands_write)
        os.close(answers_read)
        os.kill(process, signal.SIGTERM)
        os.waitpid(process, 0)
