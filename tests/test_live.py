"""A widget in JupyterLab: what the reader does reaches Python, and what Python does reaches the page."""

import json
import os
import re
import subprocess
import sys
import time

import nbformat
import pytest

CELLS = [
    """
import json
from pathlib import Path

from khnb import data, models
from khnb.settings import HeadSettings
from khnb.widgets import AttackLab

sample = data.load("cifar10-sample")
head = HeadSettings(sigma="elu", n=4.0, w_pool=5)
networks = {name: models.bp_network(3, 4, head, 3, 32, 10).eval() for name in ("first", "second")}
lab = AttackLab(networks, sample.test_images[:4].numpy(), sample.test_labels[:4].numpy(), sample.classes)

def heard(change):
    if change.new == "second":
        lab.attack = "PGD"  # Python answers what the reader chose
    Path("heard.json").write_text(json.dumps(dict(model_name=lab.model_name, image=lab.image, attack=lab.attack, own=len(lab.own))))

lab.observe(heard, ["model_name", "image", "own"])
lab""",
]


@pytest.fixture
def served(tmp_path):
    """JupyterLab with a notebook that shows a widget: its address, and the folder it works in."""
    pytest.importorskip("jupyterlab")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell.strip()) for cell in CELLS])
    notebook.metadata.kernelspec = dict(name="python3", display_name="Python 3 (ipykernel)", language="python")
    nbformat.write(notebook, tmp_path / "live.ipynb")
    words = ["lab", "--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"]
    words += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    home = dict(os.environ, JUPYTER_CONFIG_DIR=str(tmp_path / "config"), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"), OMP_NUM_THREADS="1")
    server = subprocess.Popen([sys.executable, "-m", "jupyter", *words], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=home, cwd=tmp_path)
    address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+/lab\?token=\w+", line)))
    yield address.replace("/lab?", "/lab/tree/live.ipynb?"), tmp_path
    server.terminate()
    server.stderr.close()
    server.wait(30)


@pytest.mark.slow
@pytest.mark.page
def test_a_widget_and_its_kernel_talk_to_each_other(served, browser):
    address, folder = served
    page = browser.new_page(viewport=dict(width=1300, height=1000))
    page.set_default_timeout(60_000)
    page.goto(address)
    page.wait_for_function("document.body.innerText.includes('| Idle')")
    page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".khnb-attack .khnb-summary", timeout=120_000)

    def heard(**expected):
        end = time.monotonic() + 30
        while time.monotonic() < end:
            if (folder / "heard.json").exists():
                found = json.loads((folder / "heard.json").read_text() or "{}")
                if found.items() >= expected.items():
                    return True
            time.sleep(0.1)
        return False

    page.locator(".khnb-thumbs button").nth(2).click()
    assert heard(image=2, model_name="first")
    page.locator(".khnb-widget").get_by_label("Model").select_option("second")
    assert heard(image=2, model_name="second", attack="PGD")
    page.wait_for_function("[...document.querySelectorAll('.khnb-attack select')].some((s) => s.value === 'PGD')")
    assert "second on" in page.inner_text(".khnb-summary")
    page.get_by_text("Draw on the image").click()
    page.locator(".khnb-own canvas").press(" ")
    assert heard(own=3 * 32 * 32)
    page.get_by_role("button", name="Back to the test image").click()
    assert heard(own=0)
    page.close()
