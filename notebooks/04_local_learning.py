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
# # 4 Local learning

# %% tags=["parameters"]
m = 2  # rank of the inhibited neuron
delta = 0.1  # anti-Hebbian strength
p = 2.0  # order of the norm
seed = 5  # seed of every random choice

# %% tags=["remove-cell"]
import matplotlib.pyplot as plt
import torch
from myst_nb import glue

from khnb import schematics, settings
from khnb.learning import kh_update
from khnb.widgets import HopfieldRecall, WinnerTakesAll

schematics.vector_graphics()

asked = settings.of_notebook(globals(), "m", "delta", "p", "seed")
m, delta, p, seed = (asked[name] for name in ("m", "delta", "p", "seed"))

# %% [markdown]
# Backpropagation changes each weight in view of the whole network. A *local* rule changes it in view of what is at
# hand: the activity on its two ends, and perhaps the neighbours. This chapter goes from the oldest such rule to the one
# this book is about.
#
# ## Hebb, Oja, BCM
#
# Hebb's idea {cite}`hebb1949` is that a connection grows when the two neurons it joins are active together. Taken
# literally, weights grow without end. Oja {cite}`oja1982` added a term that stops this: for one neuron with output
# $y=\sum_j w_j x_j$,
#
# $$ \Delta w = \eta\, y\,(x - y\,w), $$
#
# and $w$ turns into the first principal component of the data, at unit length. Sanger {cite}`sanger1989` extended the rule
# to several neurons and components. In the theory of Bienenstock, Cooper and Munro {cite}`bienenstock1982` the same
# input can also *weaken* a connection (anti-Hebbian learning): a threshold, which rises with the neuron's own mean
# activity, decides between the two. Both ideas return below. What these rules lack is a reason for two neurons to learn
# different things.
#
# ## Hopfield networks
#
# A Hopfield network {cite}`hopfield1982` joins every pair of its $N$ neurons, each $\pm1$, by a symmetric weight
# ({numref}`fig-4-1`). It stores patterns $\xi^1,\dots,\xi^K$ as minima of the energy
#
# (eq-4-1)=
#
# $$
# E = -\frac12\sum_{i,j}\sigma_i T_{ij}\sigma_j, \qquad T_{ij} = \sum_{\mu=1}^{K}\xi_i^\mu\xi_j^\mu, \tag{4.1}
# $$
#
# and recalls one by rolling down from a damaged copy. (With nothing stored, $T$ is zero; the thesis calls it the
# identity.) The number of patterns that can be recalled grows only as $N/\log N$ {cite}`mceliece1987`. Replacing the square
# in the energy by a power $n$ raises this to $N^{n-1}/\log N$: the *dense associative memory* {cite}`krotov2016`. It is
# equivalent to a feed-forward network with one hidden layer, whose activation function is the derivative of the energy
# function. Here lie the reasons for the single layer of filters and for the steep activation
# $\sigma(x)^n$ in all that follows.

# %% tags=["remove-cell"]
fig = schematics.hopfield(12)
glue("fig-4-1", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-4-1
# :name: fig-4-1
# :alt: Twelve numbered circles on a ring, each joined to all eleven others by straight lines.
#
# Redrawn: a Hopfield network of 12 nodes and 66 symmetric weights.
# ```
#
# Here is one of 64 neurons. Run the recall, then damage the letter yourself, by clicking on pixels or with more flipped ones. Every
# update lowers the energy or leaves it. Then store more letters. Of random patterns, about $N/(2\log N)$ can be stored, between seven and
# eight for $N=64$; of these letters the first seven are minima, and with all ten even an undamaged copy changes.

# %% tags=["remove-input"]
HopfieldRecall()

# %% [markdown]
# ## The Krotov-Hopfield rule
#
# Krotov and Hopfield {cite}`krotov2019` build their rule on four demands: the change of a weight depends on the activity
# before and after it, and can go both ways; neurons of a layer inhibit one another, so that they learn different
# things; the weights of each neuron stay bounded and end on a sphere; and this sphere may belong to any $p$-norm with
# $p\ge2$, which tunes how much large weights count. For a neuron $k$ with weights $W_k$ that sees the input $v$:
#
# (eq-4-2)=
#
# $$
# \eta\,\frac{\mathrm dW_{ki}}{\mathrm dt} = g(Q)\left[R^p v_i - \langle W_k, v\rangle_k W_{ki}\right], \tag{4.2}
# $$
#
# (eq-4-3)=
#
# $$
# \langle x, y\rangle_k = \sum_{i,j}\eta^{(k)}_{ij}x_i y_j, \qquad \eta^{(k)}_{ij} = |W_{ki}|^{p-2}\delta_{ij}. \tag{4.3}
# $$
#
# The first term in the brackets pulls $W_k$ towards the input, the second holds its length: as long as
# $g\,\langle W_k,v\rangle_k\ge0$, the $p$-norm of $W_k$ goes to $R$, here 1. The activity of the neuron is
# $h_k=\langle W_k, v\rangle_k=\sum_i \operatorname{sgn}(W_{ki})|W_{ki}|^{p-1}v_i$. What is compared between neurons is
#
# (eq-4-4)=
#
# $$
# Q_k = \frac{\langle W_k, v\rangle_k}{\langle W_k, W_k\rangle_k^{(p-1)/p}}, \tag{4.4}
# $$
#
# activity over length. The thesis prints the exponents in other places, with the numerator to the power $(p-1)/p$ and
# the denominator to $1/p$. That expression changes when a filter is merely scaled, and is undefined for a negative
# activity; the form above is the one that does not. Once the filters have unit norm both give the same order.
#
# The function $g$ decides between Hebbian and anti-Hebbian change,
#
# (eq-4-5)=
#
# $$
# g(Q) = \begin{cases} 1 & Q\ge Q_* \\ -\Delta & Q_*>Q\ge0 \\ 0 & Q<0, \end{cases} \tag{4.5}
# $$
#
# and competition comes in by letting the threshold depend on the whole layer. In practice only two neurons change for
# each input. With the $K$ neurons in order of activity, $i=K$ the most active,
#
# (eq-4-6)=
#
# $$
# g(i) = \begin{cases} 1 & i=K \\ -\Delta & i=K-m+1 \\ 0 & \text{otherwise,} \end{cases} \qquad 2\le m\le K. \tag{4.6}
# $$
#
# The winner moves towards the input, the neuron of rank $m$ away from it. (In eq. 4.6 $K$ counts neurons. From
# [chapter 6](06_implementation.ipynb) on it is the *side* of the square grid of filters, and there are $K^2$ neurons.)
# In steps, with $R=1$:
#
# (eq-4-7)=
#
# $$
# W_{ki}^{(t+1)} = W_{ki}^{(t)} + \eta\,g\big(\operatorname{rank}(k)\big)\left[v_i - \big\langle W_k^{(t)},v\big\rangle_k W_{ki}^{(t)}\right]. \tag{4.7}
# $$
#
# The $\eta$ of eq. 4.2 is a time constant and that of eq. 4.7 a learning rate; they are each other's inverse.
#
# ## What the thesis leaves open
#
# A repetition needs three decisions that the text does not settle.
#
# - **What is ranked.** $Q$ or the activity $h$: they differ until all norms have settled, which is when it matters most.
#   We rank by $h$, as published implementations of the rule do. From the large random weights that the thesis starts
#   with, ranking by $Q$ lets norms grow without bound. `kh_update(..., rank="Q")` does it for comparison.
# - **What a minibatch is.** We take a number of *patches*, not of images.
# - **How a minibatch is added up.** We sum eq. 4.7 over the patches and divide by the largest absolute change of any
#   weight, so that $\eta$ is the size of the largest change. Averages move too little to bring the filters to unit norm in
#   the stated number of epochs; plain sums overflow.
#
# ## The rule in ten lines
#
# Written out for one input, and compared with the library's version for a whole minibatch:

# %%
def kh_step(W, v, m, delta, p):
    """Change of all filters W (F, D) for one input v (D,), eqs. 4.3, 4.6 and 4.7 without eta."""
    h = (W.sign() * W.abs() ** (p - 1)) @ v
    order = h.argsort(descending=True)
    g = torch.zeros(len(W), dtype=W.dtype)
    g[order[0]] = 1.0
    g[order[m - 1]] = -delta
    return g[:, None] * (v - h[:, None] * W)


generator = torch.Generator().manual_seed(seed)
W = torch.randn(20, 48, generator=generator, dtype=torch.float64)
V = torch.rand(100, 48, generator=generator, dtype=torch.float64)
V /= torch.linalg.vector_norm(V, ord=p, dim=1, keepdim=True)
by_hand = sum(kh_step(W, v, min(m, 20), delta, p) for v in V)
difference = (by_hand - kh_update(W, V, min(m, 20), delta, p)).abs().max().item()
print(f"100 inputs, 20 filters: largest difference {difference:.1e}")

# %% [markdown]
# ## Winners, losers and a collapse
#
# In the plane one can watch it. The grey dots are inputs on the unit sphere of the $p$-norm, in clumps; each line
# is the path of one of eight filters, from a random start to the black dot. In the left panel the clumps lie all round.
# Each finds a filter, which ends on it with unit norm; filters that are too short to win anything are left near the
# middle.
#
# Images are different: no pixel is negative, so all patches lie in one corner of their space, as in the other two
# panels. A filter that starts on the far side never wins and hardly moves. And if $\Delta$ is large, there is
# a race: once one filter wins almost everything, the inhibition falls on the others and pushes them away, until they
# point opposite to all inputs and can never win again. The thesis met this on CIFAR-10, where the losers look blue, and named
# it the Blue Wall of Death. [Chapter 8](08_training.ipynb) meets it on real patches.

# %% tags=["hide-input", "remove-output"]
def inputs(clumps):
    """600 points near the given angles, scaled to unit p-norm."""
    centre = torch.tensor(clumps)[torch.randint(len(clumps), (600,), generator=generator)]
    angle = centre + 0.05 * torch.randn(600, generator=generator)
    v = torch.stack([angle.cos(), angle.sin()], 1)
    return v / torch.linalg.vector_norm(v, ord=p, dim=1, keepdim=True)


def learn(v, delta, steps=400, eta=0.03, filters=8):
    """Paths (steps + 1, filters, 2) of filters that learn from v, 60 inputs at a time."""
    W = torch.randn(filters, 2, generator=generator)
    path = [W]
    for t in range(steps):
        change = kh_update(W, v[torch.randint(len(v), (60,), generator=generator)], min(m, filters), delta, p)
        W = W + eta * (1 - t / steps) * change / change.abs().max().clamp_min(1e-12)
        path.append(W)
    return torch.stack(path)


generator = torch.Generator().manual_seed(seed)
around, corner = (0.8, 2.4, 3.9, 5.5), (0.15, 0.45, 0.75, 1.05, 1.35)
cases = [("inputs all round", around, delta), ("inputs in one corner", corner, delta), ("same, larger Δ", corner, max(6 * delta, 0.6))]
fig, axes = plt.subplots(1, 3, figsize=(10.5, 3.8))
colours = [value[-1] for value in schematics.CURVES.values()] + [schematics.BROWN]
for ax, (title, clumps, strength) in zip(axes, cases):
    v = inputs(clumps)
    path = learn(v, strength)
    ax.scatter(*v.T, s=4, color="0.6", zorder=1)
    for k, colour in enumerate(colours):
        ax.plot(*path[:, k].T, color=colour, lw=1.5, zorder=2)
    ax.scatter(*path[-1].T, s=30, color="black", zorder=3)
    ax.set(title=f"{title}, Δ = {strength:g}", xlabel="first weight", ylabel="second weight", aspect="equal")
    ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))
fig.tight_layout()
glue("fig-4-toy", fig)
plt.close(fig)

# %% [markdown]
# ```{glue:figure} fig-4-toy
# :name: fig-4-toy
# :alt: Three panels with points on a circle and the paths of eight filters. In the first the filters end on the clumps of points; in the second some filters end among the points and others stay far away; in the third one filter ends among the points and others are pushed to the opposite side.
#
# The KH rule in the plane, computed when this page was built.
# ```
#
# Do it yourself: run it, then move to the inputs in one corner and raise $\Delta$ until one filter has all of them. With one input a step
# each step shows whom the input (ringed) pulls (+) and whom it pushes away (−). Which $m$ makes the collapse less likely, and does the
# seed matter?

# %% tags=["remove-input"]
WinnerTakesAll()

# %% [markdown]
# ## Training in two stages
#
# The rule trains one layer, without labels. For an LL model the filters are trained first and then left alone; a linear
# classifier on top is trained with labels, as in [chapter 3](03_supervised_training.ipynb). Many classifiers can share one
# layer of filters, which makes large searches affordable. That filters chosen without any knowledge of the task serve it
# so well is one of the surprises of the method.
