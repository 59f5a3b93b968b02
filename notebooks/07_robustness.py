# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: tags,-all
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 7 Attacks and robustness

# %% tags=["parameters"]
step = 0.02  # step of PGD, in units of the [0, 1] range
radius = 0.3  # radius of PGD's ball

# %% tags=["remove-cell"]
import matplotlib.pyplot as plt
import numpy as np
import torch
from myst_nb import glue

from khnb import plots, schematics, settings
from khnb.attacks import fgsm, pgd
from khnb.results import Store
from khnb.robustness import five_parameter, inflection, logistic
from khnb.widgets import LogisticCurve

schematics.vector_graphics()

asked = settings.of_notebook(globals(), "step", "radius")
step, radius = asked["step"], asked["radius"]

# %% [markdown]
# An attack adds a perturbation $\pi$ to an image $x$ that the model classifies correctly, so that $x'=x+\pi$ is
# classified wrongly. The distance to the nearest such $x'$ is the image's *adversarial radius* $\rho$. Here distance is the
# largest change of any value of the image, the $l_\infty$ norm.
#
# *Black-box* attacks know nothing of the model: noise, shadows, occlusion. *White-box* attacks use it. Training lowers
# the loss by changing the parameters; an attacker raises it by changing the image:
#
# (eq-7-1)=
#
# $$ \min_\theta \mathcal L\big(f_\theta(x), y\big), \tag{7.1} $$
#
# (eq-7-2)=
#
# $$ \max_\pi \mathcal L\big(f_\theta(x+\pi), y\big). \tag{7.2} $$
#
# ## Three attacks
#
# The **fast gradient sign method** {cite}`goodfellow2015` takes one step of size $\varepsilon$ along the sign of the gradient,
#
# (eq-7-3)=
#
# $$ x' = x + \varepsilon\,\operatorname{sign}\big(\nabla_x\mathcal L(f_\theta(x), y)\big), \tag{7.3} $$
#
# and clips the result to $[0,1]$, since no pixel can be darker than black or brighter than white. Every value moves by
# the same amount, which is the most that the $l_\infty$ norm allows. An image's radius under FGSM is the smallest
# $\varepsilon$ at which the prediction becomes wrong. **Iterated FGSM** {cite}`kurakin2017` takes many small steps and looks
# at the gradient anew before each,
#
# (eq-7-4)=
#
# $$ x'_{i+1} = x'_i + \varepsilon\,\operatorname{sign}\big(\nabla_{x'}\mathcal L(f_\theta(x'_i), y)\big), \qquad x'_0 = x. \tag{7.4} $$
#
# **Projected gradient descent** {cite}`madry2018` does the same but never leaves a ball $S_x$ of given radius around the
# original: after each step the projection $\Pi$ puts the image back,
#
# (eq-7-5)=
#
# $$ x'_{i+1} = \Pi_{S_x}\!\left[x'_i + \varepsilon\,\operatorname{sign}\big(\nabla_{x'}\mathcal L(f_\theta(x'_i), y)\big)\right]. \tag{7.5} $$
#
# The iterated attacks give two measures, the distance at the first wrong step and the number of steps. In the
# $l_\infty$ norm they are nearly the same thing: if only *one* value of the image moves the same way in every step, and
# neither the ball nor the range $[0,1]$ stops it, the distance is the step size times the number of steps.
#
# The figure shows FGSM and PGD on images of two pixels, where everything can be seen. The model is a made-up one
# with a curved boundary. FGSM can only go along a diagonal, and from some points misses the boundary or meets it late;
# PGD turns on the way.

# %% tags=["hide-input", "remove-output"]
class Curve(torch.nn.Module):
    """Two classes, divided by a wavy line: images (B, 1, 1, 2) to logits (B, 2)."""

    def forward(self, images):
        x, y = images.flatten(1).T
        height = 12 * (y - 0.45 - 0.22 * torch.sin(7 * x))
        return torch.stack([torch.zeros_like(height), height], 1)


model = Curve().eval()
starts = torch.tensor([[0.32, 0.42], [0.62, 0.10], [0.85, 0.80]], dtype=torch.float64)[:, None, None, :]
labels = model(starts).argmax(1)

fig, ax = plt.subplots(figsize=(5.6, 5.2))
line = torch.linspace(0, 1, 201, dtype=torch.float64)
plane = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).reshape(-1, 1, 1, 2)
score = model(plane)[:, 1].reshape(201, 201)
ax.contourf(line, line, score, levels=[-99, 0, 99], colors=["#E8EEF5", "#FBEBDD"])
ax.contour(line, line, score, levels=[0], colors="0.4", linewidths=1)
strengths = torch.linspace(0, radius, 61, dtype=torch.float64)
for i in range(len(starts)):
    straight = torch.cat([fgsm(model, starts[i : i + 1], labels[i : i + 1], e.item()) for e in strengths]).flatten(1)
    fooled = torch.nonzero(model(straight[:, None, None, :]).argmax(1) != labels[i])
    straight = straight[: fooled[0, 0] + 1] if len(fooled) else straight
    ax.plot(*straight.T, "--", color=schematics.RED, lw=2, label="FGSM, growing strength" if i == 0 else None)
    walk = [starts[i : i + 1]]
    for steps in range(1, int(radius / step) + 1):
        walk.append(pgd(model, starts[i : i + 1], labels[i : i + 1], step=step, radius=radius, max_steps=steps))
    ax.plot(*torch.cat(walk).flatten(1).T, ".-", color=schematics.BLUE, lw=1.2, label="PGD, step by step" if i == 0 else None)
    x, y = starts[i].flatten() - radius
    ax.add_patch(plt.Rectangle((x, y), 2 * radius, 2 * radius, fill=False, ls=":", color="0.5"))
    ax.plot(*starts[i].flatten(), "ko", zorder=3)
ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="first pixel", ylabel="second pixel", aspect="equal")
ax.legend(loc="upper right")
glue("fig-7-toy", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-7-toy
# :name: fig-7-toy
# :alt: A square divided by a wavy line into two classes. From each of three points a dashed diagonal line and a chain of dots lead towards the boundary; a dotted square around each point shows the ball that PGD may not leave.
#
# FGSM and PGD on images of two pixels, computed by `khnb.attacks`. Dotted: the $l_\infty$ ball of PGD.
# ```
#
# Attacks fail silently, and then look like robustness {cite}`athalye2018`. Four precautions are built in here. The loss is
# taken of the logits, not of softmax outputs that have rounded to 0 and 1 (and where a model is so sure that even the gradient rounds, `loss="log-odds"` has a
# direction that the cross-entropy has lost). Images whose gradient vanishes stay where
# they are and are counted as never fooled. As a prediction may become wrong and right again as $\varepsilon$ grows, the
# search for $\rho$ scans upwards and only then refines the *first* crossing. And success is always checked by predicting
# the finished image again. Stronger attacks exist, such as that of Carlini and Wagner {cite}`carlini2017`, and toolboxes that hold
# many of them {cite}`rauber2017,rauber2020`; the thesis uses only the three above, and so does this book.
#
# ## Which images
#
# Only images that the model names correctly are attacked, and of these only the ones of which it is sure: the largest
# softmax output has to be at least a threshold $C$, `confidence` in this library, normally 0.8. The share of them still
# correct at strength $\varepsilon$ is the *relative accuracy*. It starts at 1 and falls.
#
# The threshold shapes the curve. Images that are barely correct fall at the slightest push, so that without a threshold
# the curve drops steeply from the very start, like an exponential, and has no steepest point in the middle. Leaving
# the uncertain images out gives it a shoulder. The price is that robustness then describes a *part* of the test images,
# a different one for each model. The thesis discusses this openly; [chapter 10](10_discussion.ipynb) returns to it.

# %% tags=["remove-cell"]
store = Store()
everything = {kind: next(iter(store.full("attack", attack="fgsm", confidence=0.0, model=kind)), None) for kind in ("LL", "BP")}
for kind, record in everything.items():
    if record:
        arrays = store.arrays(record)
        glue(f"fig-thresholds-{kind.lower()}", plots.threshold_curves(arrays["radii"], arrays["confidences"]), display=False)
    else:
        glue(f"fig-thresholds-{kind.lower()}", "The store holds no attack on all images of such a model.", display=False)

# %% [markdown]
# ```{glue:figure} fig-thresholds-ll
# :name: fig-thresholds-ll
# :alt: Five curves of relative accuracy against attack strength, for thresholds from none to 95 percent. Without a threshold the curve falls steeply from the start; the higher the threshold, the longer it stays near one before it falls.
#
# FGSM on the LL model of chapters 8 and 9 ($K=10$, full CIFAR-10), for images of more and more confidence. A dot marks the inflection point.
# ```
#
# ```{glue:figure} fig-thresholds-bp
# :name: fig-thresholds-bp
# :alt: The same five curves for a BP model.
#
# The same for its BP twin.
# ```
#
# ## One number
#
# The robustness $R$ is where the curve is steepest: its inflection point. To find it the curve is fitted with a
# generalised logistic function {cite}`richards1959`,
#
# (eq-7-6)=
#
# $$
# f(\varepsilon) = 1-\frac{1}{\left(1+Q\,e^{-B(\varepsilon/D-M)}\right)^{1/|\nu|}}, \tag{7.6}
# $$
#
# (eq-7-7)=
#
# $$
# R \equiv \varepsilon_\text{crit} = \frac DB\left(MB+\log\frac{Q}{|\nu|}\right), \qquad f''(\varepsilon_\text{crit})=0. \tag{7.7}
# $$
#
# The thesis calls $Q$ the steepness and $M$ the midpoint. But the five parameters are not independent: $B$ and $D$ act
# only through $B/D$, and a change of $Q$ can be undone by one of $M$. With $k=B/D$ the same family of curves is
#
# $$
# f(\varepsilon) = 1-\left(1+\nu\,e^{-k(\varepsilon-R)}\right)^{-1/\nu},
# $$
#
# with three parameters, of which one is $R$ itself. This is the form that `khnb.robustness` fits. The cell draws sets of
# five at random, converts them, and compares; it also counts the independent directions of the five-parameter form.

# %%
generator = np.random.default_rng(0)
eps = np.linspace(0, 0.1, 201)
worst = 0.0
for _ in range(100):
    Q, B, D, M, nu = generator.uniform([0.2, 0.5, 0.005, 0.0, 0.2], [5, 3, 0.03, 3, 4])
    R = inflection(Q, B, D, M, nu)
    worst = max(worst, np.abs(five_parameter(eps, Q, B, D, M, nu) - logistic(eps, B / D, R, nu)).max())
print(f"100 random curves: largest difference of the two forms {worst:.1e}")

point = np.array([1.5, 1.2, 0.01, 2.0, 0.8])
columns = [
    (five_parameter(eps, *(point + h)) - five_parameter(eps, *(point - h))) / (2 * h.max()) for h in np.diag(1e-5 * point)
]
singular = np.linalg.svd(np.array(columns).T * point, compute_uv=False)
print("singular values of the five-parameter form:", "  ".join(f"{s:.1e}" for s in singular))

# %% tags=["remove-cell"]
sets = [(250, 0.020, 1.0), (250, 0.020, 0.1), (250, 0.020, 4.0), (120, 0.035, 1.0), (500, 0.008, 1.0)]
colours = ["black", schematics.BLUE, schematics.RED, schematics.GREEN, schematics.ORANGE]
fig, ax = plt.subplots(figsize=(6.5, 4))
eps = np.linspace(0, 0.07, 701)
for (k, R, nu), style, colour in zip(sets, ["-", "--", "-.", ":", (0, (5, 1))], colours):
    ax.plot(eps, logistic(eps, k, R, nu), ls=style, color=colour, lw=2, label=f"$k$ = {k}, $R$ = {R:g}, $\\nu$ = {nu:g}")
    ax.plot(R, logistic(R, k, R, nu), "o", color=colour, ms=8, mec="white")
ax.set(xlabel=r"attack strength $\varepsilon$ (pixel range [0, 1])", ylabel="relative accuracy", xlim=(0, 0.07), ylim=(0, 1.02))
ax.legend()
glue("fig-7-1", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-7-1
# :name: fig-7-1
# :alt: Five curves falling from one to zero as attack strength grows, of different steepness, position and symmetry, each with a dot at its steepest point.
#
# Redrawn with our own sets of parameters: generalised logistic curves and their inflection
# points.
# ```
#
# Move the three parameters one at a time. $R$ shifts the curve, $k$ squeezes it, and $\nu$ decides at what height the steepest
# point lies. Then push $R$ below zero: what is left under attack only flattens out, as where no threshold of confidence is set.

# %% tags=["remove-input"]
LogisticCurve()

# %% [markdown]
# Two singular values are zero up to rounding. So the covariance of a five-parameter fit is singular, and how the thesis
# obtained the uncertainty it states for $R$ cannot be told. There is a second reason not to read an error off the fit:
# the points of an empirical curve are not independent, since one image more at a small radius moves all points to its
# right. We draw the images again and again with replacement, fit each draw, and take the spread (the bootstrap).
#
# The form has limits. At $\varepsilon=0$ it is always below 1, while the relative accuracy is exactly 1. On a curve that
# falls like an exponential it still finds some inflection point, near 0 and with a good $R^2$. `khnb.robustness.fit` compares
# with a convex decay and reports "no inflection" in place of a number. And an image that is never fooled says only that its
# radius is *large*. The thesis drops such images from the curve, and so does the fit here, which counts them in
# `n_survived`; with `survivors="kept"` it keeps them, as right up to where the attack ended. [Chapter 9](09_attacks.ipynb) shows both.
#
# Values of $R$ compare models under the same attack, threshold and fit. By itself $R=0.02$ says little: a change of each
# pixel value by five of 255 steps, hard to see, which costs the model a large share of its confident answers.
