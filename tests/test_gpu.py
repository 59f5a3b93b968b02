"""The kernels of a GPU: on it where there is one, else in Triton's interpreter, and compiled for one that is not here."""

import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from khnb import attacks, costs_gpu, learning, models, native, sweeps, training
from khnb import heads as heads_module
from khnb.heads import Head, train_heads
from khnb.patches import chosen, scales
from khnb.settings import ConvSettings, HeadSettings

pytest.importorskip("triton", reason="Triton is not here: it comes with PyTorch for CUDA")
ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu():
    from khnb import kernels_gpu

    return kernels_gpu


@pytest.fixture
def served(gpu, monkeypatch):
    """The kernels instead of those of the CPU; returns how often each was called."""
    calls = {}
    for name in ("gather", "learn", "conv_pool", "spread", "filters_gradient", "activated", "classify"):

        def counted(*given, name=name, call=getattr(gpu, name), **more):
            calls[name] = calls.get(name, 0) + 1
            return call(*given, **more)

        monkeypatch.setattr(gpu, name, counted)
    monkeypatch.setattr(native, "gpu", lambda tensor: gpu)
    return calls


class TestRule:
    @pytest.mark.parametrize("kind", ["uint8", "float32"])
    @pytest.mark.parametrize(("w", "shape"), [(3, (2, 1, 7, 9)), (4, (3, 3, 8, 8))])
    def test_patches_and_their_norms(self, w, shape, kind, gpu):
        generator, orders = torch.Generator().manual_seed(0), [2.0, 3.0, 4.5]
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        images[0, :, :w, :w] = 0  # a black patch
        images = images if kind == "uint8" else images.float() / 255
        each = (shape[2] - w + 1) * (shape[3] - w + 1)
        ids = torch.randperm(shape[0] * each, generator=generator)[:40].view(2, 20)
        ids[1, 3] = 0
        rows, norms = gpu.gather(images.to(DEVICE), ids.to(DEVICE), w, torch.tensor(orders, device=DEVICE))
        expected = chosen(images, ids.flatten(), w).view(2, 20, -1)
        torch.testing.assert_close(rows.cpu(), expected, atol=0, rtol=1e-6)
        torch.testing.assert_close(norms.cpu(), torch.stack([scales(expected, p) for p in orders]), atol=0, rtol=1e-5)
        assert norms[:, 1, 3].eq(0).all()

    @pytest.mark.parametrize(("neurons", "values", "count"), [(4, 27, 5), (100, 48, 150), (130, 75, 33)])
    @pytest.mark.parametrize(("by_q", "by_max", "orders"), [(False, True, [2.0, 5.0]), (False, False, [2.0, 3.0, 4.5]), (True, True, [2.0, 3.0, 4.5]), (True, False, [2.0, 5.0])])
    def test_updates_and_wins(self, neurons, values, count, by_q, by_max, orders, gpu):
        generator = torch.Generator().manual_seed(0)
        which, m = [0, 1, len(orders) - 1], [2, 3, min(8, neurons)]
        p, delta, eta = torch.tensor([orders[i] for i in which]), torch.tensor([0.1, 0.4, 0.0]), torch.tensor([0.02, 0.01, 0.5])
        weight = torch.randn(3, neurons, values, generator=generator) + 0.2
        rows = torch.rand(2, count, values, generator=generator)
        rows[:, 0] = 0  # black: on a tie the lower index ranks higher
        norms = torch.stack([scales(rows, order) for order in orders])
        found, wins = weight.to(DEVICE, copy=True), torch.zeros(3, neurons, dtype=torch.int64, device=DEVICE)
        whole = torch.tensor([which, m], dtype=torch.int32)
        given = [x.to(DEVICE) for x in (rows, norms, whole[0], p, whole[1], delta, eta)]
        gpu.learn(found, wins, *given, by_q, by_max, 4.5 not in orders)
        expected, won, columns = weight.double(), torch.zeros(3, neurons, dtype=torch.int64), [x.double()[:, None, None] for x in (p, delta, eta)]
        for v, norm in zip(rows.double(), norms[which].double().unbind(1), strict=True):
            change, winner = learning._changes(expected, v, norm, m, columns[1], columns[0], by_q)
            expected = expected + columns[2] * change / (change.abs().amax((1, 2), keepdim=True) if by_max else count)
            won.scatter_add_(1, winner, torch.ones_like(winner))
        assert torch.equal(wins.cpu(), won)
        moved = (expected - weight.double()).abs().amax((1, 2), keepdim=True)
        assert ((found.cpu().double() - expected).abs() < 2e-5 * moved + 3e-7 * expected.abs()).all()

    @pytest.mark.parametrize("count", [0, 1, 33, 60])
    def test_each_update_is_made_once_and_in_order(self, count, gpu):
        """On a GPU with a graph of several, again and again."""
        given, found = torch.rand(2, count, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64, device=DEVICE)
        gpu._repeat(lambda a, b: found.mul_(0.9).addcmul_(a, b), *given.to(DEVICE))
        expected = sum((0.9 ** (count - 1 - i) * a * b for i, (a, b) in enumerate(zip(*given, strict=True))), torch.zeros(3))
        torch.testing.assert_close(found.cpu(), expected.double())

    def test_layers_in_lockstep_are_those_of_plain_pytorch(self, served, sample, monkeypatch):
        monkeypatch.setattr(native, "learns", lambda *given: False)
        settings = [
            ConvSettings(K=3, w=4, m=m, p=p, delta=delta, conv_epochs=2, conv_batch=60, conv_scale=scale, conv_rank=rank)
            for m, p, delta, scale, rank in [(2, 2, 0.1, "max", "activity"), (3, 3, 0.3, "max", "activity"), (2, 2, 0.2, "mean", "activity"), (3, 4, 0.1, "max", "Q")]
        ]
        images, found = sample.train_images[:2, :, :14, :14], []
        for kernels in (True, False):
            if not kernels:
                assert served["gather"] == 2 and served["learn"] == 3 * 2, "three stacks, two epochs, one chunk of four minibatches"
                monkeypatch.setattr(native, "gpu", lambda tensor: None)
            found.append(learning.train_layers(images, settings, DEVICE))
        for one, plain in zip(*found, strict=True):
            torch.testing.assert_close(one.weight, plain.weight, atol=1e-5, rtol=1e-4)
            assert torch.equal(one.wins, plain.wins) and one.stopped == plain.stopped == ""


class TestConvolution:
    @pytest.mark.parametrize(("channels", "side", "w", "filters", "q", "step"), [(1, 12, 4, 5, 3, 2), (3, 14, 4, 20, 5, 2), (2, 15, 7, 33, 1, 1), (3, 16, 8, 16, 9, 3)])
    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_pooled_activities_and_their_places(self, channels, side, w, filters, q, step, kind, gpu):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(3, channels, side, side, generator=generator)
        images[1, :, :8] = 0  # equal activities: the first counts
        weight = torch.rand(filters, channels, w, w, generator=generator) - 0.5
        bias = torch.rand(filters, generator=generator) if kind == "BP" else None
        scale = torch.rand(3, 1, side - w + 1, side - w + 1, generator=generator) + 0.5 if kind == "LL" else None
        given = [x if x is None else x.to(DEVICE) for x in (images, weight, bias, scale)]
        found, where = gpu.conv_pool(*given, [(q, step), (2, 2)], True)
        activity = F.conv2d(images.double(), weight.double(), None if bias is None else bias.double()) * (1 if scale is None else scale.double())
        for one, pool in zip(found, [(q, step), (2, 2)], strict=True):
            torch.testing.assert_close(one.cpu().double(), F.max_pool2d(activity, *pool), atol=1e-5, rtol=1e-5)
        expected = F.max_pool2d(activity.float(), q, step, return_indices=True)[1]
        assert where.dtype == torch.int64 and torch.equal(where.cpu(), expected)

    @pytest.mark.parametrize("w", [4, 12])
    def test_precision(self, w, gpu):
        """Each of the sums that tensor cores make, of 16 products at a time and three for each, can lose the last bit of what there is so far."""
        generator = torch.Generator().manual_seed(0)
        images, weight = torch.rand(2, 3, 20, 20, generator=generator), torch.rand(70, 3, w, w, generator=generator)
        (found,), _ = gpu.conv_pool(images.to(DEVICE), weight.to(DEVICE), None, None, [(1, 1)], False)
        exact = F.conv2d(images.double(), weight.double())
        off = ((found.cpu().double() - exact) / exact).abs()
        assert off.max() < 2**-23 * 3 * 3 * w * w / 16 and off.max() > 0

    def test_what_is_no_number_is_passed_on(self, gpu):
        images = torch.ones(1, 1, 8, 8, device=DEVICE)
        images[0, 0, 7, 7] = float("nan")
        (found,), _ = gpu.conv_pool(images, torch.ones(1, 1, 3, 3, device=DEVICE), None, None, [(2, 2)], False)
        assert found.isnan().sum() == 1 and found[0, 0, 2, 2].isnan()

    @pytest.mark.parametrize(("shape", "q", "step"), [((6, 50, 13, 13), 5, 2), ((1, 3, 8, 11), 4, 4), ((2, 33, 9, 9), 9, 1), ((2, 5, 9, 9), 3, 1)])
    def test_slopes_go_to_where_the_largest_activities_were(self, shape, q, step, gpu):
        generator = torch.Generator().manual_seed(0)
        activity = torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_()
        pooled, where = F.max_pool2d(activity, q, step, return_indices=True)
        slope = torch.rand(pooled.shape, generator=generator)
        pooled.backward(slope.double())
        for by_place in (False, True):
            found = gpu.spread(slope.to(DEVICE), where.to(DEVICE), shape[2:], (q, step), by_place).cpu().double()
            if by_place:
                assert found[..., shape[1] :].eq(0).all(), "of filters that are not there"
                found = found[..., : shape[1]].transpose(1, 2).reshape(shape)
            torch.testing.assert_close(found, activity.grad, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("channels", "side", "w", "filters", "count"), [(1, 12, 4, 5, 3), (3, 11, 7, 70, 2), (2, 9, 6, 64, 1)])
    @pytest.mark.parametrize("multiprocessors", [1, 4])
    @pytest.mark.parametrize("size", [1.0, 1e-20])
    def test_gradients_of_filters(self, channels, side, w, filters, count, multiprocessors, size, gpu, monkeypatch):
        monkeypatch.setattr(gpu, "_multiprocessors", lambda device: multiprocessors)
        generator, places = torch.Generator().manual_seed(0), side - w + 1
        images, slope = torch.rand(count, channels, side, side, generator=generator), size * (torch.rand(count, filters, places, places, generator=generator) - 0.5)
        by_place = F.pad(slope.flatten(2).transpose(1, 2), (0, -filters % 32)).contiguous()
        monkeypatch.setattr(gpu, "LARGEST", 2 * by_place[0].numel() if count == 3 else gpu.LARGEST)  # two images and one
        found = gpu.filters_gradient(images.to(DEVICE), by_place.to(DEVICE), w, slope.to(DEVICE), (1, 1)).cpu().double()
        expected = torch.nn.grad.conv2d_weight(images.double(), (filters, channels, w, w), slope.double())
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)

    def test_slopes_of_many_windows_come_together(self, gpu):
        """At the place in the middle of all of them: more than half precision could hold, were the sum not allowed for."""
        images, slope = torch.rand(1, 1, 36, 36, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 34 * 34, 32)
        slope[0, 16 * 34 + 16, 0] = 1.9 * 18 * 18
        found = gpu.filters_gradient(images.to(DEVICE), slope.to(DEVICE), 3, torch.full((1, 1, 18, 18), 1.9, device=DEVICE), (17, 1)).cpu()
        torch.testing.assert_close(found, 1.9 * 18 * 18 * images[:, :, 16:19, 16:19], rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("w", "filters"), [(4, 130), (6, 130), (4, 3)])
    def test_gradients_of_images(self, w, filters, gpu):
        weight, slope = torch.rand(filters, 2, w, w), torch.rand(3, filters, 11 - w, 12 - w)
        found = gpu.images_gradient(weight.to(DEVICE), slope.to(DEVICE), (3, 2, 10, 11)).cpu().double()
        torch.testing.assert_close(found, torch.nn.grad.conv2d_input((3, 2, 10, 11), weight.double(), slope.double()), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("p", [None, 3])
    def test_logits_and_gradients_are_those_of_plain_pytorch(self, p, served, sample, monkeypatch):
        """Of which the exact ones are known by computing in double precision."""
        monkeypatch.setattr(native, "convolves", lambda *given: False)
        images, labels, head, found = sample.test_images[:2].float() / 255, sample.test_labels[:2], HeadSettings(sigma="elu", n=2, w_pool=9), []
        weight = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for way in ("kernels", "plain", "exact"):
            if way == "plain":
                assert served == dict(conv_pool=2, activated=3) | (dict(spread=2, filters_gradient=1) if p is None else dict(spread=1))
                monkeypatch.setattr(native, "gpu", lambda tensor: None)
            model = (models.bp_network(3, 8, head, 3, 32, 10) if p is None else models.ll_network(weight, p, head, 32, 10)).to(DEVICE)
            model, x = (model.double(), images.double()) if way == "exact" else (model, images)
            x = x.to(DEVICE, copy=True).requires_grad_()
            F.cross_entropy(model(x), labels.to(DEVICE)).backward()
            found.append([model(x).detach(), x.grad, *(each.grad for each in model.parameters())])
        for one, plain, exact in zip(*found, strict=True):
            # tensor cores add up less carefully (see kernels_gpu); gradients of an LL model are differences of much larger numbers
            assert (one - exact).norm() < 10 * (plain - exact).norm() + 2e-6 * exact.norm()


class TestTerms:
    def test_their_products_are_as_precise_as_those_of_float32(self, gpu):
        """In sums of as many as there are weights, of the upper 10 bits of each term, which is what tensor cores take; the interpreter takes all bits."""
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(1000, 432, generator=generator), torch.rand(432, generator=generator)
        terms = [gpu._in_terms(each.to(DEVICE)).cpu() for each in (x, y)]
        for (high, low), each in zip(terms, (x, y), strict=True):
            assert torch.equal(high + low, each) and (high.view(torch.int32) & 0x1FFF).eq(0).all() and (low.abs() <= high.abs() * 2**-11).all()
        (a, a_low), (b, b_low) = ([(term.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for term in pair] for pair in terms)
        exact, single = x.double() @ y.double(), torch.zeros(1000)
        for column, weight in zip(x.T, y, strict=True):
            single += column * weight
        assert (a @ b + a @ b_low + a_low @ b - exact).abs().mean() < (single - exact).abs().mean() / 2
        assert (a @ b - exact).abs().mean() > 100 * (single - exact).abs().mean(), "one product would not do"

    def test_what_is_no_number(self, gpu):
        high, low = gpu._in_terms(torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], device=DEVICE)).cpu()
        assert not (high + low)[:3].isfinite().any() and (high + low)[3:].eq(0).all()


class TestActivation:
    @pytest.mark.parametrize("n", [1, 2, 5, 16, 1.5])
    @pytest.mark.parametrize("sigma", models.ACTIVATIONS)
    def test_values_and_slopes(self, sigma, n, served):
        """To within the rounding of n factors; GeLU and the slope of tanh take a difference that is near 0 where x is far from it, in PyTorch as well."""
        x = torch.cat([torch.linspace(-3, 3, 2001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, 1e-4, -1e-4])])
        slope, here, exact = torch.linspace(-1, 1, len(x)), x.to(DEVICE, copy=True).requires_grad_(), x.double().requires_grad_()
        found, expected = models.activate(here, sigma, n), models.ACTIVATIONS[sigma](exact) ** n
        found.backward(slope.to(DEVICE)), expected.backward(slope.double())
        assert served == dict(activated=2)
        close = dict(rtol=3e-4 if sigma in ("gelu", "tanh") else 1e-5, atol=1e-37, equal_nan=True)  # smaller ones vanish
        torch.testing.assert_close(found.detach().cpu().double(), expected.detach(), **close)
        torch.testing.assert_close(here.grad.cpu().double(), exact.grad, **close | dict(atol=1e-6))

    def test_shapes(self, served):
        for shape in ((0,), (), (3, 1, 5), (1025,)):
            x = torch.rand(shape)
            torch.testing.assert_close(models.activate(x.to(DEVICE), "relu", 3).cpu(), x**3)
        x = torch.rand(4, 6).T
        torch.testing.assert_close(models.activate(x.to(DEVICE), "elu", 2).cpu(), x**2)


class TestClassifiers:
    @pytest.mark.parametrize(
        ("count", "features", "classes", "each", "sigma", "kept", "powers"),
        [
            (1, 20, 10, 1, "", torch.float32, [1, 2, 5, 16, 1.5]), (70, 300, 10, 3, "elu", torch.float16, [2, 4, 12]), (33, 4500, 3, 1, "gelu", torch.bfloat16, [4, 1]),
            (130, 40, 10, 9, "relu", torch.float16, [3, 2.5]),
        ],
    )
    def test_gradients_loss_and_hits(self, count, features, classes, each, sigma, kept, powers, gpu):
        generator, heads = torch.Generator().manual_seed(0), each * len(powers)
        x, rows = (torch.rand(count + 5, features, generator=generator) * 1.5).to(kept), torch.randint(0, count + 5, (count,), generator=generator)
        x[:, 3] = 0
        weight, bias = torch.rand(heads, classes, features, generator=generator) / features, torch.rand(heads, classes, generator=generator)
        labels, n = torch.randint(0, classes, (count,), generator=generator), torch.tensor(powers, dtype=torch.float64).repeat_interleave(each)
        learned = [each.double().requires_grad_() for each in (weight, bias)]
        y = models.ACTIVATIONS[sigma](x[rows].double()) if sigma else x[rows].double()
        said = torch.einsum("bhd,hcd->bhc", y[:, None] ** n[:, None], learned[0]) + learned[1]
        loss = F.cross_entropy(said.flatten(0, 1), labels.repeat_interleave(heads), reduction="none").view(count, heads).sum(0)
        (loss.sum() / 7).backward()
        here, sums = [each.to(DEVICE) for each in (weight, bias)], heads_module._Sums.zero(weight.to(DEVICE))
        for name in ("weight", "bias", "loss", "right"):
            getattr(sums, name).fill_(1)  # they are added to
        gpu.classify(x.to(DEVICE), rows.to(DEVICE), sigma, powers, labels.to(DEVICE), 1 / 7, *here, sums)
        for name, expected in zip(("weight", "bias", "loss"), (learned[0].grad, learned[1].grad, loss.detach()), strict=True):
            torch.testing.assert_close(getattr(sums, name).cpu().double() - 1, expected, atol=2e-6 * max(1, expected.abs().max().item()), rtol=1e-4)
        assert torch.equal(sums.right.cpu() - 1, (said.argmax(2) == labels[:, None]).sum(0))

    def test_powers_of_negative_features(self, gpu):
        y, label, powers = torch.tensor([[-0.5], [-2.0], [0.0], [3.0]]), torch.zeros(1, dtype=torch.int64, device=DEVICE), [1, 2, 3, 1.5]
        for i, x in enumerate(y.flatten()):
            weight = torch.tensor([[[1.0], [0.0]]] * 4, device=DEVICE)
            sums = heads_module._Sums.zero(weight)
            gpu.classify(y.to(DEVICE), label + i, "", powers, label, 1.0, weight, torch.zeros(4, 2, device=DEVICE), sums)
            a = x.double() ** torch.tensor(powers).double()
            torch.testing.assert_close(sums.loss.cpu(), F.softplus(-a), equal_nan=True, rtol=1e-5, atol=1e-7)
            assert sums.loss.isnan().tolist() == [False, False, False, x < 0]

    @pytest.mark.parametrize(
        ("dtype", "memory", "parts"), [(torch.float32, 2**32, 1), (torch.float16, 2**32, 1), (torch.float32, 30 * 9 * 81 * 4, 1), (torch.float32, 30 * 9 * 81 * 4, 3)]
    )
    def test_heads_are_those_of_plain_pytorch(self, dtype, memory, parts, served, sample, monkeypatch):
        monkeypatch.setattr(native, "classifies", lambda weight: False)
        monkeypatch.setattr(heads_module, "PART" if DEVICE == "cpu" else "DEVICE_PART", 9 * 81 * 4 * (20 if parts == 1 else 7))  # images of a part
        monkeypatch.setattr(native, "_convolver", lambda *given: native._plain)  # the same features, to the last bit: half precision would make much of it
        weight = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        settings = [
            HeadSettings(sigma=sigma, n=n, w_pool=9, head_epochs=2, head_batch=20, seed=seed)
            for sigma, n, seed in [("relu", 1, 0), ("relu", 1, 1), ("relu", 3, 0), ("relu", 2.5, 1), ("elu", 4, 0), ("elu", 4, 1)]
        ]
        found = []
        for kernels in (True, False):
            if not kernels:
                assert served["classify"] == 3 * 2 * 2 * parts, "two powers with one of ReLU and one with two, one of ELU; two epochs, two minibatches"
                monkeypatch.setattr(native, "gpu", lambda tensor: None)
            heads = [Head(models.ll_network(weight, 3, each, 32, 10).to(DEVICE).eval()) for each in settings]
            train_heads(heads, sample.train_images[:40], sample.train_labels[:40], dtype, memory)
            found.append(heads)
        for one, plain in zip(*found, strict=True):
            assert [row["accuracy"] for row in one.history] == [row["accuracy"] for row in plain.history]
            torch.testing.assert_close([row["loss"] for row in one.history], [row["loss"] for row in plain.history], rtol=1e-5, atol=0)
            torch.testing.assert_close(one.network.linear.weight, plain.network.linear.weight, atol=1e-5, rtol=1e-4)


KERNELS = ("_gather", "_rank", "_change", "_total", "_step", "_convolve", "_pool", "_size", "_pack", "_spread", "_filters", "_activated", "_split", "_logits", "_judge", "_gradient")
CACHED = ("images", "bias")  # far smaller than what is made of it


class Counted(TorchDispatchMode):
    """Launches, and bytes read and written, of what PyTorch does on tensors; of the kernels as well, when they are called through :meth:`through`."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def through(self, kernel):
        """The kernel, counted: each tensor it is given once, what is read and written twice, but what stays in the cache."""

        class Through:
            def __getitem__(_, grid):
                def launch(*given, **constants):
                    with _disable_current_modes():  # the interpreter copies tensors about
                        kernel[grid](*given, **constants)
                    self.launches += 1
                    named = {name: x for name, x in zip(kernel.arg_names, given, strict=False) if isinstance(x, torch.Tensor)}
                    both = dict(_step=("weight",), _judge=("dbias", "loss", "right"), _gradient=("to",)).get(kernel.fn.__name__, ())
                    seen = {x.data_ptr(): 0 if name in CACHED else _bytes(x) for name, x in reversed(named.items())}  # what is not there is an earlier one again
                    if "rows" in named and "features" in named:
                        seen[named["features"].data_ptr()] *= len(named["rows"]) / len(named["features"])
                    self.bytes += sum(seen.values()) + sum(_bytes(named[name]) for name in both)

                return launch

        return Through()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        into, outof = ([x for x in tree_leaves(each) if isinstance(x, torch.Tensor)] for each in ((args, kwargs), out))
        if func.is_view or func.namespace == "profiler" or name in ("empty", "empty_like", "new_empty", "_local_scalar_dense", "_unsafe_view", "detach", "lift_fresh"):
            return out
        self.launches += 1
        if name == "max_pool2d_with_indices_backward":
            into = [into[0], into[2]]  # the activities are not looked at
        read = sum({(x.data_ptr(), x.shape): _bytes(x) for x in into}.values())
        if "scatter" in name or name.startswith("index_put") or name.startswith("zero") or name.startswith("ones") or name.startswith("new_"):
            read = sum(map(_bytes, into[1:]))
            self.bytes += read + (2 * min(map(_bytes, into[1:])) if read else _bytes(outof[0]))  # of the whole only what is written to
        elif name == "_fused_adamw_":
            self.bytes += read * 7 / 4  # three of the four are written as well
        elif name in ("index", "index_select", "gather"):
            self.bytes += sum(map(_bytes, into[1:])) + 2 * _bytes(outof[0])
        else:
            self.bytes += read + sum(map(_bytes, outof))
        return out


def _bytes(x: torch.Tensor) -> int:
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


@pytest.mark.slow
class TestCosts:
    """What :mod:`khnb.costs_gpu` says is what the code does on one, counted where the kernels are interpreted: small groups, and what a further epoch or image adds."""

    @pytest.fixture
    def count(self, gpu, monkeypatch):
        monkeypatch.setattr(native, "gpu", lambda tensor: gpu)
        for name in ("learns", "convolves", "classifies"):
            monkeypatch.setattr(native, name, lambda *given: False)
        monkeypatch.setattr(heads_module, "PART", 2**30)
        monkeypatch.setattr(training, "part_size", lambda model, images: 1000)
        monkeypatch.setattr(torch.optim, "AdamW", lambda *given, fused, AdamW=torch.optim.AdamW, **more: AdamW(*given, fused=True, **more))

        def counted(do):
            with pytest.MonkeyPatch.context() as patch, Counted() as found:
                for name in KERNELS:
                    patch.setattr(gpu, name, found.through(getattr(gpu, name)))
                do()
            return found

        return counted

    def near(self, told, counted):
        assert 1 / 1.2 < told / counted < 1.2, (told, counted)

    def agree(self, found, less, more, fewer, graphs=1):
        """What was counted with more of something and with less, and what is told of both; ``graphs``: of how many launches one counts."""
        self.near(more.moved - fewer.moved, found.bytes - less.bytes)
        self.near(graphs * (more.launches - fewer.launches), found.launches - less.launches)

    def images(self, monkeypatch, train, test=0):
        monkeypatch.setitem(sweeps.IMAGES, "cifar10-sample", dict(train=train, test=test))

    @pytest.mark.parametrize("orders", [[2.0], [2.0, 3.0, 4.0]])
    def test_layers(self, orders, sample, count, monkeypatch):
        """Of minibatches too small to be summed in parts; such parts stay in the cache."""
        convs, found, told = [ConvSettings(K=10, w=4, m=m, p=p, conv_epochs=1, conv_batch=120) for m in (2, 3) for p in orders], [], []
        for images in (2, 1):
            self.images(monkeypatch, images)
            found.append(count(lambda images=images: learning.train_layers(sample.train_images[:images], convs)))
            told.append(costs_gpu.of(sweeps.Group("layers", "cifar10-sample", dict(convs=[conv.dict() for conv in convs]))))
        self.agree(*found, *told, graphs=10)

    @pytest.mark.parametrize(("what", "powers"), [("images", (1, 2, 2)), ("minibatches", (1, 2))])
    def test_classifiers(self, what, powers, sample, count, monkeypatch):
        """What a further epoch takes; of many images in one minibatch less that of few, which leaves what is done for images alone."""
        conv, weight, whole = ConvSettings(K=3, w=8), torch.rand(9, 3, 8, 8), []
        for images in (40, 16) if what == "images" else (16,):
            self.images(monkeypatch, images)
            found, told = [], []
            for epochs in (2, 1):
                given = dict(w_pool=11, head_epochs=epochs, head_batch=images if what == "images" else 8)
                heads = [HeadSettings(sigma=sigma, n=n, seed=seed, **given) for sigma in ("relu", "elu") for seed, n in enumerate(powers)]
                ready = [Head(models.ll_network(weight, conv.p, head, 32, 10).eval()) for head in heads]
                found.append(count(lambda ready=ready, images=images: train_heads(ready, sample.train_images[:images], sample.train_labels[:images], torch.float16)))
                told.append(costs_gpu.of(sweeps.Group("heads", "cifar10-sample", dict(conv=conv.dict(), heads=[head.dict() for head in heads], feature_dtype="float16"))))
            whole.append((told[0].moved - told[1].moved, found[0].bytes - found[1].bytes))
            if what == "minibatches":
                self.agree(*found, *told)
        if what == "images":
            self.near(*(more - fewer for more, fewer in zip(*whole, strict=True)))

    @pytest.mark.parametrize("what", ["bytes of images", "launches of minibatches"])
    def test_bp_models(self, what, sample, count, monkeypatch):
        head, found, told = HeadSettings(sigma="elu", n=4, w_pool=9, head_epochs=1, head_batch=2 if what.startswith("launches") else 1000), [], []
        for images in (4, 2):
            self.images(monkeypatch, images)
            model = models.bp_network(8, 8, head, 3, 32, 10)
            found.append(count(lambda model=model, images=images: training.train(model, sample.train_images[:images], sample.train_labels[:images])))
            told.append(costs_gpu.of(sweeps.Group("bp", "cifar10-sample", dict(models=[dict(K=8, w=8, head=head.dict())]))))
        name, theirs = ("bytes", "moved") if what.startswith("bytes") else ("launches", "launches")
        self.near(*(getattr(more, key) - getattr(less, key) for (more, less), key in ((told, theirs), (found, name))))

    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_attacks(self, kind, sample, count, monkeypatch):
        head = HeadSettings(sigma="elu", n=4, w_pool=9)
        model = (models.ll_network(torch.rand(64, 3, 8, 8), 3, head, 32, 10) if kind == "LL" else models.bp_network(8, 8, head, 3, 32, 10)).eval().requires_grad_(False)
        described = dict(K=8, w=8, head=head.dict()) if kind == "BP" else dict(conv=ConvSettings(K=8, w=8).dict(), head=head.dict())
        for forwards, gradients, do in ((1, 0, lambda x, y: model(x)), (0, 1, lambda x, y: attacks.gradient(model, x, y))):
            monkeypatch.setattr(costs_gpu, "looks", lambda *given, found=(forwards, gradients): found)
            found, told = [], []
            for images in (2, 1):
                self.images(monkeypatch, 0, images)
                x, y = sample.test_images[:images].float() / 255, sample.test_labels[:images]
                with torch.no_grad():
                    found.append(count(lambda x=x, y=y, do=do: do(x, y)))
                told.append(costs_gpu.of(sweeps.Group("attacks", "cifar10-sample", dict(models=[described], attacks=[[]], audited=0))))
            self.near(told[0].moved - told[1].moved, found[0].bytes - found[1].bytes)
            assert found[1].launches <= told[1].launches * 1000, "what an attack does around it comes on top"


def test_where_they_serve(gpu):
    assert native.gpu(torch.ones(2)) is None and native.gpu(torch.ones(2, device="meta")) is None
    if DEVICE == "cuda":
        assert native.gpu(torch.ones(2, device="cuda")) is gpu and native.gpu(torch.ones(2, device="cuda", dtype=torch.float64)) is None


def test_they_compile_for_a_gpu_that_is_not_here():
    """For compute capability 9.0, in another process, as here Triton interprets: with products on tensor cores, and hardly any memory in place of registers (what there is was faster than without, where it was tried)."""
    code = """
        import os, re, subprocess, tempfile
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from khnb import kernels_gpu as k

        KINDS = dict(whole="*i32", numbers="i32", long="*i64", bytes="*u8", half="*fp16", double="*fp64", single="fp32")
        TOOL = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")

        def made(kernel, products=None, num_warps=4, num_stages=3, **constants):
            kinds = {name: (kind, constants.pop(name).split()) for name, kind in KINDS.items() if name in constants}
            names = [name for name in kernel.arg_names if name not in constants]
            types = {name: next((kind for kind, some in kinds.values() if name in some), "*fp32") for name in names}
            aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if types.get(name, "").startswith("*")}
            source = ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
            assert compiled.metadata.shared <= 227 * 1024, compiled.metadata.shared
            ptx = compiled.asm["ptx"]
            assert ("mma" in ptx) == (products is not None) and (products is None or products in ptx), kernel.__name__
            with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                file.write(compiled.asm["cubin"]), file.flush()
                used = subprocess.run([TOOL, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
            assert int(re.search("STACK:(\\\\d+)", used)[1]) <= 560 and "LOCAL:0 " in used, (kernel.__name__, used)
            print(kernel.__name__)

        for name in ("sigmoid", "tanh", "relu", "prelu", "elu", "gelu", "rexp"):
            made(k._activated, numbers="n count", NAME=name, WHOLE=True, BACK=True, BN=1024)
        made(k._split, numbers="count", BN=1024)
        made(k._gather, numbers="N C H W w", long="ids", bytes="images", BYTES=True, BN=32, BD=64)
        for neurons in (128, 256, 512):
            made(k._rank, "tf32", whole="m winner inhibited", numbers="N F D", long="wins", BF=neurons, **k.RANK[max(256, neurons)])
        for parts in (1, 8):
            made(k._change, "tf32", whole="which winner inhibited", numbers="apart layers N F D each", PARTS=parts, BN=32, BF=64, BD=64)
        made(k._total, numbers="layers size", PARTS=8, BN=1024)
        made(k._step, numbers="N F D", MOVES=True, BY_MAX=True, BY_Q=True, WHOLE=True, BF=4, BD=64)
        made(k._size, whole="out", numbers="count", BN=4096)
        made(k._pack, whole="size out rest", numbers="count", PACKED=True, BN=1024)
        made(k._pack, whole="size", half="out rest", numbers="count", PACKED=False, BN=1024)
        image = dict(C=3, H=32, W=32)
        for w, deep, kind in ((4, 64, dict(BIASED=True, SCALED=False)), (8, 192, dict(BIASED=False, SCALED=True)), (12, 432, dict(BIASED=True, SCALED=False))):
            made(
                k._convolve, "f16", whole="images of_images of_weight", half="high low", numbers="total filters", w=w, DEEP=deep, WIDE=416,
                **image, **kind, **k.CONVOLVE[3 * w * w <= 64],
            )
            made(k._pool, long="where", numbers="blocks filters", WIDE=416, side=33 - w, across=33 - w, q=9, step=2, PLACES=w == 4, **k.POOL)
            made(k._filters, "f16", whole="images of_images of_slope", numbers="total filters each", WIDE=416, w=w, TO=9, **image, **k.FILTERS)
        numbers = "blocks filters maps programs items place_apart filter_apart"
        made(k._spread, long="where", numbers=numbers, PLACES=841, HIGH=11, WIDE=11, APART=5, BM=32, BO=16, BN=32, num_warps=8)
        for powers, wide in (((4, 6, 8, 10, 12, 2, 16), 16), ((4, 6, 8, 10), 32), ((4, 12), 64)):
            shared = dict(long="rows", half="features", NAME="gelu", POWERS=powers, BC=wide)
            made(k._logits, "tf32", numbers="count D columns width each", BB=128, BD=16, num_warps=8, **shared)
            made(k._gradient, "tf32", numbers="count deep D columns", BB=32, BD=64, **shared)
        made(k._logits, "tf32", numbers="count D columns width each", long="rows", NAME="", POWERS=(2, 1.5), BB=128, BD=16, BC=64, num_warps=8)
        made(k._judge, numbers="count deep heads classes", long="labels right", double="loss", single="share", BB=512, BC=16, num_warps=16)
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 37


def test_the_benchmark_runs():
    """On the CPU, at tiny shapes: to be ready where there is a GPU."""
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^\| (?:50 layers|126 classifiers|BP model|(?:LL|BP) (?:forward|gradient)), K=10.*, w=4 \|", done.stdout, re.M)) == 7
