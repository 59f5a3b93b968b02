"""Figures drawn from code alone: 2.1-2.4, 3.1, 4.1 and 6.1. Each function returns a matplotlib figure."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from scipy.signal import convolve2d

from khnb.models import ACTIVATIONS, n_features
from khnb.settings import ConvSettings, HeadSettings, check_geometry

# Okabe and Ito's colours: told apart under every common colour-vision deficiency
BLUE, RED, GREEN, ORANGE, SKY, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"
BROWN = "#8A5A00"  # Okabe and Ito's orange, darkened for text

SOBEL_Y = np.array([[1, 2, 1], [0, 0, 0], [-1, -2, -1]])

#: the image of fig. 2.3 (ours; the thesis's numbers are only in its drawing): a bright bar on a dark ground
IMAGE = np.array(
    [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 3, 3, 3, 1, 0],
        [0, 1, 3, 3, 3, 1, 0],
        [0, 0, 1, 2, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0],
    ]
)


def vector_graphics() -> None:
    """In a notebook, show figures as SVG from here on: sharp at any size, and small where there are no photographs."""
    from matplotlib_inline.backend_inline import set_matplotlib_formats  # only where there is a kernel

    set_matplotlib_formats("svg")


def _canvas(width, height):
    fig, ax = plt.subplots(figsize=(width, height))
    ax.set_aspect("equal")
    ax.axis("off")
    return fig, ax


def fully_connected(sizes=(4, 5, 5, 5, 3)) -> Figure:
    """Fig. 2.1: a fully connected feed-forward network. sizes : nodes of each column, input first, output last."""
    fig, ax = _canvas(7, 4)
    top = max(sizes)
    place = [[(2.2 * i, (top - size) / 2 + j) for j in range(size)] for i, size in enumerate(sizes)]
    for left, right in zip(place, place[1:]):
        for x0, y0 in left:
            for x1, y1 in right:
                ax.plot([x0, x1], [y0, y1], color="0.65", lw=0.7, zorder=1)
    for i, column in enumerate(place):
        colour, name = (GREEN, "input\nn values") if i == 0 else (SKY, f"hidden {i}")
        if i == len(sizes) - 1:
            colour, name = ORANGE, "output\nk values"
        ax.scatter(*zip(*column), s=330, color=colour, edgecolor="black", zorder=2)
        ax.text(2.2 * i, -0.8, name, ha="center", va="top", fontsize=10)
    for i in range(len(sizes) - 1):
        ax.text(2.2 * i + 1.1, top - 0.35, f"$W^{{({i + 1})}}$", ha="center", fontsize=11)
    ax.set_xlim(-0.8, 2.2 * (len(sizes) - 1) + 0.8)
    ax.set_ylim(-1.9, top + 0.3)
    return fig


def _matrix(ax, x, y, cells, colour, first=None):
    """Draw rows of text in brackets, top left at (x, y), the first column in its own colour; returns where it ends."""
    height, width = len(cells), len(cells[0])
    for i, row in enumerate(cells):
        for j, text in enumerate(row):
            ax.text(x + 0.75 + 1.5 * j, y - 0.5 - i, text, ha="center", va="center", fontsize=11, color=colour if j else first or colour)
    end = x + 1.5 * width
    for edge, inward in ((x, 0.15), (end, -0.15)):
        ax.plot([edge + inward, edge, edge, edge + inward], [y, y, y - height, y - height], color="0.3", lw=1.2)
    return end


def forward_step() -> Figure:
    """Fig. 2.2: one step forward in matrix form, with the bias apart (top) and as first column of W (bottom)."""
    fig, ax = _canvas(8, 5.2)

    def column(symbol, layer, last):
        return [[f"${symbol}_1^{{({layer})}}$"], [r"$\vdots$"], [f"${symbol}_{last}^{{({layer})}}$"]]

    new, old, bias = column("a", r"\mu", "m"), column("a", r"\mu-1", "n"), column("b", r"\mu", "m")
    weight = [["$w_{11}$", r"$\cdots$", "$w_{1n}$"], [r"$\vdots$", r"$\ddots$", r"$\vdots$"]]
    weight.append(["$w_{m1}$", r"$\cdots$", "$w_{mn}$"])
    for y, absorbed in ((8, False), (3.3, True)):
        x = _matrix(ax, 0, y, new, BLUE)
        ax.text(x + 0.5, y - 1.5, "=", ha="center", va="center", fontsize=14)
        ax.text(x + 1.2, y - 1.5, r"$\sigma$", ha="center", va="center", fontsize=16, color=RED)
        ax.text(x + 1.75, y - 1.5, "(", ha="center", va="center", fontsize=40, color=RED, fontweight="light")
        x += 2.2
        if absorbed:
            x = _matrix(ax, x, y, [[b[0], *row] for b, row in zip(bias, weight)], "black", first=BROWN)
            x = _matrix(ax, x + 0.4, y + 0.5, [["$1$"], *old], GREEN)
        else:
            x = _matrix(ax, x, y, weight, "black")
            x = _matrix(ax, x + 0.4, y, old, GREEN)
            ax.text(x + 0.5, y - 1.5, "+", ha="center", va="center", fontsize=14)
            x = _matrix(ax, x + 1.0, y, bias, BROWN)
        ax.text(x + 0.45, y - 1.5, ")", ha="center", va="center", fontsize=40, color=RED, fontweight="light")
    ax.text(0, 4.35, "or, with the bias as first column of the weights:", fontsize=10, color="0.3")
    ax.set_xlim(-0.3, 14)
    ax.set_ylim(-0.5, 8.4)
    return fig


def convolution_example(image=IMAGE, kernel=SOBEL_Y, cell=(0, 2)):
    """The numbers of fig. 2.3: ``(output, window, flipped kernel)``.

    image : (H, W); kernel : (h, w), no larger. output (H-h+1, W-w+1) is the discrete convolution, without padding,
    stride 1; window is the part of the image whose product with the flipped kernel sums to ``output[cell]``.
    """
    output = convolve2d(image, kernel, mode="valid")
    (i, j), (h, w) = cell, np.shape(kernel)
    return output, np.asarray(image)[i : i + h, j : j + w], np.flip(kernel)


def convolution(image=IMAGE, kernel=SOBEL_Y, cell=(0, 2)) -> Figure:
    """Fig. 2.3: an image convolved with a kernel, the cells behind one output value marked."""
    output, _, flipped = convolution_example(image, kernel, cell)
    fig, ax = _canvas(9, 3.6)

    def grid(x, values, colours, title):
        height, width = values.shape
        y0 = (image.shape[0] + height) / 2  # centred on the image
        for i in range(height):
            for j in range(width):
                face = colours.get((i, j), "white")
                ax.add_patch(Rectangle((x + j, y0 - i - 1), 1, 1, facecolor=face, edgecolor="0.4", lw=0.8))
                ax.text(x + j + 0.5, y0 - i - 0.5, f"{values[i, j]:d}", ha="center", va="center", fontsize=11)
        ax.text(x + width / 2, y0 + 0.3, title, ha="center", va="bottom", fontsize=11)
        return x + width

    (i, j), (h, w) = cell, kernel.shape
    marked = {(i + a, j + b): "#BFE0F5" for a in range(h) for b in range(w)}
    x = grid(0, image, marked, "image $I$")
    ax.text(x + 0.75, image.shape[0] / 2, r"$\ast$", ha="center", va="center", fontsize=16)
    x = grid(x + 1.5, kernel, {}, "kernel $K$")
    ax.text(x + 0.75, image.shape[0] / 2, "=", ha="center", va="center", fontsize=16)
    x = grid(x + 1.5, output, {cell: "#F7D7A8"}, r"output $I \ast K$")
    grid(x + 2.0, flipped, {(a, b): "#BFE0F5" for a in range(h) for b in range(w)}, "$K$ as applied\n(flipped)")
    ax.set_xlim(-0.3, x + 2.0 + w + 0.5)
    ax.set_ylim(-0.4, image.shape[0] + 1.6)
    return fig


def hopfield(nodes: int = 12) -> Figure:
    """Fig. 4.1: a Hopfield network, every pair of nodes joined by one symmetric weight."""
    fig, ax = _canvas(4, 4)
    turn = [2 * math.pi * i / nodes for i in range(nodes)]
    x, y = [math.cos(t) for t in turn], [math.sin(t) for t in turn]
    for i in range(nodes):
        for j in range(i):
            ax.plot([x[i], x[j]], [y[i], y[j]], color="0.65", lw=0.7, zorder=1)
    ax.scatter(x, y, s=330, color=SKY, edgecolor="black", zorder=2)
    for i in range(nodes):
        ax.text(x[i], y[i], str(i + 1), ha="center", va="center", fontsize=9)
    ax.set_xlim(-1.2, 1.2)
    ax.set_ylim(-1.2, 1.2)
    return fig


def architecture(conv=ConvSettings(), head=HeadSettings(), side=32, channels=3, classes=10) -> Figure:
    """Fig. 6.1: the one architecture of LL and BP models, with the shape of what passes between its parts."""
    out = check_geometry(side, conv.w, head.w_pool)
    filters, pooled = conv.K**2, (out - head.w_pool) // head.s_pool + 1
    flat = n_features(filters, side, conv.w, head)
    parts = [
        ("convolution", f"{filters} filters, {conv.w}×{conv.w}\nLL: patches of unit p-norm\nBP: plain", BLUE),
        ("max-pooling", f"{head.w_pool}×{head.w_pool}, stride {head.s_pool}", SKY),
        ("activation", r"$\sigma(x)^n$", GREEN),
        ("flatten", "", PURPLE),
        ("linear", f"{classes} logits", ORANGE),
        ("softmax", "class scores", RED),
    ]
    shapes = [f"{channels}×{side}×{side}", f"{filters}×{out}×{out}", f"{filters}×{pooled}×{pooled}",
              f"{filters}×{pooled}×{pooled}", f"{flat:,}", f"{classes}", f"{classes}"]
    fig, ax = _canvas(11, 2.4)
    for i, shape in enumerate(shapes):
        ax.annotate("", (4 * i + 1.1, 0), (4 * i, 0), arrowprops={"arrowstyle": "->", "color": "0.3"})
        ax.text(4 * i + 0.5, 0.9, shape, ha="center", va="center", fontsize=8, color="0.2")
    for i, (name, what, colour) in enumerate(parts):
        box = FancyBboxPatch((4 * i + 1.2, -0.55), 2.7, 1.1, boxstyle="round,pad=0.05", facecolor=colour, alpha=0.25)
        ax.add_patch(box)
        ax.text(4 * i + 2.55, 0, name, ha="center", va="center", fontsize=9)
        ax.text(4 * i + 2.55, -0.9, what, ha="center", va="top", fontsize=8, color="0.3")
    ax.text(-0.1, 0, "image", ha="right", va="center", fontsize=9)
    ax.text(4 * len(parts) + 1.2, 0, "prediction", ha="left", va="center", fontsize=9)
    ax.set_xlim(-1.8, 4 * len(parts) + 4)
    ax.set_ylim(-2.9, 1.4)
    return fig


# label, line style and colour of each activation function; the styles tell them apart without colour
CURVES = dict(
    sigmoid=("sigmoid", "-", "black"), tanh=("tanh", "--", ORANGE), relu=("ReLU", "-.", BLUE), prelu=("PReLU", ":", SKY),
    elu=("ELU", (0, (5, 1)), GREEN), gelu=("GeLU", (0, (3, 1, 1, 1)), RED), rexp=("rExp", (0, (1, 1)), PURPLE),
)


def activations(derivative: bool = False) -> Figure:
    """Fig. 2.4, the activation functions of eqs. 2.4-2.10 on [-4, 4], or fig. 3.1, their derivatives."""
    fig, ax = plt.subplots(figsize=(6.5, 4))
    for key, (label, style, colour) in CURVES.items():
        x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
        y = ACTIVATIONS[key](x)
        if derivative:
            (y,) = torch.autograd.grad(y.sum(), x)
        ax.plot(x.detach(), y.detach(), ls=style, color=colour, lw=2, label=label)
    ax.axhline(0, color="0.8", lw=0.8, zorder=0)
    ax.set(xlabel="$x$", ylabel=r"$\sigma'(x)$" if derivative else r"$\sigma(x)$", xlim=(-4, 4))
    ax.set_ylim((-0.3, 4) if derivative else (-1.5, 6))
    ax.legend(ncols=2)
    return fig
