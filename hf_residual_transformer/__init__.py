"""Hugging Face speech encoders whose layers share weights: `W_l = U_g + B_l A_l + D_l` (arXiv 2310.02489).

Importing this package registers its classes with the Auto classes of transformers, and does nothing else. What
`compress`, `distill`, `evaluate` and `export` need beyond transformers is imported when they are called. The residual
class of each dense class, such as `ResidualHubertForCTC`, is an attribute of the package (see `classes.py`).
"""

from typing import Any

from . import classes as _classes
from .api import compress, distill, evaluate, export
from .configuration import ResidualConfig
from .families import FAMILIES as _FAMILIES
from .reporting import size_report
from .version import __version__

__all__ = [
    "ResidualConfig",
    "__version__",
    "compress",
    "distill",
    "evaluate",
    "export",
    "size_report",
]


def __getattr__(name: str) -> Any:
    if name.startswith(_classes.PREFIX):
        return getattr(_classes, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _family in _FAMILIES.values():
    _classes.register(_family)
