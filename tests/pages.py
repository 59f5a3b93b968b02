"""Widgets outside a notebook: their arithmetic in node, and a page that shows one without a kernel."""

import base64
import json
import re
import shutil
import subprocess

import pytest

from khnb.widgets.base import module as text_of


def node(module, script, **given):
    """What an expression over the exports ``m`` of a widget's module comes to; ``given`` are its other names."""
    program = shutil.which("node")
    if program is None:
        pytest.skip("node is not installed: the arithmetic of the widgets' modules cannot be run here")
    address = "data:text/javascript;base64," + base64.b64encode(text_of(module).encode()).decode()
    text = f"""
      const m = await import({json.dumps(address)});
      const given = JSON.parse(require("fs").readFileSync(0, "utf8"));
      const bytes = (text) => new Uint8Array(Buffer.from(text, "base64"));
      const {{ {", ".join(given) or "_"} }} = given;
      const result = await (async () => {{ {script} }})();
      console.log(JSON.stringify(result, (key, v) => v === Infinity ? "inf" : v));
    """
    done = subprocess.run(
        [program, "-e", f"(async () => {{ {text} }})()"], input=json.dumps(given), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


PAGE = """<!doctype html><meta charset="utf-8"><body style="margin:8px;font-family:sans-serif"><div id="w"></div>
<script type="module">
const state = STATE;
for (const name of BYTES) state[name] = new DataView(Uint8Array.from(atob(state[name]), (c) => c.charCodeAt(0)).buffer);
const listeners = {};
window.model = {
  get: (k) => state[k], on: (e, f) => (listeners[e] ??= []).push(f), save_changes() {},
  off: (e, f) => { listeners[e] = listeners[e].filter((known) => known !== f); },
  set(key, value) {
    for (const [k, v] of typeof key === "object" ? Object.entries(key) : [[key, value]]) {
      if (state[k] !== v) { state[k] = v; (listeners["change:" + k] ?? []).forEach((f) => f()); }
    }
  },
};
const module = await import(URL.createObjectURL(new Blob([ESM], { type: "text/javascript" })));
const css = document.createElement("style"); css.textContent = CSS; document.head.append(css);
window.leave = module.default.render({ model, el: document.getElementById("w") });
document.body.dataset.ready = "yes";
</script>"""


def page_of(widget) -> str:
    """A page that shows a widget without a kernel, from the state it would be embedded with."""
    state = widget.get_state()
    module, css = state.pop("_esm"), state.pop("_css")
    binary = [name for name, value in state.items() if isinstance(value, (bytes, memoryview))]
    state = {name: base64.b64encode(value).decode() if name in binary else value for name, value in state.items() if not name.startswith("_")}
    state = {name: value for name, value in state.items() if name not in ("layout", "tabbable", "tooltip")}
    given = dict(STATE=state, BYTES=binary, ESM=module, CSS=css)
    pattern = re.compile(r"\b(STATE|BYTES|ESM|CSS)\b")
    return pattern.sub(lambda match: json.dumps(given[match[1]]).replace("</", "<\\/"), PAGE)


def nameless(page) -> list[str]:
    """The controls and pictures of a page that say nobody what they are."""
    return page.evaluate(
        """[...document.querySelectorAll("select, input, button, [role=gridcell], [role=grid], canvas")].filter((node) =>
             !node.labels?.length && !node.ariaLabel && !node.textContent.trim() && node.ariaHidden !== "true").map((node) => node.outerHTML.slice(0, 100))"""
    )
