"""A Firefox that is already on this machine, driven by WebDriver BiDi, which it speaks itself; it reaches no other host."""

import contextlib
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

PREFERENCES = {
    # every host but this machine is asked for at a port where nobody listens
    "network.proxy.type": 1, "network.proxy.http": "127.0.0.1", "network.proxy.http_port": 9, "network.proxy.ssl": "127.0.0.1",
    "network.proxy.ssl_port": 9, "network.proxy.no_proxies_on": "127.0.0.1", "network.proxy.allow_hijacking_localhost": False,
    "app.update.enabled": False, "browser.shell.checkDefaultBrowser": False, "browser.aboutwelcome.enabled": False,
    "datareporting.policy.dataSubmissionEnabled": False, "toolkit.telemetry.reportingpolicy.firstRun": False,
}


def program() -> str | None:
    return shutil.which("firefox-esr") or shutil.which("firefox")


class Firefox:
    """``open`` a page, ``ask`` it for the value of an expression; ``wrong`` has its errors, ``asked_for`` every address it wanted."""

    def __init__(self):
        import websocket

        self.profile = tempfile.TemporaryDirectory()
        lines = (f"user_pref({json.dumps(name)}, {json.dumps(value)});" for name, value in PREFERENCES.items())
        Path(self.profile.name, "user.js").write_text("\n".join(lines))
        words = [program(), "--headless", "--no-remote", "--profile", self.profile.name, "--remote-debugging-port", "0"]
        self.process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        address = next((found[1] for line in self.process.stderr if (found := re.search(r"BiDi listening on (ws://\S+)", line))), None)
        assert address, "Firefox ended before it listened"
        self.socket = websocket.create_connection(f"{address}/session", suppress_origin=True, timeout=60)
        self.ids, self.wrong, self.asked_for = itertools.count(1), [], []
        self.send("session.new", capabilities={})
        self.send("session.subscribe", events=["log.entryAdded", "network.beforeRequestSent"])
        self.context = self.send("browsingContext.getTree")["contexts"][0]["context"]

    def send(self, method: str, **params):
        """The answer to a command; what is reported meanwhile is taken down."""
        id = next(self.ids)
        self.socket.send(json.dumps(dict(id=id, method=method, params=params)))
        while True:
            said = json.loads(self.socket.recv())
            if said.get("id") == id:
                if said["type"] == "error":
                    raise RuntimeError(f"{method}: {said['error']}: {said['message']}")
                return said["result"]
            if said.get("method") == "log.entryAdded" and said["params"]["level"] == "error":
                self.wrong.append(said["params"]["text"])
            if said.get("method") == "network.beforeRequestSent":
                self.asked_for.append(said["params"]["request"]["url"])

    def open(self, url: str):
        self.wrong.clear(), self.asked_for.clear()
        self.send("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def size(self, width: int, height: int):
        self.send("browsingContext.setViewport", context=self.context, viewport=dict(width=width, height=height))

    def ask(self, expression: str):
        """The value of a JavaScript expression (or of its promise) that JSON can hold."""
        text = f"Promise.resolve({expression}).then((v) => JSON.stringify(v))"
        answer = self.send("script.evaluate", expression=text, target=dict(context=self.context), awaitPromise=True)
        assert answer["type"] == "success", answer["exceptionDetails"]["text"]
        return json.loads(answer["result"].get("value", "null"))

    def press(self, *keys: str):
        each = [dict(type=kind, value=key) for key in keys for kind in ("keyDown", "keyUp")]
        self.send("input.performActions", context=self.context, actions=[dict(type="key", id="keys", actions=each)])

    def wait(self, expression: str, seconds: float = 30):
        """Until the expression is true."""
        end = time.monotonic() + seconds
        while not self.ask(expression):
            assert time.monotonic() < end, f"in vain: {expression}"
            time.sleep(0.1)

    def close(self):
        with contextlib.suppress(Exception):
            self.send("browser.close")
        self.process.terminate()
        self.process.wait(30)
        self.profile.cleanup()
