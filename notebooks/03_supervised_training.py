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
# # 3 Supervised training
#
# The BP models, and the classifiers of the LL models, learn from labelled images. This chapter collects what that
# takes: a loss, a way downhill, and the gradient.
#
# ## Loss
#
# A cost function $\mathcal C$ compares the prediction for one image with its label. The loss of a data set is the mean,
#
# (eq-3-1)=
#
# $$
# \mathcal L(X) = \frac1N \sum_{i=1}^N \mathcal C\big(f(X_i;\theta), y_i\big). \tag{3.1}
# $$
#
# For classes the cost is the cross-entropy between the label, a vector $p$ with a single 1, and the softmax output $q$,
#
# (eq-3-2)=
#
# $$
# \mathcal C(p, q) = -\sum_{i=1}^k p_i \log q_i. \tag{3.2}
# $$
#
# Data and labels are given, so the loss is a function of the parameters alone, and training is the search for
#
# (eq-3-3)=
#
# $$
# \min_\theta \mathcal L(\theta). \tag{3.3}
# $$
#
# What counts in the end is the loss on *other* images of the same kind. A model whose training loss is small and whose
# loss on new images is large has learned the noise: it overfits.
#
# ## Downhill
#
# The gradient points uphill, so the simplest rule goes the other way, with a step set by the learning rate $\eta$:
#
# (eq-3-4)=
#
# $$
# \theta_{t+1} = \theta_t - \eta\,\nabla_\theta \mathcal L(\theta_t). \tag{3.4}
# $$
#
# *Stochastic* gradient descent estimates the gradient from a minibatch of images: more steps for the same work, and
# each a little noisy. One pass through all minibatches is an epoch. *Momentum* averages over past gradients; Adam
# {cite}`kingma2015` also divides by their running size, parameter by parameter; AdamW {cite}`loshchilov2019` takes the
# decay of the weights out of that average. AdamW is what the thesis uses, and what we use:
#
# $$
# \begin{aligned}
# m_{t+1} &= \beta_1 m_t + (1-\beta_1)\,g_{t+1}, & \hat m_{t+1} &= m_{t+1}/(1-\beta_1^{\,t+1}),\\
# v_{t+1} &= \beta_2 v_t + (1-\beta_2)\,g_{t+1}^2, & \hat v_{t+1} &= v_{t+1}/(1-\beta_2^{\,t+1}),
# \end{aligned}
# \qquad
# \theta_{t+1} = \theta_t - \eta_{t+1}\left[\frac{\hat m_{t+1}}{\sqrt{\hat v_{t+1}}+\varepsilon} + \lambda\theta_t\right],
# $$
#
# with the customary $\beta_1=0.9$, $\beta_2=0.999$, $\varepsilon=10^{-8}$, $\lambda=0.01$. The corrections of the moments
# are printed in the thesis with the exponent $t$, which would divide by zero at the first step; $t+1$ is meant. The
# step is taken for every minibatch, not once an epoch.
#
# Large steps are good at the start and harmful at the end, so the learning rate falls during training, along one of
# the four schedules of [chapter 6](06_implementation.ipynb).
#
# ## Backpropagation
#
# What remains is the gradient. Write $z^{(\mu)} = W^{(\mu)} a^{(\mu-1)}$ for the values of a layer before its activation
# function, so that
#
# (eq-3-5)=
#
# $$
# a^{(\mu)} = \sigma\big(z^{(\mu)}\big) = \sigma\big(W^{(\mu)} a^{(\mu-1)}\big). \tag{3.5}
# $$
#
# By the chain rule, the gradient with respect to the weights is an outer product of what comes back and what went in,
#
# (eq-3-6)=
#
# $$
# \frac{\partial\mathcal L}{\partial W^{(\mu)}} = \frac{\partial\mathcal L}{\partial z^{(\mu)}} \big(a^{(\mu-1)}\big)^{T}, \tag{3.6}
# $$
#
# and what comes back to a layer follows from what came back to the next one,
#
# (eq-3-7)=
#
# $$
# \frac{\partial\mathcal L}{\partial z^{(\mu)}} =
# \left[\big(W^{(\mu+1)}\big)^{T} \frac{\partial\mathcal L}{\partial z^{(\mu+1)}}\right] \odot \sigma'\big(z^{(\mu)}\big), \tag{3.7}
# $$
#
# where $\odot$ multiplies element by element (the thesis prints an ordinary product). The recursion starts at the output,
#
# (eq-3-8)=
#
# $$
# \frac{\partial\mathcal L}{\partial z^{(L)}} = \left(\frac{\partial a^{(L)}}{\partial z^{(L)}}\right)^{\!T} \frac{\partial\mathcal C}{\partial a^{(L)}}, \tag{3.8}
# $$
#
# which for softmax and cross-entropy is simply $a^{(L)} - y$. All layers together make up the gradient of the loss,
#
# (eq-3-9)=
#
# $$
# \nabla_\theta\mathcal L = \left[\frac{\partial\mathcal L}{\partial W^{(1)}} \,\Big\Vert\, \dots \,\Big\Vert\, \frac{\partial\mathcal L}{\partial W^{(L)}}\right]. \tag{3.9}
# $$
#
# Libraries do this for any chain of operations by recording them and running back through the record
# {cite}`baydin2018,paszke2019`. The cell below writes out eqs. 3.6-3.8 for a network with one hidden layer and compares
# them with what PyTorch finds.

# %%
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from myst_nb import glue

from khnb import schematics
from khnb.models import ACTIVATIONS

schematics.vector_graphics()

generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
x, label = draw(6), torch.tensor(2)
W1, W2 = draw(5, 6).requires_grad_(), draw(3, 5).requires_grad_()

z1 = W1 @ x
a1 = F.gelu(z1)
z2 = W2 @ a1
F.cross_entropy(z2, label).backward()  # PyTorch's gradient

y = F.one_hot(label, 3)
slope = torch.autograd.functional.jacobian(F.gelu, z1.detach()).diagonal()
back2 = z2.softmax(0) - y  # eq. 3.8
back1 = (W2.T @ back2) * slope  # eq. 3.7
for name, mine, theirs in (("W2", torch.outer(back2, a1), W2.grad), ("W1", torch.outer(back1, x), W1.grad)):  # eq. 3.6
    print(f"{name}: largest difference {(mine - theirs).abs().max().item():.1e}")

# %% [markdown]
# ## The slopes of the activation functions
#
# Every layer multiplies what comes back by $\sigma'$. Where that is small, little reaches the layers below.
# (In [chapter 2](02_neural_networks.ipynb) each slope can be read off at any place, also for powers $\sigma(x)^n$, whose slope is
# $n\,\sigma(x)^{n-1}\sigma'(x)$.)

# %% tags=["remove-cell"]
def steepest(sigma):
    """The largest slope of an activation function on [-4, 4]."""
    x = torch.linspace(-4, 4, 801, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(ACTIVATIONS[sigma](x).sum(), x)[0].max().item()


fig = schematics.activations(derivative=True)
glue("fig-3-1", fig)
plt.close(fig)
glue("sigmoid-steepest", f"{steepest('sigmoid'):.2f}")
glue("gelu-steepest", f"{steepest('gelu'):.2f}")

# %% [markdown]
# ```{glue:figure} fig-3-1
# :name: fig-3-1
# :alt: Seven curves of derivatives for x from -4 to 4. The sigmoid's never exceeds a quarter, tanh peaks at one, the rectifiers are one for positive x, GeLU slightly exceeds one, rExp grows exponentially.
#
# Redrawn: the derivatives of the functions of figure 2.4, found by automatic differentiation.
# ```
#
# The sigmoid is never steeper than {glue:text}`sigmoid-steepest`: after a few layers hardly any gradient is left, and the
# network stops learning (*vanishing* gradients). The exponential errs in the other direction (*exploding* gradients).
# GeLU reaches {glue:text}`gelu-steepest`, a little above 1. The networks of this book have two layers, so neither extreme
# is a danger in training. But the slope returns in [chapter 7](07_robustness.ipynb) with its sign changed: an attacker
# follows the same gradient uphill, and where an activation function is flat the attacker, too, is left without
# direction.
