"""The functions behind the command line's verbs: each loads a model, reads files, shows progress, returns a value.

Read `pairs` (check, mine), `vectors` (encode, search, read) and `measure` (evaluate, isotropy, page). Training
is in `train.run`, export in `export.run`, comparisons in `compare.run`.
"""

from anchorembed.api.measure import evaluate, isotropy, page
from anchorembed.api.pairs import check, mine
from anchorembed.api.vectors import encode, read, search

__all__ = ["check", "encode", "evaluate", "isotropy", "mine", "page", "read", "search"]
