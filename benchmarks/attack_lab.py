"""How long one step takes in the attack lab's page: a forward, and a whole FGSM step (a gradient and a forward).

``python benchmarks/attack_lab.py [rounds]`` runs the book's own module in headless Chromium (``KHNB_CHROMIUM``, or the one on
the path) on untrained models of the sizes that the book shows, and PyTorch on one thread beside it in the same run.
"""

import base64
import os
import shutil
import statistics
import sys
import time

import torch
from playwright.sync_api import sync_playwright

from khnb import attacks, data, models
from khnb.settings import HeadSettings
from khnb.widgets.attack import pack
from khnb.widgets.base import module

PAGE = """async ([esm, header, packed, x, rounds]) => {
  const m = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const net = m.makeNetwork(header, Uint8Array.from(atob(packed), (c) => c.charCodeAt(0))), times = [[], []];
  for (let i = 0; i < rounds; i++) {
    [() => net.probabilities(x), () => net.probabilities(m.move(x, net.gradient(x, 3).map(Math.sign), 0.01))].forEach((work, k) => {
      const start = performance.now();
      work();
      times[k].push(performance.now() - start);
    });
  }
  return times;
}"""


def main(rounds: int = 30):
    torch.set_num_threads(1)
    image = data.load("cifar10-sample").test_images[:1].float() / 255
    program = os.environ.get("KHNB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    print("| model | K | w | forward in the page (ms) | FGSM step in the page (ms) | slowest (ms) | FGSM step, PyTorch (ms) |\n|---|---:|---:|---:|---:|---:|---:|")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=["--no-sandbox", "--disable-gpu"])
        for K, w in ((10, 4), (10, 12), (20, 4), (20, 12)):
            for kind in ("LL", "BP"):
                head = HeadSettings(sigma="elu", n=4.0, w_pool=5 if w == 4 else 9)
                weight = torch.rand(K * K, 3, w, w)
                net = models.ll_network(weight, 2.0, head, 32, 10) if kind == "LL" else models.bp_network(K, w, head, 3, 32, 10)
                header, packed = pack(net.eval(), 32)
                page = browser.new_page()
                given = [module("attack"), header, base64.b64encode(packed).decode(), image.flatten().tolist(), rounds]
                forward, step = page.evaluate(PAGE, given)
                page.close()
                here = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    with torch.no_grad():
                        net(attacks.fgsm(net, image, torch.tensor([3]), 0.01))
                    here.append(1e3 * (time.perf_counter() - start))
                median = statistics.median
                print(f"| {kind} | {K} | {w} | {median(forward):.1f} | {median(step):.1f} | {max(step):.1f} | {median(here):.1f} |", flush=True)
        browser.close()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
