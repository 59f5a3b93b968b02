"""First-order attacks against models whose answer is known in closed form, and against real images."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from khnb.attacks import fgsm, fgsm_radius, gradient, ifgsm, pgd, pgd_radius
from khnb.models import bp_network
from khnb.settings import HeadSettings
from khnb.training import to_float

DOUBLE = torch.float64
SHAPE = (1, 3, 3)
PGD = dict(step=0.01, radius=0.2, max_steps=40)


class Function(nn.Module):
    """Logits as a plain function of the images."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.eval()

    def forward(self, images):
        return self.function(images)


def linear(classes, seed, dtype=DOUBLE):
    """logits = x W^T + b, with its weights at hand."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((classes, 9), generator=generator, dtype=DOUBLE).to(dtype)
    bias = torch.randn(classes, generator=generator, dtype=DOUBLE).to(dtype) * 0.1
    model = Function(lambda x: x.flatten(1) @ weight.T + bias)
    model.weight, model.bias = weight, bias
    return model


def grey(count, seed, spread=0.1, dtype=DOUBLE):
    """Images close to 0.5: strengths below 0.5 - spread never meet the clipping."""
    noise = torch.rand((count, *SHAPE), generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    return (0.5 + spread * (2 * noise - 1)).to(dtype)


def brightness(curve, classes=2):
    """Class 1 wins where ``curve`` of the first pixel is positive; class 0 has logit 0."""

    def logits(x):
        return torch.stack([torch.zeros_like(x[:, 0, 0, 0]), curve(x[:, 0, 0, 0])], 1)

    return Function(logits)


def tanh_net(seed=0, classes=4):
    """A small network with a gradient that turns along the way."""
    generator = torch.Generator().manual_seed(seed)
    one, two = (torch.randn(s, generator=generator, dtype=DOUBLE) for s in ((16, 9), (classes, 16)))
    return Function(lambda x: torch.tanh(3 * (x.flatten(1) - 0.5) @ one.T) @ two.T)


@pytest.fixture(scope="module")
def network(sample):
    """An untrained BP model in float64, 40 real images and, as labels, what it says of them."""
    model = bp_network(3, 4, HeadSettings(sigma="elu", n=2, w_pool=5), 3, 32, 10).double().eval()
    images = to_float(sample.test_images[:40]).double()
    with torch.no_grad():
        labels = model(images).argmax(1)
    return model, images, labels


def right(model, images, labels):
    with torch.no_grad():
        return model(images).argmax(1) == labels


def labels_of(model, images):
    with torch.no_grad():
        return model(images).argmax(1)


class TestFGSM:
    def test_is_equation_7_3(self):
        model, images = tanh_net(), grey(12, 1, 0.5)
        labels = torch.arange(12) % 4
        for i in range(12):  # one at a time, with autograd's own mean loss
            x = images[i : i + 1].clone().requires_grad_()
            F.cross_entropy(model(x), labels[i : i + 1]).backward()
            expected = (images[i : i + 1] + 0.07 * x.grad.sign()).clamp(0, 1)
            assert torch.equal(fgsm(model, images, labels, 0.07)[i : i + 1], expected)

    def test_gradient_of_a_linear_model(self):
        model, images = linear(3, 0), grey(5, 2)
        labels = torch.tensor([0, 1, 2, 0, 1])
        p = model(images).softmax(1)
        expected = (p - F.one_hot(labels, 3)) @ model.weight  # dL/dx = sum_j (p_j - y_j) W_j
        torch.testing.assert_close(gradient(model, images, labels).flatten(1), expected)

    def test_stays_in_range(self):
        model, images = tanh_net(), grey(20, 3, 0.5)
        attacked = fgsm(model, images, labels_of(model, images), 0.9)
        assert attacked.min() >= 0 and attacked.max() <= 1
        assert (attacked == 0).any() and (attacked == 1).any()

    def test_zero_strength_changes_nothing(self):
        model, images = tanh_net(), grey(5, 3)
        assert torch.equal(fgsm(model, images, torch.zeros(5, dtype=torch.int64), 0), images)

    def test_a_strength_for_each_image(self):
        model, images = tanh_net(), grey(4, 4)
        labels, epsilon = labels_of(model, images), torch.tensor([0.0, 0.01, 0.1, 0.3])
        together = fgsm(model, images, labels, epsilon)
        for i in range(4):
            alone = fgsm(model, images[i : i + 1], labels[i : i + 1], epsilon[i].item())
            assert torch.equal(together[i : i + 1], alone)
        reach = (together - images).abs().flatten(1).amax(1)
        torch.testing.assert_close(reach, epsilon.double(), rtol=0, atol=1e-7)

    @pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
    def test_the_dtype_is_kept(self, dtype):
        model, images = linear(3, 0, dtype), grey(2, 0, dtype=dtype)
        labels = torch.tensor([0, 1])
        assert fgsm(model, images, labels, 0.1).dtype == dtype
        assert pgd(model, images, labels, **PGD).dtype == dtype
        assert ifgsm(model, images, labels, 0.01, 3).dtype == dtype
        assert fgsm_radius(model, images, labels).dtype == DOUBLE
        assert pgd_radius(model, images, labels, **PGD)[0].dtype == DOUBLE

    def test_nothing_given_is_changed(self, network):
        model, images, labels = network
        before = images.clone()
        with torch.no_grad():  # a caller's no_grad does not stop the gradient
            fgsm(model, images, labels, 0.1), pgd(model, images, labels, 0.01, 0.1, 2), fgsm_radius(model, images, labels, 0.01)
        assert torch.equal(images, before) and not images.requires_grad
        assert all(parameter.grad is None for parameter in model.parameters())


class TestFGSMRadius:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 10**6), classes=st.integers(2, 6))
    def test_linear_model_in_closed_form(self, seed, classes):
        model, images = linear(classes, seed), grey(6, seed)
        labels = labels_of(model, images)
        with torch.no_grad():
            logits = model(images)
        margin = logits.gather(1, labels[:, None]) - logits
        away = model.weight - model.weight[labels][:, None]  # B, classes, 9
        p = logits.softmax(1)
        direction = ((p - F.one_hot(labels, classes)) @ model.weight).sign()
        speed = torch.einsum("bcd,bd->bc", away, direction)
        known = torch.where(speed > 1e-12, margin / speed, math.inf).amin(1)
        if classes == 2:  # the textbook's case: margin over l1 norm
            torch.testing.assert_close(known, margin.amax(1) / away.abs().sum(2).amax(1))
        found = fgsm_radius(model, images, labels, eps_max=0.39)
        inside = known < 0.389
        assert torch.isinf(found[known > 0.39 + 1e-6]).all()
        excess = (found - known)[inside]
        assert (excess > -1e-9).all() and (excess < 1e-6 + 1e-9).all()

    def test_the_first_of_several_crossings(self):
        # wrong between 0.1 and 0.2 and again from 0.85: halving [0, 1] looks at 0.5, 0.75, 0.875 and ends at 0.85
        model = brightness(lambda t: (t - 0.1) * (t - 0.2) * (t - 0.85))
        images, labels = torch.zeros((1, *SHAPE), dtype=DOUBLE), torch.tensor([0])
        low, high = 0.0, 1.0
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if right(model, fgsm(model, images, labels, middle), labels) else (low, middle)
        assert abs(high - 0.85) < 1e-5
        assert fgsm_radius(model, images, labels).item() == pytest.approx(0.1, abs=1.01e-6)

    def test_a_crossing_as_narrow_as_the_scan_is_seen(self):
        model = brightness(lambda t: 1e-3 * t + 0.001001 - (t - 0.5).abs() if t.max() > 0.3 else t - 1)
        images, labels = torch.zeros((1, *SHAPE), dtype=DOUBLE), torch.tensor([0])
        found = fgsm_radius(model, images, labels).item()
        assert 0.498 < found < 0.5

    def test_an_image_already_wrong_has_radius_0(self):
        model, images = linear(3, 1), grey(8, 1)
        labels = (labels_of(model, images) + 1) % 3
        assert (fgsm_radius(model, images, labels) == 0).all()

    def test_an_image_never_fooled_has_radius_inf(self):
        model = Function(lambda x: torch.tensor([2.0, 1.0], dtype=x.dtype).expand(len(x), 2) + 0 * x.flatten(1)[:, :1])
        assert torch.isinf(fgsm_radius(model, grey(3, 0), torch.zeros(3, dtype=torch.int64))).all()

    def test_beyond_eps_max_is_inf(self):
        model = brightness(lambda t: t - 0.3)
        images, labels = torch.zeros((1, *SHAPE), dtype=DOUBLE), torch.tensor([0])
        assert torch.isinf(fgsm_radius(model, images, labels, eps_max=0.2999)).all()
        assert fgsm_radius(model, images, labels, eps_max=0.3001).item() == pytest.approx(0.3, abs=1.01e-6)

    def test_clipping_can_save_an_image(self):
        # the first pixel starts at 0.9 and has only 0.1 to go: a threshold at 1.05 is out of reach, 0.95 is not
        images, labels = torch.full((1, *SHAPE), 0.9, dtype=DOUBLE), torch.tensor([0])
        assert torch.isinf(fgsm_radius(brightness(lambda t: t - 1.05), images, labels)).all()
        assert fgsm_radius(brightness(lambda t: t - 0.95), images, labels).item() == pytest.approx(0.05, abs=1.01e-6)

    @pytest.mark.parametrize("seed", range(4))
    def test_every_radius_holds(self, seed):
        model, images = tanh_net(seed), grey(60, seed, 0.5)
        labels = labels_of(model, images)
        radius = fgsm_radius(model, images, labels)
        finite = radius.isfinite()
        assert finite.sum() > 20
        x, y, r = images[finite], labels[finite], radius[finite]
        assert not right(model, fgsm(model, x, y, r), y).any()
        assert right(model, fgsm(model, x, y, r - 1e-6), y).all()
        for i in range(20):  # no earlier crossing on the scanned grid
            grid = torch.arange(0, r[i].item() - 1e-6, 1e-3, dtype=DOUBLE)
            many = x[i : i + 1].expand(len(grid), *SHAPE)
            assert right(model, fgsm(model, many, y[i].expand(len(grid)), grid), y[i]).all()

    def test_every_radius_of_real_images_holds(self, network):
        model, images, labels = network
        radius = fgsm_radius(model, images, labels)
        finite = radius.isfinite()
        assert finite.sum() > 10 and (radius > 0).all()
        assert not right(model, fgsm(model, images, labels, radius.clamp_max(1)), labels)[finite].any()
        assert right(model, fgsm(model, images, labels, (radius - 1e-6).clamp_max(1)), labels)[finite].all()

    def test_radii_are_whole_multiples_of_tol_in_float64(self):
        model, images = tanh_net(5), grey(60, 5, 0.5)
        radius = fgsm_radius(model, images, labels_of(model, images))
        count = radius[radius.isfinite()] / 1e-6
        assert len(count) and (count - count.round()).abs().max() < 1e-6  # float32 would be off by up to 0.06

    def test_an_image_does_not_see_the_others(self):
        model, images = tanh_net(2), grey(30, 2, 0.5)
        labels = labels_of(model, images)
        alone = torch.cat([fgsm_radius(model, images[i : i + 1], labels[i : i + 1]) for i in range(30)])
        assert torch.equal(fgsm_radius(model, images, labels), alone)

    def test_a_tolerance_that_is_asked_for(self):
        model = brightness(lambda t: t - math.pi / 10)
        images, labels = torch.zeros((1, *SHAPE), dtype=DOUBLE), torch.tensor([0])
        for tol in (1e-2, 1e-4, 1e-8):
            excess = fgsm_radius(model, images, labels, scan=1e-2, tol=tol).item() - math.pi / 10
            assert -1e-9 < excess <= tol + 1e-9


class TestPGD:
    def reference(self, model, image, label, step, radius, max_steps):
        """Eq. 7.5 for one image, without stopping: all iterates."""
        x, path = image.clone(), [image.clone()]
        for _ in range(max_steps):
            leaf = x.clone().requires_grad_()
            F.cross_entropy(model(leaf[None]), label[None]).backward()
            x = x + step * leaf.grad.sign()
            x = image + (x - image).clamp(-radius, radius)
            x = x.clamp(0, 1)
            path.append(x)
        return torch.stack(path)

    def test_is_equation_7_5(self):
        model, images = tanh_net(3), grey(10, 3, 0.5)
        labels = labels_of(model, images)
        got = pgd(model, images, labels, 0.02, 0.05, 7, stop_when_fooled=False)
        for i in range(10):
            path = self.reference(model, images[i], labels[i], 0.02, 0.05, 7)
            torch.testing.assert_close(got[i], path[-1], rtol=0, atol=1e-12)

    def test_stops_at_the_first_wrong_iterate(self):
        model, images = tanh_net(3), grey(40, 3, 0.5)
        labels = labels_of(model, images)
        got = pgd(model, images, labels, **PGD)
        radii, steps = pgd_radius(model, images, labels, **PGD)
        fooled = steps > 0
        assert 5 < fooled.sum() < 40  # some of both
        for i in range(40):
            path = self.reference(model, images[i], labels[i], *PGD.values())
            wrong = torch.nonzero(~right(model, path, labels[i]))[:, 0]
            first = int(wrong[0]) if len(wrong) else -1
            assert steps[i] == first
            torch.testing.assert_close(got[i], path[first], rtol=0, atol=1e-12)
            distance = (path[first] - images[i]).abs().max().item() if first >= 0 else math.inf
            assert radii[i].item() == pytest.approx(distance, abs=1e-12)

    def test_wrong_at_n_and_right_at_n_minus_1(self, network):
        model, images, labels = network
        options = dict(step=0.004, radius=0.1)
        radii, steps = pgd_radius(model, images, labels, **options, max_steps=30)
        assert (steps > 1).sum() > 5
        for n in steps[steps > 0].unique().tolist():
            who = steps == n
            x, y = images[who], labels[who]
            at = pgd(model, x, y, **options, max_steps=n, stop_when_fooled=False)
            assert not right(model, at, y).any()
            torch.testing.assert_close((at - x).abs().flatten(1).amax(1), radii[who])
            if n > 1:
                assert right(model, pgd(model, x, y, **options, max_steps=n - 1, stop_when_fooled=False), y).all()

    def test_goes_on_when_told_to(self):
        model, images = linear(2, 3), grey(12, 0)
        labels = labels_of(model, images)
        stopped = pgd(model, images, labels, **PGD)
        going = pgd(model, images, labels, **PGD, stop_when_fooled=False)
        fooled = ~right(model, stopped, labels)
        assert fooled.any()
        reach = (going - images).abs().flatten(1).amax(1)
        torch.testing.assert_close(reach, torch.full_like(reach, 0.2))  # a linear model's gradient never turns
        near = (stopped - images).abs().flatten(1).amax(1)[fooled]
        assert near.max() < 0.2 + 1e-9 and (near < 0.19).any()

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10**6), radius=st.floats(1e-3, 1), step=st.floats(1e-3, 0.5), start=st.booleans())
    def test_never_leaves_the_ball_or_the_range(self, seed, radius, step, start):
        model, images = tanh_net(seed % 7), grey(8, seed, 0.5)
        attacked = pgd(model, images, labels_of(model, images), step, radius, 6, False, start)
        assert ((attacked - images).abs() <= radius + 1e-12).all()
        assert attacked.min() >= 0 and attacked.max() <= 1

    def test_ifgsm_is_pgd_in_a_ball_nobody_can_leave(self):
        model, images = tanh_net(1), grey(20, 1, 0.5)
        labels = labels_of(model, images)
        for stop in (True, False):
            assert torch.equal(ifgsm(model, images, labels, 0.03, 9, stop), pgd(model, images, labels, 0.03, 1.0, 9, stop))
        far = (ifgsm(model, images, labels, 0.1, 9, False) - images).abs().max()
        assert far > 0.3  # the ball of a smaller radius would have held it

    def test_one_step_is_fgsm(self):
        model, images = tanh_net(1), grey(20, 1, 0.5)
        labels = labels_of(model, images)
        assert torch.equal(ifgsm(model, images, labels, 0.05, 1), fgsm(model, images, labels, 0.05))

    def test_already_wrong_and_never_fooled(self):
        model, images = linear(3, 1), grey(4, 1)
        wrong = (labels_of(model, images) + 1) % 3
        radii, steps = pgd_radius(model, images, wrong, **PGD)
        assert (radii == 0).all() and (steps == 0).all() and steps.dtype == torch.int64
        assert torch.equal(pgd(model, images, wrong, **PGD), images)
        radii, steps = pgd_radius(brightness(lambda t: t - 2), images, torch.zeros(4, dtype=torch.int64), **PGD)
        assert torch.isinf(radii).all() and (steps == -1).all()

    def test_a_random_start_is_drawn_from_the_seed(self):
        model, images = tanh_net(1), grey(10, 1, 0.5)
        labels = labels_of(model, images)
        torch.manual_seed(3)
        one = pgd(model, images, labels, **PGD, random_start=True)
        two = pgd(model, images, labels, **PGD, random_start=True)
        torch.manual_seed(3)
        assert torch.equal(pgd(model, images, labels, **PGD, random_start=True), one) and not torch.equal(one, two)

    def test_is_at_least_as_strong_as_fgsm_on_a_curved_model(self):
        model, images = tanh_net(4), grey(60, 4, 0.5)
        labels = labels_of(model, images)
        along = fgsm_radius(model, images, labels, eps_max=0.2) <= 0.2
        around = pgd_radius(model, images, labels, 0.005, 0.2, 80)[0] <= 0.2 + 1e-9
        assert around.sum() >= along.sum() > 10


class TestRestarts:
    @staticmethod
    def valley():
        """Class 1 wins where the first pixel is below 0.2; the gradient at 0.5 points up, from below 0.4 down: only a random start helps."""
        return brightness(lambda t: torch.where(t > 0.4, 0.3 * t - 1, (0.2 - t) * 5))

    def test_find_what_one_start_does_not(self):
        model, images, labels = self.valley(), torch.full((64, *SHAPE), 0.5, dtype=DOUBLE), torch.zeros(64, dtype=torch.int64)
        amounts = dict(step=0.05, radius=0.4, max_steps=20)
        assert right(model, pgd(model, images, labels, **amounts), labels).all()
        torch.manual_seed(0)
        once = right(model, pgd(model, images, labels, **amounts, random_start=True), labels).sum()
        torch.manual_seed(0)
        attacked = pgd(model, images, labels, **amounts, random_start=True, restarts=4)
        left = right(model, attacked, labels).sum()
        assert 64 * 0.45 < once < 64 * 0.8 and left < once / 2  # a start is below 0.4 with probability 3/8
        assert (attacked - images).abs().max() <= 0.4 + 1e-12

    def test_without_a_random_start_are_refused(self):
        with pytest.raises(ValueError, match="restarts=2 is not valid without random_start=True"):
            pgd(linear(2, 0), grey(2, 0), torch.tensor([0, 1]), **PGD, restarts=2)

    @pytest.mark.parametrize("value", [0, 1.5, -1])
    def test_as_many_as_there_can_be(self, value):
        with pytest.raises(ValueError, match=f"restarts={value} is not valid"):
            pgd(linear(2, 0), grey(2, 0), torch.tensor([0, 1]), **PGD, random_start=True, restarts=value)


class TestL2:
    """The fast gradient method and PGD in the Euclidean norm, to compare."""

    def test_linear_model_in_closed_form(self):
        """Between two classes the shortest way is along the difference of their weights: margin / its length, for both attacks."""
        model, images = linear(2, 5), grey(20, 5)
        labels = labels_of(model, images)
        with torch.no_grad():
            logits = model(images)
        known = (logits[:, 0] - logits[:, 1]).abs() / (model.weight[0] - model.weight[1]).norm()
        inside = known < 0.3
        assert inside.sum() > 5
        excess = (fgsm_radius(model, images, labels, norm="l2") - known)[inside]
        assert (excess > -1e-9).all() and (excess < 1e-6 + 1e-9).all()
        radii, steps = pgd_radius(model, images, labels, 1e-3, 0.5, 400, norm="l2")
        assert torch.equal(steps[inside], torch.ceil(known[inside] / 1e-3 - 1e-9).long())
        torch.testing.assert_close(radii[inside], steps[inside].double() * 1e-3)

    @settings(max_examples=20, deadline=None)
    @given(seed=st.integers(0, 10**6), radius=st.floats(1e-3, 2), step=st.floats(1e-3, 1), start=st.booleans())
    def test_never_leaves_the_ball_or_the_range(self, seed, radius, step, start):
        model, images = tanh_net(seed % 7), grey(8, seed, 0.5)
        attacked = pgd(model, images, labels_of(model, images), step, radius, 6, False, start, norm="l2")
        assert ((attacked - images).flatten(1).norm(dim=1) <= radius + 1e-12).all()
        assert attacked.min() >= 0 and attacked.max() <= 1

    def test_a_gradient_too_small_to_be_squared(self):
        model = Function(lambda x: linear(3, 0, torch.float32)(x) * 1e-25)
        images, labels = grey(4, 0, dtype=torch.float32), torch.tensor([0, 1, 2, 0])
        moved = (fgsm(model, images, labels, 0.1, norm="l2") - images).flatten(1).norm(dim=1)
        torch.testing.assert_close(moved, torch.full((4,), 0.1))

    def test_another_norm(self):
        for attack in (fgsm_radius, lambda *given, **more: pgd(*given, **PGD, **more)):
            with pytest.raises(ValueError, match="norm='l1' is not valid: one of linf, l2"):
                attack(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), norm="l1")


class TestLogOdds:
    def test_rises_along_the_same_direction(self):
        """In exact arithmetic each image's gradient is a positive multiple of the cross-entropy's."""
        model, images = tanh_net(3), grey(30, 3, 0.5)
        labels = labels_of(model, images)
        one, two = (gradient(model, images, labels, loss).flatten(1) for loss in ("cross-entropy", "log-odds"))
        ratio = (two / one)[:, :1]
        torch.testing.assert_close(two, one * ratio)
        assert (ratio > 0).all()
        assert torch.equal(fgsm(model, images, labels, 0.05), fgsm(model, images, labels, 0.05, loss="log-odds"))
        for one, two in zip(*(pgd_radius(model, images, labels, **PGD, loss=loss) for loss in ("cross-entropy", "log-odds")), strict=True):
            assert torch.equal(one, two)

    def test_another_loss(self):
        with pytest.raises(ValueError, match="loss='hinge' is not valid: one of cross-entropy, log-odds"):
            fgsm(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), 0.1, loss="hinge")


class TestWithoutClipping:
    """Eqs. 7.4 and 7.5 as printed, for which the thesis mentions no clipping."""

    def test_a_pixel_goes_on_beyond_white(self):
        images, labels = torch.full((1, *SHAPE), 0.9, dtype=DOUBLE), torch.tensor([0])
        model = brightness(lambda t: t - 1.05)
        assert fgsm_radius(model, images, labels, clip=False).item() == pytest.approx(0.15, abs=1.01e-6)
        assert pgd_radius(model, images, labels, 0.01, 0.3, 50, clip=False)[1].item() == 16  # at 15 steps the pixel is at 1.05 or a rounding below
        assert pgd_radius(model, images, labels, 0.01, 0.3, 50)[1].item() == -1
        assert fgsm(model, images, labels, 0.3, clip=False).max().item() == pytest.approx(1.2)

    def test_the_ball_still_holds(self):
        images, labels = torch.full((1, *SHAPE), 0.9, dtype=DOUBLE), torch.tensor([0])
        attacked = pgd(brightness(lambda t: t - 9), images, labels, 0.1, 0.25, 9, clip=False)
        assert (attacked - images).abs().max().item() == pytest.approx(0.25)


CALLS = {
    "fgsm": lambda m, x, y: fgsm(m, x, y, 0.1),
    "fgsm_radius": fgsm_radius,
    "ifgsm": lambda m, x, y: ifgsm(m, x, y, 0.01, 3),
    "pgd": lambda m, x, y: pgd(m, x, y, **PGD),
    "pgd_radius": lambda m, x, y: pgd_radius(m, x, y, **PGD),
}


def training_model():
    return linear(3, 0).train()


def probabilities():
    inner = linear(3, 0)
    return Function(lambda x: inner(x).softmax(1))


def one_logit_an_image():
    return Function(lambda x: x.flatten(1).sum(1))


def pixel(value):
    images = grey(2, 0)
    images[1, 0, 2, 2] = value
    return images


REFUSED = {
    "pixels from 0 to 255": (linear, grey(2, 0) * 255, [0, 1], r"range from .* to .*; expected \[0, 1\].*255"),
    "negative": (linear, pixel(-1e-3), [0, 1], r"expected \[0, 1\]"),
    "just above one": (linear, pixel(1.001), [0, 1], r"expected \[0, 1\]"),
    "nan": (linear, pixel(math.nan), [0, 1], r"nan.*expected \[0, 1\]"),
    "inf": (linear, pixel(math.inf), [0, 1], r"expected \[0, 1\]"),
    "bytes": (linear, (grey(2, 0) * 255).byte(), [0, 1], "uint8.*float"),
    "no batch": (linear, grey(2, 0)[0], [0], r"\(1, 3, 3\).*\(B, C, H, W\)"),
    "too few labels": (linear, grey(2, 0), [0], r"labels are \(1,\).*\(2,\)"),
    "labels in a column": (linear, grey(2, 0), [[0], [1]], r"labels are \(2, 1\)"),
    "labels with a point": (linear, grey(2, 0), [0.0, 1.0], "float.*whole numbers"),
    "label too large": (linear, grey(2, 0), [0, 3], "0 to 3; the model has 3 classes"),
    "label negative": (linear, grey(2, 0), [-1, 1], "-1 to 1; the model has 3 classes"),
    "training mode": (training_model, grey(2, 0), [0, 1], r"training mode.*model.eval\(\)"),
    "probabilities": (probabilities, grey(2, 0), [0, 1], "probabilities.*logits"),
    "not a number": (lambda: Function(lambda x: linear(3, 0)(x) * math.nan), grey(2, 0), [0, 1], "logits that are not finite"),
    "shape of the logits": (one_logit_an_image, grey(2, 0), [0, 1], r"model gave shape \(2,\).*\(images, classes\)"),
}


class TestRefused:
    @pytest.mark.parametrize("attack", CALLS)
    @pytest.mark.parametrize("case", REFUSED)
    def test_bad_input(self, case, attack):
        make, images, labels, message = REFUSED[case]
        model = linear(3, 0) if make is linear else make()
        with pytest.raises(ValueError, match=message) as caught:
            CALLS[attack](model, images, torch.tensor(labels))
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["step", "radius", "max_steps"])
    def test_amounts_of_pgd(self, name, value):
        for attack in (pgd, pgd_radius):
            with pytest.raises(ValueError, match=f"{name}=.*positive"):
                attack(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), **(PGD | {name: value}))

    @pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf])
    @pytest.mark.parametrize("name", ["eps_max", "scan", "tol"])
    def test_amounts_of_the_scan(self, name, value):
        with pytest.raises(ValueError, match=f"{name}=.*positive"):
            fgsm_radius(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), **{name: value})

    @pytest.mark.parametrize("epsilon", [-0.1, math.nan, [0.1, -0.1], [0.1, math.nan]])
    def test_strengths(self, epsilon):
        with pytest.raises(ValueError, match="epsilon.*>= 0"):
            fgsm(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), torch.tensor(epsilon))

    def test_strengths_of_another_number_of_images(self):
        with pytest.raises(ValueError, match="epsilon"):
            fgsm(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), torch.tensor([0.1, 0.1, 0.1]))

    def test_an_infinite_strength_gives_no_nan(self):
        model = brightness(lambda t: t - 0.3)  # all other pixels have gradient 0, and inf * 0 is nan
        try:
            attacked = fgsm(model, grey(1, 0), torch.tensor([0]), math.inf)
        except ValueError:
            return
        assert attacked.isfinite().all()

    def test_half_a_step(self):
        with pytest.raises(ValueError, match="max_steps"):
            pgd(linear(3, 0), grey(2, 0), torch.tensor([0, 1]), **(PGD | dict(max_steps=2.5)))


class TestEmpty:
    def test_an_empty_batch_gives_an_empty_answer(self):
        model, images, labels = linear(3, 0), grey(0, 0), torch.zeros(0, dtype=torch.int64)
        for attacked in (fgsm(model, images, labels, 0.1), pgd(model, images, labels, **PGD), ifgsm(model, images, labels, 0.1, 2)):
            assert attacked.shape == images.shape and attacked.dtype == images.dtype
        assert fgsm_radius(model, images, labels).shape == (0,)
        radii, steps = pgd_radius(model, images, labels, **PGD)
        assert radii.shape == steps.shape == (0,) and radii.dtype == DOUBLE and steps.dtype == torch.int64

    def test_an_empty_batch_is_checked_as_well(self):
        with pytest.raises(ValueError, match="training mode"):
            fgsm_radius(training_model(), grey(0, 0), torch.zeros(0, dtype=torch.int64))
