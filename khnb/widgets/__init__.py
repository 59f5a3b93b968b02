"""The book's two widgets: look at filters, attack a model.

Both are anywidgets: in JupyterLab they are live, and a built page runs the same ES module without a kernel.
"""

from khnb.widgets.attack import AttackLab
from khnb.widgets.filters import FilterExplorer

__all__ = ["AttackLab", "FilterExplorer"]
