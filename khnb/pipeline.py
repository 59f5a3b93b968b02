"""From settings to records: what the store holds is used, what it lacks is computed, checkpointed and stored.

``python -m khnb.pipeline sweeps/first-light.json`` or ``... '{"K": 20, "bp": "train"}'`` does it at a terminal.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from khnb import attacks, learning, models, robustness, training
from khnb import data as datasets
from khnb.data import Dataset
from khnb.native import cache_dir
from khnb.results import Store, atomic_write, record_id
from khnb.settings import DTYPES, PARAMETERS, ConvSettings, HeadSettings, check, check_geometry

SNAPSHOTS = (0, 1, 2, 4, 8, 15, 30)


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; ``ValueError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.ones(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used ({str(error).splitlines()[0]}); try device='cpu'") from error
    return chosen


def progress(total: int, what: str, unit: str, done: int = 0):
    """A progress bar where somebody watches: at a terminal or in a live notebook, not under papermill, CI or a book build.

    ``KHNB_PROGRESS=1`` or ``0`` overrules.
    """
    wish, live = os.environ.get("KHNB_PROGRESS"), ("JPY_SESSION_NAME", "VSCODE_PID", "COLAB_RELEASE_TAG")
    watched = "CI" not in os.environ and (sys.stderr.isatty() or any(name in os.environ for name in live))
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=not watched if wish is None else wish == "0")


class Checkpoint:
    """State of an unfinished computation: tensors, numbers and lists, written atomically, read without pickle's powers."""

    def __init__(self, id: str, every_s: float = 30.0):
        self.path, self.every_s, self.last = cache_dir() / "checkpoints" / f"{id}.pt", every_s, time.monotonic()

    def load(self):
        """What was saved last, or ``None``. A damaged checkpoint is named and left aside."""
        if not self.path.exists():
            return None
        try:
            return torch.load(self.path, weights_only=True)
        except Exception as error:  # any damage at all means: begin again
            warnings.warn(f"checkpoint {self.path} is damaged ({type(error).__name__}); starting from the beginning")
            return None

    def save(self, state, force: bool = False) -> None:
        """Write the state, at most every ``every_s`` seconds."""
        if force or time.monotonic() - self.last > self.every_s:
            buffer = io.BytesIO()
            torch.save(state, buffer)
            atomic_write(self.path, buffer.getvalue())
            self.last = time.monotonic()

    def clear(self) -> None:
        """Remove the file: the record has taken its place."""
        self.path.unlink(missing_ok=True)


@dataclass
class Run:
    """What a computation works with: images, store, device, and whom to tell what it does.

    ``evidence``: where the images are not the full CIFAR-10, a record made on the full set is taken as well.
    """

    data: Dataset
    store: Store = field(default_factory=Store)
    device: str = "auto"
    note: Callable[[str], None] = print
    evidence: bool = False

    @classmethod
    def of(cls, parameters: dict, **more) -> Run:
        """The run a notebook's parameters ask for (``data``, ``device``)."""
        return cls(datasets.load(parameters["data"]), device=parameters["device"], evidence=parameters["data"] == "auto", **more)

    def find(self, kind: str, asked: dict, what: str) -> dict | None:
        """The record of exactly this, if there is one."""
        record = self.store.get(kind, asked, self.data)
        if record is None and self.evidence:
            record = next((r for r in self.store.find(kind, **asked) if r["data"]["name"] == "cifar10"), None)
        if record:
            origin = {"cifar10": "full CIFAR-10"}.get(record["data"]["name"], record["data"]["name"])
            self.note(f"{what}: record {record['id']} from the store, computed on {origin}, {record['started'][:10]}.")
        return record

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, side and number of classes of the images."""
        return self.data.train_images.shape[1], self.data.train_images.shape[-1], len(self.data.classes)


def conv_layer(run: Run, conv: ConvSettings) -> dict:
    """Record of the KH layer with these settings: the store's, or trained now on the run's images and stored."""
    record = run.find("layer", conv.dict(), "KH layer")
    if record:
        return record
    device, data = pick_device(run.device), run.data
    checkpoint = Checkpoint(record_id("layer", conv.dict(), data.sha256))
    state, layer = checkpoint.load(), None
    if state:
        layer = learning.Layer(conv, state["weight"], state["history"], state["wins"], state["snapshots"])
    done = len(layer.history) if layer else 0
    run.note(f"KH layer: training on {len(data.train_images)} images of {data.name}, epoch {done + 1} to {conv.conv_epochs}.")
    with progress(conv.conv_epochs, "KH layer", "epoch", done) as bar:

        def after_epoch(layer):
            bar.update()
            bar.set_postfix(f=layer.history[-1]["f_1e4"], norm=layer.history[-1]["norm"])
            checkpoint.save(dict(weight=layer.weight, history=layer.history, wins=layer.wins, snapshots=layer.snapshots))

        layer = learning.train_layer(data.train_images, conv, device, layer, SNAPSHOTS, after_epoch)
    snapshots = sorted(layer.snapshots)
    record = run.store.put(
        "layer", conv.dict(), data,
        results=dict(
            f_score=learning.f_score(layer.weight, conv.p), f_score_1e4=learning.f_score(layer.weight, conv.p, 1e-4),
            collapsed=layer.collapsed, history=layer.history,
        ),
        arrays=dict(
            weight=layer.weight.numpy(), wins=layer.wins.numpy(), epochs=np.array(snapshots),
            # pictures of the way, not to be computed with: half precision
            snapshots=np.stack([layer.snapshots[e].half().numpy() for e in snapshots]),
        ),
        wall_s=sum(row["seconds"] for row in layer.history), device=device,
    )
    checkpoint.clear()
    return record


def _train(run: Run, asked: dict, model: models.Network, inputs, started: float, what: str, **more) -> dict:
    data = run.data
    checkpoint = Checkpoint(record_id("model", asked, data.sha256))
    state = checkpoint.load()
    done, epochs = len(state["history"]) if state else 0, model.head.head_epochs
    run.note(f"{what}: training on {len(inputs)} images of {data.name}, epoch {done + 1} to {epochs}.")
    with progress(epochs, what, "epoch", done) as bar:

        def after_epoch(state):
            bar.update()
            bar.set_postfix(loss=state["history"][-1]["loss"], accuracy=state["history"][-1]["accuracy"])
            checkpoint.save(state)

        history = training.train(model, inputs, data.train_labels, state, after_epoch)
    device = model.linear.weight.device
    top, guess = training.predict(model.eval(), data.test_images).softmax(1).max(1)
    right = guess == data.test_labels
    record = run.store.put(
        "model", asked, data,
        results=dict(
            test_accuracy=right.double().mean().item(), test_images=len(right),
            confident_and_correct=int((right & (top >= 0.8)).sum()), history=history,
        ),
        arrays={name.replace(".", "_"): value.cpu().numpy() for name, value in model.state_dict().items()},
        wall_s=time.perf_counter() - started + sum(row["seconds"] for row in history[:done]), device=device, **more,
    )
    checkpoint.clear()
    return record


def ll_model(run: Run, conv: ConvSettings, head: HeadSettings, feature_dtype: str = "float32") -> dict:
    """Record of the LL model with these settings; layer and head are trained where the store lacks them.

    Layer and head share their seed. ``feature_dtype`` is how features are kept while a head trains (``bfloat16`` halves
    their memory); a stored model is taken with either.
    """
    check_geometry(run.shape[1], conv.w, head.w_pool)
    asked = dict(model="LL") | conv.dict() | head.dict()
    for dtype in dict.fromkeys([feature_dtype, *DTYPES]):
        record = run.find("model", asked | dict(feature_dtype=dtype), "LL model")
        if record:
            return record
    layer = conv_layer(run, conv)
    started = time.perf_counter()
    model = models.ll_network(torch.from_numpy(run.store.arrays(layer)["weight"]), conv.p, head, *run.shape[1:])
    model = model.to(pick_device(run.device)).eval()
    inputs = training.features(model, run.data.train_images, getattr(torch, feature_dtype))
    return _train(run, asked | dict(feature_dtype=feature_dtype), model, inputs, started, "LL head", layer=layer["id"])


def bp_model(run: Run, K: int, w: int, head: HeadSettings, train: bool = True) -> dict | None:
    """Record of the BP model with these settings: the store's, else trained end to end, else (``train=False``) ``None``."""
    check_geometry(run.shape[1], w, head.w_pool)
    asked = dict(model="BP", K=K, w=w, **head.dict())
    record = run.find("model", asked, "BP model")
    if record or not train:
        return record
    started = time.perf_counter()
    model = models.bp_network(K, w, head, *run.shape).to(pick_device(run.device))
    return _train(run, asked, model, run.data.train_images, started, "BP model")


def models_of(run: Run, parameters: dict) -> dict[str, dict]:
    """The records a notebook's parameters ask for: ``LL``, and ``BP`` as the parameter ``bp`` says."""
    found = dict(LL=ll_model(run, ConvSettings.of(parameters), HeadSettings.of(parameters), parameters["feature_dtype"]))
    if parameters["bp"] != "none":
        own = dict(sigma=parameters["bp_sigma"], head_epochs=parameters["bp_epochs"], head_batch=parameters["bp_batch"])
        head = HeadSettings.of(parameters | own)
        twin = bp_model(run, parameters["K"], parameters["w"], head, train=parameters["bp"] == "train")
        if twin:
            found["BP"] = twin
        else:
            run.note("BP model: the store has none for these parameters; -p bp train trains it.")
    return found


def network(record: dict, store: Store | None = None, side: int = 32) -> models.Network:
    """The trained network of a model record, in eval mode on the CPU."""
    store = store or Store()
    arrays = {name: torch.from_numpy(value) for name, value in store.arrays(record).items()}
    asked, head = record["asked"], HeadSettings.of(record["asked"])
    classes = len(arrays["linear_bias"])
    if asked["model"] == "LL":
        model = models.ll_network(arrays["conv_weight"], asked["p"], head, side, classes)
    else:
        model = models.bp_network(asked["K"], asked["w"], head, arrays["conv_weight"].shape[1], side, classes)
    model.load_state_dict({name.replace("_", ".", 1): value for name, value in arrays.items()})
    return model.eval()


def fgsm_attack(run: Run, model_record: dict, confidence: float = 0.8) -> dict:
    """Record of FGSM radii (eq. 7.3) and their fit (eqs. 7.6-7.7) for every correct, confident test image.

    The store's record is used where it has one for this model; else the run's test images are attacked now.
    """
    asked = dict(model_record["asked"], attack="fgsm", confidence=confidence, eps_max=1.0, of=model_record["id"])
    record = run.find("attack", asked, f"FGSM on the {asked['model']} model")
    if record:
        return record
    started, device, data = time.perf_counter(), pick_device(run.device), run.data
    model = network(model_record, run.store, run.shape[1]).to(device)
    top, guess = training.predict(model, data.test_images).softmax(1).max(1)
    chosen = torch.nonzero((guess == data.test_labels) & (top >= confidence))[:, 0]
    run.note(f"FGSM: attacking {len(chosen)} of {len(guess)} test images of {data.name}, correct and at least {confidence:.0%} sure.")
    radii = [torch.empty(0, dtype=torch.float64)]
    with progress(len(chosen), "FGSM", "image") as bar:
        for part in chosen.split(training.part_size(model, data.test_images)):
            images, labels = training.to_float(data.test_images[part]).to(device), data.test_labels[part].to(device)
            radii.append(attacks.fgsm_radius(model, images, labels).cpu())
            bar.update(len(part))
    radii = torch.cat(radii).numpy()
    return run.store.put(
        "attack", asked, data, results=dict(fit=robustness.fit(radii).dict(), accuracy=model_record["results"]["test_accuracy"]),
        arrays=dict(radii=radii, images=chosen.int().numpy()),
        wall_s=time.perf_counter() - started, device=device,
    )


def main(words: list[str]) -> None:
    """Train and attack each model named by a JSON object, e.g. ``{"K": 20, "bp": "train"}``, or by a file that holds a list of them.

    What is not named has its default. ``ValueError`` before anything runs where one of them is wrong.
    """
    asked = []
    for word in words:
        text = Path(word).read_text() if word.endswith(".json") else word
        try:
            found = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{word} is no JSON ({error}); expected an object, or a file with a list of them") from error
        asked += found if isinstance(found, list) else [found]
    for parameters in [{name: p.default for name, p in PARAMETERS.items()} | check(given) for given in asked]:
        run = Run.of(parameters)
        for kind, record in models_of(run, parameters).items():
            attack = fgsm_attack(run, record, parameters["confidence"])
            fit = attack["results"]["fit"]
            R = f"R {fit['R']:.5f} +- {fit['R_err']:.5f}" if fit["status"] == "ok" else fit["status"]
            print(f"{kind} {record['id']}: accuracy {record['results']['test_accuracy']:.4f}, {R}, {fit['n']} images", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
