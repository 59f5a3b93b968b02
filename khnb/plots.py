"""The figures, drawn from records. Every function returns the matplotlib figure it drew."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import torch

from khnb import attacks, robustness
from khnb.learning import COLLAPSED

#: the Okabe-Ito palette, which colour-blind readers can tell apart
COLOURS = dict(LL="#0072B2", BP="#D55E00", thesis="#555555", fit="#000000")
SERIES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # of the same palette, where there are several lines
LETTERS = "ABCDEFGHIJKLMNOPQRST"


def tiles(weight: np.ndarray) -> np.ndarray:
    """Filters (F, C, w, w) as pictures (F, w, w, 3) in [0, 1], each scaled to its own range as in fig. 8.1; C is 1 or 3."""
    weight = np.asarray(weight, float)
    low, high = weight.min((1, 2, 3), keepdims=True), weight.max((1, 2, 3), keepdims=True)
    scaled = (weight - low) / np.where(high > low, high - low, 1)
    return np.broadcast_to(scaled.transpose(0, 2, 3, 1), (len(weight), *weight.shape[2:], 3))


def filter_grid(weight: np.ndarray, title: str = "", ax=None, labels: bool = True):
    """A square grid of filters with columns A, B, ... and rows 1, 2, ... (figs. 8.1-8.5, 8.7, 8.8). weight : (K^2, C, w, w)."""
    pictures = tiles(weight)
    K, w = int(len(pictures) ** 0.5), pictures.shape[1]
    canvas = np.ones((K * (w + 1) + 1, K * (w + 1) + 1, 3))
    for i, picture in enumerate(pictures[: K * K]):
        y, x = divmod(i, K)
        canvas[y * (w + 1) + 1 : (y + 1) * (w + 1), x * (w + 1) + 1 : (x + 1) * (w + 1)] = picture
    if ax is None:
        _, ax = plt.subplots(figsize=(5, 5.2), layout="constrained")
    ax.imshow(canvas, interpolation="nearest")
    ax.set_title(title, fontsize=10)
    places = (np.arange(K) + 0.5) * (w + 1)
    if labels and K <= len(LETTERS):
        ax.set_xticks(places, LETTERS[:K], fontsize=7)
        ax.set_yticks(places, np.arange(1, K + 1), fontsize=7)
        ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    for side in ax.spines.values():
        side.set_visible(False)
    return ax.figure


def filter_grids(named: dict[str, np.ndarray], columns: int = 2):
    """Several filter grids side by side: title -> filters."""
    rows = -(-len(named) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.9 * columns, 4.1 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[len(named) :]:
        ax.remove()
    for ax, (title, weight) in zip(axes.flat, named.items()):
        filter_grid(weight, title, ax)
    return figure


def neuron(named: dict[str, np.ndarray]):
    """One neuron enlarged, at several stages: as a colour picture, and each channel on one scale (fig. 8.4): title -> (3, w, w)."""
    figure, axes = plt.subplots(len(named), 4, figsize=(7.5, 2 * len(named)), layout="constrained", squeeze=False)
    for row, (title, weight) in zip(axes, named.items(), strict=True):
        weight = np.asarray(weight, float)
        edge = np.abs(weight).max() or 1
        row[0].imshow(tiles(weight[None])[0], interpolation="nearest")
        row[0].set_ylabel(title, fontsize=9)
        for ax, channel, name in zip(row[1:], weight, ("red", "green", "blue"), strict=True):
            picture = ax.imshow(channel, vmin=-edge, vmax=edge, cmap="PuOr_r")
            ax.set_title(name, fontsize=9)
        figure.colorbar(picture, ax=row[3], label="weight")
    axes[0][0].set_title("as in the grid", fontsize=9)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
    return figure


def layer_history(history: list[dict]):
    """How a KH layer came about: f-score and mean norm, epoch by epoch. history : ``results.history`` of a layer record."""
    epoch = [row["epoch"] for row in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    left.plot(epoch, [row["f_1e4"] for row in history], "o-", ms=3, color="#0072B2", label="tolerance 1e-4")
    left.plot(epoch, [row["f_1e6"] for row in history], "s--", ms=3, color="#E69F00", label="tolerance 1e-6 (thesis)")
    left.set(xlabel="epoch", ylabel="f-score", ylim=(0, 1.02))
    left.legend()
    right.plot(epoch, [row["norm"] for row in history], "o-", ms=3, color="#0072B2")
    right.axhline(1, color="#555555", lw=0.8, ls=":")
    right.set(xlabel="epoch", ylabel="mean $p$-norm of the filters")
    return figure


def f_histogram(scores):
    """How many layers have which f-score, in bins of 0.05 (fig. 8.6). scores : f of the layers that did not collapse."""
    figure, ax = plt.subplots(figsize=(5.5, 3), layout="constrained")
    ax.hist(scores, bins=np.linspace(0, 1, 21), color="#0072B2", edgecolor="white", lw=0.5)
    ax.axvline(COLLAPSED, color="#555555", lw=0.8, ls=":")
    ax.set(xlabel="f-score", ylabel="layers", xlim=(0, 1))
    ax.yaxis.get_major_locator().set_params(integer=True)
    return figure


def cell_map(rows: list[dict], value: str, label: str, text=None, mark=None):
    """A quantity over the cells of table A.1: four panels (delta, w), each p against m.

    rows : of :func:`khnb.tables.map_A1`; value : the column that gives the colour, from 0 to 1 (``None`` stays empty);
    text : row -> what is written in the cell, two decimals of the value by default; mark : row -> whether the cell is framed.
    """
    figure, axes = plt.subplots(2, 2, figsize=(7.5, 6.6), sharex=True, sharey=True, layout="constrained")
    ticks = {name: sorted({row[name] for row in rows}) for name in ("delta", "w", "p", "m")}
    for ax, (delta, w) in zip(axes.flat, itertools.product(ticks["delta"], ticks["w"]), strict=True):
        panel = [row for row in rows if (row["delta"], row["w"]) == (delta, w)]
        shown = np.full((len(ticks["p"]), len(ticks["m"])), np.nan)
        for row in panel:
            i, j = ticks["p"].index(row["p"]), ticks["m"].index(row["m"])
            if row[value] is None:
                continue
            shown[i, j] = row[value]
            written = text(row) if text else f"{row[value]:.2f}"
            ax.text(j, i, written, ha="center", va="center", fontsize=8, color="black" if row[value] > 0.5 else "white")
            if mark and mark(row):
                ax.add_patch(plt.Rectangle((j - 0.44, i - 0.44), 0.88, 0.88, fill=False, ec=COLOURS["BP"], lw=2))
        picture = ax.imshow(shown, vmin=0, vmax=1, cmap="cividis", origin="lower")
        ax.set_title(f"Δ = {delta:g}, w = {w:g}", fontsize=10)
        ax.set_xticks(range(len(ticks["m"])), [f"{m:g}" for m in ticks["m"]])
        ax.set_yticks(range(len(ticks["p"])), [f"{p:g}" for p in ticks["p"]])
    figure.supxlabel("rank of the inhibited neuron $m$", fontsize=10)
    figure.supylabel("order of the norm $p$", fontsize=10)
    figure.colorbar(picture, ax=axes, label=label)
    return figure


def training_history(named: dict[str, list[dict]]):
    """Loss and training accuracy of models, epoch by epoch: name -> records of models trained alike, drawn alike."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
    for name, records in named.items():
        for i, record in enumerate(records):
            history, kind = record["results"]["history"], record["asked"]["model"]
            epoch, look = [row["epoch"] for row in history], dict(color=COLOURS[kind], lw=1.5 if len(records) == 1 else 0.8, ls="-" if kind == "LL" else "--")
            left.plot(epoch, [row["loss"] for row in history], **look)
            right.plot(epoch, [row["accuracy"] for row in history], **look, label=None if i else f"{name}, training")
            right.plot(epoch[-1:], [record["results"]["test_accuracy"]], "D", ms=5, color=COLOURS[kind], label=None if i else f"{name}, test")
    left.set(xlabel="epoch", ylabel="mean cross-entropy", yscale="log")
    right.set(xlabel="epoch", ylabel="accuracy")
    right.legend(fontsize=8)
    return figure


def accuracy_by_power(named: dict[str, list[dict]]):
    """Accuracy against the power n, on held-out (solid) and test images (dashed): name -> model records with held-out images."""
    figure, ax = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for (name, records), colour, mark in zip(named.items(), SERIES, "os^D"):
        n = [record["asked"]["n"] for record in records]
        for key, style, what in (("validation_accuracy", "-", "held out"), ("test_accuracy", "--", "test")):
            ax.plot(n, [record["results"][key] for record in records], style, marker=mark, ms=4, color=colour, label=f"{name}, {what}")
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    ax.set(xlabel="power $n$", ylabel="accuracy")
    ax.legend(fontsize=8)
    return figure


def robustness_curves(named: dict[str, tuple[str, np.ndarray, dict]]):
    """Relative accuracy against FGSM strength, with fit and R (fig. 9.2): name -> (LL or BP, radii, fit of a record)."""
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    edge = 0.0
    for name, (kind, radii, fit) in named.items():
        eps, accuracy = robustness.curve(radii)
        if not len(eps):
            continue
        edge = max(edge, float(np.quantile(eps, 0.98)))
        ax.plot(eps, accuracy, "-", lw=4, alpha=0.35, color=COLOURS[kind], label=f"{name}: {fit['n']} images")
        if fit["status"] == "ok":
            grid = np.linspace(0, eps.max(), 2000)
            ax.plot(grid, robustness.logistic(grid, fit["k"], fit["R"], fit["nu"]), "--", lw=1.2, color=COLOURS[kind])
            at = robustness.logistic(fit["R"], fit["k"], fit["R"], fit["nu"])
            ax.plot(fit["R"], at, "o", color=COLOURS[kind], label=f"$R$ = {fit['R']:.4f} ± {fit['R_err']:.4f}, $R^2$ = {fit['r2']:.4f}")
    ax.set(xlabel=r"attack strength $\varepsilon$ (pixel range 0 to 1)", ylabel="relative accuracy", ylim=(0, 1.02))
    ax.set_xlim(0, edge or 1)
    ax.legend(fontsize=8)
    return figure


def _scatter(ax, rows, **look):
    return ax.scatter([row["R"] for row in rows], [row["accuracy"] for row in rows], s=look.pop("s", 22), lw=0.4, edgecolor="white", **look)


def cloud(rows: list[dict]):
    """Accuracy against R, one point a model, with histograms along both axes and a line from the most accurate to the most robust (fig. 9.3).

    rows : of :func:`khnb.tables.accepted_models`, at least one.
    """
    figure = plt.figure(figsize=(6.5, 5), layout="constrained")
    axes = figure.subplot_mosaic([["above", "."], ["ax", "beside"]], width_ratios=[5, 1], height_ratios=[1, 5])
    ax, above, beside = axes["ax"], axes["above"], axes["beside"]
    _scatter(ax, rows, color=COLOURS[rows[0]["model"]])
    best, toughest = max(rows, key=lambda row: row["accuracy"]), max(rows, key=lambda row: row["R"])
    ax.plot([best["R"], toughest["R"]], [best["accuracy"], toughest["accuracy"]], color=COLOURS["thesis"], lw=1)
    ax.set(xlabel=r"robustness $\mathcal{R}$ (pixel range 0 to 1)", ylabel="test accuracy")
    for side, key, way in ((above, "R", "vertical"), (beside, "accuracy", "horizontal")):
        side.hist([row[key] for row in rows], bins=20, orientation=way, color=COLOURS[rows[0]["model"]], alpha=0.6)
        side.tick_params(labelbottom=way == "horizontal", labelleft=way == "vertical")
    above.sharex(ax), beside.sharey(ax)
    above.set_ylabel("models"), beside.set_xlabel("models")
    return figure


def cloud_by(rows: list[dict], names: dict[str, str], columns: int = 3):
    """The same points once for each hyperparameter, coloured and marked by its value (fig. 9.4). names : key of a row -> how it is called."""
    height = -(-len(names) // columns)
    figure, axes = plt.subplots(height, columns, figsize=(3.4 * columns, 2.9 * height), layout="constrained", sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.remove()
    for letter, ax, (key, called) in zip(LETTERS, axes.flat, names.items()):
        values = sorted({row[key] for row in rows if row.get(key) is not None})
        shades = plt.get_cmap("cividis")(np.linspace(0, 0.95, len(values)))
        for value, shade, mark in zip(values, shades, itertools.cycle("os^Dv<>pP*X")):
            text = value if isinstance(value, str) else "rExp" if (key, value) == ("n", 0) else f"{value:g}"
            _scatter(ax, [row for row in rows if row.get(key) == value], color=[shade], marker=mark, label=text)
        ax.set_title(f"{letter}  {called}", fontsize=10, loc="left")
        ax.legend(fontsize=7, ncols=1 + len(values) // 6, handletextpad=0.1, borderpad=0.3)
    figure.supxlabel(r"robustness $\mathcal{R}$ (pixel range 0 to 1)", fontsize=10)
    figure.supylabel("test accuracy", fontsize=10)
    return figure


def cloud_shaded(rows: list[dict], names: dict[str, str]):
    """The same points once for each quantity, coloured by it (fig. 9.5). names : key of a row -> how it is called."""
    figure, axes = plt.subplots(1, len(names), figsize=(4.2 * len(names), 3.6), layout="constrained", sharex=True, sharey=True, squeeze=False)
    for ax, (key, called) in zip(axes[0], names.items()):
        shown = [row for row in rows if row.get(key) is not None]
        figure.colorbar(_scatter(ax, shown, c=[row[key] for row in shown], cmap="cividis"), ax=ax, label=called)
        ax.set_xlabel(r"robustness $\mathcal{R}$ (pixel range 0 to 1)")
        ax.locator_params(axis="x", nbins=5)
    axes[0][0].set_ylabel("test accuracy")
    return figure


def clouds(panels: dict[str, dict[str, list[dict]]], joined: bool = False):
    """Several sets of models in one panel or more (figs. 9.6, 9.8, 9.9): title -> name -> rows. ``joined``: a line from a model to the same in the next set."""
    figure, axes = plt.subplots(1, len(panels), figsize=(max(6, 4.5 * len(panels)), 4), layout="constrained", sharex=True, sharey=True, squeeze=False)
    for ax, (title, series) in zip(axes[0], panels.items()):
        last = {}
        for (name, rows), colour, mark in zip(series.items(), itertools.cycle(SERIES), itertools.cycle("os^D")):
            _scatter(ax, rows, color=COLOURS.get(name.split()[0], colour), marker=mark, label=f"{name}: {len(rows)} models", zorder=3)
            for row in rows if joined else []:
                if row["id"] in last:
                    ax.plot([last[row["id"]], row["R"]], [row["accuracy"]] * 2, color="#bbbbbb", lw=0.7, zorder=1)
                last[row["id"]] = row["R"]
        ax.set_title(title, fontsize=10)
        ax.set_xlabel(r"robustness $\mathcal{R}$ (pixel range 0 to 1)")
        ax.legend(fontsize=8)
    axes[0][0].set_ylabel("test accuracy")
    return figure


def pgd_curves(radii: np.ndarray, steps: np.ndarray, fits: tuple[dict, dict]):
    """Relative accuracy under PGD against the distance and against the number of steps (fig. 9.7), each with its fit and inflection point.

    radii : (n,) ; steps : (n,), -1 where never fooled; fits : ``fit`` and ``fit_steps`` of an attack record.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.5), layout="constrained", sharey=True)
    counts = np.where(steps < 0, np.inf, steps)
    for ax, values, fit, colour, text, digits in zip(axes, (radii, counts), fits, SERIES, (r"attack strength $\varepsilon$ (pixel range 0 to 1)", "steps"), (4, 1)):
        at, accuracy = robustness.curve(values)
        ax.step(at, accuracy, where="post", color=colour, lw=3, alpha=0.4, label=f"{fit['n']} images, {fit['n_survived']} never fooled")
        if fit["status"] == "ok":
            grid = np.linspace(0, at.max(), 1000)
            ax.plot(grid, robustness.logistic(grid, fit["k"], fit["R"], fit["nu"]), "--", color="black", lw=1.2)
            ax.plot(fit["R"], robustness.logistic(fit["R"], fit["k"], fit["R"], fit["nu"]), "o", color="black", label=f"inflection at {fit['R']:.{digits}f}")
        ax.set(xlabel=text, ylim=(0, 1.02), xlim=(0, float(np.quantile(at, 0.98)) or 1))
        ax.legend(fontsize=8)
    axes[0].set_ylabel("relative accuracy")
    return figure


def threshold_curves(radii: np.ndarray, confidences: np.ndarray, thresholds=(0.0, 0.4, 0.6, 0.8, 0.95)):
    """How the curve of one model changes with the least confidence of its images (section 7.2).

    radii, confidences : (n,) of an attack on all images classified correctly. A dot is an inflection point; a curve without one has none.
    """
    figure, ax = plt.subplots(figsize=(6.5, 4), layout="constrained")
    shades = plt.get_cmap("cividis")(np.linspace(0, 0.95, len(thresholds)))
    for threshold, shade, dash in zip(thresholds, shades, ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))):
        some = radii[confidences >= threshold]
        found = robustness.fit(some, bootstrap=2)
        eps, accuracy = robustness.curve(some)
        said = f"$\\mathcal{{R}}$ = {found.R:.4f}" if found.status == "ok" else found.status
        ax.plot(eps, accuracy, ls=dash, lw=2, color=shade, label=f"{threshold:.0%} sure: {len(some)} images, {said}")
        if found.status == "ok":
            ax.plot(found.R, np.interp(found.R, eps, accuracy), "o", color=shade, mec="black", ms=7)
    ax.set(xlabel=r"attack strength $\varepsilon$ (pixel range 0 to 1)", ylabel="relative accuracy", ylim=(0, 1.02), xlim=(0, float(np.quantile(radii[np.isfinite(radii)], 0.98))))
    ax.legend(fontsize=8)
    return figure


def attack_examples(model, images: torch.Tensor, labels: torch.Tensor, classes, count: int = 4):
    """Original, sign of the gradient and attacked image, of the first confident images of ``count`` classes (fig. 9.1).

    model : network in eval mode; images : (N, C, H, W) float in [0, 1]; labels : (N,) int64.
    """
    with torch.no_grad():
        top, guess = model(images).softmax(1).max(1)
    good = torch.nonzero((guess == labels) & (top >= 0.8))[:, 0].tolist()
    chosen = list({int(labels[i]): i for i in reversed(good)}.values())[::-1][:count]
    if not chosen:
        raise ValueError("no image is classified correctly with confidence 0.8 or more: nothing to show")
    x, y = images[chosen], labels[chosen]
    radii = attacks.fgsm_radius(model, x, y)
    eps = torch.where(radii.isfinite(), radii, 1.0)
    attacked, signs = attacks.fgsm(model, x, y, eps), attacks.gradient(model, x, y).sign()
    with torch.no_grad():
        after, to = model(attacked).softmax(1).max(1)
    figure, axes = plt.subplots(len(chosen), 3, figsize=(6, 2.1 * len(chosen)), layout="constrained", squeeze=False)
    for row, i in enumerate(chosen):
        pictures = (x[row], (signs[row] + 1) / 2, attacked[row])
        texts = (
            f"{classes[labels[i]]}, {top[i]:.0%} sure", f"sign of the gradient, ρ = {radii[row]:.4f}",
            f"{classes[to[row]]}, {after[row]:.0%} sure",
        )
        for ax, picture, text in zip(axes[row], pictures, texts):
            ax.imshow(picture.permute(1, 2, 0).numpy().squeeze(), cmap="gray", vmin=0, vmax=1)
            ax.set_title(text, fontsize=8)
            ax.axis("off")
    return figure
