"""What the widgets share in Python: the text of their modules and traits with limits."""

from __future__ import annotations

from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent


def module(name: str) -> str:
    """The ES module of a widget: ``common.js`` and then ``NAME.js``, so that a page needs no other file."""
    return _text("common.js", f"{name}.js")


def style(name: str) -> str:
    """The style of a widget: ``common.css`` and then ``NAME.css``."""
    return _text("common.css", f"{name}.css")


def _text(*names: str) -> str:
    return "\n".join((HERE / name).read_text(encoding="utf-8") for name in names)


def limited(*names: str):
    """A validator of the traits ``names``: each is one of what ``self.limits`` has under its name, a list or a range."""

    @traitlets.validate(*names)
    def check(self, proposal):
        name, value = proposal["trait"].name, proposal["value"]
        allowed = self.limits.get(name)
        if allowed is not None and value not in allowed:
            valid = f"from {allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else f"one of {', '.join(map(str, allowed))}"
            raise traitlets.TraitError(f"{name}={value!r} is not valid: {valid}")
        return value

    return check


class Widget(anywidget.AnyWidget):
    """An anywidget of the book. ``header`` is what its module needs to know; ``limits`` what ``limited`` traits may be."""

    header = traitlets.Dict().tag(sync=True)

    def __init__(self, header: dict, limits: dict | None = None, **kwargs):
        self.limits = limits or {}
        super().__init__(header=header, **kwargs)
