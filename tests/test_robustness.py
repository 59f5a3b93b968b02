"""The fit of section 7.2: known curves come back, curves without an inflection are told apart, errors are honest."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, curve_fit

from khnb.robustness import MIN_IMAGES, accepted, covariance_error, curve, fit, five_parameter, inflection, logistic

KNOWN = [(300.0, 0.05, 1.0), (300.0, 0.05, 0.1), (300.0, 0.1, 3.0), (60.0, 0.3, 0.5), (3000.0, 0.006, 1.0)]


def quantile(level, k, R, nu):
    """Where :func:`logistic` equals 1 - level."""
    return R - np.log((level**-nu - 1) / nu) / k


def exact(n, k, R, nu):
    return quantile((np.arange(n) + 0.5) / n, k, R, nu)


def drawn(n, seed, k=300.0, R=0.05, nu=1.0):
    return np.maximum(quantile(np.random.default_rng(seed).uniform(size=n), k, R, nu), 0)


class TestCurves:
    def test_against_the_formula(self):
        eps = np.linspace(0, 0.2, 41)
        for k, R, nu in KNOWN[:4]:
            np.testing.assert_allclose(logistic(eps, k, R, nu), 1 - (1 + nu * np.exp(-k * (eps - R))) ** (-1 / nu), atol=1e-13)

    def test_nu_1_is_the_logistic_curve(self):
        eps = np.linspace(-1, 1, 21)
        np.testing.assert_allclose(logistic(eps, 7, 0.1, 1), 1 / (1 + np.exp(7 * (eps - 0.1))), atol=1e-14)

    def test_nu_0_is_gompertz(self):
        eps = np.linspace(-1, 1, 21)
        np.testing.assert_allclose(logistic(eps, 7, 0.1, 1e-9), 1 - np.exp(-np.exp(-7 * (eps - 0.1))), atol=1e-8)

    def test_falls_from_1_to_0_without_overflow(self):
        with np.errstate(over="raise", invalid="raise", divide="raise"):
            value = logistic(np.array([-1e6, -1.0, 0.0, 0.05, 1.0, 1e6]), 300, 0.05, 0.7)
        assert value[0] == 1 and value[-1] == 0 and (np.diff(value) <= 0).all()

    @settings(max_examples=60, deadline=None)
    @given(Q=st.floats(0.05, 20), B=st.floats(0.5, 20), D=st.floats(0.05, 5), M=st.floats(-1, 1), nu=st.floats(0.1, 5), sign=st.sampled_from([1, -1]))
    def test_five_parameters_are_three(self, Q, B, D, M, nu, sign):
        R = inflection(Q, B, D, M, sign * nu)
        eps = np.linspace(R - 5 * D / B, R + 5 * D / B, 31)
        np.testing.assert_allclose(five_parameter(eps, Q, B, D, M, sign * nu), logistic(eps, B / D, R, nu), atol=1e-10)

    @settings(max_examples=40, deadline=None)
    @given(Q=st.floats(0.05, 20), B=st.floats(0.5, 20), D=st.floats(0.05, 5), M=st.floats(-1, 1), nu=st.floats(0.1, 5))
    def test_equation_7_7_is_where_the_second_derivative_vanishes(self, Q, B, D, M, nu):
        R, h = inflection(Q, B, D, M, nu), 1e-3 * D / B

        def second(eps):
            f = five_parameter(np.array([eps - h, eps, eps + h]), Q, B, D, M, nu)
            return f[0] - 2 * f[1] + f[2]

        reach = 0.5 * D / B  # concave before, convex after
        assert second(R - reach) < 0 < second(R + reach)
        assert abs(brentq(second, R - reach, R + reach) - R) < 1e-3 * D / B


class TestCurve:
    def test_sorts_and_counts_half(self):
        eps, accuracy = curve([0.3, 0.1, 0.2, 0.4])
        assert eps.tolist() == [0.1, 0.2, 0.3, 0.4] and accuracy.tolist() == [0.875, 0.625, 0.375, 0.125]

    def test_leaves_out_what_was_never_fooled(self):
        eps, accuracy = curve([np.inf, 0.1, np.inf, 0.2])
        assert eps.tolist() == [0.1, 0.2] and accuracy.tolist() == [0.75, 0.25]

    def test_or_keeps_it(self):
        eps, accuracy = curve([np.inf, 0.1, np.inf, 0.2], "kept")
        assert eps.tolist() == [0.1, 0.2] and accuracy.tolist() == [0.875, 0.625]

    def test_a_way_there_is_not(self):
        with pytest.raises(ValueError, match="survivors='lost' is not valid: one of dropped, kept"):
            curve([0.1], "lost")

    def test_of_nothing(self):
        assert [len(part) for part in curve([])] == [0, 0] == [len(part) for part in curve([np.inf])]


class TestFit:
    @pytest.mark.parametrize("k, R, nu", KNOWN)
    def test_recovers_the_curve_from_its_quantiles(self, k, R, nu):
        radii = exact(1000, k, R, nu)
        assert (radii >= 0).all()
        found = fit(radii, bootstrap=10)
        assert found.status == "ok"
        assert (found.k, found.R, found.nu) == (pytest.approx(k, rel=2e-3), pytest.approx(R, rel=1e-4), pytest.approx(nu, rel=2e-2))
        assert found.mse < 1e-9 and found.r2 > 1 - 1e-7
        assert found.f0 == pytest.approx(logistic(0.0, k, R, nu), abs=1e-4)

    def test_the_order_does_not_matter(self):
        radii = drawn(300, 0)
        one, two = fit(radii, bootstrap=5), fit(np.random.default_rng(9).permutation(radii), bootstrap=5)
        assert (one.R, one.k, one.nu) == (two.R, two.k, two.nu)

    @pytest.mark.parametrize("factor", [1e-4, 1e3])
    def test_scales_with_the_radii(self, factor):
        one, two = fit(drawn(300, 0), bootstrap=20), fit(drawn(300, 0) * factor, bootstrap=20)
        assert two.R == pytest.approx(one.R * factor, rel=1e-4) and two.R_err == pytest.approx(one.R_err * factor, rel=1e-2)

    def test_the_same_seed_gives_the_same_errors(self):
        radii = drawn(200, 0)
        assert fit(radii, bootstrap=20, seed=1) == fit(radii, bootstrap=20, seed=1) != fit(radii, bootstrap=20, seed=2)

    @pytest.mark.parametrize("seed", range(4))
    def test_an_exponential_decay_has_no_inflection(self, seed):
        found = fit(np.random.default_rng(seed).exponential(0.02, 2000))
        assert found.status == "no-inflection" and np.isnan(found.R) and np.isnan(found.R_err) and np.isnan(found.R_ci).all()
        assert found.n == 2000 and np.isfinite([found.k, found.nu, found.mse, found.r2, found.f0]).all()

    @pytest.mark.parametrize("seed", range(4))
    def test_a_steeper_decay_has_none_either(self, seed):
        found = fit(0.02 * np.random.default_rng(seed).weibull(0.8, 2000))
        assert found.status == "no-inflection" and np.isnan(found.R)

    @pytest.mark.parametrize("seed", range(3))
    def test_a_hump_has_one(self, seed):
        radii = 0.02 * np.random.default_rng(seed).weibull(2.5, 2000)  # density largest at 0.02 (3/5)^(2/5) = 0.0163
        found = fit(radii, bootstrap=10)
        assert found.status == "ok" and found.R == pytest.approx(0.0163, rel=0.1)

    @pytest.mark.parametrize("radii", [[], [0.1], [np.inf] * 100, [0.0] * 100, exact(MIN_IMAGES - 1, *KNOWN[0])])
    def test_too_few(self, radii):
        found = fit(radii)
        assert found.status == "too-few" and np.isnan(found.R) and found.n == len(radii)

    def test_just_enough(self):
        assert fit(exact(MIN_IMAGES, *KNOWN[0]), bootstrap=5).status == "ok"
        assert fit([*exact(MIN_IMAGES - 1, *KNOWN[0]), *[np.inf] * 50], bootstrap=5).status == "too-few"

    def test_survivors_are_counted_and_left_out(self):
        radii = exact(400, *KNOWN[0])
        alone, crowd = fit(radii, bootstrap=20), fit([*radii, *[np.inf] * 100], bootstrap=20)
        assert (crowd.n, crowd.n_survived, alone.n, alone.n_survived) == (500, 100, 400, 0)
        assert crowd.status == "ok" and (crowd.R, crowd.k, crowd.nu) == (alone.R, alone.k, alone.nu)

    def test_keeping_survivors_undoes_the_cut(self):
        """An attack that gives up at 0.06, where up to a third of the images are still right. Kept, they leave R where it is; dropped, they move it,
        though not by much: what is left is steepest close to the cut."""
        for R in (0.05, 0.055, 0.058):
            radii = exact(1000, 400.0, R, 1.0)
            cut = np.where(radii <= 0.06, radii, np.inf)
            dropped, kept = fit(cut, bootstrap=5), fit(cut, bootstrap=5, survivors="kept")
            assert kept.status == "ok" and kept.R == pytest.approx(R, rel=1e-3) and kept.n_survived == dropped.n_survived == np.isinf(cut).sum() > 10
            assert dropped.status == "ok" and abs(kept.R - R) < abs(dropped.R - R)
        assert 0.055 < dropped.R < 0.0577 and dropped.k > 2 * kept.k

    def test_an_inflection_beyond_the_radii_is_none(self):
        radii = exact(1000, 200.0, 0.05, 1.0)
        found = fit(np.where(radii <= 0.04, radii, np.inf), bootstrap=5, survivors="kept")
        assert found.status == "no-inflection" and np.isnan(found.R)

    def test_the_error_of_survivors_kept_is_the_scatter(self):
        cut = [np.where(radii <= 0.055, radii, np.inf) for radii in (drawn(300, seed) for seed in range(12))]
        fits = [fit(radii, bootstrap=40, survivors="kept") for radii in cut]
        assert 0.5 < np.mean([f.R_err for f in fits]) / np.std([f.R for f in fits], ddof=1) < 2

    def test_steps_of_pgd_are_no_trouble(self):
        radii = drawn(500, 1)
        steps = np.ceil(radii / 5e-4) * 5e-4
        assert fit(steps, bootstrap=10).R == pytest.approx(fit(radii, bootstrap=10).R + 2.5e-4, abs=1e-4)

    def test_all_radii_equal(self):
        found = fit(np.full(100, 0.05), bootstrap=5)
        assert found.status in ("ok", "no-inflection") and (found.status != "ok" or abs(found.R - 0.05) < 0.005)

    @pytest.mark.parametrize("bad", [np.nan, -1e-9, -np.inf])
    def test_impossible_radii_are_refused(self, bad):
        with pytest.raises(ValueError, match="nan or negative.*>= 0"):
            fit([*exact(100, *KNOWN[0]), bad])


@pytest.fixture(scope="module")
def fits():
    """Fits of many samples from one known curve."""
    return [fit(drawn(200, seed), bootstrap=40, seed=seed) for seed in range(24)]


class TestErrors:
    def test_the_interval_covers_the_truth(self, fits):
        covered = sum(f.R_ci[0] <= 0.05 <= f.R_ci[1] for f in fits)
        assert covered >= 19  # of 24; with 95% each, fewer happens once in 2000 times
        assert all(f.R_ci[0] < f.R < f.R_ci[1] for f in fits)

    def test_the_error_is_the_scatter(self, fits):
        ratio = np.mean([f.R_err for f in fits]) / np.std([f.R for f in fits], ddof=1)
        assert 0.6 < ratio < 1.7

    def test_the_estimate_is_not_biased(self, fits):
        R, scatter = np.mean([f.R for f in fits]), np.std([f.R for f in fits], ddof=1)
        assert abs(R - 0.05) < 3.5 * scatter / len(fits) ** 0.5

    def test_shrinks_with_the_root_of_n(self):
        small, large = fit(drawn(400, 0), bootstrap=100), fit(drawn(6400, 0), bootstrap=100)
        assert 2.7 < small.R_err / large.R_err < 6  # 4, within what 100 resamplings tell
        assert 0 < large.R_err < 0.001


class TestDict:
    @pytest.mark.parametrize(
        "radii, status",
        [(drawn(100, 0), "ok"), (np.random.default_rng(0).exponential(0.02, 2000), "no-inflection"), ([0.1], "too-few"), ([], "too-few")],
    )
    def test_is_strict_json_of_plain_values(self, radii, status):
        found = fit(radii, bootstrap=5)
        assert found.status == status
        plain = found.dict()
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert {type(v) for v in plain.values()} <= {int, float, str, list, type(None)}
        assert list(plain) == "R R_err R_ci k nu f0 mse r2 n n_survived status".split()
        if status == "ok":
            assert plain["R"] == found.R and plain["R_ci"] == list(found.R_ci)
        else:
            assert plain["R"] is plain["R_err"] is plain["R_ci"] is None


class TestCovarianceError:
    def test_is_that_of_scipy(self):
        radii = drawn(500, 3)
        eps, accuracy = curve(radii)
        found = fit(radii, bootstrap=40)
        best, covariance = curve_fit(logistic, eps, accuracy, p0=(found.k, found.R, found.nu))
        assert best[1] == pytest.approx(found.R, rel=1e-4)
        assert covariance_error(radii, found) == pytest.approx(covariance[1, 1] ** 0.5, rel=0.02)

    def test_is_far_too_small(self):
        """Over many samples of one curve R scatters many times as much; the bootstrap says so, the covariance does not."""
        samples = [drawn(2000, seed) for seed in range(10)]
        fits = [fit(radii, bootstrap=40) for radii in samples]
        scatter = np.std([f.R for f in fits], ddof=1)
        covariance = np.mean([covariance_error(radii, f) for radii, f in zip(samples, fits, strict=True)])
        assert covariance < scatter / 10 and 0.4 < np.mean([f.R_err for f in fits]) / scatter < 2.5

    def test_without_an_inflection(self):
        radii = np.random.default_rng(0).exponential(0.02, 2000)
        assert np.isnan(covariance_error(radii, fit(radii)))


class TestAccepted:
    GOOD = dict(status="ok", n=501, r2=0.96)

    @pytest.mark.parametrize("changed", [dict(n=500), dict(r2=0.95), dict(status="no-inflection"), dict(status="too-few", r2=None)])
    def test_both_rules_and_an_R(self, changed):
        assert accepted(self.GOOD) and not accepted(self.GOOD | changed)

    def test_each_rule_can_be_left_out(self):
        poor = self.GOOD | dict(n=40, r2=0.2)
        assert not accepted(poor, min_images=0) and not accepted(poor, min_r2=-np.inf) and accepted(poor, 0, -np.inf)
        assert not accepted(poor | dict(status="no-inflection"), 0, -np.inf)
