"""Sweeps for real: Snakemake, papermill, kernels; killed, interrupted, on a full disk, and on a Slurm of our own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from khnb import sweeps
from khnb.results import Store

pytestmark = pytest.mark.slow
pytest.importorskip("snakemake", reason="Snakemake is not installed: pip install '.[sweep]'")
ROOT = Path(__file__).parents[1]
LAYERS = dict(what="layers", data="cifar10-sample", K=4, w=6, m=[2, 3], conv_epochs=1, conv_batch=2000, conv_share=0.1, snapshots=[])
LONG = dict(LAYERS, K=10, w=4, m=2, conv_share=1.0, conv_batch=200, conv_epochs=500)  # minutes, if it is let
SHORT = dict(LAYERS, w=5)


class Sweep:
    """A grid with a store and a folder of its own, run as at a terminal."""

    def __init__(self, folder: Path, grid: list, **env):
        self.folder, self.store = folder, Store(folder / "results")
        self.grid, self.place = folder / "mine.json", folder / "runs" / "mine-thesis"
        (folder / "results").mkdir(parents=True, exist_ok=True)
        self.write(grid)
        self.env = os.environ | dict(
            KHNB_RESULTS=str(folder / "results"), KHNB_RUNS=str(folder / "runs"), KHNB_CHECKPOINTS=str(folder / "checkpoints"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
        ) | env

    def write(self, grid: list):
        self.grid.write_text(json.dumps(grid))

    def words(self, do: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "khnb.sweeps", do, str(self.grid), "--no-estimate", "--cores", "2", *more]

    def do(self, do: str, *more: str, timeout=900) -> subprocess.CompletedProcess:
        engine = self.start(do, *more)
        try:
            out, err = engine.communicate(timeout=timeout)
        finally:
            stop(engine)
        return subprocess.CompletedProcess(engine.args, engine.returncode, out, err)

    def start(self, do="run", *more: str) -> subprocess.Popen:
        # as a terminal starts it: a shell's background jobs, and so tests run in one, ignore Ctrl-C and hand that on
        return subprocess.Popen(
            self.words(do, *more), env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def groups(self) -> list:
        return sweeps.groups(str(self.grid))

    def left(self) -> list:
        store = Store(self.folder / "results")
        return [group.kind for group in self.groups() if sweeps.missing(group, store)]


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (parent, command line)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            found[int(path.name)] = int(path.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1]), path.joinpath("cmdline").read_text().replace("\0", " ")
        except (OSError, IndexError):
            continue
    return found


def below(pid: int, command: str = "") -> list[int]:
    """The processes that this one started, and those that they did, whose command has this in it."""
    every, family = processes(), [pid]
    for one in family:
        family += [child for child, (parent, _) in every.items() if parent == one]
    return [one for one in family[1:] if command in every[one][1]]


def stop(engine: subprocess.Popen):
    """Nothing that a test started outlives it."""
    for pid in [engine.pid, *below(engine.pid)] if engine.poll() is None else []:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def until(what, seconds=600):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.2)
    return found


def working(engine: subprocess.Popen) -> list[int]:
    """Kernels of the sweep that have been computing for a second."""
    def busy():
        kernels = below(engine.pid, "ipykernel_launcher")
        return [pid for pid in kernels if sum(map(int, Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])) > 3 * os.sysconf("SC_CLK_TCK")]

    return until(busy)


@pytest.fixture
def sweep(tmp_path):
    made = []

    def make(grid, **env):
        made.append(Sweep(tmp_path, grid, **env))
        return made[-1]

    yield make


def test_from_a_grid_to_records_and_nothing_twice(sweep):
    """Layers, heads, a BP model and their attacks; the second time there is nothing to do; a changed parameter asks for what is new alone."""
    small = dict(LAYERS, m=2) | dict(n=[1, 2], w_pool=9, head_epochs=1, head_batch=500, attacked=[dict(eps_max=0.002, confidence=0.2)])
    models = {k: v for k, v in small.items() if k != "what"} | dict(bp="train", bp_epochs=1, bp_batch=500)
    mine = sweep([LAYERS, models])
    done = mine.do("run")
    assert done.returncode == 0, done.stdout + done.stderr
    groups = mine.groups()
    assert [group.kind for group in groups] == ["layers", "heads", "bp", "attacks", "attacks"] and mine.left() == []
    lines = re.findall(r"^\[(\d) of 5\] .*: \d+ s$", done.stdout, re.MULTILINE)
    assert sorted(lines) == list("12345") and done.stderr == ""
    assert f"{len(groups)} of {len(groups)} groups finished, 0 running, 0 failed, 0 to come; no engine is running" in done.stdout
    assert {path.stem for path in (mine.place / "done").iterdir()} == {group.id for group in groups}
    assert len(mine.store.find("layer")) == 2 and len(mine.store.find("model")) == 4 and len(mine.store.find("attack")) == 4
    before = {path: path.stat().st_mtime_ns for path in (mine.folder / "results").rglob("*.npz")}
    again = mine.do("run")
    assert again.returncode == 0 and "5 of 5 groups are done" in again.stdout and "[1 of" not in again.stdout
    mine.write([LAYERS, models | dict(n=[1, 2, 4])])
    assert sorted(mine.left()) == ["attacks", "attacks", "bp", "heads"]
    third = mine.do("run")
    assert third.returncode == 0 and "[4 of 4]" in third.stdout
    assert before.items() <= {path: path.stat().st_mtime_ns for path in (mine.folder / "results").rglob("*.npz")}.items(), "a finished record was made again"


def test_killed_worker(sweep):
    mine = sweep([LONG, SHORT])
    engine = mine.start()
    until(lambda: list((mine.place / "done").glob("*.ipynb")))  # that was the short one
    os.kill(working(engine)[0], signal.SIGKILL)
    out, err = engine.communicate(timeout=600)
    assert engine.returncode and "1 of 2 groups finished, 0 running, 1 failed" in out, out + err
    assert re.search(r"FAILED after \d+ s: DeadKernelError", out)
    mine.write([dict(LONG, conv_epochs=2), SHORT])
    assert mine.do("run").returncode == 0 and mine.left() == []


@pytest.mark.parametrize("what", ["engine", "everything"])
def test_killed_engine(what, sweep):
    mine = sweep([dict(LONG, conv_epochs=25), SHORT])
    engine = mine.start()
    working(engine)
    family, every = below(engine.pid), processes()
    workers = {pid for pid in family if pid in every and ("-m khnb.runner" in every[pid][1] or "ipykernel_launcher" in every[pid][1])}
    doomed = [engine.pid, *family] if what == "everything" else [engine.pid, *(pid for pid in family if pid not in workers)]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    engine.communicate(timeout=300)
    assert "no engine is running" in mine.do("status").stdout
    done = mine.do("run")  # waits for workers that are still at it, and does what they do not
    assert done.returncode == 0 and mine.left() == [], done.stdout + done.stderr
    for kind in ("layer",):
        assert len(list((mine.folder / "results" / "records" / kind).iterdir())) == 3
    assert not [path for path in (mine.folder / "results").rglob(".*.json.*")] or what == "everything"


def test_interrupted(sweep):
    mine = sweep([LONG, SHORT])
    engine = mine.start()
    working(engine)
    until(lambda: list((mine.folder / "results" / "records").rglob("*.json")))
    family = below(engine.pid)
    os.killpg(engine.pid, signal.SIGINT)  # as Ctrl-C does
    out, _ = engine.communicate(timeout=300)
    assert engine.returncode and "1 of 2 groups finished" in out
    until(lambda: not [pid for pid in family if pid in processes()], 120)
    mine.write([dict(LONG, conv_epochs=2), SHORT])
    assert mine.do("run").returncode == 0 and mine.left() == []


def test_the_same_sweep_twice_at_once(sweep):
    mine = sweep([dict(LONG, conv_epochs=25)])
    engine = mine.start()
    working(engine)
    second = mine.do("run")
    assert second.returncode == 3 and "this sweep is running already" in second.stderr
    told = mine.do("status").stdout
    assert "0 of 1 groups finished, 1 running, 0 failed, 0 to come; an engine is at it" in told and "running: 1 KH layers" in told
    assert engine.wait(timeout=900) == 0 and mine.left() == []


def test_a_notebook_that_raises(sweep, tmp_path):
    mine = sweep([dict(LAYERS, data="cifar10"), SHORT], KHNB_DATA=str(tmp_path / "nothing"))  # valid, but there are no such images here
    done = mine.do("run")
    assert done.returncode and "1 of 2 groups finished, 0 running, 1 failed" in done.stdout
    (reason,) = (mine.place / "failed").glob("*.txt")
    assert "DataError" in reason.read_text() and "failed: 2 KH layers" in done.stdout and "DataError" in mine.do("status").stdout
    assert reason.with_suffix(".ipynb").exists()


def test_a_damaged_record_is_named_and_made_again(sweep):
    mine = sweep([SHORT])
    assert mine.do("run").returncode == 0
    path = next((mine.folder / "results" / "records" / "layer").iterdir())
    path.write_bytes(path.read_bytes()[:100])
    told = mine.do("status")
    assert "0 of 1 groups finished" in told.stdout and path.name in told.stderr and "damaged" in told.stderr
    done = mine.do("run")
    assert done.returncode == 0 and mine.left() == []


@pytest.mark.parametrize("change", [dict(m=1), dict(Kk=2), dict(what="nothing")])
def test_an_invalid_grid_is_refused_before_anything_runs(change, sweep):
    mine = sweep([LAYERS, LAYERS | change])
    done = mine.do("run")
    assert done.returncode == 2 and next(iter(change)) in done.stderr and len(done.stderr.splitlines()) == 1
    assert not mine.place.exists() and not list((mine.folder / "results").iterdir())


def test_a_full_disk(sweep, tmp_path):
    place = tmp_path / "results"
    place.mkdir()
    mount = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(place)], capture_output=True, text=True)
    if not mount or mount.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {mount.stderr.strip() if mount else 'no mount'}")
    try:
        mine = sweep([dict(SHORT, K=4, m=2), dict(LAYERS, K=20, w=8, conv_batch=5000, m=2)])
        done = mine.do("run")
        assert done.returncode and "No space left on device" in done.stdout, done.stdout + done.stderr
        whole = Store(place).find("layer")
        assert len(whole) == 1 == len(list(place.rglob("*.json"))), "the small one is whole, of the large one there is nothing"
        assert Store(place).arrays(whole[0])["weight"].shape == (16, 3, 5, 5)
        subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
        assert mine.do("run").returncode == 0 and mine.left() == []
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


SLURM = """ClusterName=khnb
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
SlurmctldPort={port}
SlurmdPort={next}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout=3600
SlurmctldTimeout=3600
MailProg=/bin/true
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a Slurm whose controller and only node are this machine, or a skip that says why there is none."""
    import socket

    programs = ["munged", "mungekey", "slurmctld", "slurmd", "sbatch", "sinfo"]
    lacking = [name for name in programs if not shutil.which(name)]
    if lacking or os.geteuid():
        pytest.skip(f"needs {', '.join(lacking)}: install slurm-wlm" if lacking else "starting Slurm's daemons needs root")
    folder = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())  # a socket's path must be short
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0)), two.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], two.getsockname()[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 - 500
    host = socket.gethostname().split(".")[0]
    (folder / "slurm.conf").write_text(SLURM.format(host=host, folder=folder, port=ports[0], next=ports[1], cpus=os.cpu_count(), memory=memory))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    usual = Path("/etc/slurm/slurm.conf")  # the executor hands no SLURM_CONF on to its jobs
    if usual.exists() or usual.is_symlink():
        pytest.skip("this machine has a Slurm of its own")
    usual.parent.mkdir(parents=True, exist_ok=True)
    usual.symlink_to(folder / "slurm.conf")
    env, daemons = os.environ.copy(), []

    def run(*words):
        return subprocess.run(words, env=env, capture_output=True, text=True)

    def start(*words):
        daemons.append(subprocess.Popen(words, env=env, stdout=open(folder / f"{words[0]}.out", "w"), stderr=subprocess.STDOUT))

    try:
        run("mungekey", "--create", "--keyfile", str(folder / "munge.key"))
        folder.chmod(0o755)
        start("munged", "--foreground", "--force", f"--key-file={folder}/munge.key", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid",
              f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--num-threads=2")
        until(lambda: (folder / "munge.socket").exists() or daemons[0].poll() is not None, 30)
        start("slurmctld", "-D")
        start("slurmd", "-D", "-N", host)
        try:
            until(lambda: "idle" in run("sinfo", "-h", "-o", "%t").stdout, 60)
        except AssertionError:
            told = " / ".join((folder / name).read_text().strip()[-300:] for name in ("munged.out", "slurmctld.out", "slurmctld.log", "slurmd.out") if (folder / name).exists())
            pytest.skip(f"Slurm does not start here: {told}")
        yield run
    finally:
        usual.unlink()
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_on_a_cluster(slurm, sweep):
    """The same grid, each group a job of Slurm, with the profile of sweeps/slurm/."""
    run = slurm
    models = {k: v for k, v in LAYERS.items() if k != "what"} | dict(m=2, n=1, w_pool=9, head_epochs=1, head_batch=500, bp="none", attacked=False)
    mine = sweep([LAYERS, models])
    here = ["--slurm-status-command", "squeue", "--slurm-init-seconds-before-status-checks", "2"]  # no accounting here, which a cluster has
    engine = mine.start("run", "--", "--profile", str(ROOT / "sweeps" / "slurm"), "--default-resources", "mem_mb_per_cpu=500", "runtime=10", *here)
    try:
        until(lambda: run("squeue", "-h").stdout.strip() or engine.poll() is not None, 300)
        out, err = engine.communicate(timeout=900)
    finally:
        stop(engine)
    assert engine.returncode == 0 and mine.left() == [], out + err
    assert "2 of 2 groups finished" in out
    assert len(list((mine.place / "done").iterdir())) == 2
