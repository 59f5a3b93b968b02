"""The book's widgets: look at filters, attack a model, explore accuracy against robustness, and five small ones for what is
better moved than read about.

All are anywidgets: in JupyterLab they are live, and a built page runs the same ES modules without a kernel.
"""

from khnb.widgets.attack import AttackLab
from khnb.widgets.filters import FilterExplorer
from khnb.widgets.small import Activations, Convolution, HopfieldRecall, LogisticCurve, WinnerTakesAll
from khnb.widgets.tradeoff import TradeOffExplorer

__all__ = ["Activations", "AttackLab", "Convolution", "FilterExplorer", "HopfieldRecall", "LogisticCurve", "TradeOffExplorer", "WinnerTakesAll"]
