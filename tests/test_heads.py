"""Classifiers trained together, against the same training written plainly, on real digits."""

import copy
import functools
import io

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from khnb import heads as module
from khnb import native
from khnb.heads import Features, Head, logits, train_heads
from khnb.layer import KHConv2d
from khnb.learning import schedule
from khnb.models import ll_network
from khnb.settings import HeadSettings
from khnb.training import accuracy, epoch_order, predict, to_float

BASE = dict(sigma="gelu", n=4, w_pool=5, head_eta0=5e-3, head_batch=100, head_epochs=3)
#: every way two heads can differ: pooling and its place, activation function, power, learning rate, schedule, seed, epochs, minibatch, order, bias,
#: initial weights (but for zeros: there a class as frequent as all others has no gradient but rounding, of which AdamW makes a whole step)
MIXED = [
    dict(), dict(sigma="elu"), dict(n=1), dict(n=7), dict(w_pool=8), dict(w_pool=1), dict(sigma="relu", n=2.5), dict(seed=3),
    dict(head_eta0=1e-3, head_scheduler="linear"), dict(head_epochs=1), dict(head_epochs=2, seed=1), dict(head_batch=70), dict(head_order=5),
    dict(pooling="last"), dict(pooling="last", sigma="elu", n=2), dict(head_bias="no"), dict(head_init="he", seed=2),
]  # fmt: skip


def head(filters, p=2, **settings) -> Head:
    return Head(ll_network(filters, p, HeadSettings(**BASE | settings), 28, 10).eval())


def trained(filters, digits, each, count=230, p=2, **how) -> list[Head]:
    found = [head(filters, p, **settings) for settings in each]
    train_heads(found, digits.train_images[:count], digits.train_labels[:count], **how)
    return found


def same(one: Head, other: Head, exact: bool = False) -> None:
    """Sums in another order differ by rounding. AdamW moves a weight by about eta0 = 5e-3 whatever the size of its gradient, so where that
    is itself little more than rounding the difference shows. Allowed is 1% of a step, but for two weights in ten thousand, which may be
    off by less than a step: in one of the nine updates the gradients of single images cancel there to a millionth of their sum
    (measured in float64; of the 19,360 weights of a case the one or two that are off are those with the smallest remainder)."""
    for key in ("weight", "bias"):
        here, there = getattr(one.network.linear, key).data, getattr(other.network.linear, key).data
        off = ~torch.isclose(here, there, atol=5e-5, rtol=1e-3)
        assert torch.equal(here, there) or not exact
        assert off.double().mean() <= 2e-4 and (here - there).abs().max() < 5e-3, f"{off.sum()} of {off.numel()}, up to {(here - there).abs().max():g}"


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(native, "_library", lambda: None)


@pytest.fixture
def with_threads(request):
    request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
    return torch.set_num_threads


def plainly(filters, digits, settings, count=230, p=2, dtype=torch.float32):
    """The same training as anyone would write it: the network of fig. 6.1, its loss, PyTorch's gradient and AdamW."""
    network = ll_network(filters, p, HeadSettings(**BASE | settings), 28, 10).to(dtype)
    s, rows = network.head, []
    optimizer = torch.optim.AdamW(network.linear.parameters(), lr=s.head_eta0)
    images, labels = to_float(digits.train_images[:count]).to(dtype), digits.train_labels[:count]
    for epoch in range(s.head_epochs):
        optimizer.param_groups[0]["lr"] = schedule(s.head_scheduler, s.head_eta0, epoch, s.head_epochs)
        total, right = 0.0, 0
        for index in epoch_order(count, s.head_order, epoch).split(s.head_batch):
            out = network(images[index])
            loss = F.cross_entropy(out, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
            right += (out.argmax(1) == labels[index]).sum().item()
        rows.append((total / count, right / count))
    return network, rows


class TestTraining:
    def test_it_learns_digits(self, digits, kh_filters):
        """Three seeds reached 0.948 to 0.951. Trained the same way, a classifier reaches 0.88 on the pixels of these
        digits, and 0.89 to 0.932 on the features of random filters (six draws): the bar is above both."""
        before = accuracy(head(kh_filters).network, digits.test_images, digits.test_labels)
        (one,) = trained(kh_filters, digits, [dict(head_epochs=10)], 2000)
        assert one.history[-1]["loss"] < one.history[0]["loss"] / 4
        assert before < 0.3 and accuracy(one.network, digits.test_images, digits.test_labels) > 0.935
        assert torch.equal(one.network.conv.weight, kh_filters)  # two stages: the second leaves the filters alone

    @pytest.mark.parametrize("settings", MIXED)
    def test_alone_it_is_what_anyone_would_write(self, digits, kh_filters, settings):
        (one,) = trained(kh_filters, digits, [settings])
        network, rows = plainly(kh_filters, digits, settings, dtype=torch.float64)
        np.testing.assert_allclose([(row["loss"], row["accuracy"]) for row in one.history], rows, rtol=2e-5)
        same(one, Head(network.float()))

    @pytest.mark.parametrize("p", [2, 5])
    def test_together_each_ends_as_alone(self, digits, kh_filters, p):
        for one, settings in zip(trained(kh_filters, digits, MIXED, p=p), MIXED, strict=True):
            (alone,) = trained(kh_filters, digits, [settings], p=p)
            assert len(one.history) == len(alone.history) == one.network.head.head_epochs
            np.testing.assert_allclose([r["loss"] for r in one.history], [r["loss"] for r in alone.history], rtol=1e-5)
            same(one, alone)

    def test_without_the_kernels_it_is_the_same(self, digits, kh_filters, request):
        served = trained(kh_filters, digits, MIXED)
        assert native.classifies(served[0].network.linear.weight)
        request.getfixturevalue("no_kernels")
        for one, plain in zip(served, trained(kh_filters, digits, MIXED), strict=True):
            np.testing.assert_allclose([r["loss"] for r in one.history], [r["loss"] for r in plain.history], rtol=1e-5)
            assert [r["accuracy"] for r in one.history] == [r["accuracy"] for r in plain.history]
            same(one, plain)

    def test_threads_do_not_matter(self, digits, kh_filters, with_threads):
        found = []
        for threads in (1, 3):
            with_threads(threads)
            found.append(trained(kh_filters, digits, MIXED[:3]))
        for one, other in zip(*found, strict=True):
            same(one, other)

    def test_the_same_again(self, digits, kh_filters):
        for one, other in zip(trained(kh_filters, digits, MIXED[:5]), trained(kh_filters, digits, MIXED[:5]), strict=True):
            same(one, other, exact=True)

    def test_the_first_update_is_adamw(self, digits, kh_filters):
        """In closed form: the first update moves each weight by eta g/(|g| + 1e-8), and by its decay."""
        one = head(kh_filters, head_epochs=1, head_batch=50, head_eta0=1e-2)
        images, labels = digits.train_images[:50], digits.train_labels[:50]
        w, b = (x.detach().double().numpy().copy() for x in (one.network.linear.weight, one.network.linear.bias))
        pooled = F.max_pool2d(one.network.conv(to_float(images)), 5, 2).double()
        x, y = F.gelu(pooled).pow(4).flatten(1).numpy(), np.eye(10)[labels]
        share = scipy.special.softmax(x @ w.T + b, axis=1)
        loss = -np.log((share * y).sum(1)).mean()  # eq. 3.2
        gradient, of_bias = (share - y).T @ x / 50, (share - y).mean(0)
        train_heads([one], images, labels)
        assert one.history[0]["loss"] == pytest.approx(loss, rel=1e-5)
        assert one.history[0]["accuracy"] == pytest.approx((share.argmax(1) == labels.numpy()).mean())
        clear = np.abs(gradient) > 1e-4  # where rounding does not matter
        expected = w * (1 - 1e-2 * 0.01) - 1e-2 * gradient / (np.abs(gradient) + 1e-8)
        assert clear.mean() > 0.5 and np.abs(of_bias).min() > 1e-4
        np.testing.assert_allclose(one.network.linear.weight.detach().numpy()[clear], expected[clear], atol=3e-7)
        expected = b * (1 - 1e-2 * 0.01) - 1e-2 * of_bias / (np.abs(of_bias) + 1e-8)
        np.testing.assert_allclose(one.network.linear.bias.detach(), expected, atol=3e-7)

    def test_the_history(self, digits, kh_filters):
        (one,) = trained(kh_filters, digits, [dict(head_epochs=4, head_scheduler="linear")])
        assert [row["epoch"] for row in one.history] == [1, 2, 3, 4]
        assert [row["eta"] for row in one.history] == [schedule("linear", 5e-3, t, 4) for t in range(4)]
        assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 and row["seconds"] >= 0 for row in one.history)

    def test_a_head_that_overflows_stops_alone(self, digits, kh_filters):
        good, bad = trained(kh_filters, digits, [dict(), dict(head_eta0=1e37)])
        assert bad.stopped == "the loss stopped being finite in epoch 1: lower head_eta0=1e+37" and bad.done
        assert len(good.history) == 3 and not good.stopped
        same(good, trained(kh_filters, digits, [dict()])[0])

    def test_heads_of_different_layers_are_refused(self, digits, kh_filters):
        for other in (head(kh_filters.flip(0)), head(kh_filters, p=3)):
            with pytest.raises(ValueError, match="different KH layers"):
                train_heads([head(kh_filters), other], digits.train_images[:10], digits.train_labels[:10])


class TestResume:
    @pytest.mark.parametrize("stop", [1, 2, 4])
    def test_equals_an_uninterrupted_run(self, digits, kh_filters, stop):
        each = [*MIXED[:4], MIXED[9], MIXED[11], dict(head_eta0=1e37)]  # several powers, epochs, minibatches, and one that fails
        images, labels = digits.train_images[:230], digits.train_labels[:230]
        whole = trained(kh_filters, digits, each)

        class Stop(Exception):
            pass

        first, calls = [head(kh_filters, **settings) for settings in each], []

        def after_epoch(active):
            calls.append(active)
            if len(calls) == stop:
                raise Stop

        with pytest.raises(Stop):
            train_heads(first, images, labels, after_epoch=after_epoch)
        file = io.BytesIO()
        torch.save([one.state() for one in first], file)  # plain tensors and numbers: what a checkpoint does
        file.seek(0)
        again = [head(kh_filters, **settings) for settings in each]
        for one, state in zip(again, torch.load(file, weights_only=True), strict=True):
            one.resume(state)
        train_heads(again, images, labels)
        for one, other in zip(whole, again, strict=True):
            assert one.stopped == other.stopped and len(one.history) == len(other.history)
            if not one.stopped:
                assert [row["loss"] for row in one.history] == [row["loss"] for row in other.history]
                same(one, other, exact=True)

    def test_a_state_holds_its_own_head_only(self, digits, kh_filters):
        found = trained(kh_filters, digits, [dict(seed=seed) for seed in range(8)], 100)
        sizes = []
        for kept in (found[:1], found):
            file = io.BytesIO()
            torch.save([one.state() for one in kept], file)
            sizes.append(len(file.getvalue()))
        assert sizes[1] < 8.5 * sizes[0] and sizes[0] < 14 * found[0].network.linear.weight.numel()

    def test_heads_that_are_not_equally_far(self, digits, kh_filters):
        late, images, labels = trained(kh_filters, digits, [dict()]), digits.train_images[:230], digits.train_labels[:230]
        late += [head(kh_filters, seed=1), head(kh_filters, head_epochs=2), head(kh_filters, head_epochs=5)]
        late[0].network.head = HeadSettings(**BASE | dict(head_epochs=4, head_scheduler="constant"))
        train_heads(late, images, labels)
        assert [len(one.history) for one in late] == [4, 3, 2, 5]
        same(late[1], trained(kh_filters, digits, [dict(seed=1)])[0])

    def test_nothing_left_to_do(self, digits, kh_filters):
        found = trained(kh_filters, digits, [dict()])
        before = copy.deepcopy(found[0].network.state_dict())
        train_heads(found, digits.train_images[:230], digits.train_labels[:230], after_epoch=lambda heads: pytest.fail("trained on"))
        assert all(torch.equal(before[name], value) for name, value in found[0].network.state_dict().items())


class TestMemory:
    """What does not fit is computed again."""

    EACH = [dict(), dict(w_pool=8), dict(n=7)]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("share", [0, 0.4])
    def test_with_the_same_result(self, digits, kh_filters, dtype, share):
        kept = []
        for part in (1, share):
            sizes = sum(Features(KHConv2d(kh_filters, 2), digits.train_images[:1], [(5, 2), (8, 2)]).sizes.values())
            kept.append(trained(kh_filters, digits, self.EACH, dtype=dtype, memory=part * 230 * sizes * dtype.itemsize))
        for one, other in zip(*kept, strict=True):
            same(one, other, exact=True)

    @pytest.mark.parametrize("memory", [0, 1e5, 1e9])
    def test_bound(self, digits, kh_filters, memory):
        found = Features(KHConv2d(kh_filters, 2), digits.train_images[:50], [(5, 2), (8, 2)], torch.float16, memory)
        taken = sum(kept.numel() * kept.itemsize for kept in found.kept.values())
        assert taken <= memory and (taken == 0) == (memory == 0)

    @pytest.mark.parametrize("dtype, error", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
    def test_smaller_floats(self, digits, kh_filters, dtype, error):
        exact = Features(KHConv2d(kh_filters, 2), digits.train_images[:20], [(5, 2)])
        for memory in (0, 1e9):
            found = Features(KHConv2d(kh_filters, 2), digits.train_images[:20], [(5, 2)], dtype, memory)
            (_, x), (_, y) = next(found.of(torch.arange(20))), next(exact.of(torch.arange(20)))
            assert x.dtype == torch.float32 and 0 < (x - y).abs().max() and ((x - y).abs() <= error * y.abs() + 1e-7).all()
        (rough,), (fine,) = (trained(kh_filters, digits, [dict()], dtype=kind) for kind in (dtype, torch.float32))
        assert rough.history[-1]["loss"] == pytest.approx(fine.history[-1]["loss"], rel=0.02)
        assert not torch.equal(rough.network.linear.weight, fine.network.linear.weight)

    def test_the_order_of_the_images_is_kept(self, digits, kh_filters):
        found = Features(KHConv2d(kh_filters, 2), digits.train_images[:20], [(5, 2)], memory=10 * 16 * 121 * 4)
        assert len(found.kept[5, 2]) == 10
        index = torch.tensor([15, 3, 19, 0, 11])
        expected = F.max_pool2d(KHConv2d(kh_filters, 2)(to_float(digits.train_images[index])), 5, 2).flatten(1)
        torch.testing.assert_close(next(found.of(index))[1], expected, atol=1e-6, rtol=1e-5)


class TestLogits:
    def test_of_every_head(self, digits, kh_filters, monkeypatch):
        found = trained(kh_filters, digits, MIXED[:7])
        expected = [predict(one.network, digits.test_images[:70]) for one in found]
        monkeypatch.setattr(module, "PART", 2**18)
        for said, same in zip(logits(found, digits.test_images[:70]), expected, strict=True):
            assert said.shape == (70, 10) and not said.requires_grad
            torch.testing.assert_close(said, same, atol=1e-4, rtol=1e-4)


class TestKernels:
    @pytest.mark.parametrize("count, features, n_heads, classes, n, threads", [
        (1, 1, 1, 10, 1, 1), (64, 512, 1, 10, 4, 1), (65, 513, 3, 10, 5, 2), (200, 1030, 2, 3, 2, 3), (2, 17, 1, 7, 50, 3), (130, 90, 2, 26, 3, 2),
    ])  # fmt: skip
    def test_gradients_loss_and_hits(self, count, features, n_heads, classes, n, threads, with_threads):
        with_threads(threads)
        generator = torch.Generator().manual_seed(0)
        y = torch.rand(count, features, generator=generator)
        labels = torch.randint(0, classes, (count,), generator=generator)
        weight = (torch.rand(n_heads, classes, features, generator=generator) - 0.5).mul_(3).contiguous()
        bias = torch.rand(n_heads, classes, generator=generator)
        sums = [module._Sums.zero(weight) for _ in range(threads)]
        for _ in range(2):  # added to what is there
            native.classify(y, labels, n, 1 / count, weight, bias, sums)
        found = [2 * sum(getattr(one, name).double() for one in sums) / 4 for name in ("weight", "bias", "loss", "right")]
        for h in range(n_heads):
            w, b = (x[h].double().requires_grad_() for x in (weight, bias))
            out = y.double() ** n @ w.T + b
            loss = F.cross_entropy(out, labels)
            loss.backward()
            torch.testing.assert_close(found[0][h], w.grad, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(found[1][h], b.grad, atol=1e-6, rtol=1e-4)
            assert found[2][h].item() == pytest.approx(loss.item() * count, rel=1e-4)
            assert found[3][h].item() == (out.argmax(1) == labels).sum()

    def test_not_a_number_is_passed_on(self):
        weight, bias = torch.full((1, 3, 20), float("nan")), torch.zeros(1, 3)
        sums = [module._Sums.zero(weight)]
        native.classify(torch.ones(4, 20), torch.tensor([0, 1, 2, 0]), 1, 1.0, weight, bias, sums)
        assert sums[0].loss.isnan().all()

    @pytest.mark.parametrize("channels, side, w, filters", [(1, 28, 4, 5), (3, 32, 8, 49), (3, 32, 12, 130)])
    @pytest.mark.parametrize("threads", [1, 3])
    def test_convolution_with_several_poolings(self, channels, side, w, filters, threads, with_threads):
        with_threads(threads)
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(5, channels, side, side, generator=generator)
        weight = torch.rand(filters, channels, w, w, generator=generator) - 0.5
        scale = torch.rand(5, 1, side - w + 1, side - w + 1, generator=generator)
        for pools in ([(5, 2)], [(1, 1), (2, 2), (5, 2), (9, 2), (13, 3)]):
            plain = F.conv2d(images, weight) * scale
            for found, (q, s) in zip(native.conv_pools(images, weight, scale, pools), pools, strict=True):
                torch.testing.assert_close(found, F.max_pool2d(plain, q, s), atol=1e-5, rtol=1e-5)
