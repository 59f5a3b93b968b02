"""Figures from records: what is drawn is what was given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from khnb import plots, tables
from khnb.robustness import fit


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_the_map_writes_every_cell_it_has_and_frames_the_marked_ones():
    rows = tables.map_A1([], [])
    for row in rows:
        row["share"] = None if row["w"] == 8 else 0.25
    figure = plots.cell_map(rows, "share", "share", lambda row: f"{row['p']:g},{row['m']:g}", lambda row: row["delta"] == 0.2 and row["m"] == 6)
    panels = figure.axes[:4]
    assert [len(ax.texts) for ax in panels] == [25, 0, 25, 0]  # delta 0.1 above 0.2, w = 4 beside 8
    assert [len(ax.patches) for ax in panels] == [0, 0, 5, 0]
    written = {text.get_text(): text.get_position() for text in panels[0].texts}
    assert written["2,6"] == (4, 0) and written["6,2"] == (0, 4)  # m to the right, p upwards
    assert np.isnan(panels[1].images[0].get_array().filled(np.nan)).all() and (panels[0].images[0].get_array() == 0.25).all()


def test_a_neuron_shows_its_three_channels_on_one_scale():
    weight = np.zeros((3, 4, 4))
    weight[1, 2, 3] = -0.5
    figure = plots.neuron({"one": weight, "two": -weight})
    first = figure.axes[:4]
    assert [ax.get_title() for ax in first] == ["as in the grid", "red", "green", "blue"]
    assert all(ax.images[0].get_clim() == (-0.5, 0.5) for ax in first[1:])
    np.testing.assert_array_equal(first[2].images[0].get_array(), weight[1])


def test_tiles_are_scaled_each_on_its_own():
    weight = np.stack([np.arange(12.0).reshape(3, 2, 2), np.full((3, 2, 2), 7.0)])
    pictures = plots.tiles(weight)
    assert pictures.shape == (2, 2, 2, 3) and pictures[0].min() == 0 and pictures[0].max() == 1 and not pictures[1].any()
    assert plots.tiles(weight[:, :1]).shape == (2, 2, 2, 3)


def test_the_histogram_of_f_counts_every_layer():
    (ax,) = plots.f_histogram([0.2, 0.22, 0.96, 1.0]).axes
    counts = {round(bar.get_x(), 2): bar.get_height() for bar in ax.patches if bar.get_height()}
    assert counts == {0.2: 2, 0.95: 2} and ax.lines[0].get_xdata()[0] == 0.15


def model(i, **more):
    return dict(id=f"m{i}", model="LL", R=0.01 + 0.001 * i, accuracy=0.7 - 0.01 * i, sigma=("gelu", "rexp")[i % 2], n=(4.0, 0)[i % 2], f=0.1 * i, images=500 + i) | more


def test_the_cloud_shows_every_model_and_joins_the_extremes():
    rows = [model(i) for i in range(5)]
    figure = plots.cloud(rows)
    (ax,) = [ax for ax in figure.axes if ax.get_ylabel() == "test accuracy"]
    np.testing.assert_allclose(ax.collections[0].get_offsets(), [(row["R"], row["accuracy"]) for row in rows])
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [(0.01, 0.7), (0.014, 0.66)])
    counts = [sum(patch.get_height() if other.get_ylabel() == "models" else patch.get_width() for patch in other.patches) for other in figure.axes if other is not ax]
    assert counts == [5, 5]


def test_each_panel_has_every_model_once_under_its_value():
    figure = plots.cloud_by([model(i) for i in range(5)] + [model(9, sigma=None)], dict(sigma="sigma", n="power"))
    first, second = figure.axes
    assert [t.get_text() for t in first.get_legend().get_texts()] == ["gelu", "rexp"] and [len(c.get_offsets()) for c in first.collections] == [3, 2]
    assert [t.get_text() for t in second.get_legend().get_texts()] == ["rExp", "4"] and second.get_title(loc="left") == "B  power"


def test_shades_leave_out_what_is_not_known():
    figure = plots.cloud_shaded([model(0), model(1, f=None), model(2)], dict(f="f-score", images="images"))
    assert figure.axes[0].collections[0].get_array().tolist() == pytest.approx([0, 0.2]) and len(figure.axes[1].collections[0].get_offsets()) == 3


def test_a_model_is_joined_to_itself_in_the_next_set():
    one, two = [model(0), model(1)], [model(1, R=0.5), model(7)]
    figure = plots.clouds({"left": {"LL models": one, "BP models": two}, "right": {"LL models": one}}, joined=True)
    left, right = figure.axes
    assert [list(line.get_xdata()) for line in left.lines] == [[pytest.approx(0.011), 0.5]] and not right.lines
    assert [t.get_text() for t in left.get_legend().get_texts()] == ["LL models: 2 models", "BP models: 2 models"]


def test_pgd_in_distance_and_in_steps():
    steps = np.r_[np.repeat(np.arange(1, 41), 5), [-1] * 7]
    radii = np.where(steps < 0, np.inf, steps * 5e-4)
    fits = tuple(fit(values).dict() for values in (radii, np.where(steps < 0, np.inf, steps)))
    left, right = plots.pgd_curves(radii, steps, fits).axes
    np.testing.assert_allclose(left.lines[0].get_xdata() / 5e-4, right.lines[0].get_xdata())
    assert "207 images, 7 never fooled" in left.get_legend().get_texts()[0].get_text() and fits[0]["R"] == pytest.approx(5e-4 * fits[1]["R"], rel=1e-3)


def test_thresholds_take_the_images_they_should():
    generator = np.random.default_rng(0)
    confidences = generator.uniform(0.3, 1, 2000)
    radii = np.maximum(generator.normal(0.03, 0.006, 2000) * (confidences > 0.6) + generator.exponential(0.004, 2000), 0)
    said = [text.get_text() for text in plots.threshold_curves(radii, confidences, (0.0, 0.6)).axes[0].get_legend().get_texts()]
    assert said[0].startswith("0% sure: 2000 images") and said[1].startswith(f"60% sure: {(confidences >= 0.6).sum()} images, $\\mathcal{{R}}$ = 0.03")
