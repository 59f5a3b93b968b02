"""Adversarial radii against foolbox and torchattacks: ``python benchmarks/attacks.py [threads] [--images N] [--counted M] [--plain]``.

On the LL and the BP model named in ``MODELS``, from the store (``KHNB_RESULTS``), and the first N (200) test images
of the full CIFAR-10 (``KHNB_DATA``) that a model gets right and is at least 80% sure of. Everyone attacks the same
model object, in the same parts of the images, those of ``khnb.training.part_size``. With ``--plain`` the others
attack the same network written with conv2d, division by the norms and max_pool2d instead, and so does khnb once more;
their radii are then compared with those, because rounding decides which of two equal activities wins its pooling window.
Needs ``pip install foolbox`` and ``pip install --no-deps torchattacks``; what is not installed is left out. Neither
has the adversarial radius along the ray of FGSM, or the first wrong step of PGD; this is what can be done with them.

FGSM radii to 1e-6. A call of their FGSM is a gradient at the image and, to see whether it is fooled, a forward. They
take a strength for each image: torchattacks as ``eps`` of shape (B, 1, 1, 1), foolbox in a list of one such tensor
(neither says so). Around that call, by us:

- bisection: 20 halvings of [0, 1], all images of a part at once. It takes for granted that an image stays fooled once
  it is. Those where it ends elsewhere than at khnb's radius, by more than 2e-6, are counted ("other radius"); those
  that are later by more than 1e-3, or where no strength it tried fools the model, missed the first crossing. The
  rest is mostly rounding: torchattacks takes the mean loss, the others the sum, and so now and then another of two
  nearly equal activities wins its pooling window and turns a sign. The table by upper ends is of M images (N);
- grid and halvings: strengths 1e-3, 2e-3, ..., an image leaves once it is fooled, then 10 halvings of its interval.
  What khnb does, with their call: the cheapest way around it that finds first crossings;
- grid and grids: a list of strengths as foolbox takes it (``epsilons``), 1e-3, 2e-3, ... up to the largest radius of
  all (which it is told; 1 if an image has none) for every image, then 9 strengths within the interval, and so twice
  again: 27 more. Too long to run: the number of strengths times the time of one in the bisection;
- grid of 1e-6: the list 1e-6, 2e-6, ... up to the largest radius; the same arithmetic.

PGD radii, step 5e-4, S=0.14, at most 300 steps. Neither library stops early, tells when an image was first fooled or
can go on from an iterate in the ball of the image (foolbox has ``early_stop`` for minimisation attacks only;
MultiAttack of torchattacks drops fooled images between attacks, each of which begins anew). So:

- one step at a time: their attack with one step from where the last one ended, in a ball that does not matter,
  projection to ours, one forward to see who is fooled and leaves. The cheapest way to the first wrong step; loop and
  projection are ours;
- 1, 2, 3, ... steps: anew from the image until it is fooled, as with MultiAttack: N(N+1)/2 steps and N forwards for
  an image fooled at step N;
- bisection of steps: 300 steps, then as it goes; right where no image recovers. The same arithmetic;
- one call of 300 steps: tells who is fooled at the end, and no radius. All three from the time of a call of 10 steps.

A curve of E strengths comes with khnb from the radii. foolbox takes the list of strengths, measured for E = 10; it
goes through them one by one and keeps two attacked images for each, so E = 100 and 1,000 are 10 and 100 times that. The
two curves have a gap where an image is right again at a higher strength: khnb's counts it as fooled from the first.

The floor: forwards and gradients that the radii need (FGSM: a gradient, a forward for each 1e-3 up to the radius, 10
halvings; PGD: a gradient a step, and a forward at the end), times the measured time of one; "made" are those counted.
That of a forward: its multiplications and additions at the rate of a product of 2,048 x 2,048 matrices.

Times are medians of three rounds, in which all ways take turns on every part; ratios within one run are what to
quote.
"""

import argparse
import importlib
import math
import platform
import statistics
import sys
import time

from khnb import attacks, data, native, training  # before torch, whose threads it keeps from spinning

import torch
import torch.nn.functional as F
from torch import nn

from khnb.layer import KHConv2d
from khnb.pipeline import network
from khnb.results import Store

MODELS = {
    "LL": dict(model="LL", K=10, w=4, m=3, p=2, sigma="gelu", n=4, w_pool=5),
    "BP": dict(model="BP", K=10, w=4, sigma="elu", n=4, w_pool=5, head_batch=1000),
}
CONFIDENCE, ROUNDS = 0.8, 3
SCAN, TOL, TOP, HALVINGS, REFINE = 1e-3, 1e-6, 1.0, 20, 10  # FGSM
STEP, RADIUS, STEPS, SOME = 5e-4, 0.14, 300, 10  # PGD
CURVES, TOPS = (10, 100, 1000), (1.0, 0.3, 0.1)
SQUARE, AGAIN = 2048, 5  # product; how often a forward or gradient is repeated to be timed: those of an attack are not cold either


class Plain(nn.Module):
    """The network of fig. 6.1 as anyone would write it; p=2."""

    def __init__(self, model):
        super().__init__()
        self.normalised, self.n = isinstance(model.conv, KHConv2d), int(model.head.n)
        self.weight, self.bias = model.conv.weight.detach(), None if self.normalised else model.conv.bias.detach()
        self.box = torch.ones_like(self.weight[:1])
        self.pool = nn.MaxPool2d(model.head.w_pool, model.head.s_pool)
        self.sigma = dict(gelu=nn.GELU(), elu=nn.ELU())[model.head.sigma]
        self.linear = model.linear

    def forward(self, images):
        h = F.conv2d(images, self.weight, self.bias)
        if self.normalised:
            squares = F.conv2d(images.square(), self.box)
            h = h / torch.where(squares > 0, squares, 1).sqrt()
        return self.linear((self.sigma(self.pool(h)) ** self.n).flatten(1))


class Foolbox:
    """What foolbox can do, on one model."""

    def __init__(self, model):
        self.box = importlib.import_module("foolbox")
        self.model = self.box.PyTorchModel(model, bounds=(0, 1), device="cpu")
        self.fast = self.box.attacks.LinfFastGradientAttack()

    def fooled(self, x, y, epsilons):
        """Whether FGSM fools it at these strengths, (B,): (B,)."""
        return self.fast(self.model, x, y, epsilons=[epsilons.to(x.dtype)[:, None, None, None]])[2][0]

    def curve(self, x, y, epsilons):
        return self.fast(self.model, x, y, epsilons=epsilons)[2]

    def steps(self, x, y, count, radius):
        """PGD's iterate after so many steps."""
        attack = self.box.attacks.LinfProjectedGradientDescentAttack(abs_stepsize=STEP, steps=count, random_start=False)
        return attack.run(self.model, x, y, epsilon=radius)

    def says(self, x):
        return self.model(x)


class Torchattacks:
    """What torchattacks can do, on one model."""

    def __init__(self, model):
        self.box, self.model = importlib.import_module("torchattacks"), model

    def fooled(self, x, y, epsilons):
        return self.says(self.box.FGSM(self.model, eps=epsilons.to(x.dtype)[:, None, None, None])(x, y)).argmax(1) != y

    def steps(self, x, y, count, radius):
        return self.box.PGD(self.model, eps=radius, alpha=STEP, steps=count, random_start=False)(x, y)

    @torch.no_grad()
    def says(self, x):
        return self.model(x)


def bisection(peer, x, y, top=TOP):
    """Radii by halving [0, top] around a library's FGSM; inf where no strength tried fools the model."""
    low, high = torch.zeros(len(x), dtype=torch.float64), torch.full((len(x),), top, dtype=torch.float64)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        fooled = peer.fooled(x, y, middle)
        low, high = torch.where(fooled, low, middle), torch.where(fooled, middle, high)
    return torch.where(high < top, high, math.inf)


def grid(peer, x, y):
    """Radii at the first crossing: strengths of a grid until an image is fooled, then halving."""
    grain, wrong_at = round(SCAN / TOL), torch.full((len(x),), -1)
    active = torch.arange(len(x))
    for at in range(grain, round(TOP / TOL) + 1, grain):
        fooled = peer.fooled(x[active], y[active], torch.full((len(active),), at * TOL))
        wrong_at[active[fooled]], active = at, active[~fooled]
        if len(active) == 0:
            break
    todo = torch.nonzero(wrong_at > 0)[:, 0]
    right_at = wrong_at - grain
    for _ in range(REFINE):
        middle = (wrong_at[todo] + right_at[todo] + 1) // 2  # at most 10 halvings: 1000 < 2^10
        open_ = (middle > right_at[todo]) & (middle < wrong_at[todo])
        todo, middle = todo[open_], middle[open_]
        if len(todo):
            fooled = peer.fooled(x[todo], y[todo], middle.double() * TOL)
            wrong_at[todo], right_at[todo] = torch.where(fooled, middle, wrong_at[todo]), torch.where(fooled, right_at[todo], middle)
    return torch.where(wrong_at > 0, wrong_at.double() * TOL, math.inf)


def step_by_step(peer, x, y):
    """The number of steps after which a library's PGD, one step at a time, first fools the model; -1 where it does not."""
    steps, active, now = torch.full((len(x),), -1), torch.arange(len(x)), x.clone()
    for i in range(1, STEPS + 1):
        moved, start = peer.steps(now[active], y[active], 1, 1.0), x[active]
        now[active] = torch.minimum(torch.maximum(moved, start - RADIUS), start + RADIUS)
        fooled = peer.says(now[active]).argmax(1) != y[active]
        steps[active[fooled]], active = i, active[~fooled]
        if len(active) == 0:
            break
    return steps


def tell(text: str) -> None:
    print(f"\r{text:<79}", end="", file=sys.stderr, flush=True)


def measure(name, ways, parts):
    """Median milliseconds an image of each way, and what it found, all parts together."""
    spent, found = {way: [0.0] * ROUNDS for way in ways}, {way: [] for way in ways}
    for i in range(ROUNDS):
        for j, part in enumerate(parts):
            for way, work in ways.items():
                tell(f"{name}, round {i + 1} of {ROUNDS}, part {j + 1} of {len(parts)}: {' '.join(way)}")
                started = time.perf_counter()
                result = work(*part)
                spent[way][i] += time.perf_counter() - started
                if i == 0:
                    found[way].append(result)
    images = sum(len(y) for _, y in parts)
    return {way: statistics.median(s) / images * 1e3 for way, s in spent.items()}, {way: torch.cat(r, -1) for way, r in found.items()}


def counted(model, work, parts):
    """Forwards and gradients, in images, that work asks of the model; and what it found."""
    count = [0, 0]

    def look(module, args):
        count[torch.is_grad_enabled() and args[0].requires_grad] += len(args[0])

    handle = model.register_forward_pre_hook(look)
    found = torch.cat([work(*part) for part in parts])
    handle.remove()
    return count, found


def choose(model, dataset, count):
    """Images and labels, in parts: the first so many that the model gets right and is sure of."""
    found = []
    for part, y in zip(dataset.test_images.split(1000), dataset.test_labels.split(1000), strict=True):
        tell(f"choosing images: {sum(map(len, found))}")
        top, guess = training.predict(model, part).softmax(1).max(1)
        found.append(torch.nonzero((guess == y) & (top >= CONFIDENCE))[:, 0] + 1000 * len(found))
        if sum(map(len, found)) >= count:
            break
    chosen, size = torch.cat(found)[:count], training.part_size(model, dataset.test_images)
    images, labels = training.to_float(dataset.test_images[chosen]), dataset.test_labels[chosen]
    return list(zip(images.split(size), labels.split(size), strict=True))


def differ(radii, first):
    """Cells: how many radii are others than the first crossings, how many of them far later; by how much, where finite."""
    other = torch.where(radii == first, 0, (radii - first).abs()) > 2 * TOL
    counts = f"{int(other.sum())} | {int((other & (radii > first + SCAN)).sum())} | "
    off = (radii - first)[other & radii.isfinite() & first.isfinite()].abs()
    return counts + (f"{off.median():.3g} | {off.max():.3g}" if len(off) else "|")


def halving_steps(first: int) -> tuple[int, int]:
    """Steps and calls of a bisection of the number of steps for an image first fooled at this one."""
    low, high, steps, calls = 0, STEPS, STEPS, 1
    while first > 0 and high - low > 1:
        middle = (low + high) // 2
        steps, calls = steps + middle, calls + 1
        low, high = (low, middle) if middle >= first else (middle, high)
    return steps, calls


def compare(name, model, parts, plain, tables):
    """Measure everything on one model and add to the tables."""
    target = Plain(model).eval() if plain else model
    peers = {kind.__name__.lower(): kind for kind in (Foolbox, Torchattacks)}
    peers = {title: kind(target) for title, kind in peers.items() if importlib.util.find_spec(title)}
    everyone, count = torch.cat([x for x, _ in parts]), sum(len(y) for _, y in parts)
    with torch.no_grad():
        away = (torch.cat([model(x) for x, _ in parts]) - torch.cat([target(x) for x, _ in parts])).abs().max().item()
    if away > 1e-3:
        raise ValueError(f"the plain network is not the same as the {name} model: logits differ by {away:g}")
    square = torch.randn(SQUARE, SQUARE)

    def fgsm_radii(model):
        return lambda x, y: attacks.fgsm_radius(model, x, y, TOP, SCAN, TOL)

    def pgd_steps(model):
        return lambda x, y: attacks.pgd_radius(model, x, y, STEP, RADIUS, STEPS)[1]

    @torch.no_grad()
    def forward(model, x):
        return [model(x).argmax(1) for _ in range(AGAIN)][-1]

    def gradient(x, y):
        return [attacks.gradient(model, x, y) for _ in range(AGAIN)][-1].flatten(1)[:, 0]

    tell(f"{name}: counting forwards and gradients")
    made = {}
    made["FGSM"], radii = counted(model, fgsm_radii(model), parts)
    made["PGD"], _ = counted(model, pgd_steps(model), parts)
    largest = radii.max().item() if radii.isfinite().all() else TOP
    span = math.ceil(largest / SCAN) * SCAN
    strengths = torch.linspace(0, span, CURVES[0] + 1)[1:].tolist()

    ways = {("khnb", "FGSM"): fgsm_radii(model), ("khnb", "PGD"): pgd_steps(model)}
    if plain:
        ways |= {("khnb, plain network", "FGSM"): fgsm_radii(target), ("khnb, plain network", "PGD"): pgd_steps(target)}
    for title, peer in peers.items():
        ways[title, "bisection"] = lambda x, y, peer=peer: bisection(peer, x, y)
        ways[title, "grid"] = lambda x, y, peer=peer: grid(peer, x, y)
        ways[title, "step by step"] = lambda x, y, peer=peer: step_by_step(peer, x, y)
        ways[title, "steps"] = lambda x, y, peer=peer: peer.says(peer.steps(x, y, SOME, RADIUS)).argmax(1) != y
    if "foolbox" in peers:
        ways["foolbox", "curve"] = lambda x, y: peers["foolbox"].curve(x, y, strengths)
    ways["one", "forward"] = lambda x, y: forward(model, x)
    ways["one", "gradient"] = gradient
    ways["their", "forward"] = lambda x, y: forward(target, x)
    ways["one", "product"] = lambda x, y: (square @ square)[0, :1]
    ms, found = measure(name, ways, parts)
    for way in (("one", "forward"), ("one", "gradient"), ("their", "forward")):
        ms[way] /= AGAIN

    # FGSM
    ours_too = "khnb, plain network" if plain else "khnb"  # what the others are compared with: rounding turns some signs
    first, ours, reference = found["khnb", "FGSM"], ms["khnb", "FGSM"], found[ours_too, "FGSM"]
    scans = torch.where(first.isfinite(), (first / SCAN - 1e-9).ceil(), round(TOP / SCAN))
    refined = first.isfinite() * REFINE

    def row(table, way, took, how, *cells, base):
        tables[table].append(f"| {name} | {way} | {took:.3g} | {took / base:.3g} | {how} | " + " | ".join(cells) + " |")

    row("fgsm", "khnb", ours, "measured", differ(first, first), base=ours)
    if plain:
        row("fgsm", ours_too, ms[ours_too, "FGSM"], "measured", differ(reference, first), base=ours)
    for title in peers:
        each = ms[title, "bisection"] / HALVINGS
        for text, way in (("bisection", "bisection"), ("grid and halvings", "grid")):
            row("fgsm", f"{title}, {text}", ms[title, way], "measured", differ(found[title, way], reference), base=ours)
        sums = (scans + refined).mean().item()
        print(f"{name}, {title}: grid and halvings by the arithmetic {sums:.1f} strengths x {each:.3g} ms = {sums * each:.3g} ms")
        for text, tried in (("grid and grids", math.ceil(largest / SCAN - 1e-9) + 27), ("grid of 1e-6", round(largest / TOL))):
            row("fgsm", f"{title}, {text}", tried * each, f"{tried:,} x {each:.3g}", "|||", base=ours)

    # PGD
    first, ours, reference = found["khnb", "PGD"], ms["khnb", "PGD"], found[ours_too, "PGD"]
    last = torch.where(first < 0, STEPS, first).double()
    row("pgd", "khnb", ours, "measured", "first wrong step", "0", base=ours)
    if plain:
        other = f"{int((reference != first).sum())}"
        row("pgd", ours_too, ms[ours_too, "PGD"], "measured", "first wrong step", other, base=ours)
    halved = torch.tensor([halving_steps(int(step)) for step in first]).double().mean(0)
    for title in peers:
        look = ms["their", "forward"]
        step = (ms[title, "steps"] - look) / SOME
        other, took = f"{int((found[title, 'step by step'] != reference).sum())}", ms[title, "step by step"]
        row("pgd", f"{title}, one step at a time", took, "measured", "first wrong step", other, base=ours)
        for text, steps, looks, gives in (
            ("1, 2, 3, ... steps", (last * (last + 1) / 2).mean().item(), last.mean().item(), "first wrong step"),
            ("bisection of steps", *halved.tolist(), "a wrong step after a right one"),
            ("one call of 300 steps", STEPS, 1, "no radius"),
        ):
            how = f"{steps:.0f} x {step:.3g} + {looks:.0f} x {look:.3g}"
            row("pgd", f"{title}, {text}", steps * step + looks * look, how, gives, "", base=ours)

    # curves
    if "foolbox" in peers:
        right = ~found["foolbox", "curve"]
        kept = torch.tensor([(found[ours_too, "FGSM"] > strength).double().mean() for strength in strengths])
        gap = (right.double().mean(1) - kept).abs().max().item()
        for number in CURVES:
            started = time.perf_counter()
            len(radii) - torch.searchsorted(radii.sort().values, torch.linspace(0, span, number + 1, dtype=torch.float64), right=True)
            ours = ms["khnb", "FGSM"] + (time.perf_counter() - started) / count * 1e3
            took, keeps = ms["foolbox", "curve"] * number / CURVES[0], 2 * number * everyone[0].nbytes * 1000 / 2**30
            how, gap = ("measured", f"{gap:.1%}") if number == CURVES[0] else (f"{number // CURVES[0]} x measured", "")
            tables["curve"].append(
                f"| {name} | {number} | {ours:.3g} | {took:.3g} | {how} | {took / ours:.3g} | {keeps:.1f} | {gap} |"
            )

    # floors
    one, slope = ms["one", "forward"], ms["one", "gradient"]
    for kind, forwards, gradients in (("FGSM", (scans + refined).mean().item(), 1), ("PGD", 1, last.mean().item())):
        floor, took = forwards * one + gradients * slope, ms["khnb", kind]
        tables["floor"].append(
            f"| {name} | {kind} | {forwards:.1f} | {made[kind][0] / count:.1f} | {gradients:.1f} | {made[kind][1] / count:.1f} "
            f"| {one:.3g} | {slope:.3g} | {floor:.3g} | {took:.3g} | {took / floor:.2f} |"
        )
    filters, channels, w, _ = model.conv.weight.shape
    flop = 2 * filters * channels * w * w * (everyone.shape[-1] - w + 1) ** 2
    rate = 2 * SQUARE**3 * len(parts) / (ms["one", "product"] * count / 1e3)
    least = flop / rate * 1e3
    theirs = ms["their", "forward"]
    tables["product"].append(
        f"| {name} | {flop / 1e6:.2f} | {rate / 1e9:.0f} | {least:.3g} | {one:.3g} | {one / least:.1f} | {slope:.3g} | {slope / one:.1f} |"
        + (f" {theirs:.3g} | {theirs / one:.1f} |" if plain else "")
    )
    print(
        f"{name}: {count} images; FGSM radii {radii.min():.4g} to {radii.max():.4g}, median {radii.median():.4g}, "
        f"{int(radii.isinf().sum())} never fooled; PGD steps median {last.median():.0f}, largest {last.max():.0f}, "
        f"{int((first < 0).sum())} never fooled"
    )


def misses(name, model, parts, tables):
    """How many first crossings bisection misses, by its upper end."""
    kinds = [kind for kind in (Foolbox, Torchattacks) if importlib.util.find_spec(kind.__name__.lower())]
    first = torch.cat([attacks.fgsm_radius(model, *part, TOP, SCAN, TOL) for part in parts]) if kinds else None
    for top in TOPS if kinds else ():
        found = []
        for j, part in enumerate(parts):
            tell(f"{name}: bisection of [0, {top:g}], part {j + 1} of {len(parts)}")
            found.append(bisection(kinds[0](model), *part, top))
        tables["tops"].append(f"| {name} | {top:g} | {len(first)} | {differ(torch.cat(found), first)} |")


HEADS = {
    "fgsm": (
        "FGSM radii to 1e-6",
        "model | way | ms an image | / khnb | from: strengths x ms | other radius | first missed | off by, median | largest",
    ),
    "tops": (
        "Bisection by its upper end",
        "model | upper end | images | other radius | first missed | off by, median | largest",
    ),
    "pgd": ("PGD radii", "model | way | ms an image | / khnb | from: steps x ms + forwards x ms | gives | other step"),
    "curve": (
        "A curve of E strengths",
        "model | E | khnb: ms an image | foolbox | from | foolbox / khnb | foolbox keeps, GiB a 1,000 images | gap of the curves",
    ),
    "floor": (
        "Floors, an image",
        "model | radii | forwards needed | made | gradients needed | made | ms a forward | ms a gradient | floor, ms | measured | / floor",
    ),
    "product": (
        "The forward",
        "model | Mflop | product, Gflop/s | at that rate, ms | measured, ms | measured / that | gradient, ms | gradient / forward",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Adversarial radii against foolbox and torchattacks")
    parser.add_argument("threads", type=int, nargs="?", default=torch.get_num_threads())
    parser.add_argument("--images", type=int, default=200, help="images of each model (200)")
    parser.add_argument("--counted", type=int, help="images of each model to count what bisection misses (as many)")
    parser.add_argument("--plain", action="store_true", help="let the others attack the network written with plain torch modules")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    store, dataset, tables = Store(), data.load("cifar10"), {name: [] for name in HEADS}
    print(
        f"{platform.processor() or platform.machine()}, {given.threads} thread(s), torch {torch.__version__}, "
        f"kernels {'on' if native._library() else 'off'}; "
        f"the others attack {'the plain network' if given.plain else 'the same model object'}"
    )
    for name in ("foolbox", "torchattacks"):
        spec = importlib.util.find_spec(name)
        print(f"{name} {importlib.import_module(name).__version__}" if spec else f"{name} is not installed and left out")
    for name, asked in MODELS.items():
        records = store.full("model", **asked)
        if not records:
            raise ValueError(f"{store.root} has no {name} model with {asked}; name a store that has it in KHNB_RESULTS")
        model = network(records[0], store)
        parts = choose(model, dataset, given.images)
        print(f"{name}: record {records[0]['id']}, parts of {len(parts[0][1])} images")
        compare(name, model, parts, given.plain, tables)
        misses(name, model, choose(model, dataset, given.counted or given.images), tables)
    tell("")
    for name, (title, head) in HEADS.items():
        if name == "product" and given.plain:
            head += " | plain network, ms | plain / measured"
        words = ("model", "way", "gives", "radii", "from")
        rule = "|".join(" --- " if column.startswith(words) else " ---: " for column in head.split(" | "))
        print(f"\n{title}:\n\n| {head} |\n|{rule}|")
        print("\n".join(tables[name]))


if __name__ == "__main__":
    main()
