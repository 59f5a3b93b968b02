"""The robustness R of a model: the inflection point of its accuracy against attack strength (section 7.2)."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy.optimize import least_squares

MIN_IMAGES = 30  # fewer radii than this cannot carry three parameters
NU = (1e-3, 100.0)
SURVIVORS = ("dropped", "kept")


def logistic(eps, k: float, R: float, nu: float):
    """The generalised logistic curve of eq. 7.6 in its three independent parameters.

    f(eps) = 1 - (1 + nu exp(-k (eps - R)))^(-1/nu), falling from 1 to 0, with its inflection point at eps = R.
    eps : array of attack strengths; k > 0 : steepness, per unit of eps; nu > 0 : asymmetry (1 logistic, 0 Gompertz).
    """
    z = np.log(nu) - k * (np.asarray(eps, float) - R)
    return -np.expm1(-np.logaddexp(0, z) / nu)


def five_parameter(eps, Q: float, B: float, D: float, M: float, nu: float):
    """Eq. 7.6 as printed: 1 - (1 + Q exp(-B (eps/D - M)))^(-1/|nu|). Only three of the five are independent."""
    return 1 - (1 + Q * np.exp(-B * (np.asarray(eps, float) / D - M))) ** (-1 / abs(nu))


def inflection(Q: float, B: float, D: float, M: float, nu: float) -> float:
    """Eq. 7.7, the inflection point of :func:`five_parameter`: (D/B) (M B + log(Q/|nu|))."""
    return D / B * (M * B + np.log(Q / abs(nu)))


def curve(radii, survivors: str = "dropped") -> tuple[np.ndarray, np.ndarray]:
    """Relative accuracy against attack strength.

    radii : (n,) adversarial radii; ``inf`` (never fooled) is left out, as in the thesis (section 10.2), or, with ``survivors="kept"``,
    counted as right at every strength tried, the Kaplan-Meier curve of radii that are all cut off at one strength. Returns the finite
    radii, sorted, and, at each, the share of images not yet fooled, counting the image fooled there as half.
    """
    if survivors not in SURVIVORS:
        raise ValueError(f"survivors={survivors!r} is not valid: one of {', '.join(SURVIVORS)}")
    every = np.sort(np.asarray(radii, float))
    eps = every[np.isfinite(every)]
    return eps, 1 - (np.arange(len(eps)) + 0.5) / max(len(every) if survivors == "kept" else len(eps), 1)


@dataclass(frozen=True)
class Fit:
    """R and how well it is known.

    ``R`` (nan where there is none), ``R_err`` bootstrap standard error, ``R_ci`` 95% interval, ``k``, ``nu`` and ``f0`` = f(0) of the
    fitted curve, ``mse`` and ``r2`` of the fit, ``n`` images, ``n_survived`` of them never fooled, ``status``: ``ok``,
    ``no-inflection`` (a decay that has no steepest point, or has not come to it where the radii end) or ``too-few``.
    """

    R: float
    R_err: float
    R_ci: tuple[float, float]
    k: float
    nu: float
    f0: float
    mse: float
    r2: float
    n: int
    n_survived: int
    status: str

    def dict(self) -> dict:
        """Name -> plain number, as stored in a record; ``None`` where there is no number."""
        plain = {name: None if value != value else value for name, value in asdict(self).items()}
        return plain | dict(R_ci=None if self.R_ci[0] != self.R_ci[0] else list(self.R_ci))


def _fit(eps, accuracy, start=None):
    """Least squares in (log k, R, log nu), in units of the median radius; returns k, R, nu."""
    scale = max(float(np.median(eps)), 1e-12)
    x = eps / scale

    def residual(theta):
        return logistic(x, np.exp(theta[0]), theta[1], np.exp(theta[2])) - accuracy

    low, high = np.array([-5.0, -20.0, np.log(NU[0])]), np.array([8.0, 20.0, np.log(NU[1])])
    if start is not None:
        starts = [np.clip([np.log(start[0] * scale), start[1] / scale, np.log(start[2])], low, high)]
    else:
        # a logistic of the sample's own spread, then a lopsided one: one of them always leads down
        spread = max(float(np.subtract(*np.quantile(x, [0.75, 0.25]))), 1e-3)
        starts = [[np.log(2.2 / spread), 1.0, 0.0], [np.log(2.2 / spread), 0.7, -2.0]]
        starts = [np.clip(s, low, high) for s in starts]
    best = min((least_squares(residual, s, bounds=(low, high), x_scale=[1, 1, 2]) for s in starts), key=lambda r: r.cost)
    return np.exp(best.x[0]) / scale, best.x[1] * scale, np.exp(best.x[2])


def _convex_mse(eps, accuracy) -> float:
    """Mean squared error of the best convex decay exp(-(eps/s)^c), c <= 1: exponential or steeper at the start."""
    scale = max(float(np.median(eps)), 1e-12)

    def residual(theta):
        return np.exp(-np.exp(theta[1] * np.log(np.maximum(eps / scale, 1e-12)) - theta[0])) - accuracy

    best = least_squares(residual, [0.4, 0.9], bounds=([-10, 0.05], [10, 1.0]))
    return 2 * best.cost / len(eps)


def fit(radii, bootstrap: int = 200, seed: int = 0, survivors: str = "dropped") -> Fit:
    """Fit :func:`logistic` to the accuracy curve of these radii by least squares (eqs. 7.6-7.7).

    radii : (n,) adversarial radii, >= 0; ``inf`` marks images never fooled, which ``n_survived`` counts.
    bootstrap : resamplings of the images for ``R_err`` and ``R_ci``. The residuals of an empirical curve are
    correlated, so the covariance of the least-squares fit (:func:`covariance_error`) is far too small and is not used.
    survivors : ``dropped``, as in the thesis, or ``kept``, see :func:`curve`. Dropping them takes the model for one that the attack
    fools sooner or later on every image it can be fooled on at all, and makes R too small where the attack was merely cut off.

    Where a convex decay fits at least as well, or the inflection is not at a positive strength within the radii, the status is
    ``no-inflection`` and R is nan. ``ValueError`` for nan or negative radii.
    """
    radii = np.asarray(radii, float).ravel()
    if np.isnan(radii).any() or (radii < 0).any():
        raise ValueError("radii hold nan or negative numbers; expected adversarial radii >= 0, inf where never fooled")
    eps, accuracy = curve(radii, survivors)
    n, survived = len(radii), len(radii) - len(eps)
    nan = float("nan")
    if len(eps) < MIN_IMAGES or eps[-1] <= 0:
        return Fit(nan, nan, (nan, nan), nan, nan, nan, nan, nan, n, survived, "too-few")
    k, R, nu = _fit(eps, accuracy)
    mse = float(np.mean((logistic(eps, k, R, nu) - accuracy) ** 2))
    r2 = 1 - mse / float(np.var(accuracy))
    found = dict(k=float(k), nu=float(nu), f0=float(logistic(0.0, k, R, nu)), mse=mse, r2=r2, n=n, n_survived=survived)
    if not 0 < R <= eps[-1] or _convex_mse(eps, accuracy) <= mse:
        return Fit(R=nan, R_err=nan, R_ci=(nan, nan), status="no-inflection", **found)
    generator = np.random.default_rng(seed)
    draws = []
    for _ in range(bootstrap):
        # quantiles stand for the whole resampled curve: the same fit, a fraction of the time
        eps, accuracy = curve(generator.choice(radii, n), survivors)
        level = (np.arange(min(len(eps), 400)) + 0.5) / min(len(eps), 400)
        draws.append(_fit(np.quantile(eps, level), 1 - level * (len(eps) / n if survivors == "kept" else 1), (k, R, nu))[1])
    interval = tuple(float(q) for q in np.quantile(draws, [0.025, 0.975]))
    return Fit(R=float(R), R_err=float(np.std(draws, ddof=1)), R_ci=interval, status="ok", **found)


def covariance_error(radii, found: Fit) -> float:
    """The standard error of R that least squares would give if the points of the curve were independent, which they are not.

    It shrinks as the square root of the number of points, whatever they are: the order of the thesis's errors of R for single models
    (section 9.1.1), far below the bootstrap's ``R_err``. nan where there is no R.
    """
    if found.status != "ok":
        return float("nan")
    eps, _ = curve(radii)
    theta = np.array([found.k, found.R, found.nu])
    steps = 1e-5 * theta
    jacobian = np.array([(logistic(eps, *(theta + h)) - logistic(eps, *(theta - h))) / (2 * h.max()) for h in np.diag(steps)]).T
    scaled = jacobian * theta  # of comparable columns
    covariance = np.linalg.inv(scaled.T @ scaled) * found.mse * len(eps) / (len(eps) - 3)
    return float(np.sqrt(covariance[1, 1]) * found.R)


def accepted(found: dict, min_images: int = 500, min_r2: float = 0.95) -> bool:
    """The thesis's rule for a model to count (section 9.1.1), on a fit from a record: more than 500 images and R^2 > 0.95.

    Each half is switched off by a bound that all pass (``min_images=0``, ``min_r2=-inf``); a fit without R never counts.
    """
    return found["status"] == "ok" and found["n"] > min_images and found["r2"] > min_r2
