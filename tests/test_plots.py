"""Figures from records: what is drawn is what was given."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest

from khnb import plots, tables


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
