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

from khnb import attacks, costs, learning, models, native, sweeps, training
from khnb import heads as heads_module
from khnb.heads import Head, train_heads
from khnb.patches import scales
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
    for name in ("changes", "conv_pool", "filters_gradient", "logits", "gradients"):

        def counted(*given, name=name, call=getattr(gpu, name)):
            calls[name] = calls.get(name, 0) + 1
            return call(*given)

        monkeypatch.setattr(gpu, name, counted)
    monkeypatch.setattr(native, "gpu", lambda tensor: gpu)
    return calls


class TestRule:
    @pytest.mark.parametrize(("neurons", "values", "count"), [(4, 27, 5), (100, 48, 150), (130, 75, 33)])
    @pytest.mark.parametrize("by_q", [False, True])
    def test_changes_and_winners(self, neurons, values, count, by_q, gpu):
        generator = torch.Generator().manual_seed(0)
        p = torch.tensor([2.0, 3.0, 4.5])[:, None, None]
        m, delta = [2, 3, min(8, neurons)], torch.tensor([0.1, 0.4, 0.0])[:, None, None]
        weight = torch.randn(3, neurons, values, generator=generator) + 0.2
        v = torch.rand(count, values, generator=generator)
        v[0] = 0  # black: on a tie the lower index ranks higher
        each = torch.stack([scales(v, order) for order in p.flatten().tolist()])
        sizes = learning._sizes(weight, p) if by_q else torch.ones(3, neurons)
        moved = [x.to(DEVICE).contiguous() for x in (weight, learning.synapses(weight, p), sizes, v, each, torch.tensor(m, dtype=torch.int32), delta.flatten())]
        found, winner = (x.cpu() for x in gpu.changes(*moved))
        expected, won = learning._changes(weight.double(), v.double(), each.double(), m, delta.double(), p.double(), by_q)
        assert torch.equal(winner, won)
        torch.testing.assert_close(found.double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)

    def test_layers_in_lockstep_are_those_of_plain_pytorch(self, served, sample, monkeypatch):
        monkeypatch.setattr(native, "learns", lambda *given: False)
        settings = [
            ConvSettings(K=3, w=4, m=m, p=p, delta=delta, conv_epochs=2, conv_batch=60, conv_scale=scale, conv_rank=rank)
            for m, p, delta, scale, rank in [(2, 2, 0.1, "max", "activity"), (3, 3, 0.3, "max", "activity"), (2, 2, 0.2, "mean", "activity"), (3, 4, 0.1, "max", "Q")]
        ]
        images, found = sample.train_images[:2, :, :14, :14], []
        for kernels in (True, False):
            if not kernels:
                assert served["changes"] == 3 * 2 * 4, "three stacks, two epochs, four minibatches"
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

    def test_what_is_no_number_is_passed_on(self, gpu):
        images = torch.ones(1, 1, 8, 8, device=DEVICE)
        images[0, 0, 7, 7] = float("nan")
        (found,), _ = gpu.conv_pool(images, torch.ones(1, 1, 3, 3, device=DEVICE), None, None, [(2, 2)], False)
        assert found.isnan().sum() == 1 and found[0, 0, 2, 2].isnan()

    @pytest.mark.parametrize(("channels", "side", "w", "filters", "count"), [(1, 12, 4, 5, 3), (3, 11, 7, 70, 2), (2, 9, 6, 64, 1)])
    @pytest.mark.parametrize("multiprocessors", [1, 4])
    def test_gradients_of_filters(self, channels, side, w, filters, count, multiprocessors, gpu, monkeypatch):
        monkeypatch.setattr(gpu, "_multiprocessors", lambda device: multiprocessors)
        generator = torch.Generator().manual_seed(0)
        images, slope = torch.rand(count, channels, side, side, generator=generator), torch.rand(count, filters, side - w + 1, side - w + 1, generator=generator) - 0.5
        found = gpu.filters_gradient(images.to(DEVICE), slope.to(DEVICE), w).cpu().double()
        expected = torch.nn.grad.conv2d_weight(images.double(), (filters, channels, w, w), slope.double())
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)

    @pytest.mark.parametrize("p", [None, 3])
    def test_logits_and_gradients_are_those_of_plain_pytorch(self, p, served, sample, monkeypatch):
        monkeypatch.setattr(native, "convolves", lambda *given: False)
        images, labels, head, found = sample.test_images[:2].float() / 255, sample.test_labels[:2], HeadSettings(sigma="elu", n=2, w_pool=9), []
        weight = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        for kernels in (True, False):
            if not kernels:
                assert served == dict(conv_pool=2) | (dict(filters_gradient=1) if p is None else {})
                monkeypatch.setattr(native, "gpu", lambda tensor: None)
            model = (models.bp_network(3, 8, head, 3, 32, 10) if p is None else models.ll_network(weight, p, head, 32, 10)).to(DEVICE)
            x = images.to(DEVICE).requires_grad_()
            F.cross_entropy(model(x), labels.to(DEVICE)).backward()
            found.append([model(x).detach(), x.grad, *(each.grad for each in model.parameters())])
        for one, plain in zip(*found, strict=True):
            torch.testing.assert_close(one, plain, atol=1e-5 * max(1, plain.abs().max().item()), rtol=1e-4)


class TestClassifiers:
    @pytest.mark.parametrize(("count", "features", "classes"), [(1, 20, 10), (70, 300, 10), (33, 4500, 3)])
    def test_logits_and_gradients(self, count, features, classes, gpu):
        generator = torch.Generator().manual_seed(0)
        powers = torch.tensor([1.0, 2.0, 5.0, 16.0, 1.5])
        y = torch.rand(count, features, generator=generator)
        y[:, 3] = 0
        weight = torch.rand(len(powers), classes, features, generator=generator) - 0.5
        slope = torch.rand(count, len(powers), classes, generator=generator) - 0.5
        a = y.double()[:, None] ** powers.double()[:, None]  # B, heads, D
        found = gpu.logits(*(x.to(DEVICE) for x in (y, powers, weight))).cpu().double()
        expected = torch.einsum("bhd,hcd->bhc", a, weight.double())
        torch.testing.assert_close(found, expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)
        to = torch.ones(weight.shape, device=DEVICE)
        gpu.gradients(*(x.to(DEVICE) for x in (y, powers, slope)), to)
        expected = torch.einsum("bhc,bhd->hcd", slope.double(), a) + 1
        torch.testing.assert_close(to.cpu().double(), expected, atol=1e-5 * expected.abs().max().item(), rtol=1e-4)

    def test_powers_of_negative_features(self, gpu):
        y, powers = torch.tensor([[-0.5], [-2.0], [0.0], [3.0]]), torch.tensor([1.0, 2.0, 3.0, 1.5])
        found = gpu.logits(y.to(DEVICE), powers.to(DEVICE), torch.ones(4, 1, 1, device=DEVICE)).cpu()[:, :, 0]
        torch.testing.assert_close(found, y**powers, equal_nan=True)
        assert found.isnan().sum() == 2

    def test_heads_are_those_of_plain_pytorch(self, served, sample, monkeypatch):
        monkeypatch.setattr(native, "classifies", lambda weight: False)
        weight = torch.rand(9, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        settings = [
            HeadSettings(sigma=sigma, n=n, w_pool=9, head_epochs=2, head_batch=20, seed=seed)
            for sigma, n, seed in [("relu", 1, 0), ("relu", 3, 0), ("relu", 2.5, 1), ("elu", 4, 0), ("elu", 4, 1)]
        ]
        found = []
        for kernels in (True, False):
            if not kernels:
                assert served["logits"] == served["gradients"] == 2 * 2 * 2, "two activation functions, two epochs, two minibatches"
                monkeypatch.setattr(native, "gpu", lambda tensor: None)
            heads = [Head(models.ll_network(weight, 3, each, 32, 10).to(DEVICE).eval()) for each in settings]
            train_heads(heads, sample.train_images[:40], sample.train_labels[:40])
            found.append(heads)
        for one, plain in zip(*found, strict=True):
            assert [row["accuracy"] for row in one.history] == [row["accuracy"] for row in plain.history]
            torch.testing.assert_close([row["loss"] for row in one.history], [row["loss"] for row in plain.history], rtol=1e-5, atol=0)
            torch.testing.assert_close(one.network.linear.weight, plain.network.linear.weight, atol=1e-5, rtol=1e-4)


class Counted(TorchDispatchMode):
    """Launches, and bytes read and written, of what PyTorch does on tensors; of the kernels as well, when they are called through :meth:`through`."""

    def __init__(self):
        super().__init__()
        self.launches = self.bytes = 0

    def through(self, call, kernels):
        def counted(*given):
            with _disable_current_modes():  # the interpreter copies tensors about
                found = call(*given)
            self.launches += kernels
            self.bytes += sum(map(_bytes, (x for x in tree_leaves((given, found)) if isinstance(x, torch.Tensor))))
            return found

        return counted

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
        elif name in ("index", "index_select", "gather"):
            self.bytes += sum(map(_bytes, into[1:])) + 2 * _bytes(outof[0])
        else:
            self.bytes += read + sum(map(_bytes, outof))
        return out


def _bytes(x: torch.Tensor) -> int:
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)


@pytest.mark.slow
class TestCosts:
    """What :mod:`khnb.costs` says of a GPU is what the code does on one, counted where the kernels are interpreted: small groups, and what a further epoch or image adds."""

    @pytest.fixture
    def count(self, gpu, monkeypatch):
        monkeypatch.setattr(native, "gpu", lambda tensor: gpu)
        for name in ("learns", "convolves", "classifies"):
            monkeypatch.setattr(native, name, lambda *given: False)
        monkeypatch.setattr(models, "power", lambda y, n: y if n == 1 else y.pow(n))  # as on a GPU
        monkeypatch.setattr(heads_module, "PART", 2**30)
        monkeypatch.setattr(training, "part_size", lambda model, images: 1000)

        def counted(do):
            with pytest.MonkeyPatch.context() as patch, Counted() as found:
                for name, kernels in dict(changes=2, conv_pool=1, filters_gradient=1, logits=1, gradients=1).items():
                    patch.setattr(gpu, name, found.through(getattr(gpu, name), kernels))
                do()
            return found

        return counted

    def near(self, told, counted):
        assert 1 / 1.2 < told / counted < 1.2, (told, counted)

    def agree(self, found, less, more, fewer):
        """What was counted with more of something and with less, and what is told of both."""
        self.near(more.moved - fewer.moved, found.bytes - less.bytes)
        self.near(more.launches - fewer.launches, found.launches - less.launches)

    def images(self, monkeypatch, train, test=0):
        monkeypatch.setitem(sweeps.IMAGES, "cifar10-sample", dict(train=train, test=test))

    @pytest.mark.parametrize("orders", [[2.0], [2.0, 3.0, 4.0]])
    def test_layers(self, orders, sample, count, monkeypatch):
        convs, found, told = [ConvSettings(K=10, w=4, m=m, p=p, conv_epochs=1, conv_batch=400) for m in (2, 3) for p in orders], [], []
        for images in (2, 1):
            self.images(monkeypatch, images)
            found.append(count(lambda images=images: learning.train_layers(sample.train_images[:images], convs)))
            told.append(costs.of(sweeps.Group("layers", "cifar10-sample", dict(convs=[conv.dict() for conv in convs]))))
        self.agree(*found, *told)

    def test_classifiers(self, sample, count, monkeypatch):
        self.images(monkeypatch, 16)
        conv, weight, found, told = ConvSettings(K=3, w=8), torch.rand(9, 3, 8, 8), [], []
        for epochs in (2, 1):
            heads = [HeadSettings(sigma=sigma, n=n, w_pool=11, head_epochs=epochs, head_batch=8) for sigma in ("relu", "elu") for n in (1, 2)]
            ready = [Head(models.ll_network(weight, conv.p, head, 32, 10).eval()) for head in heads]
            found.append(count(lambda ready=ready: train_heads(ready, sample.train_images[:16], sample.train_labels[:16], torch.float16)))
            told.append(costs.of(sweeps.Group("heads", "cifar10-sample", dict(conv=conv.dict(), heads=[head.dict() for head in heads], feature_dtype="float16"))))
        self.agree(*found, *told)

    @pytest.mark.parametrize("what", ["bytes of images", "launches of minibatches"])
    def test_bp_models(self, what, sample, count, monkeypatch):
        head, found, told = HeadSettings(sigma="elu", n=4, w_pool=9, head_epochs=1, head_batch=2 if what.startswith("launches") else 1000), [], []
        for images in (4, 2):
            self.images(monkeypatch, images)
            model = models.bp_network(6, 8, head, 3, 32, 10)
            found.append(count(lambda model=model, images=images: training.train(model, sample.train_images[:images], sample.train_labels[:images])))
            told.append(costs.of(sweeps.Group("bp", "cifar10-sample", dict(models=[dict(K=6, w=8, head=head.dict())]))))
        name, theirs = ("bytes", "moved") if what.startswith("bytes") else ("launches", "launches")
        self.near(*(getattr(more, key) - getattr(less, key) for (more, less), key in ((told, theirs), (found, name))))

    @pytest.mark.parametrize("kind", ["LL", "BP"])
    def test_attacks(self, kind, sample, count, monkeypatch):
        head = HeadSettings(sigma="elu", n=4, w_pool=9)
        model = (models.ll_network(torch.rand(36, 3, 8, 8), 3, head, 32, 10) if kind == "LL" else models.bp_network(6, 8, head, 3, 32, 10)).eval().requires_grad_(False)
        described = dict(K=6, w=8, head=head.dict()) if kind == "BP" else dict(conv=ConvSettings(K=6, w=8).dict(), head=head.dict())
        for forwards, gradients, do in ((1, 0, lambda x, y: model(x)), (0, 1, lambda x, y: attacks.gradient(model, x, y))):
            monkeypatch.setattr(costs, "looks", lambda *given, found=(forwards, gradients): found)
            found, told = [], []
            for images in (2, 1):
                self.images(monkeypatch, 0, images)
                x, y = sample.test_images[:images].float() / 255, sample.test_labels[:images]
                with torch.no_grad():
                    found.append(count(lambda x=x, y=y, do=do: do(x, y)))
                told.append(costs.of(sweeps.Group("attacks", "cifar10-sample", dict(models=[described], attacks=[[]], audited=0))))
            self.near(told[0].moved - told[1].moved, found[0].bytes - found[1].bytes)


def test_where_they_serve(gpu):
    assert native.gpu(torch.ones(2)) is None and native.gpu(torch.ones(2, device="meta")) is None
    if DEVICE == "cuda":
        assert native.gpu(torch.ones(2, device="cuda")) is gpu and native.gpu(torch.ones(2, device="cuda", dtype=torch.float64)) is None


def test_they_compile_for_a_gpu_that_is_not_here():
    """For compute capability 9.0, in another process, as here Triton interprets: with the shapes of K=20, w=12."""
    code = """
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from khnb import kernels_gpu as k

        def made(kernel, whole=(), numbers="", long=(), **constants):
            names = [name for name in kernel.arg_names if name not in constants]
            types = {name: "*i64" if name in long else "*i32" if name in whole else "i32" if name in numbers.split() else "*fp32" for name in names}
            source = ASTSource(fn=kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
            found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=8, num_stages=2) if kernel is k._rank else {})
            assert found.metadata.shared <= 227 * 1024, found.metadata.shared
            assert "mma" in found.asm["ptx"] and "tf32" in found.asm["ptx"] and len(found.asm["cubin"]) > 0
            print(kernel.__name__, found.metadata.shared)

        made(k._rank, ("m", "winner", "inhibited"), "N F D", BN=32, BF=512, BD=16)
        numbers = "count filters C H W w side across q step high wide"
        for kind in (dict(BIASED=True, SCALED=False, PLACES=True), dict(BIASED=False, SCALED=True, PLACES=False)):
            made(k._conv_pool, (), numbers, long=("where",), BN=64, BF=16, BD=16, **kind)
        made(k._filters, (), "count filters C H W w side across", BF=64, BD=64, BN=16)
        made(k._change, ("winner", "inhibited"), "N F D", BN=32, BF=64, BD=64)
        made(k._logits, (), "count heads D classes each", BB=64, BD=32, BC=16)
        made(k._gradient, (), "count heads D classes", BB=32, BD=64, BC=16)
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 7


def test_the_benchmark_runs():
    """On the CPU, at tiny shapes: to be ready where there is a GPU."""
    done = subprocess.run([sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(re.findall(r"^\| (?:9 KH layers|4 classifiers|BP model|LL forward|LL gradient), K=3 w=8 \|", done.stdout, re.M)) == 5
