"""The manifest covers the thesis, claims nothing that is not there, and the scoreboard says what it says."""

import math
import re

import pytest

from khnb import coverage
from khnb.results import Store
from khnb.tables import thesis

ROWS = coverage.manifest()
STORE = Store(coverage.REFERENCE.parent / "results")
TABLES = ["6.1", "8.1", "9.1", "A.1", "A.2", "A.3", "A.4", "B.1", "B.2", "B.3", "B.4"]
PAGES = coverage.REFERENCE.parent / "book" / "_build" / "html"


def ids(kind):
    return [row["id"] for row in ROWS if row["kind"] == kind]


def test_every_figure_table_and_number_of_the_thesis_has_a_row():
    assert ids("figure") == [row["figure"] for row in thesis("figures")] and len(ids("figure")) == 27
    assert ids("table") == TABLES
    assert ids("number") == [row["id"] for row in thesis("headline_numbers")]


def test_every_row_names_a_notebook_that_exists():
    for row in ROWS:
        assert (coverage.REFERENCE.parent / "notebooks" / f"{row['notebook']}.ipynb").is_file(), row


@pytest.mark.parametrize("row", [r for r in ROWS if r["status"] in ("done", "partial")], ids=lambda r: r["id"])
def test_what_is_claimed_has_its_record(row):
    assert row["scale"] and row["record"], "a row that is done says from what and at which scale"
    assert row["anchor"] or row["evidence"], "a row that is done is shown somewhere"
    found = coverage.records(row, STORE)
    assert None not in found, f"{row['id']} is {row['status']}, but the store lacks one of {row['record']}"
    if row["evidence"]:
        value = coverage.dig(found[0], row["evidence"])
        assert isinstance(value, (int, float)) and math.isfinite(value)


@pytest.mark.parametrize("row", [r for r in ROWS if r["status"] == "adopted" and r["evidence"]], ids=lambda r: r["id"])
def test_adopted_settings_are_those_of_the_records(row):
    (record,) = coverage.records(row, STORE)
    assert coverage.dig(record, row["evidence"]) == float(coverage.stated(row, record)[0])


def test_nothing_not_yet_done_claims_evidence():
    for row in ROWS:
        if row["status"] in ("not yet", "thesis only", "quoted"):
            assert not row["evidence"], row


def test_the_scoreboard_is_up_to_date():
    assert coverage.PAGE.read_text() == coverage.scoreboard(STORE), "run python -m khnb.coverage"


def test_verdicts():
    assert coverage.verdict(0.61949, "0.619", 0.001) == "equal as printed"
    assert coverage.verdict(0.6205, "0.619", 0.001).startswith("agrees")
    assert coverage.verdict(0.625, "0.619", 0.001) == "close (1.0% off)"
    assert coverage.verdict(0.7, "0.619", None) == "differs (13% off)"
    assert coverage.verdict(1e-3, "1e-3", None) == "equal as printed"


def test_a_manifest_with_a_wrong_row_is_refused(tmp_path):
    text = (coverage.REFERENCE / "manifest.csv").read_text().splitlines()
    for bad in (text[1], text[1].replace(",done,", ",perfect,")):
        (tmp_path / "manifest.csv").write_text("\n".join([*text, bad]))
        with pytest.raises(ValueError, match="manifest row"):
            coverage.manifest(tmp_path)


@pytest.mark.slow
@pytest.mark.page
@pytest.mark.parametrize("row", [r for r in ROWS if r["anchor"]], ids=lambda r: r["id"])
def test_the_built_book_shows_what_the_manifest_says(row):
    page = PAGES / "notebooks" / f"{row['notebook']}.html"
    if not PAGES.is_dir():
        pytest.skip("the book is not built: make book")
    assert re.search(f'id="{re.escape(row["anchor"])}"', page.read_text()), f"{page.name} lacks #{row['anchor']}"


def test_no_attack_or_audit_is_of_a_model_as_it_was_before():
    """A model that is trained again has other weights, so that what was known of it must be found again."""
    started = {kind: {record["id"]: record["started"] for record in STORE.find(kind)} for kind in ("model", "attack")}
    for kind, of in (("attack", "of"), ("audit", "audited")):
        about = started["model" if kind == "attack" else "attack"]
        assert not [r["id"] for r in STORE.find(kind) if r["asked"][of] not in about or r["started"] < about[r["asked"][of]]]
