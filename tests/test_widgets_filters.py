"""The filter explorer: what neurons answer to patches, what Python packs, and what the page shows of it."""

import dataclasses

import numpy as np
import pytest
import torch
import traitlets
from torch import nn

from khnb import patches
from khnb.layer import KHConv2d, responses, synapses
from khnb.learning import is_feature
from khnb.plots import tiles
from khnb.widgets import FilterExplorer
from pages import nameless, node

# ---------------------------------------------------------------------------------------------------------------------
# What neurons answer to patches


def brute(kernel, images, w, p=None, bias=0.0):
    """Every activity (N, places, F), float64, patch by patch."""
    every = patches.extract(images.double() / 255, w)
    return (patches.normalise(every, p) if p else every) @ kernel.double().flatten(1).T + bias


@pytest.mark.parametrize("kind, p", [("LL", 2.0), ("LL", 3.0), ("BP", None)])
def test_responses_are_those_of_every_patch_taken_alone(sample, kind, p):
    images, generator = sample.test_images[:11].clone(), torch.Generator().manual_seed(3)
    images[4, :, :9, :9] = 0  # patches without a norm
    weight, bias = torch.randn(7, 3, 5, 5, generator=generator), torch.randn(7, generator=generator)
    if kind == "LL":
        found, every = responses(KHConv2d(weight, p), images, 4), brute(synapses(weight, p), images, 5, p)
    else:
        conv = nn.Conv2d(3, 7, 5)
        conv.weight.data, conv.bias.data = weight, bias
        found, every = responses(conv, images, 4), brute(weight, images, 5, bias=bias.double())
    torch.testing.assert_close(found.mean, every.mean((0, 1)), rtol=1e-5, atol=1e-5)
    wins = torch.bincount(every.argmax(2).flatten(), minlength=7) / every[..., 0].numel()
    torch.testing.assert_close(found.wins, wins.double(), rtol=0, atol=2 / every[..., 0].numel())  # but for near ties
    assert found.wins.sum().item() == pytest.approx(1)
    best = every.amax(1).sort(dim=0, descending=True)  # of each image
    torch.testing.assert_close(found.activity.double(), best.values[:4].T, rtol=1e-4, atol=1e-4)
    for f in range(7):
        assert len(set(found.image[f].tolist())) == 4
        for image, row, col, activity in zip(found.image[f], found.row[f], found.column[f], found.activity[f], strict=True):
            assert every[image, row * 28 + col, f].item() == pytest.approx(activity.item(), abs=1e-4)


def test_on_a_tie_the_first_image_place_and_neuron_come_first():
    images = torch.full((6, 1, 4, 5), 0.5)
    found = responses(KHConv2d(torch.ones(3, 1, 2, 2), 2), images, 3)
    assert found.image.tolist() == [[0, 1, 2]] * 3 and not found.row.any() and not found.column.any()
    assert found.wins.tolist() == [1, 0, 0]


def test_responses_say_what_is_wrong(sample):
    conv = KHConv2d(torch.ones(1, 3, 4, 4), 2)
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"count={count}"):
            responses(conv, sample.test_images[:2], count)
    with pytest.raises(ValueError, match="shape"):
        responses(conv, sample.test_images[0], 1)


# ---------------------------------------------------------------------------------------------------------------------
# What Python packs


def unpacked(widget, model, part):
    place = widget.header["models"][model]["parts"][part]
    return np.frombuffer(widget.numbers, "<" + place["kind"], place["length"], place["offset"])


def few(data, count=20):
    """A data set of fewer test images."""
    return dataclasses.replace(data, **{name: getattr(data, name)[:count] for name in ("test_images", "test_labels", "test_index")})


@pytest.mark.parametrize("name, w, count", [("sample", 4, 8), ("sample", 8, 4), ("sample", 12, 1), ("digits", 4, 8)])
def test_the_patches_in_the_page_are_those_of_the_images(request, name, w, count):
    data = few(request.getfixturevalue(name))
    C = data.test_images.shape[1]
    weight = np.random.default_rng(0).normal(size=(5, C, w, w)).astype(np.float32)
    widget = FilterExplorer({"LL": dict(weight=weight, p=2)}, data)
    expected = responses(KHConv2d(torch.from_numpy(weight), 2), data.test_images, count)
    assert torch.equal(widget.responses["LL"].image, expected.image) and widget.header["models"][0]["patches"] == count
    pixels = unpacked(widget, 0, "pixels").reshape(5, count, C, w, w)
    numbers, labels = (unpacked(widget, 0, part).reshape(5, count) for part in ("image", "label"))
    for f in range(5):
        for i in range(count):
            image, row, col = (values[f, i].item() for values in (expected.image, expected.row, expected.column))
            np.testing.assert_array_equal(pixels[f, i], data.test_images[image, :, row : row + w, col : col + w])
            assert numbers[f, i] == data.test_index[image] and labels[f, i] == data.test_labels[image]
    np.testing.assert_array_equal(unpacked(widget, 0, "activity"), expected.activity.flatten())


def test_a_model_of_400_filters_stays_small(sample):
    for w in (4, 8):
        widget = FilterExplorer({"LL": dict(weight=np.ones((400, 3, w, w)), p=2)}, few(sample))
        assert len(widget.numbers) < 540_000


def test_the_last_epoch_is_known_exactly_though_its_snapshot_is_rounded():
    weight = np.abs(np.random.default_rng(0).normal(size=(50, 3, 4, 4))) + 0.01
    weight /= (weight**4).sum((1, 2, 3), keepdims=True) ** 0.25
    snapshots = np.stack([weight, weight]).astype(np.float16)
    widget = FilterExplorer({"LL": dict(weight=weight, p=4, epochs=[1, 2], snapshots=snapshots)})
    early, last = np.abs(unpacked(widget, 0, "norms").reshape(2, 50) - 1).max(1)
    assert last < 1e-9 and 1e-6 < early < 1e-3
    assert widget.header["models"][0]["tolerances"] == [[1e-3], [1e-4, 1e-6]]


FILTERS = np.ones((4, 3, 4, 4))


@pytest.mark.parametrize(
    "model, message",
    [
        (dict(weight=np.ones((4, 2, 4, 4)), p=2), "shape"),
        (dict(weight=FILTERS, p=2, epochs=[1]), "both or neither"),
        (dict(weight=FILTERS, p=2, epochs=[1], snapshots=np.ones((2, 4, 3, 4, 4))), "snapshots"),
        (dict(weight=FILTERS, p=2, epochs=[1], snapshots=np.zeros((1, 4, 3, 4, 4))), "not its weight"),
        (dict(weight=FILTERS, p=2, wins=np.ones(3)), "win rates"),
        (dict(weight=FILTERS, p=2, kind="BP", bias=np.ones(3)), "biases"),
        (dict(weight=FILTERS, p=2, kind="KH"), "one of LL, BP"),
        (dict(weight=np.full((4, 3, 4, 4), np.nan), p=2), "finite"),
        (dict(weight=np.ones((4, 1, 4, 4)), p=2), "does not fit images"),
        (dict(weight=FILTERS, p=1), "p=1"),
    ],
)
def test_the_explorer_says_what_is_wrong(sample, model, message):
    with pytest.raises(ValueError, match=message):
        FilterExplorer({"LL": model}, sample)


def test_the_explorer_needs_a_model():
    with pytest.raises(ValueError, match="no model"):
        FilterExplorer({})


# ---------------------------------------------------------------------------------------------------------------------
# The modules' arithmetic


def test_tiles_in_the_page_are_the_figures_tiles():
    weight = np.random.default_rng(0).normal(size=(2, 3, 4, 4))
    for i in range(2):
        found = node("filters", "return Array.from(m.tile(weight, 3))", weight=weight[i].ravel().tolist())
        picture = np.array(found).reshape(4, 4, 4)
        assert (picture[..., 3] == 255).all()
        np.testing.assert_allclose(picture[..., :3], 255 * tiles(weight)[i], atol=0.5 + 1e-9)


def test_columns_are_named_as_in_the_figures():
    assert node("filters", "return [0, 19, 25, 26, 51, 52].map(m.column)") == ["A", "T", "Z", "AA", "AZ", "BA"]


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture(scope="module")
def given(sample):
    """An LL layer of nine neurons that forms, one that dies, and four BP filters; as models, and the data they meet."""
    generator = np.random.default_rng(1)
    snapshots = generator.normal(size=(3, 9, 3, 4, 4))
    snapshots[2] = np.abs(snapshots[2])
    snapshots[2, 1:] /= np.sqrt((snapshots[2, 1:] ** 2).sum((1, 2, 3), keepdims=True))
    snapshots[2, 2] *= 1 + 1e-5
    dying = snapshots[[0, 1, 1, 2]]
    dying[3, :6] *= -1
    models = {
        "LL": dict(weight=snapshots[2], p=2, epochs=[0, 1, 5], snapshots=snapshots, wins=np.arange(9) / 36),
        "BP": dict(weight=generator.normal(size=(4, 3, 4, 4)), p=2, kind="BP", bias=np.arange(4) / 10),
        "dying": dict(weight=dying[3], p=2, epochs=[0, 1, 3, 5], snapshots=dying),
    }
    return models, few(sample, 30)


@pytest.fixture
def explorer(given):
    return FilterExplorer(*given)


def fact(page, name, view=0):
    return page.locator(".khnb-view").nth(view).locator(f'dt:text-is("{name}") + dd').inner_text()


def neuron_of(page, view=0):
    return page.locator(".khnb-neuron").nth(view).inner_text()


def summary(page):
    return page.inner_text(".khnb-summary")


def cell(page, name, view=0):
    return page.locator(".khnb-view").nth(view).locator(f'[role="gridcell"][aria-label^="{name},"]')


def test_the_explorer_s_traits_are_checked_and_read_back(explorer):
    for name, value in dict(model_name="other", beside="other", epoch=4, neuron=9, neuron_beside=-1, emphasis="none").items():
        with pytest.raises(traitlets.TraitError, match=name):
            setattr(explorer, name, value)
    state = dict(model_name="BP", beside="dying", epoch=1, neuron=3, neuron_beside=8, linked=False, emphasis="others")
    for name, value in state.items():
        setattr(explorer, name, value)
    assert {name: getattr(explorer, name) for name in state} == state


@pytest.mark.page
@pytest.mark.slow
def test_the_explorer_works_with_mouse_and_keyboard(shown, explorer, given):
    snapshots = given[0]["LL"]["snapshots"]
    page = shown(explorer)
    good = [is_feature(torch.tensor(snapshots[2]), 2, tol).sum().item() for tol in (1e-4, 1e-6)]
    assert good == [8, 7]
    assert "8 of 9 filters are features at tolerance 1e−4 (f = 0.89), 7 at 1e−6" in page.locator(".khnb-gridbox").first.inner_text()
    assert neuron_of(page) == "Neuron A1" and "it is no feature" in summary(page)
    page.locator('[role="gridcell"]').first.focus()
    for key in ("ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown", "ArrowLeft", "ArrowLeft", "End"):
        page.keyboard.press(key)
    assert neuron_of(page) == "Neuron C3" and page.evaluate("model.get('neuron')") == 8
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "C3, feature"
    assert page.get_by_label("next neuron").first.is_disabled()
    page.keyboard.press("Control+Home")
    page.get_by_label("next neuron").first.click()
    assert neuron_of(page) == "Neuron B1"
    cell(page, "C1").click()
    assert neuron_of(page) == "Neuron C1" and fact(page, "feature") == "yes at 1e−4, no at 1e−6" and fact(page, "2-norm") == "1.000010"
    page.get_by_label("After epoch").fill("0")
    assert "0 of 9 filters" in page.locator(".khnb-gridbox").first.inner_text() and "after epoch 0" in summary(page)
    assert fact(page, "2-norm") == f"{np.linalg.norm(snapshots[0, 2]):.6f}" and fact(page, "sign") == "some negative"
    page.get_by_label("Model").select_option("BP")
    assert page.locator('[role="gridcell"]').count() == 4 and not page.get_by_label("After epoch").is_visible()
    assert page.evaluate("model.get('model_name')") == "BP"


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.parametrize("name, f", [("LL", 4), ("BP", 3), ("dying", 1)])
def test_the_explorer_shows_what_excites_a_neuron(shown, explorer, given, name, f):
    models, data = given
    page = shown(explorer)
    page.get_by_label("Model").select_option(name)
    page.locator('[role="gridcell"]').nth(f).click()
    weight, p = torch.tensor(models[name]["weight"]), None if name == "BP" else 2
    every = brute(weight, data.test_images, 4, p, torch.tensor(models[name].get("bias", np.zeros(9)))[: len(weight)])
    rate = 100 * (every.argmax(2) == f).double().mean().item()
    recorded = f", {100 * f / 36:.2f} % in the last epoch of training" if name == "LL" else ""
    assert float(fact(page, "win rate").split(" %")[0]) == pytest.approx(rate, abs=0.011) and fact(page, "win rate").endswith(f"of test patches{recorded}")
    mean = every[..., f].mean().item()
    assert float(fact(page, "mean activity").split()[0].replace("−", "-")) == pytest.approx(mean, rel=6e-3)
    best = every[..., f].max(1)
    order = best.values.argsort(descending=True)[:8]
    figures = page.locator(".khnb-strongest figure")
    assert figures.count() == 8
    for i, image in enumerate(order.tolist()):
        kind, activity = figures.nth(i).locator("figcaption").inner_text().split("\n")
        assert float(activity.replace("−", "-")) == pytest.approx(best.values[image].item(), rel=6e-3)
        if i == 0:
            assert kind == data.classes[data.test_labels[image]] and f"of the class {kind}, activity {activity}" in summary(page)
            row, col = divmod(best.indices[image].item(), 29)
            assert figures.nth(0).get_attribute("title") == f"test image {data.test_index[image]}, row {row + 1}, column {col + 1}"
            drawn = page.evaluate("Array.from(document.querySelector('.khnb-strongest canvas').getContext('2d').getImageData(0, 0, 4, 4).data)")
            patch = data.test_images[image, :, row : row + 4, col : col + 4].numpy().astype(float)
            bright = 255 / patch.max() if name != "BP" else 1
            np.testing.assert_allclose(np.array(drawn).reshape(4, 4, 4)[..., :3], bright * patch.transpose(1, 2, 0), atol=1)
    text = page.inner_text(".khnb-excited")
    assert f"of the {30 * 29 * 29:,} in 30 test images" in text and ("No patch excites it" in text) == (name == "dying")
    assert ("6 have no positive weight: no patch excites them" in page.locator(".khnb-gridbox").first.inner_text()) == (name == "dying")
    if name != "BP":
        page.get_by_label("After epoch").fill("1")
        assert fact(page, "win rate") == fact(page, "mean activity") == "known after the last epoch only"
        assert figures.count() == 0


@pytest.mark.page
@pytest.mark.slow
def test_two_models_side_by_side(shown, explorer):
    page = shown(explorer)
    views, link = page.locator(".khnb-view"), page.get_by_label("same neuron in both")
    assert not views.nth(1).is_visible() and not link.is_visible()
    page.get_by_label("Beside it").select_option("dying")
    assert views.nth(1).is_visible() and link.is_checked()
    cell(page, "B2", 1).click()  # linked: either grid moves both
    assert neuron_of(page, 0) == neuron_of(page, 1) == "Neuron B2"
    link.uncheck()
    cell(page, "B2", 1).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert (neuron_of(page, 0), neuron_of(page, 1)) == ("Neuron B2", "Neuron C3")
    # the second grid shows what it was by then
    for first, second, pairs in (("dying", "LL", "00 11 31 55"), ("LL", "dying", "00 11 55")):
        page.get_by_label("Model").select_option(first)
        page.get_by_label("Beside it").select_option(second)
        for place, pair in enumerate(pairs.split()):
            page.get_by_label("After epoch").fill(str(place))
            assert [text.split()[-1] for text in views.locator("h4").all_inner_texts()] == list(pair)
    assert "LL, after epoch 5" in summary(page) and "dying, after epoch 5: 3 of 9" in summary(page)
    page.get_by_label("Beside it").select_option("BP")
    assert not link.is_visible() and views.nth(1).locator('[role="gridcell"]').count() == 4
    cell(page, "A2", 1).click()
    assert (neuron_of(page, 0), neuron_of(page, 1)) == ("Neuron B2", "Neuron A2")
    # the slider is that of the model which has a history, wherever it is
    page.get_by_label("Model").select_option("BP")
    page.get_by_label("Beside it").select_option("LL")
    page.get_by_label("After epoch").fill("1")
    assert "LL, after epoch 1" in summary(page) and "BP, trained" in summary(page)


@pytest.mark.page
@pytest.mark.slow
def test_the_emphasis_changes_more_than_colour(shown, explorer):
    page = shown(explorer)

    def small():
        widths = page.evaluate("[...document.querySelectorAll('[role=gridcell] canvas')].map((c) => c.getBoundingClientRect().width)")
        return [width < 0.6 * max(widths) for width in widths]

    assert not any(small())
    page.get_by_label("Emphasise").select_option("features")
    assert small() == [True] + 8 * [False]
    page.get_by_label("Emphasise").select_option("others")
    assert small() == [False] + 8 * [True]
    assert page.evaluate("model.get('emphasis')") == "others"


@pytest.mark.page
@pytest.mark.slow
def test_half_precision_is_not_taken_for_more_than_it_is(shown):
    weight = np.full((4, 1, 4, 4), 0.25)
    models = {"LL": dict(weight=weight, p=2, epochs=[0, 1], snapshots=np.stack([1.0005 * weight, weight]).astype(np.float16))}
    page = shown(FilterExplorer(models))
    assert "known" not in page.locator(".khnb-facts").first.inner_text() and not page.locator(".khnb-excited").first.is_visible()
    assert fact(page, "win rate") == "not recorded"
    page.get_by_label("After epoch").fill("0")
    assert fact(page, "feature") == "yes at 1e−3" and "half precision" in page.locator(".khnb-gridbox").first.inner_text() and len(fact(page, "2-norm")) == 5


@pytest.mark.page
@pytest.mark.slow
def test_the_explorer_fits_a_telephone_names_its_controls_and_can_be_touched(shown, explorer):
    explorer.beside = "dying"
    page = shown(explorer, width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390 and nameless(page) == []
    # a tile may be small where the two buttons, which reach every neuron, are not
    boxes = [box.bounding_box() for box in page.locator(".khnb-controls select, .khnb-controls input[type=range], .khnb-which button").all()]
    assert min(min(box["width"], box["height"]) for box in boxes) >= 24


@pytest.mark.page
@pytest.mark.slow
def test_the_explorer_prints_as_a_still_picture(shown, explorer):
    page = shown(explorer)
    page.emulate_media(media="print")
    assert not page.get_by_label("next neuron").first.is_visible() and not page.locator("input[type=range]").is_visible()
    assert page.locator(".khnb-strongest canvas").first.is_visible() and page.locator('[role="gridcell"] canvas').first.is_visible()
