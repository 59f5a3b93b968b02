"""Every chapter has its notebook: a pair in step, committed without outputs, and one that runs."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
import yaml
from jupytext.compare import compare_notebooks

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ROOT / "notebooks"
CHAPTERS = [
    "01_introduction", "02_neural_networks", "03_supervised_training", "04_local_learning", "05_datasets",
    "06_implementation", "07_robustness", "08_training", "09_attacks", "10_discussion", "11_conclusions",
    "A_grid_searches", "B_ensembles", "C_heads",
]
# Small enough for a test; each is given to the notebooks that have a parameter of that name.
SMALL = dict(data="cifar10-sample", conv_epochs=1, head_epochs=1, conv_batch=5000)


def read(name: str):
    return nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(name: str) -> dict:
    return papermill.inspect_notebook(str(NOTEBOOKS / f"{name}.ipynb"))


def execute(name: str, out: Path, **given):
    papermill.execute_notebook(
        str(NOTEBOOKS / f"{name}.ipynb"), str(out), parameters=given, cwd=str(NOTEBOOKS), kernel_name="python3",
        progress_bar=False, log_output=False,
    )
    return nbformat.read(out, as_version=4)


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """A copy of the committed results, so that what a notebook trains here stays here."""
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.setenv("KHNB_RESULTS", str(tmp_path / "results"))
    return tmp_path


def test_the_chapters_are_the_thesis_chapters_in_order():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == sorted(CHAPTERS)
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    assert [name.removeprefix("notebooks/") for name in files if name.startswith("notebooks/")] == CHAPTERS


@pytest.mark.parametrize("name", CHAPTERS)
class TestEachChapter:
    def test_the_pair_is_in_step(self, name):
        script = jupytext.read(NOTEBOOKS / f"{name}.py", fmt="py:percent")
        compare_notebooks(read(name), script, "py:percent")
        assert [cell.metadata.get("tags", []) for cell in read(name).cells] == [
            cell.metadata.get("tags", []) for cell in script.cells
        ]

    def test_it_says_that_it_is_paired(self, name):
        assert read(name).metadata.get("jupytext", {}).get("formats") == "ipynb,py:percent"

    def test_it_is_committed_without_outputs(self, name):
        code = [cell for cell in read(name).cells if cell.cell_type == "code"]
        assert not [cell.source for cell in code if cell.outputs or cell.execution_count is not None]
        assert "widgets" not in read(name).metadata

    def test_it_names_its_kernel(self, name):
        assert read(name).metadata.kernelspec.name == "python3"

    def test_it_is_a_valid_notebook(self, name):
        nbformat.validate(read(name))

    def test_it_has_one_title_and_something_to_say(self, name):
        prose = "\n\n".join(cell.source for cell in read(name).cells if cell.cell_type == "markdown")
        assert len(re.findall(r"^# \S", prose, re.MULTILINE)) == 1
        assert len(prose.split()) > 50

    @pytest.mark.slow
    def test_it_runs_with_small_parameters(self, name, scratch):
        given = {key: value for key, value in SMALL.items() if key in parameters(name)}
        done = execute(name, scratch / "out.ipynb", **given)
        code = [cell for cell in done.cells if cell.cell_type == "code"]
        assert all(cell.execution_count is not None for cell in code if cell.source.strip())


@pytest.mark.slow
@pytest.mark.parametrize("name", CHAPTERS)
@pytest.mark.parametrize("given", [{"Kk": 10}, {"K": -1}], ids=["misspelt", "out of range"])
def test_a_wrong_parameter_stops_it_and_lists_the_valid_ones(name, given, scratch):
    if not parameters(name) or "K" in given and "K" not in parameters(name):
        pytest.skip(f"{name} takes no such parameter")
    with pytest.raises(papermill.PapermillExecutionError) as stopped:
        execute(name, scratch / "out.ipynb", **given)
    wrong = next(iter(given))
    assert re.search(rf"\b{wrong}\b", stopped.value.evalue)
    listed = parameters(name) if wrong not in parameters(name) else [wrong]
    missing = [valid for valid in listed if not re.search(rf"\b{valid}\b", stopped.value.evalue)]
    assert not missing, f"the error does not name {missing}: {stopped.value.evalue}"


@pytest.mark.slow
def test_the_command_of_the_readme_uses_a_committed_model(scratch):
    """``papermill 09_attacks.ipynb out.ipynb -p K 20`` inside notebooks/, within three minutes."""
    before = {path.name for path in (scratch / "results").rglob("*") if path.is_file()}
    subprocess.run(
        [str(Path(sys.executable).with_name("papermill")), "09_attacks.ipynb", str(scratch / "out.ipynb"), "-p", "K", "20"],
        cwd=NOTEBOOKS, check=True, timeout=180, capture_output=True, text=True,
    )
    done = nbformat.read(scratch / "out.ipynb", as_version=4)
    assert any("injected-parameters" in cell.metadata.get("tags", []) for cell in done.cells)
    after = {path.name for path in (scratch / "results").rglob("*") if path.is_file()}
    assert not [name for name in after - before if name.endswith(".json")], "it trained a model instead of using one"
