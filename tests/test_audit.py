"""The audit tells models that resist from models whose gradient leads nowhere."""

import numpy as np
import pytest
import torch
from torch import nn

from khnb import attacks
from khnb.audit import Around, audit, verdict
from khnb.heads import Head, train_heads
from khnb.models import bp_network, ll_network
from khnb.settings import HeadSettings
from khnb.training import to_float, train

torchattacks = pytest.importorskip("torchattacks")

HEAD = dict(sigma="gelu", w_pool=5, head_epochs=8, head_batch=100)


@pytest.fixture(scope="module")
def digit_models(digits, kh_filters):
    """An LL and a BP model of pale digits on grey, with 100 that both classify correctly.

    On black, the LL model is fooled by noise, and the audit says so: patches of nothing but noise are scaled up to unit norm."""

    def pale(images):
        return 0.2 + 0.6 * to_float(images)

    ll = Head(ll_network(kh_filters, 2, HeadSettings(**HEAD, n=4), 28, 10).eval())
    train_heads([ll], pale(digits.train_images[:2000]), digits.train_labels[:2000])
    bp = bp_network(4, 4, HeadSettings(**HEAD | dict(sigma="elu"), n=1), 1, 28, 10)
    train(bp.train(), pale(digits.train_images[:2000]), digits.train_labels[:2000])
    images, labels = pale(digits.test_images), digits.test_labels
    with torch.no_grad():
        right = (ll.network(images).argmax(1) == labels) & (bp.eval()(images).argmax(1) == labels)
    chosen = torch.nonzero(right)[:100, 0]
    return dict(LL=ll.network, BP=bp), images[chosen], labels[chosen]


def at_median(model, images, labels) -> float:
    """The strength at which FGSM fools half of the images."""
    return float(np.median(attacks.fgsm_radius(model, images, labels)))


@pytest.mark.parametrize("kind", ["LL", "BP"])
def test_of_an_honest_model(digit_models, kind):
    models, images, labels = digit_models
    model = models[kind]
    state = torch.random.get_rng_state()
    found = audit(model, images, labels, at_median(model, images, labels), steps=20)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert verdict(found, len(images)) == "no sign of masking"
    assert found["zero_gradients"] == 0 and found["noise"] < 0.2 and found["unbounded"] == 1
    assert 0.45 <= found["fgsm"] <= 0.55 and found["fgsm"] <= found["pgd"] <= found["restarts"]
    assert ("around" in found) == (kind == "LL") and found["log_odds"] == found["fgsm"]


def test_around_has_the_same_logits_and_another_gradient(digit_models):
    models, images, labels = digit_models
    model, around = models["LL"], Around(models["LL"])
    with torch.no_grad():
        torch.testing.assert_close(around(images), model(images))
    away = torch.nn.functional.cosine_similarity(attacks.gradient(model, images, labels).flatten(1), attacks.gradient(around, images, labels).flatten(1))
    assert away.median() < 0.95


class Masked(nn.Module):
    """A model that rounds its pixels, so that no gradient comes through, or all but a trace of it."""

    def __init__(self, model, levels: int, leak: float):
        super().__init__()
        self.model, self.levels, self.leak, self.head, self.conv = model, levels, leak, model.head, nn.Identity()
        self.eval()

    def forward(self, images):
        rounded = (images * self.levels).round() / self.levels
        return self.model(rounded.detach() + self.leak * (images - images.detach()))


def test_of_a_model_without_gradients(digit_models):
    models, images, labels = digit_models
    found = audit(Masked(models["BP"], 16, 0.0), images, labels, 0.1, steps=10)
    assert found["zero_gradients"] == 1 and found["fgsm"] == found["pgd"] == found["unbounded"] == 0
    said = verdict(found, len(images))
    assert "100% of the images have no gradient" in said and "a large ball does not suffice" in said and "noise is as good" in said


def test_of_a_model_with_a_wrong_gradient(digit_models):
    """The gradient points the other way: iterating with it helps nobody, noise is better."""
    models, images, labels = digit_models
    found = audit(Masked(models["BP"], 256, -1.0), images, labels, at_median(models["BP"], images, labels), steps=10)
    assert found["zero_gradients"] == 0 and "noise is as good as the gradient" in verdict(found, len(images))
    assert "a large ball does not suffice" in verdict(found, len(images))


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(pgd=0.4, restarts=0.42, apgd=0.43), "iterating does not help"), (dict(noise=0.5), "noise is as good"), (dict(around=0.7), "around the normalisation"), (dict(log_odds=0.6), "confidence beyond the precision"),
        (dict(restarts=0.9), "restarts find much more"), (dict(apgd=0.9), "APGD finds much more"), (dict(unbounded=0.9), "a large ball"),
        (dict(zero_gradients=0.02), "2% of the images have no gradient"),
    ],
)  # fmt: skip
def test_each_sign(changed, said):
    healthy = dict(zero_gradients=0.0, zero_pixels=0.01, noise=0.01, fgsm=0.5, around=0.4, pgd=0.6, restarts=0.62, apgd=0.63, unbounded=1.0)
    assert verdict(healthy, 500) == "no sign of masking"
    assert said in verdict(healthy | changed, 500) and ";" not in verdict(healthy | changed, 500)
    without = {name: share for name, share in healthy.items() if name != "around"}
    assert verdict(without, 500) == "no sign of masking"


def test_of_patches_without_light(digits, kh_filters):
    """Digits on black: what the normalisation makes of noise there is what fools the model, and the verdict names it."""
    ll = Head(ll_network(kh_filters, 2, HeadSettings(**HEAD, n=4), 28, 10).eval())
    train_heads([ll], digits.train_images[:2000], digits.train_labels[:2000])
    images, labels = to_float(digits.test_images[:150]), digits.test_labels[:150]
    with torch.no_grad():
        right = ll.network(images).argmax(1) == labels
    images, labels = images[right], labels[right]
    found = audit(ll.network, images, labels, at_median(ll.network, images, labels), steps=10)
    assert found["zero_pixels"] > 0.3 and "noise is as good as the gradient" in verdict(found, len(images))
