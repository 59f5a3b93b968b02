"""The trade-off explorer: its traits, its arithmetic against SciPy, and its page in Chromium."""

import json
import re

import numpy as np
import pytest
import traitlets
from scipy.stats import spearmanr

from khnb import tables
from khnb.results import Store
from khnb.widgets import TradeOffExplorer
from pages import node


def a_row(i, **other):
    """The i-th made-up row: accuracy falls as R rises."""
    row = dict(
        id=f"model{i}", record=f"attack{i}", model="LL", attack="fgsm", confidence=0.8, accuracy=0.7 - 0.01 * i, R=0.01 + 0.001 * i, R_err=0.0004, R_ci=[0.0092 + 0.001 * i, 0.0108 + 0.001 * i],
        images=1000 + i, n_survived=0, r2=0.99, status="ok", K=10, m=3 + i % 3, p=2.0, n=float(2 ** (i % 4)), sigma="gelu", seed=0, f=0.1 * i,
    )
    return row | other


ROWS = [
    *map(a_row, range(8)),
    a_row(8, model="BP", m=None, p=None, f=None, accuracy=0.75, R=0.012, R_ci=None),
    a_row(9, images=500, R=0.03),  # not more than 500
    a_row(10, r2=0.95, R=0.03),
    a_row(11, R=None, R_err=None, R_ci=None, r2=None, status="too-few"),
    *(a_row(i, attack="pgd", step=1e-3, radius=0.12, record=f"pgd{i}", R=0.009 + 0.001 * i) for i in range(4)),
    *(a_row(i, confidence=0.6, record=f"sure{i}") for i in range(5)),
]
PGD = "PGD, S = 0.12, step 0.001"


# ---------------------------------------------------------------------------------------------------------------------
# Python


def test_it_says_what_there_is_to_choose():
    widget = TradeOffExplorer(ROWS)
    assert (widget.attack, widget.confidence, widget.min_images, widget.min_r2) == ("FGSM", 0.8, 500, 0.95)
    assert widget.limits["attack"] == ["FGSM", PGD] and widget.limits["confidence"] == [0.6, 0.8]
    assert widget.limits["colour_by"] == ["model", "m", "n", "f", "images"]  # p is 2 wherever there is one
    assert widget.header["columns"]["model"]["values"] == ["LL", "BP"] and widget.header["columns"]["m"]["values"] == [3, 4, 5, None]


def test_every_value_survives_the_packing():
    rows = [*ROWS, *(a_row(i, accuracy=0.001 * i, tau=1.5 + i % 60) for i in range(100, 400))]  # columns in letters, in numbers, and as they are
    names = ("id", "record", "model", "accuracy", "R", "R_err", "images", "m", "n", "sigma", "f", "tau", "R_high")
    script = "const read = m.reader(m.unpack(header).columns); return rows.map((_, i) => names.map((name) => read(name)(i)))"
    header = TradeOffExplorer(rows).header
    assert [type(header["columns"][name].get("at")) for name in ("m", "tau", "record")] == [str, list, type(None)]
    for row, found in zip(rows, node("tradeoff", script, header=header, rows=rows, names=names), strict=True):
        for name, value in zip(names, found, strict=True):
            given = row["R_ci"] and row["R_ci"][1] if name == "R_high" else row.get(name)
            assert value == (pytest.approx(given, rel=1e-6) if isinstance(given, float) else given)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([], "no rows"),
        ([{k: v for k, v in a_row(0).items() if k != "R_err"}], "row 0 has no R_err: give rows of khnb.tables.attacked_models"),
        ([a_row(0), a_row(1, attack="pgd")], "row 1 has no step, radius"),
        ([a_row(0, attack="cw")], "row 0 has attack='cw'"),
        ([a_row(0, accuracy=62.0)], "accuracy=62.0: expected a number from 0 to 1"),
        ([a_row(0, R=float("nan"))], "R=nan"),
        ([a_row(0), a_row(0)], "row 1 is a second attack on model model0 by FGSM at confidence 0.8"),
    ],
)
def test_wrong_rows_are_named(rows, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TradeOffExplorer(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("attack", "CW", "one of FGSM, PGD"), ("confidence", 0.7, "one of 0.6, 0.8"), ("colour_by", "tau", "one of model, m"), ("filter_by", "images", "one of model, m"),
        ("filters", {"p": [2]}, "one of model, m, n"), ("filters", {"m": [3, 9]}, "m=9"), ("selected", ["nobody"], "nobody"), ("selected", ["model0", "model1", "model2"], "at most two"),
        ("selected", ["model0", "model0"], "each once"), ("min_images", -1, "min_images"), ("min_r2", 1.5, "min_r2"),
    ],
)
def test_wrong_traits_are_refused(name, value, message):
    widget = TradeOffExplorer(ROWS)
    before = getattr(widget, name)
    with pytest.raises(traitlets.TraitError, match=message):
        setattr(widget, name, value)
    assert getattr(widget, name) == before
    with pytest.raises(traitlets.TraitError, match=message):
        TradeOffExplorer(ROWS, **{name: value})


def test_right_traits_are_kept():
    given = dict(attack=PGD, confidence=0.6, colour_by="f", filter_by="m", filters={"m": [3, None], "model": ["LL"]}, min_images=0, min_r2=0.5, selected=["model1", "model0"])
    widget = TradeOffExplorer(ROWS, **given)
    assert {name: getattr(widget, name) for name in given} == given


def test_it_holds_the_attacks_of_the_store():
    store = Store()
    widget = TradeOffExplorer.of(store)
    rows = tables.attacked_models(store, "fgsm", 0.8)
    sifted = node("tradeoff", "return m.sift(m.unpack(header), state)", header=widget.header, state=dict(attack="FGSM", confidence=0.8, filters={}, min_images=500, min_r2=0.95))
    assert sifted["all"] == len(rows) and len(sifted["shown"]) == len(tables.accepted_models(rows)) > 0
    assert len(json.dumps(widget.header)) < 8000 + 150 * widget.header["count"]  # the page embeds it
    assert len(widget.limits["attack"]) == 3 and None not in widget.header["columns"]["computed"]["values"]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


@pytest.mark.parametrize("levels", [3, 1000], ids=["with ties", "without"])
def test_spearman_is_scipy_s(levels):
    generator = np.random.default_rng(levels)
    x = generator.permutation(200) % levels
    y = (x + generator.integers(0, 4, 200)) % levels
    found = node("tradeoff", "return m.spearman(x, y)", x=x.tolist(), y=y.tolist())
    assert found == pytest.approx(spearmanr(x, y).statistic, abs=1e-12) and abs(found) > 0.05


def test_spearman_of_numbers_that_do_not_vary_is_no_number():
    assert node("tradeoff", "return [m.spearman([1, 1, 1], [1, 2, 3])].map(String)") == ["NaN"]


def test_the_nearest_point_within_reach():
    script = "return [m.nearest(xs, ys, 2, 1, 5), m.nearest(xs, ys, 9.5, 9, 5), m.nearest(xs, ys, 50, 50, 5), m.nearest(xs, ys, 13, 14, 5), m.nearest(xs, ys, 13, 14.1, 5), m.nearest([], [], 0, 0, 5)]"
    assert node("tradeoff", script, xs=[0, 3, 10], ys=[0, 0, 10]) == [1, 2, -1, 2, -1, -1]


@pytest.mark.parametrize(
    "state, shown, left",
    [
        ({}, [*range(9)], (1, 2, 0)),
        (dict(min_images=0), [*range(10)], (1, 1, 0)),
        (dict(min_r2=0), [*range(9), 10], (1, 1, 0)),
        (dict(filters={"m": [3]}), [0, 3, 6], (1, 2, 6)),
        (dict(filters={"m": [None]}), [8], (1, 2, 8)),
        (dict(filters={"m": [3, 4], "n": [1]}), [0, 4], (1, 2, 7)),
        (dict(filters={"model": []}), [], (1, 2, 9)),
        (dict(attack=PGD), [12, 13, 14, 15], (0, 0, 0)),
        (dict(attack=PGD, confidence=0.6), [], (0, 0, 0)),
    ],
)
def test_filters_and_rules(state, shown, left):
    given = dict(attack="FGSM", confidence=0.8, filters={}, min_images=500, min_r2=0.95) | state
    found = node("tradeoff", "return m.sift(m.unpack(header), state)", header=TradeOffExplorer(ROWS).header, state=given)
    assert found["shown"] == shown and (found["without"], found["ruled"], found["filtered"]) == left
    assert found["all"] == len(shown) + sum(left)


def test_no_two_values_look_alike():
    script = "return [m.looksOf({ values: numbers, at: [] }, false), m.looksOf({ values: words, at: [] }, false)].map((l) => l.looks)"
    numbers, words = node("tradeoff", script, numbers=[*range(17), None], words=["elu", "gelu", "prelu", "relu", "rexp"])
    for looks in (numbers, words):
        assert len({(look["colour"], look["shape"]) for look in looks}) == len(looks) == len({look["colour"] for look in looks})
    assert len({look["shape"] for look in words}) == 5


def test_a_colour_bar_runs_from_the_smallest_to_the_largest_value():
    looks = node("tradeoff", "const l = m.looksOf({ values }, true); return [l.ends, values.map((_, i) => l.looks[l.index(i)].colour)]", values=[5, 1, None, 3])
    assert looks[0] == [1, 5] and looks[1][0] == "rgb(253 231 37)" and looks[1][1] == "rgb(68 1 84)" and looks[1][2] == "#7a7a7a"


def test_stamps_mix_at_their_edges_and_end_at_the_picture_s():
    script = """
      const image = (width, height, pixel) => m.inWords({ width, height, data: Uint8ClampedArray.from(Array(width * height).fill(pixel).flat()) });
      const picture = image(5, 4, [0, 0, 0, 0]);
      m.stamp(picture, image(2, 2, [200, 0, 0, 255]), 2, 2);
      m.stamp(picture, image(2, 2, [0, 100, 0, 51]), 3, 3);
      m.stamp(picture, image(2, 2, [9, 9, 9, 255]), 0, 4);
      return Array.from({ length: 20 }, (_, i) => [...picture.data.subarray(4 * i, 4 * i + 4)].join());
    """
    empty, red, mixed, thin, corner = "0,0,0,0", "200,0,0,255", "160,20,0,255", "0,100,0,51", "9,9,9,255"
    assert node("tradeoff", script) == [
        empty, empty, empty, empty, empty,
        empty, red, red, empty, empty,
        empty, red, mixed, thin, empty,
        corner, empty, thin, thin, empty,
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The page

def place_of(page, row):
    """Where a row's point is on the screen, by the numbers on the axes."""
    return page.evaluate(
        """([x, y]) => {
          const lines = [...document.querySelectorAll(".khnb-axes line")], texts = [...document.querySelectorAll(".khnb-axes text")];
          const at = (attribute, wanted) => {
            const known = lines.map((line, i) => [Number(texts[i].textContent), Number(line.getAttribute(attribute + "1")), line.getAttribute(attribute + "1") === line.getAttribute(attribute + "2")]).filter((k) => k[2]);
            const [a, b] = [known[0], known.at(-1)];
            return a[1] + ((wanted - a[0]) * (b[1] - a[1])) / (b[0] - a[0]);
          };
          const area = document.querySelector(".khnb-cloud").getBoundingClientRect(), unit = area.width / document.querySelector(".khnb-cloud svg").viewBox.baseVal.width;
          return [area.left + at("x", x) * unit, area.top + at("y", y) * unit];
        }""",
        [row["R"], row["accuracy"]],
    )


@pytest.mark.page
@pytest.mark.slow
class TestPage:
    def test_the_mouse_points_and_selects(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        assert "9 of 12 models shown" in page.inner_text(".khnb-summary") and "1 without R, 2 by the rules (more than 500 images, R² of the fit above 0.95)" in page.inner_text(".khnb-summary")
        some = ROWS[:9]
        rho = spearmanr([r["R"] for r in some], [r["accuracy"] for r in some]).statistic
        assert f"(Spearman): {rho:.2f}".replace("-", "−") in page.inner_text(".khnb-summary")
        page.mouse.move(*place_of(page, ROWS[5]))
        tip = page.inner_text(".khnb-tip").replace("\xa0", " ")
        assert "m = 5" in tip and "accuracy 0.6500" in tip and "0.01500 ± 0.00040" in tip
        assert "model5" in page.inner_text(".khnb-compare") and "0.01420 to 0.01580" in page.inner_text(".khnb-compare")
        assert page.evaluate("model.get('selected')") == []
        page.mouse.click(*place_of(page, ROWS[5]))
        page.mouse.click(*place_of(page, ROWS[2]))
        assert page.evaluate("model.get('selected')") == ["model5", "model2"]
        page.mouse.click(*place_of(page, ROWS[0]))
        assert page.evaluate("model.get('selected')") == ["model2", "model0"]
        page.mouse.click(*place_of(page, ROWS[0]))
        assert page.evaluate("model.get('selected')") == ["model2"]
        x, y = place_of(page, ROWS[0])
        page.mouse.move(x + 60, y - 5)
        assert not page.locator(".khnb-tip").is_visible()

    def test_points_are_where_the_axes_say(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        pixel = """([x, y]) => { const c = document.querySelector(".khnb-cloud canvas"), r = c.getBoundingClientRect(), u = c.width / r.width;
          return [...c.getContext("2d").getImageData(Math.round((x - r.left) * u), Math.round((y - r.top) * u), 1, 1).data]; }"""
        for row, colour in ((ROWS[0], [0, 114, 178, 255]), (ROWS[7], [0, 114, 178, 255]), (ROWS[8], [213, 94, 0, 255])):
            assert page.evaluate(pixel, place_of(page, row)) == colour
        assert page.evaluate(pixel, [place_of(page, ROWS[8])[0], place_of(page, ROWS[0])[1]]) == [0, 0, 0, 0]

    def test_two_models_are_compared(self, shown):
        page = shown(TradeOffExplorer(ROWS, selected=["model0", "model3"]))
        marked = dict(page.locator(".khnb-compare tbody tr").evaluate_all("rows => rows.map((row) => [row.cells[0].innerText, row.cells[3].innerText])"))
        assert marked["power n"] == marked["test accuracy"] == marked["record of the attack"] == "≠"
        assert marked["m"] == marked["R² of the fit"] == marked["model"] == ""
        page.get_by_label("Take A away").click()
        assert page.evaluate("model.get('selected')") == ["model3"]
        page.evaluate(f"model.set('selected', ['model3', 'model7']); model.set('attack', {json.dumps(PGD)})")
        assert "Not every selected model was attacked like this" in page.inner_text(".khnb-compare")
        assert "pgd3" in page.inner_text(".khnb-compare")  # the selection follows the model from attack to attack

    def test_the_keyboard_moves_along_both_axes(self, shown):
        page = shown(TradeOffExplorer(ROWS))

        def press(*keys):
            for key in keys:
                page.keyboard.press(key)
            return page.inner_text(".khnb-unseen")

        page.locator(".khnb-cloud").focus()
        assert "R 0.01000" in press("ArrowRight") and "R 0.01100" in press("ArrowRight")
        assert "accuracy 0.7500" in press("ArrowRight", "ArrowRight")  # model2 and the BP model have the same R
        assert "accuracy 0.7000" in press("ArrowDown") and "accuracy 0.6900" in press("ArrowDown")
        assert "accuracy 0.7000" in press("ArrowUp")
        assert "R 0.01700" in press("End", "ArrowRight") and "R 0.01000" in press("Home", "ArrowLeft")
        assert "selected as A" in press("Enter") and "selected as B" in press("ArrowRight", " ")
        assert page.evaluate("model.get('selected')") == ["model0", "model1"]
        assert press("Escape") == "" and not page.locator(".khnb-tip").is_visible()

    def test_filters_and_rules(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        page.get_by_label("Filter by").select_option("m")
        page.get_by_role("group", name="Values of m").get_by_label("3").uncheck()
        assert page.evaluate("model.get('filters')") == {"m": [4, 5, None]} and "6 of 12 models" in page.inner_text(".khnb-summary")
        page.get_by_label("Filter by").select_option("model")
        page.get_by_label("BP").uncheck()
        assert "5 of 12 models" in page.inner_text(".khnb-summary") and "4 by the filters" in page.inner_text(".khnb-summary")
        page.get_by_role("button", name="m: 4, 5, none").click()
        page.get_by_label("BP").check()
        assert page.evaluate("model.get('filters')") == {}
        page.get_by_label("more than 500 images").uncheck()
        assert page.evaluate("model.get('min_images')") == 0 and "10 of 12 models" in page.inner_text(".khnb-summary")
        page.get_by_label("more than 500 images").check()
        assert page.evaluate("model.get('min_images')") == 500
        for name in ("LL", "BP"):
            page.get_by_label(name, exact=True).uncheck()
        assert not page.locator(".khnb-cloud").is_visible()
        page.get_by_role("button", name="Show all models").click()
        assert "11 of 12 models" in page.inner_text(".khnb-summary") and page.locator(".khnb-cloud").is_visible()

    def test_an_attack_that_was_not_made_is_named(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        page.get_by_label("Images", exact=True).select_option("at least 60% sure")
        assert page.evaluate("model.get('confidence')") == 0.6 and "5 of 5 models" in page.inner_text(".khnb-summary")  # a number, as the trait is
        page.get_by_label("Attack").select_option(PGD)
        assert f"No model here was attacked by {PGD}" in page.inner_text(".khnb-nothing") and not page.locator(".khnb-cloud").is_visible()
        page.get_by_role("button", name="at least 80% sure").click()
        assert page.evaluate("model.get('confidence')") == 0.8 and "4 of 4 models" in page.inner_text(".khnb-summary")

    def test_colours(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        assert page.locator(".khnb-legend li").all_inner_texts() == ["LL (8)", "BP (1)"]
        page.get_by_label("Colour by").select_option("m")
        assert page.locator(".khnb-legend li").all_inner_texts() == ["3 (3)", "4 (3)", "5 (2)", "none (1)"]
        page.get_by_label("Colour by").select_option("f")
        assert page.locator(".khnb-colours span").all_inner_texts() == ["0", "0.55", "1.1"] and page.locator(".khnb-legend li").all_inner_texts() == ["none (1)"]

    def test_the_table_lists_what_is_shown(self, shown):
        page = shown(TradeOffExplorer(ROWS, filters={"m": [3]}))
        page.get_by_text("Show as a table").click()
        page.wait_for_selector(".khnb-list tbody tr")  # the browser says later that it was opened
        cells = page.locator(".khnb-list tbody tr").evaluate_all("rows => rows.map((row) => [...row.cells].map((cell) => cell.innerText))")
        assert [cell[:2] for cell in cells] == [["0.7000", "0.01000"], ["0.6700", "0.01300"], ["0.6400", "0.01600"]]
        page.evaluate("model.set('filters', {})")
        assert page.locator(".khnb-list tbody tr").count() == 9

    def test_it_follows_python(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        page.evaluate("model.set('filters', {n: [1, 2]}); model.set('min_images', 1002); model.set('colour_by', 'n'); model.set('filter_by', 'n')")
        assert page.get_by_label("Colour by").input_value() == page.get_by_label("Filter by").input_value() == "n" and page.get_by_label("more than 1002 images").is_checked()
        assert page.locator(".khnb-legend li").all_inner_texts() == ["1 (2)", "2 (1)"]
        assert not page.get_by_role("group", name="Values of power n").get_by_label("8").is_checked()

    @pytest.mark.parametrize("width", [1000, 390])
    def test_it_fits_and_names_its_controls(self, shown, width):
        page = shown(TradeOffExplorer.of(Store(), selected=TradeOffExplorer.of(Store()).header["columns"]["id"]["values"][:2], colour_by="n", filter_by="n"), width=width)
        page.get_by_text("Show as a table").click()
        page.locator(".khnb-cloud").focus()
        page.keyboard.press("End")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        left, right = page.locator(".khnb-tip").evaluate("tip => [tip.getBoundingClientRect().left, tip.getBoundingClientRect().right]")
        assert left >= 0 and right <= width
        nameless = page.evaluate(
            """[...document.querySelectorAll("select, input, button, canvas, svg, [tabindex]")].filter((node) =>
                 !node.labels?.length && !node.ariaLabel && !node.textContent.trim() && node.ariaHidden !== "true" && node.getAttribute("aria-hidden") !== "true").map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert nameless == []
        smallest = page.evaluate("Math.min(...[...document.querySelectorAll('.khnb-tradeoff svg text')].map((t) => t.getBoundingClientRect().height))")
        assert smallest >= 11

    def test_a_finger_selects(self, browser, shown):
        page = shown(TradeOffExplorer(ROWS), width=390)
        x, y = place_of(page, ROWS[7])
        page.evaluate(
            """([x, y]) => { const cloud = document.querySelector(".khnb-cloud");
              for (const [type, of] of [["pointermove", "touch"], ["click", "touch"], ["pointerleave", "touch"]]) cloud.dispatchEvent(new PointerEvent(type, { clientX: x, clientY: y, pointerType: of, bubbles: true })); }""",
            [x + 12, y + 8],
        )
        assert page.evaluate("model.get('selected')") == ["model7"] and page.locator(".khnb-tip").is_visible()

    def test_on_paper_it_is_a_still_picture(self, shown):
        page = shown(TradeOffExplorer(ROWS, selected=["model0"], filters={"m": [3]}))
        page.emulate_media(media="print")
        assert page.locator(".khnb-tradeoff :is(input, select, button, details):visible").count() == 0
        assert page.locator(".khnb-cloud canvas").is_visible() and page.locator(".khnb-compare table").is_visible()
        assert "6 by the filters (only m: 3)" in page.inner_text(".khnb-summary")  # the check boxes are not there to say so

    def test_the_cloud_takes_the_width_it_gets(self, shown):
        page = shown(TradeOffExplorer(ROWS))
        page.set_viewport_size(dict(width=390, height=900))
        page.wait_for_function("Math.abs(document.querySelector('.khnb-cloud svg').viewBox.baseVal.width - document.querySelector('.khnb-cloud').clientWidth) < 1")
        page.mouse.move(*place_of(page, ROWS[6]))
        assert "accuracy 0.6400" in page.inner_text(".khnb-tip")

    def test_twenty_thousand_models_are_drawn_quickly(self, shown):
        generator = np.random.default_rng(0)
        rows = [a_row(i % 8, id=f"{i}", R=float(generator.uniform(0.01, 0.05)), R_ci=None, accuracy=float(generator.uniform(0.4, 0.7))) for i in range(20000)]
        page = shown(TradeOffExplorer(rows))
        took = page.evaluate(
            """() => Array.from({ length: 7 }, (_, k) => { const start = performance.now(); model.set("filters", k % 2 ? {} : { m: [3, 4] }); return performance.now() - start; }).sort((a, b) => a - b)"""
        )
        assert page.locator(".khnb-widget *, #w *").count() < 500 and "of 20,000 models" in page.inner_text(".khnb-summary")
        assert took[1] < 250  # 50 ms on an idle core; the machine may be busy
