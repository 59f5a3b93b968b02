"""The book's widgets: look at filters, attack a model, explore accuracy against robustness.

All are anywidgets: in JupyterLab they are live, and a built page runs the same ES module without a kernel.
"""

from khnb.widgets.attack import AttackLab
from khnb.widgets.filters import FilterExplorer
from khnb.widgets.tradeoff import TradeOffExplorer

__all__ = ["AttackLab", "FilterExplorer", "TradeOffExplorer"]
