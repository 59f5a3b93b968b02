"""The environment is said in three places (pyproject.toml, constraints.txt, environment.yml): they agree."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NAMED = {"jupyter-book", "jupytext", "papermill", "torch", "torchvision", "numpy", "scipy", "matplotlib", "ipywidgets"}
# Written in two halves, so that this file does not name them itself.
HOSTS = [
    ".".join(halves)
    for halves in [
        ("pypi", "org"), ("pythonhosted", "org"), ("npmjs", "org"), ("npmjs", "com"), ("unpkg", "com"),
        ("jsdelivr", "net"), ("cdnjs", "cloudflare"), ("debian", "org"), ("anaconda", "org"), ("esm", "sh"),
        ("skypack", "dev"), ("googleapis", "com"), ("gstatic", "com"), ("download", "pytorch"),
    ]
]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def without_dependencies() -> dict[str, Requirement]:
    """What the Makefile installs with --no-deps, by canonical name: a list of requirements cannot say so to pip."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert list(groups) == ["no-deps"]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in groups["no-deps"]}


def requirements() -> dict[str, Requirement]:
    """Every direct requirement, extras included, by canonical name."""
    extras = project()["optional-dependencies"]
    lines = project()["dependencies"] + [line for extra in extras.values() for line in extra]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


def pins() -> dict[str, str]:
    lines = [line.strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^\s;#]+)", line) for line in lines if line and line[0] != "#"]
    assert all(pinned), "constraints.txt holds a line that is not NAME==VERSION"
    return {canonicalize_name(pin[1]): pin[2] for pin in pinned}


def conda() -> dict:
    return yaml.safe_load((ROOT / "environment.yml").read_text())


def project_files() -> list[Path]:
    """Files under version control, and new ones that git does not ignore."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True, text=True,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout: the files of the project cannot be told from others")
    return [path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_direct_requirement_is_pinned_within_its_range():
    for name, requirement in (requirements() | without_dependencies()).items():
        assert name in pins(), f"{name} is in pyproject.toml but not pinned in constraints.txt: run `make freeze`"
        assert requirement.specifier.contains(pins()[name]), f"{name}=={pins()[name]} is outside {requirement.specifier}"


def test_environment_yml_says_the_same_as_pyproject():
    pip = next(entry["pip"] for entry in conda()["dependencies"] if isinstance(entry, dict))
    options = [line for line in pip if line.startswith("-")]
    named = {canonicalize_name(Requirement(line).name): Requirement(line) for line in pip if line not in options}
    assert {n: str(r.specifier) for n, r in named.items()} == {n: str(r.specifier) for n, r in requirements().items()}
    assert options == ["--constraint constraints.txt", "--editable ."]


def test_what_comes_without_dependencies_is_said_everywhere():
    makefile = (ROOT / "Makefile").read_text()
    names = re.search(r"^NO_DEPS := (.*)$", makefile, re.MULTILINE)[1].split()
    assert {canonicalize_name(name) for name in names} == set(without_dependencies()) and names
    assert not set(without_dependencies()) & set(requirements())
    command = "-m pip install --quiet --constraint constraints.txt --no-deps $(NO_DEPS)"
    assert makefile.count(command) == 1 and makefile.count("--no-deps") == 1
    command = "#     pip install --constraint constraints.txt --no-deps " + " ".join(names)
    assert command in (ROOT / "environment.yml").read_text().splitlines()


def test_what_comes_without_dependencies_has_them_all_but_the_one_it_need_not_have():
    """Where this fails because every declared version is met, the package can move to the extra ``test``."""
    unmet = {}
    for name in without_dependencies():
        declared = {canonicalize_name(each.name): each for each in map(Requirement, metadata.requires(name))}
        declared = {n: each for n, each in declared.items() if each.marker is None or each.marker.evaluate()}
        unmet[name] = {n for n, each in declared.items() if not each.specifier.contains(pins()[n])}
        assert set(declared) - unmet[name] <= set(requirements())
    assert unmet == {"torchattacks": {"requests"}}
    files = list(Path(find_spec("torchattacks").origin).parent.rglob("*.py"))
    uses = re.compile(r"^\s*(import|from) requests\b", re.MULTILINE)
    assert len(files) > 10 and not [path for path in files if uses.search(path.read_text())]


def test_environment_yml_asks_for_the_same_python():
    python = [entry for entry in conda()["dependencies"] if isinstance(entry, str) and entry.startswith("python")]
    assert python == ["python" + project()["requires-python"]]


def test_the_named_packages_are_required():
    assert NAMED <= set(requirements())


def test_everything_that_is_imported_is_required():
    """A package that comes along with another may stay away tomorrow; what the code imports is named. But for Triton, which comes with PyTorch for
    the GPUs it is for, in the version that this PyTorch wants: where it is not, nothing asks for it (``khnb.native.gpu``)."""
    imported = set()
    for path in [*ROOT.glob("khnb/**/*.py"), *ROOT.glob("notebooks/*.py"), *ROOT.glob("tests/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    own = {"khnb", *(path.stem for path in ROOT.glob("tests/*.py"))}
    outside = imported - set(sys.stdlib_module_names) - own - {"triton"}
    distributions = metadata.packages_distributions()
    named = {*requirements(), *without_dependencies()}
    unnamed = {
        module: distributions.get(module, "not installed")
        for module in outside
        if not {canonicalize_name(name) for name in distributions.get(module, [])} & named
    }
    assert not unnamed


def test_the_version_is_said_once_and_the_same():
    import khnb

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert khnb.__version__ == project()["version"] == citation["version"]
    assert f"## {khnb.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_no_file_names_a_registry_or_a_cdn():
    pattern = re.compile("|".join(re.escape(host) for host in HOSTS), re.IGNORECASE)
    found = []
    for path in project_files():
        text = path.read_bytes()
        if b"\0" not in text and (hit := pattern.search(text.decode("utf-8", "replace"))):
            found.append(f"{path.relative_to(ROOT)}: {hit[0]}")
    assert not found


def test_no_file_is_too_large_for_a_repository():
    assert not [str(path) for path in project_files() if path.stat().st_size > 5 * 2**20]


@pytest.mark.parametrize(
    "name",
    ["book/", "notebooks/", "khnb/", "tests/", "_config.yml", "_toc.yml", "environment.yml", "README.md", "LICENSE",
     "LICENSE-text", "LICENCES.md", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md"],
)
def test_the_top_level_is_as_promised(name):
    path = ROOT / name
    assert path.is_dir() if name.endswith("/") else path.is_file() and path.stat().st_size > 0


@pytest.mark.parametrize("name", ["_config.yml", "_toc.yml", "notebooks"])
def test_the_book_links_to_the_top_level(name):
    link = ROOT / "book" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split())
    explained = set(re.findall(r"^([a-z]+):.*## \S", makefile, re.MULTILINE))
    assert explained == phony
