"""From settings to records: what the store holds is used, what it lacks is computed, checkpointed and stored."""

from __future__ import annotations

import io
import json
import os
import sys
import time
import warnings

import numpy as np
import torch
from tqdm.auto import tqdm

from khnb import attacks, learning, models, robustness, training
from khnb.native import cache_dir
from khnb.results import Store, atomic_write, record_id
from khnb.settings import ConvSettings, HeadSettings, check_geometry

SNAPSHOTS = (0, 1, 2, 4, 8, 15, 30)


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; ``ValueError`` for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device={device!r} cannot be used ({str(error).splitlines()[0]}); try device='cpu'") from error
    return chosen


def progress(total: int, what: str, done: int = 0):
    """A progress bar; silent under CI, papermill and wherever nobody watches (``KHNB_PROGRESS=1`` or ``0`` overrules)."""
    wish = os.environ.get("KHNB_PROGRESS")
    watched = sys.stderr.isatty() and "CI" not in os.environ
    return tqdm(total=total, initial=done, desc=what, unit="epoch", disable=not watched if wish is None else wish == "0")


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


def find_or_none(store: Store, kind: str, asked: dict, data) -> dict | None:
    """The record asked for: on this very data, else on the full CIFAR-10 (the committed evidence)."""
    exact = store.get(kind, asked, data)
    if exact:
        return exact
    found = [r for r in store.find(kind, **asked) if r["data"]["name"] == "cifar10"]
    return found[0] if found and data.name.startswith("cifar10") else None


def conv_layer(data, conv: ConvSettings, store: Store | None = None, device: str = "auto", note=print) -> dict:
    """Record of the KH layer with these settings: the store's, or trained now on ``data`` and stored."""
    store = store or Store()
    record = find_or_none(store, "layer", conv.dict(), data)
    if record:
        note(f"KH layer {record['id']}: from the store ({record['data']['name']}, {record['started'][:10]}).")
        return record
    device = pick_device(device)
    checkpoint = Checkpoint(record_id("layer", conv.dict(), data.sha256))
    state, layer = checkpoint.load(), None
    if state:
        layer = learning.Layer(conv, state["weight"], state["history"], state["wins"], state["snapshots"])
    note(f"KH layer: training on {len(data.train_images)} images of {data.name}, epoch {len(layer.history) if layer else 0} on.")
    with progress(conv.conv_epochs, "KH layer", len(layer.history) if layer else 0) as bar:

        def after_epoch(layer):
            bar.update()
            bar.set_postfix(f=layer.history[-1]["f_1e4"], norm=layer.history[-1]["norm"])
            checkpoint.save(dict(weight=layer.weight, history=layer.history, wins=layer.wins, snapshots=layer.snapshots))

        layer = learning.train_layer(data.train_images, conv, device, layer, SNAPSHOTS, after_epoch)
    snapshots = sorted(layer.snapshots)
    record = store.put(
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


def _train(store, asked, data, model, inputs, started, device, note, what, **more):
    checkpoint = Checkpoint(record_id("model", asked, data.sha256))
    state = checkpoint.load()
    done = len(state["history"]) if state else 0
    note(f"{what}: training on {len(inputs)} images of {data.name}, epoch {done} on.")
    with progress(model.head.head_epochs, what, done) as bar:

        def after_epoch(state):
            bar.update()
            bar.set_postfix(loss=state["history"][-1]["loss"], accuracy=state["history"][-1]["accuracy"])
            checkpoint.save(state)

        history = training.train(model, inputs, data.train_labels, state, after_epoch)
    model.eval()
    logits = training.predict(model, data.test_images)
    top, guess = logits.softmax(1).max(1)
    right = guess == data.test_labels
    weights = {name.replace(".", "_"): value.numpy() for name, value in model.cpu().state_dict().items()}
    record = store.put(
        "model", asked, data,
        results=dict(
            test_accuracy=right.double().mean().item(), test_images=len(right),
            confident_and_correct=int((right & (top >= 0.8)).sum()), history=history,
        ),
        arrays=weights, wall_s=time.perf_counter() - started + sum(row["seconds"] for row in history[:done]),
        device=device, **more,
    )
    checkpoint.clear()
    return record


def _shape(data) -> tuple[int, int, int]:
    return data.train_images.shape[1], data.train_images.shape[-1], len(data.classes)


def ll_model(
    data, conv: ConvSettings, head: HeadSettings, store: Store | None = None, device: str = "auto", note=print,
    feature_dtype: str = "float32",
) -> dict:
    """Record of the LL model with these settings; layer and head are trained where the store lacks them.

    The head's seed is the layer's. ``feature_dtype`` is how the features are kept while the head trains:
    ``bfloat16`` halves their memory.
    """
    store = store or Store()
    check_geometry(data.train_images.shape[-1], conv.w, head.w_pool)
    asked = dict(model="LL", **conv.dict(), **head.dict(), feature_dtype=feature_dtype)
    for dtype in dict.fromkeys([feature_dtype, "float32", "bfloat16"]):
        record = find_or_none(store, "model", asked | dict(feature_dtype=dtype), data)
        if record:
            note(f"LL model {record['id']}: from the store ({record['data']['name']}, {record['started'][:10]}).")
            return record
    layer = conv_layer(data, conv, store, device, note)
    started, device = time.perf_counter(), pick_device(device)
    channels, side, classes = _shape(data)
    model = models.ll_network(torch.from_numpy(store.arrays(layer)["weight"]), conv.p, head, side, classes).to(device).eval()
    inputs = training.features(model, data.train_images, getattr(torch, feature_dtype))
    return _train(store, asked, data, model, inputs, started, device, note, "LL head", layer=layer["id"])


def bp_model(data, K: int, w: int, head: HeadSettings, store: Store | None = None, device: str = "auto", note=print) -> dict:
    """Record of the BP model with these settings, trained end to end where the store lacks it."""
    store = store or Store()
    check_geometry(data.train_images.shape[-1], w, head.w_pool)
    asked = dict(model="BP", K=K, w=w, **head.dict())
    record = find_or_none(store, "model", asked, data)
    if record:
        note(f"BP model {record['id']}: from the store ({record['data']['name']}, {record['started'][:10]}).")
        return record
    started, device = time.perf_counter(), pick_device(device)
    channels, side, classes = _shape(data)
    model = models.bp_network(K, w, head, channels, side, classes).to(device)
    return _train(store, asked, data, model, data.train_images, started, device, note, "BP model")


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


def fgsm_attack(model_record: dict, data, confidence: float = 0.8, store: Store | None = None, device: str = "auto", note=print) -> dict:
    """Record of FGSM radii (eq. 7.3) and their fit (eqs. 7.6-7.7) for every correct, confident test image.

    The store's record is used where it has one for this model; else ``data``'s test images are attacked now.
    """
    store = store or Store()
    asked = dict(model_record["asked"], attack="fgsm", confidence=confidence, eps_max=1.0)
    record = find_or_none(store, "attack", asked, data)
    if record:
        note(f"FGSM radii {record['id']}: from the store ({record['results']['fit']['n']} images of {record['data']['name']}).")
        return record
    started, device = time.perf_counter(), pick_device(device)
    model = network(model_record, store, data.test_images.shape[-1]).to(device)
    top, guess = training.predict(model, data.test_images).softmax(1).max(1)
    chosen = torch.nonzero((guess == data.test_labels) & (top >= confidence))[:, 0]
    note(f"FGSM: attacking {len(chosen)} test images of {data.name}.")
    radii = []
    with progress(len(chosen), "FGSM") as bar:
        bar.unit = "image"
        for part in chosen.split(250):
            images, labels = training.to_float(data.test_images[part]).to(device), data.test_labels[part].to(device)
            radii.append(attacks.fgsm_radius(model, images, labels).cpu())
            bar.update(len(part))
    radii = torch.cat(radii) if radii else torch.empty(0, dtype=torch.float64)
    fit = robustness.fit(radii.numpy())
    return store.put(
        "attack", asked, data, results=dict(fit=fit.dict(), accuracy=model_record["results"]["test_accuracy"]),
        arrays=dict(radii=radii.numpy(), images=chosen.int().numpy()),
        wall_s=time.perf_counter() - started, device=device, of=model_record["id"],
    )


def main(words=None) -> None:
    """``python -m khnb.pipeline '{"model": "LL", "K": 10}'``: train and attack the models named, one JSON object each."""
    from khnb import data as datasets

    for word in words or sys.argv[1:]:
        wish = json.loads(word)
        kind, dtype, name = wish.pop("model", "LL"), wish.pop("feature_dtype", "float32"), wish.pop("data", "cifar10")
        data = datasets.load(name)
        head = HeadSettings.of(wish)
        if kind == "LL":
            record = ll_model(data, ConvSettings.of(wish), head, feature_dtype=dtype)
        else:
            record = bp_model(data, wish.get("K", 10), wish.get("w", 4), head)
        print(record["id"], kind, record["results"]["test_accuracy"], flush=True)
        attack = fgsm_attack(record, data)
        print(attack["id"], "FGSM", attack["results"]["fit"], flush=True)


if __name__ == "__main__":
    main()
