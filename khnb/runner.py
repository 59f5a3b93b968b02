"""One group of a sweep: its chapter's notebook, run by papermill. Light, since it is started for each: nothing here imports PyTorch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import sys
import time
from pathlib import Path


@contextlib.contextmanager
def held(place: Path, wait: bool = True):
    """A lock that the system itself gives back when its holder dies, however it dies; ``BlockingIOError`` where it is held and not to be waited for."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def is_held(place: Path) -> bool:
    """Whether somebody who is alive holds the lock."""
    try:
        with open(place) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


@contextlib.contextmanager
def _errors_into(place: Path):
    """What this process and its kernel write to stderr goes into a file: a log of a thousand jobs has room for their lines alone."""
    place.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    before = os.dup(2)
    try:
        with open(place, "w") as file:
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def minutes(seconds: float) -> str:
    """A time in words of about two digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def do(place: Path, id: str, quiet: bool = False, env: dict | None = None) -> bool:
    """Run one group of the plan in this file; True where it came to its end. What it printed is in ``done/<id>.ipynb``, or in ``failed/<id>.ipynb``
    with the reason beside it."""
    import papermill

    folder, started, used = place.parent, time.time(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    plan = json.loads(place.read_text())
    group = next(one for one in plan["groups"] if one["id"] == id)
    done, failed = folder / "done" / f"{id}.ipynb", folder / "failed" / f"{id}.ipynb"
    for path in (done, failed):
        path.parent.mkdir(parents=True, exist_ok=True)
    threads = str(group.get("threads", 1))
    os.environ |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "KHNB_PROGRESS": "0", "PYDEVD_DISABLE_FILE_VALIDATION": "1"} | (env or {})
    with held(folder / "locks" / id):  # a worker that outlived its engine may still be at it
        reason = ""
        try:
            with _errors_into(folder / "logs" / f"{id}.txt"):
                papermill.execute_notebook(
                    str(folder / f"{group['notebook']}.ipynb"), str(failed), parameters=dict(group=f"{place}#{id}", device=plan["device"]),
                    cwd=plan["notebooks"], kernel_name="python3", progress_bar=False, log_output=False,
                )
        except papermill.PapermillExecutionError as error:
            reason = f"{error.ename}: {error.evalue}"
        except Exception as error:  # the kernel died, the disk is full: whatever it is, the sweep's other groups go on
            reason = f"{type(error).__name__}: {error}"
        took, used = time.time() - started, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - used
        with contextlib.suppress(OSError):  # on a full disk the exit status must do
            if reason:
                failed.with_suffix(".txt").write_text(reason + "\n")
            else:
                os.replace(failed, done)
                failed.with_suffix(".txt").unlink(missing_ok=True)
            with open(folder / "times.jsonl", "a") as file:
                file.write(json.dumps(dict(id=id, seconds=round(took, 1), cpu=round(used, 1), expected=group.get("seconds"), failed=bool(reason))) + "\n")
    if not quiet:
        print(line(plan, folder, group, took, reason), flush=True)
    return not reason


def line(plan: dict, folder: Path, group: dict, took: float, reason: str) -> str:
    """What is said when a group has ended."""
    todo = [one for one in plan["groups"] if one["id"] in set(plan["todo"])]
    left = [one for one in todo if not (folder / "done" / f"{one['id']}.ipynb").exists() and not (folder / "failed" / f"{one['id']}.txt").exists()]
    told = f"[{len(todo) - len(left)} of {len(todo)}] {group['title']}: "
    if reason:
        return told + f"FAILED after {minutes(took)}: {reason.splitlines()[0][:200]} (see {folder / 'failed' / group['id']}.ipynb)"
    told += minutes(took) + (f" (expected {minutes(group['seconds'])})" if group.get("seconds") else "")
    if left and all("seconds" in one for one in left):
        told += f"; about {minutes(pace(folder) * sum(one['seconds'] for one in left) / plan['workers'])} left"
    return told


def pace(folder: Path) -> float:
    """How much longer than expected the groups took that have ended, together; 1 where none has."""
    took = expected = 0.0
    with contextlib.suppress(OSError):
        for text in (folder / "times.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line cut short by a crash
                one = json.loads(text)
                if one["expected"] and not one["failed"]:
                    took, expected = took + one["seconds"], expected + one["expected"]
    return took / expected if expected else 1.0


if __name__ == "__main__":
    sys.exit(0 if do(Path(sys.argv[1]), sys.argv[2]) else 1)
