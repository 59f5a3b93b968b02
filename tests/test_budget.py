"""What figures and tables cost, and that the page of it is about the grids as they are."""

from types import SimpleNamespace

import pytest

from khnb import budget, tables
from khnb.results import Store


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fig 8.1; fig 8.2", ["figure 8.1", "figure 8.2"]), ("figs 9.2-9.4", ["figure 9.2", "figure 9.3", "figure 9.4"]), ("figs 9.8, 9.9a", ["figure 9.8", "figure 9.9"]),
        ("figs 9.10a; tables B.1, B.2", ["figure 9.10", "table B.1", "table B.2"]), ("table A.2; best 0.689", ["table A.2"]), ("speed-ups 4, 2.1, 1.6 and 25%", []),
        ("figs 9.1, 9.2; R 0.01720", ["figure 9.1", "figure 9.2"]), ("input of E08, E09; figs 8.7b, 9.5", ["figure 8.7", "figure 9.5"]), ("none", []),
    ],
)
def test_outputs_of_an_experiment(text, expected):
    assert [" ".join(one) for one in budget.outputs(text)] == expected


def test_what_is_drawn_from_experiments():
    needed = budget.needed()
    assert needed["figure", "9.8"] == ["E12", "E15", "E16"] and needed["table", "A.3"] == ["E08", "E09"] and needed["figure", "9.2"] == ["E11"]
    known = {(row["kind"], row["id"]) for row in tables.thesis("manifest")}
    assert set(needed) <= known
    computed = {number for kind, number in known - set(needed) if kind == "figure"}
    assert computed == {"2.1", "2.2", "2.3", "2.4", "3.1", "4.1", "5.1", "6.1", "7.1"}, "those that need no experiment"


@pytest.mark.slow
def test_the_page_is_of_the_grids_and_records_as_they_are():
    (record,) = Store().find("timing", **budget.ASKED)
    assert budget.PAGE.read_text() == budget.page(record), "run python -m khnb.budget"


def test_a_rate_that_is_not_on_record():
    with pytest.raises(ValueError, match="no rate of 'bp' is on record: python -m khnb.budget --measure"):
        budget.Rates({"start": [1.0]}).get("bp", lambda: [2.0])
    source = SimpleNamespace(get=lambda name, measure: measure())
    rates = budget.Rates({"start": [1.0]}, source)
    assert rates.get("bp", lambda: [2.0]) == [2.0] and rates.known == {"start": [1.0], "bp": [2.0]}


@pytest.mark.slow
def test_one_kind_of_table_has_one_kind_of_model(monkeypatch):
    monkeypatch.setattr(budget, "needed", lambda: {("table", "B.1"): ["E21"], ("table", "B.3"): ["E21"]})
    source = SimpleNamespace(get=lambda name, measure: [1e-9] * (2 if name.startswith(("heads", "attack")) else 1))
    LL, BP, both = budget.rows(budget.Rates({}, source))
    assert "layers" in LL["laptop"] and "layers" not in BP["laptop"] and both["whole_Pflop"] == pytest.approx(LL["whole_Pflop"] + BP["whole_Pflop"])
    assert LL["hours"] > 0 and LL["whole_hours"] > LL["hours"]
