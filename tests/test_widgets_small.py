"""The small widgets: what their modules compute against PyTorch, SciPy and the library, and what a reader sees and moves."""

import json
import re

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d, correlate2d
from traitlets import TraitError

from khnb import models, schematics
from khnb.learning import kh_update
from khnb.robustness import five_parameter, inflection, logistic
from khnb.widgets import Activations, Convolution, HopfieldRecall, LogisticCurve, WinnerTakesAll
from khnb.widgets.small import CLUMPS, CORNER, KERNELS, LETTERS
from pages import node

WIDGETS = dict(activations=Activations, logistic=LogisticCurve, convolution=Convolution, winner=WinnerTakesAll, hopfield=HopfieldRecall)
X = np.array([-4, -2.5, -1, -0.3, -1e-3, 0, 1e-3, 0.7, 1, 2, 4])


def numbers(nested):
    """A list out of node as an array: what is not a number comes as null."""
    return np.array(nested, dtype=float)


# ---------------------------------------------------------------------------------------------------------------------
# What the modules compute


@pytest.mark.parametrize("n", [1, 2, 3, 4.5, 10])
@pytest.mark.parametrize("sigma", models.ACTIVATIONS)
def test_powers_and_slopes_of_activation_functions(sigma, n):
    x = torch.tensor(X, requires_grad=True)
    y = models.activate(x, sigma, n)
    (slope,) = torch.autograd.grad(y.sum(), x)
    found = numbers(node("activations", "return x.map((v) => m.powered(sigma, n, v))", x=X.tolist(), sigma=sigma, n=n))
    np.testing.assert_allclose(found[:, 0], y.detach(), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(found[:, 1], slope, rtol=1e-12, atol=1e-15)


def test_the_logistic_curve_and_its_slope():
    eps = np.linspace(-0.02, 0.08, 101)
    for k, R, nu in [(250, 0.02, 1.0), (20, -0.02, 0.05), (1000, 0.06, 5.0), (120, 0.0, 0.1)]:
        given = dict(k=k, R=R, nu=nu)
        values, slopes = numbers(node("logistic", "return [m.curve, m.slope].map((f) => eps.map((e) => f(e, at)))", eps=eps.tolist(), at=given))
        np.testing.assert_allclose(values, logistic(eps, k, R, nu), rtol=1e-10, atol=1e-14)
        h = 1e-5 / k
        np.testing.assert_allclose(slopes, (logistic(eps + h, k, R, nu) - logistic(eps - h, k, R, nu)) / (2 * h), rtol=1e-6, atol=1e-6 * k)


def test_the_inflection_point_is_that_of_the_thesis_form():
    Q, B, D, M, nu = 1.5, 1.2, 0.01, 2.0, 0.8
    R = inflection(Q, B, D, M, nu)
    eps = np.linspace(R - 0.02, R + 0.02, 4001)
    given = dict(k=B / D, R=R, nu=nu)
    values, slopes = numbers(node("logistic", "return [m.curve, m.slope].map((f) => eps.map((e) => f(e, at)))", eps=eps.tolist(), at=given))
    np.testing.assert_allclose(values, five_parameter(eps, Q, B, D, M, nu), atol=1e-12)
    assert abs(eps[np.argmin(slopes)] - R) < 1.5e-5


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("flip, reference", [(True, convolve2d), (False, correlate2d)])
def test_a_convolution_and_a_correlation(flip, reference, stride):
    generator = np.random.default_rng(3)
    image, kernel = generator.integers(-5, 6, (7, 8)), generator.integers(-5, 6, (3, 3))
    found = node("convolution", "return m.windows(image, kernel, flip, stride)", image=image.tolist(), kernel=kernel.ravel().tolist(), flip=flip, stride=stride)
    expected = reference(image, kernel, mode="valid")[::stride, ::stride]
    assert found["columns"] == expected.shape[1]
    np.testing.assert_array_equal([window["sum"] for window in found["list"]], expected.ravel())
    for window in found["list"]:
        assert [v for v, _ in window["products"]] == image[window["row"] :][:3, window["column"] :][:, :3].ravel().tolist()
        assert sum(v * weight for v, weight in window["products"]) == window["sum"]


@pytest.mark.parametrize("m, delta, p", [(2, 0.1, 2.0), (4, 0.6, 3.0), (6, 0.0, 2.5), (3, 1.0, 6.0)])
def test_the_rule_in_the_page_is_the_library_s(m, delta, p):
    generator = torch.Generator().manual_seed(1)
    W, V = (torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (6, 40))
    W[3] = W[1]  # a tie
    V /= torch.linalg.vector_norm(V, ord=p, dim=1, keepdim=True)
    found = node("winner", "return m.khUpdate(W, V, rank, delta, p).change", W=W.tolist(), V=V.tolist(), rank=m, delta=delta, p=p)
    np.testing.assert_allclose(found, kh_update(W, V, m, delta, p), rtol=0, atol=1e-9)


def learned(script, **changes):
    """``script`` run with a learner ``L`` of the widget's defaults."""
    widget = WinnerTakesAll(**changes)
    given = {name: getattr(widget, name) for name in ("filters", "m", "delta", "p", "eta", "batch", "seed")}
    return node("winner", f"const L = m.learner(asked); {script}", asked=given | dict(clumps=CLUMPS[widget.inputs], last=400))


@pytest.mark.parametrize("changes", [{}, dict(inputs=CORNER, delta=0.6, p=3.0, m=3), dict(batch=1, filters=5)])
def test_training_in_the_page_follows_the_library_step_by_step(changes):
    widget = WinnerTakesAll(**changes)
    V, states = learned("L.at(400); return [L.V, Array.from({ length: 401 }, (_, t) => L.at(t))]", **changes)
    V = torch.tensor(V, dtype=torch.float64)
    np.testing.assert_allclose(torch.linalg.vector_norm(V, ord=widget.p, dim=1), 1, rtol=1e-12)
    assert len(states[1]["batch"]) == widget.batch
    for t in range(400):
        W = torch.tensor(states[t]["W"], dtype=torch.float64)
        change = kh_update(W, V[states[t + 1]["batch"]], widget.m, widget.delta, widget.p)
        expected = W + widget.eta * (1 - t / 400) * change / change.abs().max()
        np.testing.assert_allclose(states[t + 1]["W"], expected, rtol=0, atol=1e-9)


def test_what_chapter_4_tells_happens():
    wins = "const h = m.activities(L.at(400).W, 2); return [L.V.map((v) => h(v).indexOf(Math.max(...h(v)))), L.V.map(h), L.at(400).W]"
    winners, _, W = learned(wins)
    counts = np.bincount(winners, minlength=8)
    np.testing.assert_allclose(np.linalg.norm(np.array(W)[counts > 0], axis=1), 1, atol=0.02)
    assert (counts > 30).sum() == 4  # a filter for each clump
    winners, activities, _ = learned(wins, inputs=CORNER, delta=0.6)
    assert len(set(winners)) == 1 and (np.array(activities) <= 0).all(0).sum() == 7  # the wall


def test_the_same_seed_is_the_same_page():
    draws = node("winner", "return [1, 1, 2].map((seed) => { const r = m.random(seed); return Array.from({ length: 4000 }, r); })")
    assert draws[0] == draws[1] != draws[2]
    assert 0 <= min(draws[0]) and max(draws[0]) < 1
    np.testing.assert_allclose(np.histogram(draws[0], 10, (0, 1))[0], 400, atol=80)


def pattern(name):
    return np.array([1 if pixel == "#" else -1 for pixel in LETTERS[name]])


def recalled(stored, start, seed):
    """The course of a recall in the page, and the weights of eq. 4.1 by NumPy."""
    xi = np.array([pattern(name) for name in list(LETTERS)[:stored]])
    script = "const T = m.weights(patterns); return [T, m.recall(T, start, seed)]"
    T, steps = node("hopfield", script, patterns=xi.tolist(), start=start.tolist(), seed=seed)
    np.testing.assert_array_equal(T, xi.T @ xi)
    return xi.T @ xi, np.array([step["state"] for step in steps]), np.array([step["energy"] for step in steps]), xi


@pytest.mark.parametrize("stored", [1, 4, 10])
def test_the_energy_is_that_of_eq_4_1_and_never_rises(stored):
    start = np.random.default_rng(stored).choice([-1, 1], 64)
    T, states, energies, _ = recalled(stored, start, seed=2)
    np.testing.assert_array_equal(states[0], start)
    np.testing.assert_array_equal(energies, -0.5 * np.einsum("ti,ij,tj->t", states, T, states))
    assert (np.diff(energies) <= 0).all() and energies[-1] < energies[0]
    changed = (np.diff(states, axis=0) != 0).sum(1)
    assert changed.max() == 1 and ((np.diff(energies) < 0) == (changed == 1)).all()
    field = (T - np.diag(np.diag(T))) @ states[-1]
    assert (field * states[-1] >= 0).all()  # nothing left to do
    assert len(states) % 64 == 1


def test_stored_patterns_are_recalled_and_too_many_are_not():
    for k, name in enumerate(list(LETTERS)[:4]):
        start = np.array(node("hopfield", "return m.noisy(xi, 0.2, seed)", xi=pattern(name).tolist(), seed=k))
        assert (start != pattern(name)).sum() == 13
        _, states, _, xi = recalled(4, start, seed=k)
        np.testing.assert_array_equal(states[-1], xi[k])

    def kept(stored):
        ends = [recalled(stored, pattern(name), seed=0)[1][-1] for name in list(LETTERS)[:stored]]
        return sum((end == pattern(name)).all() for end, name in zip(ends, LETTERS))

    assert kept(7) == 7 and kept(8) < 8 and kept(10) <= 5


def test_more_noise_flips_the_same_pixels_and_more():
    flips = node("hopfield", "return [0, 0.25, 0.5].map((share) => m.noisy(xi, share, 3))", xi=pattern("A").tolist())
    none, some, many = (np.array(flip) != pattern("A") for flip in flips)
    assert (none.sum(), some.sum(), many.sum()) == (0, 16, 32) and not (some & ~many).any()


# ---------------------------------------------------------------------------------------------------------------------
# The Python side


@pytest.mark.parametrize(
    "kind, wrong",
    [
        (Activations, dict(functions=[])), (Activations, dict(functions=["swish"])), (Activations, dict(n=0.5)), (Activations, dict(x=5.0)),
        (Activations, dict(n=float("nan"))), (LogisticCurve, dict(k=0.0)), (LogisticCurve, dict(R=0.5)), (LogisticCurve, dict(nu=0.0)),
        (Convolution, dict(kernel="Prewitt")), (Convolution, dict(own=[1] * 8)), (Convolution, dict(own=[100] * 9)), (Convolution, dict(stride=3)),
        (Convolution, dict(position=20)), (Convolution, dict(flip="no")), (WinnerTakesAll, dict(inputs="elsewhere")), (WinnerTakesAll, dict(filters=9)),
        (WinnerTakesAll, dict(m=1)), (WinnerTakesAll, dict(m=4, filters=3)), (WinnerTakesAll, dict(p=1.5)), (WinnerTakesAll, dict(delta=-0.1)),
        (WinnerTakesAll, dict(steps=401)), (HopfieldRecall, dict(stored=0)), (HopfieldRecall, dict(letter="Q")), (HopfieldRecall, dict(noise=0.6)),
        (HopfieldRecall, dict(start="#.")), (HopfieldRecall, dict(start="x" * 64)), (HopfieldRecall, dict(updates=-1)),
    ],
)
def test_a_wrong_value_is_named(kind, wrong):
    with pytest.raises(TraitError, match=rf"\b{next(iter(wrong))}\b"):
        kind(**wrong)
    widget = kind()
    before = {name: getattr(widget, name) for name in wrong}
    with pytest.raises(TraitError):
        for name, value in wrong.items():
            setattr(widget, name, value)
    assert all(getattr(widget, name) in (value, wrong[name]) for name, value in before.items())


def test_fewer_filters_and_a_lower_rank_may_come_together():
    widget = WinnerTakesAll(m=6)
    widget.set_state(dict(filters=3, m=3))  # as a page sends them
    assert (widget.filters, widget.m) == (3, 3)


def test_the_page_knows_the_limits_of_each_number():
    header = WinnerTakesAll(m=3, filters=3).header
    assert header["delta"] == dict(min=0, max=1, step=0.05) and header["steps"]["max"] == 400
    assert {curve["name"] for curve in Activations().header["curves"]} == set(models.ACTIVATIONS)
    assert len({curve["dash"] for curve in Activations().header["curves"]}) == 7  # told apart without colour
    np.testing.assert_array_equal(Convolution().header["image"], schematics.IMAGE)


@pytest.mark.parametrize("name", WIDGETS)
def test_a_page_carries_little(name):
    state = {key: value for key, value in WIDGETS[name]().get_state().items() if key not in ("_esm", "_css")}
    assert len(json.dumps(state)) < 4000
    assert len(WIDGETS[name]._esm) < 30_000 and "import " not in re.sub(r"//.*|/\*.*?\*/", "", WIDGETS[name]._esm, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------------------------
# The page


def summary(page) -> str:
    return page.inner_text(".khnb-summary").replace("−", "-")


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.parametrize("name", WIDGETS)
def test_a_widget_fits_a_telephone_and_names_what_it_shows(shown, name):
    page = shown(WIDGETS[name](), width=390)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    nameless = page.evaluate(
        """[...document.querySelectorAll("select, input, button, svg, canvas, [role]")].filter((node) => node.role !== "row" &&
             !node.labels?.length && !node.ariaLabel && node.ariaHidden !== "true" && !node.textContent.trim()).map((node) => node.outerHTML)"""
    )
    assert nameless == []
    small = page.evaluate(
        """[...document.querySelectorAll("select, input, button")].map((node) => {
             const box = (node.type === "checkbox" ? node.parentElement : node).getBoundingClientRect();
             return [Math.min(box.width, box.height), node.outerHTML]; }).filter(([size]) => size < 24)"""
    )
    assert small == []
    text = page.evaluate(
        """[...document.querySelectorAll(".khnb-svg text")].map((node) => Math.hypot(node.getScreenCTM().a, node.getScreenCTM().b) * parseFloat(getComputedStyle(node).fontSize))"""
    )
    assert min(text, default=11) >= 10.5
    assert len(summary(page)) > 40


@pytest.mark.page
@pytest.mark.slow
def test_two_widgets_of_a_page_share_no_names(shown):
    page = shown(LogisticCurve())
    again = """async (text) => {
      const module = await import(URL.createObjectURL(new Blob([text], { type: "text/javascript" })));
      module.default.render({ model, el: document.body.appendChild(document.createElement("div")) });
    }"""
    page.evaluate(again, LogisticCurve._esm)
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((node) => node.id)")
    assert len(ids) == len(set(ids)) > 8


@pytest.mark.page
@pytest.mark.slow
def test_activations_are_chosen_and_read(shown):
    page = shown(Activations(functions=["relu"], x=1.0))
    assert page.locator(".khnb-panel").nth(0).locator("circle").count() == 1
    page.get_by_label("ELU", exact=True).check()
    page.get_by_label("ReLU", exact=True).uncheck()
    assert page.evaluate("model.get('functions')") == ["elu"]
    page.get_by_label("ELU", exact=True).click()  # the last one stays
    assert page.get_by_label("ELU", exact=True).is_checked() and page.evaluate("model.get('functions')") == ["elu"]
    page.get_by_label("Power n").fill("3")
    page.get_by_label("Place x").fill("-1")
    y = np.expm1(-1)
    assert summary(page) == f"At x = -1.00, to the power 3: ELU {y**3:.4f}, slope {3 * y**2 * np.exp(-1):.4f}."
    page.get_by_label("Place x").press("ArrowRight")
    assert "At x = -0.95" in summary(page)
    page.get_by_label("Power n").fill("2.5")
    assert "ELU undefined" in summary(page)


@pytest.mark.page
@pytest.mark.slow
def test_the_logistic_curve_says_where_it_is_steepest(shown):
    page = shown(LogisticCurve())
    page.get_by_label("Steepness").fill("100")
    page.get_by_label("Asymmetry").fill("2")
    page.get_by_label("Inflection").fill("0.03")
    start, middle = logistic(np.array([0, 0.03]), 100, 0.03, 2.0)
    steepest = (logistic(0.03 + 1e-7, 100, 0.03, 2.0) - logistic(0.03 - 1e-7, 100, 0.03, 2.0)) / 2e-7
    assert summary(page) == f"f(0) = {start:.4f} (square). It is steepest at ε = R = 0.030, where f = {middle:.3f} and the slope is {steepest:.1f}."
    for _ in range(31):
        page.get_by_label("Inflection").press("ArrowLeft")
    assert "No inflection in ε > 0: R = -0.001" in summary(page)


@pytest.mark.page
@pytest.mark.slow
def test_a_convolution_is_stepped_through(shown):
    page = shown(Convolution())
    output = convolve2d(schematics.IMAGE, schematics.SOBEL_Y, mode="valid")

    def values():
        return [int(text.replace("−", "-")) for text in page.locator('[role="gridcell"]').all_inner_texts() if text]

    assert values() == output[0, :3].tolist() and summary(page).startswith("Output row 1, column 3 of 4 × 5: ")
    page.get_by_role("button", name="Step").click()
    assert values() == output[0, :4].tolist()
    page.locator('[aria-selected="true"]').press("ArrowDown")
    assert page.evaluate("model.get('position')") == 8 and values() == output.ravel()[:9].tolist()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("row 2, column 4")
    page.get_by_label("Flip the kernel").uncheck()
    assert values() == correlate2d(schematics.IMAGE, schematics.SOBEL_Y, mode="valid").ravel()[:9].tolist()
    assert page.locator(".khnb-cells > .khnb-window").count() == 18
    page.get_by_label("kernel, row 1, column 1").fill("5")
    page.get_by_label("kernel, row 1, column 1").press("Enter")
    assert page.get_by_label("Kernel", exact=True).input_value() == "own"
    kernel = schematics.SOBEL_Y.copy()
    kernel[0, 0] = 5
    assert values() == correlate2d(schematics.IMAGE, kernel, mode="valid").ravel()[:9].tolist()
    page.get_by_label("Kernel", exact=True).select_option("sharpen")
    page.get_by_label("Stride").fill("2")
    page.get_by_label("Position").press("End")
    assert values() == correlate2d(schematics.IMAGE, np.reshape(KERNELS["sharpen"], (3, 3)), mode="valid")[::2, ::2].ravel().tolist()


@pytest.mark.page
@pytest.mark.slow
def test_filters_learn_and_collapse(shown):
    page = shown(WinnerTakesAll())
    assert summary(page).startswith("After 0 of 400 steps with Δ = 0.10 and m = 2: 0 of 8 filters have norm 1")
    page.get_by_role("button", name="Step").click()
    assert "After 1 of 400" in summary(page)
    page.get_by_label("Step", exact=True).last.fill("400")
    assert "5 of 8 filters have norm 1 (within 0.02), 4 win no input." in summary(page)
    page.get_by_label("Inputs", exact=True).select_option(CORNER)
    page.get_by_label("Strength").fill("0.6")
    assert "7 win no input, 7 of them pointing away from every input" in summary(page)
    assert page.locator("td", has_text="points away from all").count() == 7
    page.get_by_label("Rank").fill("6")
    page.get_by_label("Filters", exact=True).fill("3")
    assert page.evaluate("[model.get('m'), model.get('filters')]") == [3, 3] and page.locator("tbody tr").count() == 3
    page.get_by_label("Inputs a step").fill("1")
    page.get_by_role("button", name="Reset").click()
    page.get_by_role("button", name="Step").click()
    assert re.search(r"The last input pulled filter \d and pushed filter \d away", summary(page))


@pytest.mark.page
@pytest.mark.slow
def test_a_letter_is_recalled_and_pixels_are_flipped(shown):
    page = shown(HopfieldRecall())
    page.get_by_label("Updates").press("End")
    assert "It has settled on A, exactly." in summary(page)
    on = "[...document.querySelectorAll('.khnb-pixel')].map((node) => node.ariaPressed === 'true' ? '#' : '.').join('')"
    assert page.evaluate(on) == LETTERS["A"]
    page.get_by_label("row 1, column 1", exact=True).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    flipped = "".join(c if i != 9 else ".#"[c == "."] for i, c in enumerate(LETTERS["A"]))
    assert page.evaluate(on) == flipped == page.evaluate("model.get('start')")
    assert "After 0 of" in summary(page) and page.get_by_role("row", name="A").inner_text().split()[-1] == f"{62 / 64:.2f}"
    page.get_by_label("row 8, column 8", exact=True).click()
    assert page.get_by_role("row", name="A").inner_text().split()[-1] == f"{60 / 64:.2f}"
    page.get_by_label("Pixels flipped").fill("0")
    assert page.evaluate(on) == LETTERS["A"] and page.evaluate("model.get('start')") == ""
    page.get_by_label("Stored").fill("10")
    page.get_by_label("Updates").press("End")
    assert page.locator("tbody tr:visible").count() == 10 and "a mixture that was never stored" in summary(page)


@pytest.mark.page
@pytest.mark.slow
def test_a_run_stops_where_it_ends(shown):
    page = shown(WinnerTakesAll(steps=391))
    page.get_by_role("button", name="Run").click()
    page.wait_for_function("model.get('steps') === 400")
    assert page.get_by_role("button", name="Run").count() == 1 and "After 400 of 400" in summary(page)
    assert page.locator(".khnb-summary").get_attribute("aria-live") == "polite"


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.parametrize("name, trait", [("convolution", "position"), ("winner", "steps"), ("hopfield", "updates")])
def test_a_run_can_be_paused_and_ends_with_the_widget(shown, name, trait):
    page = shown(WIDGETS[name](**{trait: 0}))
    at = f"model.get('{trait}')"
    page.get_by_role("button", name="Run").click()
    assert page.locator(".khnb-summary").get_attribute("aria-live") == "off"
    page.wait_for_function(f"{at} > 1")
    page.get_by_role("button", name="Pause").click()
    before = page.evaluate(at)
    page.wait_for_timeout(700)
    assert page.evaluate(at) == before and page.locator(".khnb-summary").get_attribute("aria-live") == "polite"
    page.get_by_role("button", name="Run").click()
    page.wait_for_function(f"{at} > {before}")
    page.evaluate("leave()")
    before = page.evaluate(at)
    page.wait_for_timeout(700)
    assert page.evaluate(at) == before


@pytest.mark.page
@pytest.mark.slow
def test_who_wants_no_motion_is_taken_to_the_end(shown):
    page = shown(HopfieldRecall())
    page.emulate_media(reduced_motion="reduce")
    page.get_by_role("button", name="Run").click()
    assert "It has settled on A, exactly." in summary(page)
