"""The figures drawn from code: their numbers, and that they say what they claim."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from khnb import schematics
from khnb.settings import ConvSettings, HeadSettings


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def texts(fig):
    return [t.get_text() for t in fig.axes[0].texts]


def test_convolution_example_equals_sums_by_hand():
    output, window, flipped = schematics.convolution_example(cell=(0, 2))
    image, kernel = schematics.IMAGE, schematics.SOBEL_Y
    assert output.shape == (4, 5)
    for i in range(4):
        for j in range(5):  # eq. 2.3 in two dimensions: sum of f(t - s) g(s)
            assert output[i, j] == sum(kernel[a, b] * image[i + 2 - a, j + 2 - b] for a in range(3) for b in range(3))
    assert (window * flipped).sum() == output[0, 2]
    assert np.array_equal(flipped, [[-1, -2, -1], [0, 0, 0], [1, 2, 1]])


def test_convolution_example_is_not_what_pytorch_calls_convolution():
    output, _, flipped = schematics.convolution_example()
    image, kernel = (torch.tensor(a)[None, None].double() for a in (schematics.IMAGE, schematics.SOBEL_Y))
    unflipped = torch.nn.functional.conv2d(image, kernel)[0, 0].numpy()
    assert np.array_equal(unflipped, -output)  # a Sobel kernel changes sign when turned by half a turn
    assert output.any()
    turned = torch.nn.functional.conv2d(image, torch.tensor(flipped.copy())[None, None].double())[0, 0].numpy()
    assert np.array_equal(turned, output)


def test_convolution_figure_shows_every_number():
    output, _, _ = schematics.convolution_example()
    shown = texts(schematics.convolution())
    for value in [*schematics.IMAGE.flat, *output.flat]:
        assert str(value) in shown
    assert len([t for t in shown if t.lstrip("-").isdigit()]) == 42 + 20 + 9 + 9


def test_hopfield_joins_every_pair_once():
    ax = schematics.hopfield(12).axes[0]
    ends = {tuple(sorted(zip(np.round(line.get_xdata(), 9), np.round(line.get_ydata(), 9)))) for line in ax.lines}
    assert len(ax.lines) == len(ends) == 66
    assert len(ax.collections[0].get_offsets()) == 12


def test_fully_connected_draws_every_weight():
    assert len(schematics.fully_connected((4, 5, 5, 5, 3)).axes[0].lines) == 4 * 5 + 5 * 5 + 5 * 5 + 5 * 3
    assert sum("W" in t for t in texts(schematics.fully_connected())) == 4


def test_forward_step_shows_bias_apart_and_absorbed():
    shown = texts(schematics.forward_step())
    assert sum(t.startswith("$b_") for t in shown) == 4  # first and last row, twice
    assert shown.count("$1$") == 1


def test_architecture_gives_the_shapes_of_the_network():
    from khnb.models import bp_network

    conv, head = ConvSettings(K=3, w=8), HeadSettings(w_pool=7)
    shown = texts(schematics.architecture(conv, head))
    network = bp_network(3, 8, head, 3, 32, 10)
    pooled = network.pool(torch.zeros(1, 3, 32, 32))
    assert "×".join(map(str, network.conv(torch.zeros(1, 3, 32, 32)).shape[1:])) in shown
    assert shown.count("×".join(map(str, pooled.shape[1:]))) == 2
    assert f"{network.linear.in_features:,}" in shown


def test_activation_curves_and_slopes():
    values, slopes = (
        {line.get_label(): line.get_ydata() for line in schematics.activations(d).axes[0].lines if len(line.get_xdata()) > 2}
        for d in (False, True)
    )
    assert len(values) == len(slopes) == 7
    for name in values:  # each slope is the slope of its own curve
        steps = np.diff(values[name]) / 0.01
        assert np.allclose(steps, (slopes[name][1:] + slopes[name][:-1]) / 2, atol=1e-3 if name != "rExp" else 1e-2) or (
            name in ("ReLU", "PReLU", "rExp") and (np.abs(steps - (slopes[name][1:] + slopes[name][:-1]) / 2) > 0.02).sum() <= 2
        )
    assert np.isclose(slopes["sigmoid"].max(), 0.25)
    assert values["ELU"].min() > -1 and slopes["GeLU"].max() > 1.1
