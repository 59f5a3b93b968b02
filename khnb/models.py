"""The one architecture of fig. 6.1, and the activation functions of section 2.4."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from khnb import native
from khnb.layer import KHConv2d
from khnb.settings import PRELU_SLOPE, HeadSettings, check_geometry

#: eqs. 2.4-2.10 by name; ELU with alpha = 1
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "prelu": lambda x: F.leaky_relu(x, PRELU_SLOPE),
    "elu": F.elu,
    "gelu": F.gelu,
    "rexp": lambda x: torch.expm1(torch.relu(x)),  # its slope at 0 is 0, which that of a clamp is in some versions of PyTorch only
}


def _whole_power(x: Tensor, n: int) -> Tensor:
    """x^n by repeated squaring: several times faster than the library's power."""
    result = None
    while n:
        if n & 1:
            result = x if result is None else result * x
        n >>= 1
        x = x * x if n else x
    return torch.ones_like(x) if result is None else result


class _Power(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, n):
        ctx.save_for_backward(x)
        ctx.n = n
        return _whole_power(x, n)

    @staticmethod
    def backward(ctx, grad):
        return _whole_power(ctx.saved_tensors[0], ctx.n - 1) * ctx.n * grad, None


def power(y: Tensor, n: float) -> Tensor:
    """y^n, element by element; a broken n wants y >= 0."""
    if n == 1:
        return y
    # on a GPU it is the traffic that counts, and the library's power takes one pass
    return _Power.apply(y, int(n)) if n == int(n) and y.device.type == "cpu" else y.pow(n)


class _Activated(torch.autograd.Function):
    """Both functions in one pass, and their gradients in another."""

    @staticmethod
    def forward(ctx, x, sigma, n, activator):
        ctx.save_for_backward(x)
        ctx.of = activator, sigma, n
        return activator(x, sigma, n)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        (activator, *of), (x,) = ctx.of, ctx.saved_tensors
        return activator(x, *of, slope.contiguous()), None, None, None


def activate(x: Tensor, sigma: str, n: float) -> Tensor:
    """sigma(x)^n, element by element (chapter 6), differentiable once. x : float tensor of any shape; dtype kept."""
    activator = native.activator(x, sigma, n)
    return _Activated.apply(x.contiguous(), sigma, n, activator) if activator else power(ACTIVATIONS[sigma](x), n)


class Network(nn.Module):
    """Convolution -> max-pooling -> sigma(.)^n -> flatten -> linear classifier (fig. 6.1); ``pooling="last"`` swaps the middle two.

    ``conv`` is a :class:`~khnb.layer.KHConv2d` in an LL model and a plain ``Conv2d``, without patch normalisation, in its
    BP twin. Images (B, C, H, W), float in [0, 1] -> logits (B, classes); softmax is left to the loss.
    """

    def __init__(self, conv: nn.Module, linear: nn.Linear, head: HeadSettings):
        super().__init__()
        self.conv, self.linear, self.head = conv, linear, head

    def pool(self, images: Tensor) -> Tensor:
        """Max-pooled activities, before the activation function unless pooling comes last: (B, F, P, P)."""
        if self.head.pooling == "last":
            activity = activate(self.conv(images), self.head.sigma, self.head.n)
            return F.max_pool2d(activity, self.head.w_pool, self.head.s_pool)
        pool = self.head.w_pool, self.head.s_pool
        if isinstance(self.conv, KHConv2d):
            kernel, norms = self.conv.parts(images)
            return native.conv_pool(images, kernel, None, *pool, scale=1 / norms)
        return native.conv_pool(images, self.conv.weight, self.conv.bias, *pool)

    def classify(self, pooled: Tensor) -> Tensor:
        """Logits (B, classes) from what :meth:`pool` gives, (B, F, P, P) or flattened."""
        if self.head.pooling == "first":
            pooled = activate(pooled, self.head.sigma, self.head.n)
        return self.linear(pooled.flatten(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.pool(images))


def n_features(filters: int, side: int, w: int, head: HeadSettings) -> int:
    """Number of inputs of the classifier for ``side`` x ``side`` images."""
    out = check_geometry(side, w, head.w_pool)
    return filters * ((out - head.w_pool) // head.s_pool + 1) ** 2


def _linear(features: int, classes: int, head: HeadSettings, generator: torch.Generator) -> nn.Linear:
    """A classifier as ``head_init`` and ``head_bias`` say, drawn from the seed alone. Without a bias it has one that stays zero."""
    linear = _uniform(nn.Linear(features, classes), features, generator)
    with torch.no_grad():
        linear.weight *= dict(uniform=1, he=6**0.5, zeros=0)[head.head_init]
        linear.bias *= head.head_init == "uniform" and head.head_bias == "yes"
    linear.bias.requires_grad_(head.head_bias == "yes")
    return linear


def _uniform(module, fan_in, generator):
    """Weights and bias from U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    with torch.no_grad():
        for parameter in (module.weight, module.bias):
            drawn = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * drawn - 1) / fan_in**0.5)
    return module


def ll_network(weight: Tensor, p: float, head: HeadSettings, side: int, classes: int) -> Network:
    """An LL model with the given filters (F, C, w, w) and an untrained classifier."""
    generator = torch.Generator().manual_seed(head.seed)
    features = n_features(len(weight), side, weight.shape[-1], head)
    return Network(KHConv2d(weight, p), _linear(features, classes, head, generator), head)


def bp_network(K: int, w: int, head: HeadSettings, channels: int, side: int, classes: int) -> Network:
    """The untrained BP twin: K^2 filters of a plain convolution with bias.

    The thesis's initialisation, U(-sqrt k, sqrt k), can only be meant with k = 1/fan_in; that is what is drawn.
    """
    generator = torch.Generator().manual_seed(head.seed)
    conv = _uniform(nn.Conv2d(channels, K * K, w), channels * w * w, generator)
    return Network(conv, _linear(n_features(K * K, side, w, head), classes, head, generator), head)
