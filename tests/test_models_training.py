"""The architecture of fig. 6.1, its activation functions, and both ways of training, on real digits."""

import copy
import functools
import io

import numpy as np
import pytest
import scipy.special
import torch
import torch.nn.functional as F

from khnb import native, training
from khnb.heads import Features
from khnb.layer import KHConv2d
from khnb.learning import schedule
from khnb.models import ACTIVATIONS, PRELU_SLOPE, Network, activate, bp_network, ll_network, n_features
from khnb.settings import ACTIVATIONS as NAMES
from khnb.settings import HeadSettings, check_geometry
from khnb.training import accuracy, predict, to_float, train

X = np.concatenate([np.linspace(-4, 4, 81), [-30.0, -1e-9, 0.0, 1e-9, 20.0]])
#: eqs. 2.4-2.10, written out in another way than the library's
FORMULAS = {
    "sigmoid": scipy.special.expit,  # 2.4
    "tanh": lambda x: 2 * scipy.special.expit(2 * x) - 1,  # 2.5
    "relu": lambda x: (x + np.abs(x)) / 2,  # 2.6
    "prelu": lambda x: np.where(x < 0, PRELU_SLOPE * x, x),  # 2.7
    "elu": lambda x: np.where(x < 0, np.exp(np.minimum(x, 0)) - 1, x),  # 2.8
    "gelu": lambda x: x * (1 + scipy.special.erf(x / np.sqrt(2))) / 2,  # 2.9, exact and not the tanh approximation
    "rexp": lambda x: np.maximum(0, np.exp(x) - 1),  # 2.10
}


class TestActivations:
    def test_all_of_them_are_here(self):
        assert set(ACTIVATIONS) == set(NAMES) == set(FORMULAS)

    @pytest.mark.parametrize("n", [1, 2, 5])
    @pytest.mark.parametrize("name", FORMULAS)
    def test_the_formula(self, name, n):
        found = activate(torch.from_numpy(X), name, n)
        assert found.dtype == torch.float64
        # exp(x) - 1 loses digits near 0 in the plain formula: hence the absolute part
        np.testing.assert_allclose(found, FORMULAS[name](X) ** n, rtol=1e-12, atol=1e-15)

    def test_a_broken_power_of_a_positive_function(self):
        np.testing.assert_allclose(activate(torch.from_numpy(X), "relu", 2.5), np.maximum(X, 0) ** 2.5, rtol=1e-12)

    @pytest.mark.parametrize("name", FORMULAS)
    def test_the_gradient_is_finite_also_at_zero(self, name):
        x = torch.tensor([-2.0, 0.0, 1.5], requires_grad=True)
        activate(x, name, 4.0).sum().backward()
        assert x.grad.isfinite().all()

    @pytest.mark.parametrize("n", [1, 2, 5, 16])
    @pytest.mark.parametrize("name", native.SIGMAS)
    def test_the_compiled_kernel(self, name, n):
        """To within the rounding of n factors of the formula in double precision, and so is the gradient."""
        x = torch.cat([torch.linspace(-8, 5, 4001), torch.tensor([0.0, -0.0, 1e-20, -1e-20, -1e-4, -87.0, -1000.0])])
        if native.activator(x, name, n) is None:
            pytest.skip("there is no compiled kernel here")
        slope, here, exact = torch.linspace(-1, 1, len(x)), x.clone().requires_grad_(), x.double().requires_grad_()
        found, expected = activate(here, name, n), ACTIVATIONS[name](exact) ** n
        found.backward(slope), expected.backward(slope.double())
        torch.testing.assert_close(found.detach().double(), expected.detach(), rtol=5e-7 * n, atol=1e-37)  # smaller ones vanish
        torch.testing.assert_close(here.grad.double(), exact.grad, rtol=5e-7 * n, atol=5e-7 * n)

    @pytest.mark.parametrize("name", native.SIGMAS)
    def test_the_compiled_kernel_takes_any_number_of_values(self, name):
        x, whole = torch.linspace(-2, 2, 50), activate(torch.linspace(-2, 2, 50), name, 3)
        for count in (0, 1, 7, 16, 17, 33, 49):
            assert torch.equal(activate(x[:count], name, 3), whole[:count])
        assert torch.equal(activate(x.view(5, 10).T, name, 3), whole.view(5, 10).T)
        threads = torch.get_num_threads()
        try:
            torch.set_num_threads(3)
            assert torch.equal(activate(x, name, 3), whole)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("name", NAMES)
    def test_what_is_no_number_stays_none(self, name):
        found = activate(torch.tensor([float("nan"), 1.0]), name, 2)
        assert found.isnan().tolist() == [True, False]

    def test_float32_is_kept(self):
        assert all(activate(torch.ones(2), name, 3.0).dtype == torch.float32 for name in NAMES)


HEAD = HeadSettings(sigma="elu", n=4, w_pool=5)


def rounding_decides(model, images):
    """Whether the two largest activities of some pooling are so near each other, and not equal, that single precision may take the other one."""
    with torch.no_grad():
        activity = copy.deepcopy(model).double().conv(images.double())
    size, step = model.head.w_pool, model.head.s_pool
    if size == 1:
        return False
    first, second = activity.unfold(2, size, step).unfold(3, size, step).flatten(4).topk(2).values.unbind(-1)
    return ((first != second) & (first - second < 1e-6 * activity.abs().max())).any().item()


class TestArchitecture:
    @pytest.mark.parametrize("side, channels", [(28, 1), (32, 3)])
    @pytest.mark.parametrize(
        "w, w_pool, map_side",
        [(4, 5, {28: 11, 32: 13}), (12, 11, {28: 4, 32: 6}), (4, 1, {28: 25, 32: 29}), (8, 2, {28: 10, 32: 12})],
    )
    def test_shapes(self, side, channels, w, w_pool, map_side):
        head = HeadSettings(w_pool=w_pool)
        images = torch.rand(2, channels, side, side)
        for model in (
            ll_network(torch.rand(9, channels, w, w), 2, head, side, 10),
            bp_network(3, w, head, channels, side, 10),
        ):
            assert model.pool(images).shape == (2, 9, map_side[side], map_side[side])
            assert model.linear.in_features == 9 * map_side[side] ** 2 == n_features(9, side, w, head)
            assert model(images).shape == (2, 10)

    def test_what_does_not_fit(self):
        for w, w_pool, words in ((33, 1, "w=33"), (28, 6, "w_pool=6")):
            with pytest.raises(ValueError, match=words):
                check_geometry(32, w, w_pool)
        with pytest.raises(ValueError, match="w_pool=26"):
            bp_network(2, 4, HeadSettings(w_pool=26), 1, 28, 10)

    @pytest.mark.parametrize("p", [2, 4])
    def test_ll_is_convolution_pooling_activation_classifier(self, sample, p):
        weight = torch.rand(9, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        model = ll_network(weight, p, HeadSettings(sigma="gelu", n=3, w_pool=5), 32, 10).eval()
        images = to_float(sample.test_images[:3])
        h = KHConv2d(weight, p)(images).detach().numpy()
        pooled = np.array(
            [
                [
                    [[h[b, f, 2 * y : 2 * y + 5, 2 * x : 2 * x + 5].max() for x in range(13)] for y in range(13)]
                    for f in range(9)
                ]
                for b in range(3)
            ]
        )
        seen = (FORMULAS["gelu"](pooled.astype(np.float64)) ** 3).reshape(3, -1)
        logits = seen @ model.linear.weight.detach().double().numpy().T + model.linear.bias.detach().double().numpy()
        np.testing.assert_allclose(model(images).detach(), logits, atol=1e-5 * seen.max())
        ((_, found),) = Features(model.conv, sample.test_images[:3], [(5, 2)]).of(torch.arange(3))
        np.testing.assert_allclose(found, pooled.reshape(3, -1), rtol=1e-5, atol=1e-6)

    def test_the_bp_convolution_is_plain(self, sample):
        model = bp_network(3, 4, HEAD, 3, 32, 10).eval()
        assert type(model.conv) is torch.nn.Conv2d and model.conv.bias is not None
        images = to_float(sample.test_images[:2])
        plain = F.max_pool2d(F.conv2d(images, model.conv.weight, model.conv.bias), 5, 2)
        expected = model.linear(F.elu(plain).pow(4).flatten(1))
        torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
        darker = model.pool(images / 2) - model.pool(images)
        assert darker.abs().max() > 1e-3  # no patch normalisation, which would make both equal

    @pytest.mark.parametrize("channels, side, w, w_pool", [(1, 28, 4, 5), (3, 32, 4, 5), (3, 32, 8, 1), (1, 28, 12, 9), (3, 32, 12, 9), (3, 32, 5, 3)])
    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("p", [None, 2, 5])
    def test_the_fused_path_is_the_plain_one(self, channels, side, w, w_pool, threads, p, monkeypatch, request):
        """Logits, and gradients of images and of whatever is trained: of BP (p is None) and LL models, images with a black corner included."""
        request.addfinalizer(functools.partial(torch.set_num_threads, torch.get_num_threads()))
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        filters = torch.rand((25, channels, w, w), generator=generator) - 0.3
        head, found = HeadSettings(sigma="elu", n=2, w_pool=w_pool), []

        def network():
            return bp_network(5, w, head, channels, side, 10) if p is None else ll_network(filters, p, head, side, 10)

        images = torch.zeros((5, channels, side, side))
        while rounding_decides(network(), images) or not images.any():
            images = torch.rand((5, channels, side, side), generator=generator)
            images[2, :, : side // 2, : side // 2] = 0  # patches without a norm, and poolings won by the first of many equals
        labels = torch.tensor([0, 1, 2, 3, 4])
        for served in (True, False):
            if not served:
                monkeypatch.setattr(native, "convolves", lambda *given: False)
            model, x = network(), images.clone().requires_grad_()
            assert native.convolves(x, model.conv.weight) == served
            logits = model(x)
            F.cross_entropy(logits, labels).backward()
            trained = [each.grad for each in model.parameters()]
            with torch.no_grad():
                found.append([logits.detach(), model(images), x.grad, *trained])
        for fused, plain in zip(*found, strict=True):
            torch.testing.assert_close(fused, plain, atol=1e-5 * max(1, plain.abs().max().item()), rtol=1e-4)

    @pytest.mark.parametrize(
        ("more", "wanted"), [("", "images"), ("", "weight"), ("", "images weight"), ("bias", "images"), ("bias", "bias"), ("bias", "weight bias")]
        + [("bias", "images weight bias"), ("scale", "images"), ("scale", "scale"), ("scale", "images scale")],
    )  # fmt: skip
    @pytest.mark.parametrize("w_pool", [1, 2, 5])
    def test_the_gradients_that_are_asked_for(self, more, wanted, w_pool):
        """Without more, with a bias or with a scale; also where windows do not overlap, or share what won, and where slopes are 0."""
        generator, made = torch.Generator().manual_seed(0), {}
        for name, shape in dict(images=(3, 2, 13, 15), weight=(7, 2, 5, 5), bias=(7,), scale=(3, 1, 9, 11)).items():
            made[name] = torch.rand(shape, generator=generator) + 0.1 if name in ("images", "weight", more) else None
        slope, found = None, []
        for double in (False, True):
            given = {name: x if x is None else x.double() if double else x.clone() for name, x in made.items()}
            for name in wanted.split():
                given[name].requires_grad_()
            x, k, b, s = given.values()
            if double:
                y = F.max_pool2d(F.conv2d(x, k, b) * (1 if s is None else s), w_pool, 2)
            else:
                y = native.conv_pool(x, k, b, w_pool, 2, scale=s)
            slope = (torch.rand(y.shape, generator=generator) - 0.5).relu() if slope is None else slope
            found.append(torch.autograd.grad(y, [given[name] for name in wanted.split()], slope.to(y.dtype)))
        for mine, plain in zip(*found, strict=True):
            torch.testing.assert_close(mine.double(), plain, atol=1e-5 * plain.abs().max().item(), rtol=1e-5)

    def test_scaled_filters_have_no_gradient_and_say_so(self):
        weight = torch.rand(3, 1, 4, 4, requires_grad=True)
        with pytest.raises(ValueError, match="needs a gradient"):
            native.conv_pool(torch.rand(2, 1, 12, 12), weight, None, 3, 2, scale=torch.ones(2, 1, 9, 9))

    def test_the_fused_path_gives_one_derivative_and_no_more(self, sample):
        model, x = bp_network(3, 4, HEAD, 3, 32, 10), to_float(sample.test_images[:2]).requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()

    @pytest.mark.parametrize(("sigma", "n"), [(sigma, n) for sigma in ("relu", "elu", "gelu") for n in (1, 2, 4, 6, 8, 10, 12, 16)] + [("rexp", 1)])
    def test_steep_powers_are_safe(self, sample, sigma, n):
        """Every power of the thesis's BP models, with activities ten times those at the start: loss and gradients are those of double
        precision, and the squares that AdamW keeps of them are far from overflowing."""
        model = bp_network(4, 8, HeadSettings(sigma=sigma, n=n, w_pool=9), 3, 32, 10).train()
        model.conv.weight.data *= 10
        images, labels, found = to_float(sample.train_images[:20]), sample.train_labels[:20], []
        for each, x in ((model, images), (copy.deepcopy(model).double(), images.double())):
            loss = F.cross_entropy(each(x), labels)
            loss.backward()
            found.append([loss.detach().double()] + [parameter.grad.double() for parameter in each.parameters()])
        for single, double in zip(*found, strict=True):
            assert single.isfinite().all() and single.abs().max() < 1e18
            torch.testing.assert_close(single, double, rtol=1e-3, atol=1e-4 * double.abs().max().item())

    @pytest.mark.parametrize("channels, side", [(1, 28), (3, 32)])
    def test_initial_weights(self, channels, side):
        """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), for weights and biases: range, mean and standard deviation."""
        model = bp_network(10, 4, HEAD, channels, side, 10)
        for module, fan_in in ((model.conv, channels * 16), (model.linear, n_features(100, side, 4, HEAD))):
            drawn, bound = module.weight.detach().flatten(), fan_in**-0.5
            spread = 5 * bound / 3**0.5 / len(drawn) ** 0.5  # five standard errors of the mean
            assert drawn.abs().max() <= bound and drawn.max() > 0.98 * bound and drawn.min() < -0.98 * bound
            assert abs(drawn.mean()) < spread and abs(drawn.std() - bound / 3**0.5) < spread
            assert module.bias.abs().max() <= bound and module.bias.unique().numel() == module.bias.numel()

    def test_other_initial_classifiers(self):
        plain, he, zeros, bare = (
            bp_network(3, 4, HeadSettings(**more), 3, 32, 10) for more in (dict(), dict(head_init="he"), dict(head_init="zeros"), dict(head_bias="no"))
        )
        torch.testing.assert_close(he.linear.weight, plain.linear.weight * 6**0.5)
        assert torch.equal(bare.linear.weight, plain.linear.weight) and not zeros.linear.weight.any()
        for each in (he, zeros, bare):
            assert not each.linear.bias.any() and torch.equal(each.conv.weight, plain.conv.weight)
        images, labels = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
        for network, learns in ((bare, False), (zeros, True)):
            train(network.train(), images, labels)
            assert network.linear.bias.any() == learns and network.linear.weight.any()

    def test_pooling_first_or_last(self, sample):
        """They differ only where an activation function that is not monotone, or an even power, meets negative activities."""
        images = to_float(sample.test_images[:4])
        for sigma, n, alike in (("elu", 1, True), ("relu", 4, True), ("elu", 3, True), ("elu", 4, False), ("gelu", 1, False)):
            found = []
            for pooling in ("first", "last"):
                network = bp_network(4, 4, HeadSettings(sigma=sigma, n=n, pooling=pooling), 3, 32, 10).eval()
                network.conv.weight.data *= 5
                found.append(network(images))
            assert torch.allclose(*found, atol=1e-5, rtol=1e-4) == alike
            pooled = F.max_pool2d(activate(network.conv(images), sigma, n), 5, 2)
            torch.testing.assert_close(found[1], network.linear(pooled.flatten(1)))

    def test_the_seed_decides(self):
        one, same, other = (bp_network(3, 4, HeadSettings(seed=seed), 1, 28, 10) for seed in (1, 1, 2))
        for name, value in one.state_dict().items():
            assert torch.equal(value, same.state_dict()[name]) and not torch.equal(value, other.state_dict()[name])
        torch.manual_seed(0)
        a = ll_network(torch.rand(4, 1, 4, 4), 2, HEAD, 28, 10).linear.weight
        torch.manual_seed(1)
        assert torch.equal(a, ll_network(torch.rand(4, 1, 4, 4), 2, HEAD, 28, 10).linear.weight)


def ll(filters, **head) -> Network:
    return ll_network(
        filters,
        2,
        HeadSettings(**dict(sigma="gelu", n=4, w_pool=5, head_eta0=5e-3, head_batch=100, head_epochs=3) | head),
        28,
        10,
    )


def bp(**head) -> Network:
    settings = dict(sigma="elu", n=4, w_pool=5, head_eta0=5e-3, head_batch=100, head_epochs=3)
    return bp_network(4, 4, HeadSettings(**settings | head), 1, 28, 10).train()


class TestTraining:
    def test_the_bp_model_learns_digits(self, digits):
        """Three seeds reached 0.943 to 0.961."""
        model = bp(head_epochs=5)
        start = model.conv.weight.detach().clone()
        history = train(model, digits.train_images[:2000], digits.train_labels[:2000])
        assert history[-1]["loss"] < history[0]["loss"] / 4
        assert accuracy(model.eval(), digits.test_images, digits.test_labels) > 0.92
        assert not torch.equal(model.conv.weight, start)  # end to end

    def test_the_history(self, digits):
        rows = train(bp(head_epochs=4, head_scheduler="linear"), digits.train_images[:250], digits.train_labels[:250])
        assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
        assert [row["eta"] for row in rows] == [schedule("linear", 5e-3, t, 4) for t in range(4)]
        assert all(row["loss"] > 0 and 0 <= row["accuracy"] <= 1 and row["seconds"] >= 0 for row in rows)

    def test_a_resumed_run_equals_an_uninterrupted_one(self, digits):
        images, labels = digits.train_images[:300], digits.train_labels[:300]
        kept, whole = [], bp(seed=7)
        history = train(whole, images, labels, after_epoch=lambda state: kept.append(copy.deepcopy(state)))
        assert [len(state["history"]) for state in kept] == [1, 2, 3]
        for state in kept[:2]:
            file = io.BytesIO()
            torch.save(state, file)  # plain tensors and numbers: what a checkpoint does
            file.seek(0)
            again = bp(seed=7)
            rows = train(again, images, labels, torch.load(file, weights_only=True))
            assert [row["loss"] for row in rows] == [row["loss"] for row in history]
            for name, value in whole.state_dict().items():
                assert torch.equal(value, again.state_dict()[name]), name

    def test_seed_and_order_decide(self, digits):
        found = []
        for seeds in (dict(seed=1), dict(seed=1), dict(seed=2), dict(seed=1, head_order=1)):
            model = bp(head_epochs=2, **seeds)
            train(model, digits.train_images[:200], digits.train_labels[:200])
            found.append(predict(model.eval(), digits.test_images[:50]))
        assert torch.equal(found[0], found[1])
        assert not torch.equal(found[0], found[2]) and not torch.equal(found[0], found[3])

    def test_a_loss_that_overflows_is_reported(self, digits):
        with pytest.raises(FloatingPointError, match="epoch 1: lower head_eta0"):
            train(bp(head_eta0=1e30), digits.train_images[:300], digits.train_labels[:300])


class TestPrediction:
    def test_pixels_and_floats(self):
        assert to_float(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
        assert torch.equal(to_float(torch.tensor([0.25])), torch.tensor([0.25]))

    def test_the_size_of_the_parts_does_not_matter(self, digits, kh_filters, monkeypatch):
        model = ll(kh_filters).eval()
        whole = predict(model, to_float(digits.test_images[:70]))
        monkeypatch.setattr(training, "part_size", lambda *given: 32)
        logits = predict(model, digits.test_images[:70])
        assert logits.shape == (70, 10) and logits.dtype == torch.float32 and not logits.requires_grad
        torch.testing.assert_close(logits, whole)

    def test_accuracy_counts(self, digits, kh_filters):
        model = ll(kh_filters).eval()
        guess = predict(model, digits.test_images[:40]).argmax(1)
        labels = guess.clone()
        labels[:10] = (labels[:10] + 1) % 10
        assert accuracy(model, digits.test_images[:40], guess) == 1
        assert accuracy(model, digits.test_images[:40], labels) == 0.75
