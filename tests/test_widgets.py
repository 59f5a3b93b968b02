"""The attack lab and what the widgets share: what Python packs, and what their modules compute and show, against the library.

The modules' arithmetic is run in node and compared with PyTorch; the page is run in Chromium. Where one of the two is
missing, the tests that need it are skipped and say so.
"""

import base64
from pathlib import Path

import numpy as np
import pytest
import torch

from khnb import attacks, models, pipeline
from khnb.results import Store
from khnb.settings import HeadSettings
from khnb.widgets import AttackLab
from khnb.widgets.attack import pack
from khnb.widgets.base import module as text_of
from pages import nameless, node

ROOT = Path(__file__).parents[1]
SIGMAS = tuple(models.ACTIVATIONS)


def network(kind, sigma="gelu", n=4.0, p=2.0, K=3, w=4, w_pool=5, s_pool=2, channels=3, side=32, seed=0, **more):
    """A small untrained network in eval mode whose answers depend on the image, and differ in confidence."""
    head = HeadSettings(sigma=sigma, n=n, w_pool=w_pool, s_pool=s_pool, seed=seed, **more)
    generator = torch.Generator().manual_seed(seed)
    if kind == "LL":
        weight = torch.randn(K * K, channels, w, w, generator=generator)
        weight /= torch.linalg.vector_norm(weight.flatten(1), ord=p, dim=1)[:, None, None, None]
        net = models.ll_network(weight, p, head, side, 10)
    else:
        net = models.bp_network(K, w, head, channels, side, 10)
    with torch.no_grad():  # logits of the order of 1, whatever sigma and n
        images = torch.rand(32, channels, side, side, generator=generator)
        net.linear.weight /= net.eval()(images).std(0).mean()
    return net


def lab(networks, sample, count=4):
    images, labels = sample.test_images[:count].numpy(), sample.test_labels[:count].numpy()
    return AttackLab(networks, images, labels, sample.classes)


def as_packed(net):
    """The network with the weights that the widget carries, in float64: what the module ought to compute exactly."""
    header, packed = pack(net, 32)
    shapes, offsets = header["shapes"], header["offsets"]

    def read(name, kind, *shape):
        return torch.from_numpy(np.frombuffer(packed, kind, int(np.prod(shape)), offsets[name]).astype(float).reshape(shape))

    filters = read("filters", "<f4", *shapes["filters"])
    classes, features = shapes["linear"]
    top = read("top", "<f4", classes, len(filters), 1)
    linear = read("linear", "<i2", classes, len(filters), features // len(filters)) * top / 32767
    net = models.Network(net.conv, net.linear, net.head).double().eval()
    p = header["norm"]
    net.conv.weight.data.copy_(filters if p is None else filters.sign() * filters.abs() ** (1 / (p - 1)))
    net.linear.weight.data.copy_(linear.flatten(1))
    return net


def computed(net, images, labels, script):
    """``script`` run for every image with ``net``, ``x`` and ``label``."""
    header, packed = pack(net, images.shape[-1])
    loop = f"""
      const net = m.makeNetwork(header, bytes(packed)), out = [];
      for (let i = 0; i < images.length; i++) {{ const x = Float64Array.from(images[i]), label = labels[i]; out.push({script}); }}
      return out;
    """
    given = dict(header=header, packed=base64.b64encode(packed).decode(), images=images.flatten(1).tolist(), labels=labels.tolist())
    return node("attack", loop, **given)


# ---------------------------------------------------------------------------------------------------------------------
# The modules' arithmetic


def test_float16_is_read_as_numpy_reads_it():
    every = np.arange(2**16, dtype="<u2")
    numbers = every.view("<f2").astype(float)
    finite = np.isfinite(numbers)
    read = node("filters", "return Array.from(m.decodeHalf(bytes(packed), 0, 65536))", packed=base64.b64encode(every.tobytes()).decode())
    np.testing.assert_array_equal(np.array([np.nan if x in (None, "inf") else x for x in read])[finite], numbers[finite])
    assert finite.sum() == 63488


def test_bytes_arrive_in_any_wrapping():
    script = """
      const b = Uint8Array.from([9, 1, 2, 3, 9]).buffer, inner = [new DataView(b, 1, 3), new Uint8Array(b, 1, 3), b];
      return inner.map((v) => Array.from(m.toBytes(v)));
    """
    assert node("filters", script) == [[1, 2, 3], [1, 2, 3], [9, 1, 2, 3, 9]]


def test_the_error_function():
    x = torch.linspace(-7, 7, 2001, dtype=torch.float64)
    found = node("attack", "return x.map(m.erf)", x=x.tolist())
    np.testing.assert_allclose(found, torch.erf(x), atol=1e-14)


@pytest.mark.parametrize(
    "kind, options",
    [("LL", dict(sigma=s)) for s in SIGMAS]
    + [("BP", dict(sigma=s)) for s in SIGMAS]
    + [("LL", dict(p=3.0)), ("LL", dict(p=2.5, n=1.0)), ("LL", dict(sigma="relu", n=2.5)), ("BP", dict(w=3, w_pool=4, s_pool=3))]
    + [("LL", dict(channels=1, side=28, w=5, w_pool=2, s_pool=1))],
)
def test_a_network_in_the_page_is_the_network(sample, digits, kind, options):
    net = network(kind, **options)
    images = (digits if options.get("channels") == 1 else sample).test_images[:3].double() / 255
    images[0, :, :8, :8] = 0  # patches without a norm
    exact = as_packed(net)
    labels = torch.tensor([1, 2, 3])
    found = computed(network(kind, **options), images, labels, "[Array.from(net.probabilities(x)), Array.from(net.gradient(x, label))]")
    probabilities, gradients = (torch.tensor([row[i] for row in found], dtype=torch.float64) for i in (0, 1))
    expected = exact(images).softmax(1)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-9)
    with torch.no_grad():
        rounded_away = (network(kind, **options)(images.float()).softmax(1) - probabilities).abs().max()
    assert rounded_away < 1e-3
    gradient = attacks.gradient(exact, images, labels).flatten(1)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradients, gradient, rtol=0, atol=1e-9 * gradient.abs().max().item())


@pytest.mark.parametrize("kind, options", [("LL", {}), ("LL", dict(p=3.0)), ("BP", dict(sigma="elu"))])
def test_the_radius_in_the_page_is_the_library_s(sample, kind, options):
    net = network(kind, **options)
    images = sample.test_images[:6].float() / 255
    with torch.no_grad():
        labels = net(images).argmax(1)
    labels[0] = (labels[0] + 1) % 10  # wrong already
    found = [float(r) for r in computed(net, images, labels, "await m.fgsmRadius(net, x, label)")]
    expected = attacks.fgsm_radius(network(kind, **options), images, labels)
    assert found[0] == 0 and max(found) > 0.001
    exact = attacks.fgsm_radius(as_packed(net), images.double(), labels)
    np.testing.assert_allclose(found, exact, rtol=0, atol=1.5e-6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


def test_a_network_that_nothing_fools_has_no_radius(sample):
    net = network("LL")
    with torch.no_grad():
        net.linear.bias[3] += 1e6
    found = computed(net, sample.test_images[:1].double() / 255, torch.tensor([3]), "await m.fgsmRadius(net, x, label)")
    assert found == ["inf"]


def test_pgd_in_the_page_is_the_library_s(sample):
    net = network("BP", sigma="elu")
    images = sample.test_images[:4].double() / 255
    labels = as_packed(net)(images).argmax(1)
    found = computed(
        network("BP", sigma="elu"), images, labels,
        "await m.pgd(net, x, label, { step: 0.002, radius: 0.02, maxSteps: 40 }).then((r) => [r.steps, r.fooled, r.distance])",
    )
    radii, steps = attacks.pgd_radius(as_packed(net), images, labels, step=0.002, radius=0.02, max_steps=40)
    assert (steps > 0).any()
    for (taken, fooled, distance), radius, step in zip(found, radii.tolist(), steps.tolist()):
        assert (taken if fooled else -1) == step
        assert distance == pytest.approx(radius if fooled else 0.02, abs=1e-9)


def test_a_newer_wish_stops_the_search(sample):
    found = computed(network("LL"), sample.test_images[:1].double() / 255, torch.tensor([3]),
                     "await m.fgsmRadius(net, x, net.guess(x), () => false)")
    assert found == [None]


# ---------------------------------------------------------------------------------------------------------------------
# The Python side


@pytest.mark.parametrize("scale", [1e-7, 1, 1e7])
def test_weights_of_any_size_survive(scale):
    net = network("BP")
    with torch.no_grad():
        net.linear.weight[:, :5] = 0
        net.linear.weight *= scale
    found, expected = as_packed(net).linear.weight, net.linear.weight.double()
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(networks={}), "no network"),
        (dict(images=np.zeros((4, 3, 32, 32))), "uint8"),
        (dict(labels=np.zeros(3, int)), "one whole number each"),
        (dict(labels=np.full(4, 10)), "10 classes"),
        (dict(classes=("a", "b")), "classes"),
        (dict(networks={"BP": network("BP").train()}), "training mode"),
        (dict(networks={"BP": network("BP", channels=1)}), "channels"),
        (dict(networks={"BP": network("BP", pooling="last")}), "pools after"),
        (dict(radii={"LL": [0.1, 0.2]}), "no such network"),
        (dict(radii={"BP": [0.0, np.inf, 0.1]}), "1 of 3 radii"),
    ],
)
def test_the_lab_says_what_is_wrong(change, message):
    given = dict(networks={"BP": network("BP")}, images=np.zeros((4, 3, 32, 32), np.uint8), labels=np.zeros(4, int), classes=tuple("abcdefghij"))
    with pytest.raises(ValueError, match=message):
        AttackLab(**given | change)


def test_the_lab_takes_no_other_module(sample):
    with pytest.raises(TypeError, match="Network"):
        lab({"x": torch.nn.Linear(2, 2)}, sample)


def test_the_traits_are_checked(sample):
    widget = lab({"BP": network("BP")}, sample)
    for name, value in dict(own=bytes(5), own_label=10, image=4, model_name="other", attack="CW", epsilon=-1.0, radius=0.0).items():
        with pytest.raises(Exception, match=name):
            setattr(widget, name, value)
    widget.image, widget.attack, widget.epsilon = 3, "PGD", 0.05
    assert (widget.image, widget.attack, widget.epsilon, widget.model_name) == (3, "PGD", 0.05, "BP")
    widget.own = bytes(3 * 32 * 32)
    assert len(widget.own) == 3072


def test_where_a_radius_lies_on_the_curve(sample):
    radii = np.concatenate([np.random.default_rng(0).gamma(3, 0.01, 400), [0, np.inf, np.nan]])
    net = network("BP")
    curve = AttackLab({"BP": net}, sample.test_images[:1].numpy(), [0], sample.classes, radii={"BP": radii}).header["models"][0]["curve"]
    assert curve["images"] == 400
    asked = [0.0, 0.004, 0.02, 0.031, 0.2]
    found = node("attack", "return asked.map((r) => m.below(radii, r))", asked=asked, radii=curve["radii"])
    np.testing.assert_allclose(found, [(radii[:400] < r).mean() for r in asked], atol=0.01)
    assert found[0] == 0 and found[-1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.mark.page
@pytest.mark.slow
def test_the_lab_shows_what_the_library_computes(shown, sample):
    networks = {"LL": network("LL", K=10), "BP": network("BP", sigma="elu", K=10)}
    images = sample.test_images[:3].float() / 255
    with torch.no_grad():
        labels = networks["LL"](images).argmax(1)
    page = shown(AttackLab(networks, sample.test_images[:3].numpy(), labels.numpy(), sample.classes))
    page.wait_for_function("!document.querySelector('.khnb-pictures .khnb-facts').innerText.includes('…')", timeout=60000)
    expected = attacks.fgsm_radius(networks["LL"], images[:1], labels[:1]).item()
    assert float(page.locator(".khnb-pictures dd").first.inner_text()) == pytest.approx(expected, abs=1.5e-4)  # shown with four decimals

    def bars():
        return np.array([float(text.split()[0]) / 100 for text in page.locator(".khnb-number").all_inner_texts()])

    for image, name, epsilon in ((0, "LL", 0.0), (2, "BP", 0.05)):
        page.locator(".khnb-thumbs button").nth(image).click()
        page.get_by_label("Model").select_option(name)
        page.get_by_label("Strength ε").fill(str(epsilon))
        x, y = images[image : image + 1], labels[image : image + 1]
        with torch.no_grad():
            np.testing.assert_allclose(bars(), networks[name](attacks.fgsm(networks[name], x, y, epsilon)).softmax(1)[0], atol=2e-3)
    page.get_by_label("Attack", exact=True).select_option("PGD")
    page.wait_for_function("/PGD (fools|does not)|wrong without/.test(document.querySelector('.khnb-summary').innerText)", timeout=60000)
    assert not page.get_by_label("Strength ε").is_visible() and page.get_by_label("Ball S", exact=True).is_visible()


def own(page) -> np.ndarray:
    """The image that was drawn or brought in, (C, side, side) uint8."""
    return np.array(page.evaluate("[...new Uint8Array(model.get('own').buffer)]"), np.uint8).reshape(-1, 32, 32)


@pytest.mark.page
@pytest.mark.slow
def test_the_reader_draws_on_an_image_or_brings_one(shown, sample, tmp_path):
    net = network("LL", K=10)
    images = sample.test_images[:2]
    page = shown(AttackLab({"LL": net}, images.numpy(), [3, 5], sample.classes, radii={"LL": np.linspace(0.001, 0.05, 60)}))
    page.get_by_text("Draw on the image").click()
    board = page.locator(".khnb-own canvas")
    board.focus()
    page.get_by_label("Colour").fill("#ff0080")
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", " "):  # from the middle, 16 16
        board.press(key)
    drawn, expected = own(page), images[0].numpy().copy()
    expected[:, 18, 17] = 255, 0, 128
    np.testing.assert_array_equal(drawn, expected)
    box = board.bounding_box()
    pixel = box["width"] / 32
    page.mouse.move(box["x"] + 2.5 * pixel, box["y"] + 4.5 * pixel)
    page.mouse.down()
    page.mouse.move(box["x"] + 8.5 * pixel, box["y"] + 4.5 * pixel)
    page.mouse.up()
    expected[:, 4, 2:9] = np.array([[255], [0], [128]])
    np.testing.assert_array_equal(own(page), expected)
    assert "your own image" in page.inner_text(".khnb-summary") and page.evaluate("model.get('own_label')") == 3
    page.get_by_label("Its true class").select_option("ship")
    assert page.evaluate("model.get('own_label')") == 8 and page.locator(".khnb-true th").inner_text() == "ship (true)"
    page.get_by_label("Strength ε").fill("0.01")
    x = torch.from_numpy(expected)[None].float() / 255
    with torch.no_grad():
        answer = net(attacks.fgsm(net, x, torch.tensor([8]), 0.01)).softmax(1)[0]
    bars = [float(text.split()[0]) / 100 for text in page.locator(".khnb-number").all_inner_texts()]
    np.testing.assert_allclose(bars, answer, atol=2e-3)
    page.get_by_role("button", name="Back to the test image").click()
    assert own(page).size == 0 and "image 1 of 2" in page.inner_text(".khnb-summary")

    from PIL import Image

    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:, 16:80] = 10, 200, 90  # the middle square
    Image.fromarray(picture).save(tmp_path / "mine.png")
    page.get_by_label("A picture of yours").set_input_files(tmp_path / "mine.png")
    page.wait_for_function("model.get('own').byteLength > 0")
    np.testing.assert_array_equal(own(page), np.broadcast_to(np.array([10, 200, 90], np.uint8)[:, None, None], (3, 32, 32)))
    with torch.no_grad():
        assert page.evaluate("model.get('own_label')") == net(torch.from_numpy(own(page))[None].float() / 255).argmax()
    (tmp_path / "text.png").write_text("no picture")
    page.get_by_label("A picture of yours").set_input_files(tmp_path / "text.png")
    page.wait_for_function("document.querySelector('.khnb-own [role=status]').textContent.includes('text.png')")
    page.locator(".khnb-thumbs button").nth(1).click()
    assert own(page).size == 0 and "image 2 of 2" in page.inner_text(".khnb-summary")


COMPARE = """async ([esm, header, packed, images, labels]) => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const m = await import(URL.createObjectURL(new Blob([esm], { type: "text/javascript" })));
  const net = m.makeNetwork(header, bytes(packed)), pixels = bytes(images), size = pixels.length / labels.length, out = [];
  for (let i = 0; i < labels.length; i++) {
    const x = Float64Array.from(pixels.subarray(i * size, (i + 1) * size), (v) => v / 255);
    const radius = await m.fgsmRadius(net, x, labels[i]);
    out.push([Array.from(net.probabilities(x)), radius === Infinity ? -1 : radius]);
  }
  return out;
}"""


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.parametrize("kind, chosen", [("LL", dict(sigma="gelu")), ("BP", dict(sigma="elu", head_batch=1000))])
def test_trained_models_answer_in_the_browser_as_in_pytorch(browser, sample, kind, chosen):
    """The models of chapter 9 on 60 images each: probabilities within 1e-3, radii within 1e-4."""
    store = Store(ROOT / "results")
    asked = dict(model=kind, K=10, w=4, n=4.0, w_pool=5, seed=0, **chosen)
    record = next(r for r in store.full("model", **asked) if not r["arrays"].get("dropped") and r["asked"].get("m", 3) == 3)
    net = pipeline.network(record, store)
    images = sample.test_images[:60]
    x, labels = images.float() / 255, sample.test_labels[:60]
    header, packed = pack(net, 32)
    page = browser.new_page()
    coded = [base64.b64encode(data).decode() for data in (packed, images.numpy().tobytes())]
    page.set_default_timeout(120_000)
    found = page.evaluate(COMPARE, [text_of("attack"), header, coded[0], coded[1], labels.tolist()])
    page.close()
    with torch.no_grad():
        probabilities = net(x).softmax(1)
    radii = attacks.fgsm_radius(net, x, labels).numpy()
    np.testing.assert_allclose([row[0] for row in found], probabilities, atol=1e-3)
    here = np.array([np.inf if row[1] < 0 else row[1] for row in found])
    assert (radii > 0).sum() > 25
    np.testing.assert_array_equal(np.isinf(here), np.isinf(radii))
    np.testing.assert_allclose(here[np.isfinite(radii)], radii[np.isfinite(radii)], rtol=0, atol=1e-4)


@pytest.mark.page
@pytest.mark.slow
def test_the_lab_fits_a_telephone_and_names_its_controls(shown, sample):
    page = shown(lab({"LL": network("LL")}, sample), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and nameless(page) == []
