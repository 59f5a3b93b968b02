"""What figures and tables cost, and that the page of it is about the grids as they are."""

import re

import pytest

from khnb import budget, tables


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


class Rates:
    """Every rate is 1e-9 s."""

    def get(self, name, measure):
        return [1e-9] * (2 if name.startswith(("heads", "attack")) else 1)


@pytest.mark.slow
def test_the_page_has_the_counts_of_the_grids():
    def told(text):  # cells of the rows of all tables
        return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line.startswith("|")]

    def counts(rows, width):
        return [[cell for cell in row if not re.fullmatch(r"[\d,]+\.?\d*", cell)] for row in rows if len(row) == width]

    made = budget.page(budget.rows(Rates()), budget.lists(Rates()), [dict(part="none")], dict(hardware=dict(name="test"), code=dict(source="0" * 16)), "today")
    page = budget.PAGE.read_text().split("## On one GPU")[0]
    for width in (8, 4):
        expected, found = counts(told(made), width), counts(told(page), width)
        assert len(expected) > 10 and found == expected, "out of date: python -m khnb.budget"


@pytest.mark.slow
def test_one_kind_of_table_has_one_kind_of_model(monkeypatch):
    monkeypatch.setattr(budget, "needed", lambda: {("table", "B.1"): ["E21"], ("table", "B.3"): ["E21"]})
    LL, BP, both = budget.rows(Rates())
    assert "layers" in LL["laptop"] and "layers" not in BP["laptop"] and both["whole_Pflop"] == pytest.approx(LL["whole_Pflop"] + BP["whole_Pflop"])
    assert LL["hours"] > 0 and LL["whole_hours"] > LL["hours"]
