"""Headless Chromium, led by its DevTools protocol through a pair of pipes: no port, no driver, no package."""

import base64
import json
import os
import shutil
import subprocess
import time

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe"),
]
FOR_CHROMIUM, FROM_CHROMIUM = 3, 4
"""File descriptors, of which Chromium reads one and writes to the other."""


class Browser:
    """One tab; use it as a context manager."""

    def __init__(self, profile):
        theirs_in, self.out = os.pipe()
        self.into, theirs_out = os.pipe()

        def place():
            # Out of each other's way first, since one of them can be where the other one has to go.
            high = [os.dup(number) for number in (theirs_in, theirs_out)]
            os.dup2(high[0], FOR_CHROMIUM)
            os.dup2(high[1], FROM_CHROMIUM)

        command, quiet = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}"], subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, preexec_fn=place, close_fds=False, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True
        )
        for number in (theirs_in, theirs_out):
            os.close(number)
        self.buffer, self.number, self.requests, self.errors, self.session = b"", 0, [], [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.call(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()
        os.close(self.out)
        os.close(self.into)

    def call(self, method, **parameters):
        """What the browser answers to one command."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self):
        while b"\0" not in self.buffer:
            more = os.read(self.into, 2**20)
            assert more, "the browser is gone"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(message["params"]["request"]["url"])
            case "Runtime.exceptionThrown":
                self.errors.append(message["params"]["exceptionDetails"].get("exception", {}).get("description", "an exception"))
            case "Log.entryAdded" if message["params"]["entry"]["level"] == "error":
                self.errors.append(message["params"]["entry"]["text"] + " " + message["params"]["entry"].get("url", ""))
        return message

    def open(self, address, width=1440, height=1000, dark=False):
        """Go there, with a screen of that size and that colour scheme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=address)

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script, seconds=60):
        """Until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({script})"):
            if time.monotonic() > end:
                raise AssertionError(f"{script} was not true within {seconds} s: {self.run('document.body.innerText')[:2000]}")
            time.sleep(0.1)

    def give_file(self, selector, path):
        """Choose a file for an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def picture(self, path):
        """A PNG file of the whole page."""
        content = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(content))
