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
# # 2 Neural networks
#
# Machine learning fits a function $f(x;\theta)$ to data by choosing its parameters $\theta$. With *supervised*
# learning every input $x$ comes with the answer $y$ that $f$ should give; with *unsupervised* learning there is only
# $x$, and what is learned is structure in the data itself. The LL models of this book use both, one after the other.
#
# The functions here are neural networks. Their appeal is that already one hidden layer, if it is wide enough and its
# non-linearity is not a polynomial, comes as close as one likes to any continuous function on a bounded domain
# {cite}`cybenko1989,hornik1989,leshno1993`. These theorems promise that good weights exist. They do not say how to find
# them, and that is what chapters [3](03_supervised_training.ipynb) and [4](04_local_learning.ipynb) are about. For a
# longer introduction see {cite}`goodfellow2016`.

# %% tags=["hide-input"]
import matplotlib.pyplot as plt
from myst_nb import glue

from khnb import schematics
from khnb.models import PRELU_SLOPE
from khnb.widgets import Activations, Convolution

schematics.vector_graphics()


def show(name, figure):
    """Put a figure where the text wants it: under its caption."""
    glue(name, figure)
    plt.close(figure)


# %% tags=["remove-cell"]
show("fig-2-1", schematics.fully_connected())
show("fig-2-2", schematics.forward_step())

# %% [markdown]
# ## Feed-forward networks
#
# A feed-forward network passes its input through layers, one after the other. In a *fully connected* one every node of
# a layer is joined to every node of the next ({numref}`fig-2-1`).
#
# ```{glue:figure} fig-2-1
# :name: fig-2-1
# :alt: Five columns of circles, the input on the left, three hidden layers and the output on the right, with a line from each circle to every circle of the next column.
#
# Redrawn: a fully connected feed-forward network with three hidden layers. Circles are
# nodes, lines are weights; biases and activation functions are not drawn.
# ```
#
# The values of layer $\mu$ follow from those of the layer before it by
#
# (eq-2-1)=
#
# $$
# a^{(\mu)} = \sigma\!\left(W^{(\mu)} a^{(\mu-1)}\right), \tag{2.1}
# $$
#
# where the non-linear function $\sigma$ acts on each element. The bias is hidden in $W$: give $a^{(\mu-1)}$ a first
# element that is always 1, and the first column of $W^{(\mu)}$ is the bias ({numref}`fig-2-2`). The network is the
# chain of all its layers, and $\theta$ is the set of all its matrices.
#
# ```{glue:figure} fig-2-2
# :name: fig-2-2
# :alt: Two matrix equations. Above, the new layer equals sigma of the weights times the previous layer plus the bias. Below, the bias is the first column of the weights and the previous layer begins with a one.
#
# Redrawn: one step forward, eq. 2.1, with the bias apart and with the bias inside the weights.
# ```
#
# ## Convolution
#
# In a picture, a pixel says more about its neighbours than about the far corner. A convolutional network builds this
# in: a small array of weights, a *kernel* or *filter*, slides over the image, and each position gives one number. All
# positions share the same few weights. In one continuous dimension the convolution of $f$ and $g$ is
#
# (eq-2-3)=
#
# $$
# (f * g)(t) = \int_{-\infty}^{\infty} f(\tau)\, g(t-\tau)\, \mathrm{d}\tau. \tag{2.3}
# $$
#
# The minus sign turns the kernel round, and so does the discrete version: in two dimensions the kernel is turned by
# half a turn before it is laid on the image. {numref}`fig-2-3` does this with a Sobel kernel, which answers to
# horizontal edges. Its numbers are computed here by `scipy.signal.convolve2d`.

# %% tags=["hide-input"]
output, window, flipped = schematics.convolution_example()
print("one output value, by hand:", " ".join(f"{a}·{b:+d}" for a, b in zip(window.flat, flipped.flat)), "=", output[0, 2])

# %% tags=["remove-cell"]
show("fig-2-3", schematics.convolution())

# %% [markdown]
# ```{glue:figure} fig-2-3
# :name: fig-2-3
# :alt: A grid of small whole numbers, a three by three Sobel kernel and the resulting smaller grid; nine cells of the image and one of the result are highlighted, and the kernel turned by half a turn is shown beside them.
#
# With an image of our own: convolution with the Sobel-y kernel, without padding, stride 1.
# The marked output value is the sum of the marked image values times the kernel as applied, that is, flipped.
# ```
#
# Step through it below. Before each step, say what the next value will be. Then switch off the flip: with Sobel-y only the sign
# changes, because this kernel turned by half a turn is its own negative. Edit a cell to make one for which more changes, and one for which
# nothing does.

# %% tags=["remove-input"]
Convolution()

# %% [markdown]
# Deep-learning libraries leave out the flip: their "convolution" is a correlation. For *learned* filters the
# difference is only one of naming, and so it plays no part in the rest of this book.
#
# Three choices belong to a convolution: the width of the kernel, the *stride* by which it moves, and the *padding*
# around the image. Here the stride is always 1 and there is no padding, so a filter of width $w$ on an image of width
# $I$ gives $I-w+1$ values in each direction. One layer has many filters, and each gives one *channel* of output. To
# keep that in bounds, a *pooling* layer then keeps one number, here the largest, for each small window.
#
# ## Activation functions
#
# Without $\sigma$, a chain of layers would be one linear map. The thesis tries most of the following:
#
# (eq-2-4)=
#
# $$ \text{sigmoid:}\quad \sigma(x) = \frac{1}{1+e^{-x}} \tag{2.4} $$
#
# (eq-2-5)=
#
# $$ \text{hyperbolic tangent:}\quad \sigma(x) = \tanh x \tag{2.5} $$
#
# (eq-2-6)=
#
# $$ \text{ReLU:}\quad \sigma(x) = \max(0, x) \tag{2.6} $$
#
# (eq-2-7)=
#
# $$ \text{PReLU:}\quad \sigma(x) = \begin{cases} \alpha x & x<0 \\ x & x\ge 0 \end{cases} \tag{2.7} $$
#
# (eq-2-8)=
#
# $$ \text{ELU:}\quad \sigma(x) = \begin{cases} \alpha(e^x-1) & x<0 \\ x & x\ge 0 \end{cases} \tag{2.8} $$
#
# (eq-2-9)=
#
# $$ \text{GeLU:}\quad \sigma(x) = x\,\Phi(x), \qquad \Phi(x) = P(\chi\le x),\ \chi\sim\mathcal N(0,1) \tag{2.9} $$
#
# (eq-2-10)=
#
# $$ \text{rExp:}\quad \sigma(x) = \max(0, e^x-1) \tag{2.10} $$
#
# Sigmoid and tanh flatten out on both sides, and where they are flat the gradient vanishes. ReLU {cite}`glorot2011`
# keeps a slope of 1 for every positive input. Its relatives differ for negative input: PReLU {cite}`he2015` leaves a
# small slope, ELU {cite}`clevert2016` bends towards $-\alpha$, and GeLU {cite}`hendrycks2016` is smooth. The rectified
# exponential is the thesis's own addition: its power series contains every power, and in a dense associative memory
# higher powers mean more capacity. [Chapter 10](10_discussion.ipynb) says how it fared.

# %% tags=["remove-cell"]
show("fig-2-4", schematics.activations())
glue("prelu-slope", PRELU_SLOPE)

# %% [markdown]
# ```{glue:figure} fig-2-4
# :name: fig-2-4
# :alt: Seven curves of activation functions for x from -4 to 4. Sigmoid and tanh level off; ReLU, PReLU, ELU and GeLU are close to x for positive x and differ below zero; rExp grows exponentially.
#
# Redrawn from eqs. 2.4-2.10 (ELU with α = 1; for PReLU the thesis gives no slope, here α = {glue:text}`prelu-slope`).
# ```
#
# The networks of this book raise $\sigma$ to a power $n$. Watch what that does to each function: compare the slopes left and right of zero
# at $n=1$ and at $n=4$, look for places where a function that always rose falls once $n$ is even, and see where the sigmoid
# keeps any slope at all.

# %% tags=["remove-input"]
Activations()

# %% [markdown]
# Two slips of the thesis are set right here: ELU tends to $-\alpha$ as $x\to-\infty$ (printed: $+\infty$), and the ranges
# of sigmoid and tanh are open intervals, as neither ever reaches its limits.
#
# The last layer is different. To name one of $k$ classes, its values $z$ are turned by *softmax* into positive numbers
# that sum to 1,
#
# (eq-2-11)=
#
# $$
# \sigma(z)_i = \frac{e^{z_i}}{\sum_{j=1}^{k} e^{z_j}}, \qquad i = 1,\dots,k, \tag{2.11}
# $$
#
# and the largest is the prediction. They look like probabilities and are treated as such, but nothing in the training
# makes them so. This matters in [chapter 7](07_robustness.ipynb), where the largest of them serves as the model's
# *confidence*.
#
# ## Where the weights start
#
# Random weights that are too large or too small make signals and gradients grow or shrink from layer to layer. The
# usual cure is to scale their spread by the number of inputs of a neuron, in one way for symmetric activation functions
# {cite}`glorot2010` and in another for rectifiers {cite}`he2015`. [Chapter 6](06_implementation.ipynb) returns to this,
# because the thesis's formula for it cannot be meant as printed.
