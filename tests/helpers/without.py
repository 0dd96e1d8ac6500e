"""Hide packages from Python's imports, as if they were not installed; used in processes of their own.

``python tests/helpers/without.py lancedb,polars search MODEL CORPUS QUERY`` runs the command line without the two.
"""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


class Hidden(MetaPathFinder):
    """Asks the finders that were there before, but never for what is hidden."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = set(names)
        self._finders = list(sys.meta_path)

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return None, which Python makes a ModuleNotFoundError of, for a hidden module and for one that is not there.

        A finder that raised would break those who only ask whether a package is there.
        """
        if name.partition(".")[0] in self.names:
            return None
        found = (finder.find_spec(name, path, target) for finder in self._finders)
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, context: DistributionFinder.Context) -> Iterator[Distribution]:
        """Yield what is installed, for those who ask for versions."""
        for finder in self._finders:
            if hasattr(finder, "find_distributions"):
                yield from finder.find_distributions(context)


def hide(*names: str) -> Hidden:
    """Hide packages from now on; raises RuntimeError where one of them is imported already."""
    if early := sorted({module.partition(".")[0] for module in sys.modules} & set(names)):
        raise RuntimeError(f"imported already: {', '.join(early)}")
    hidden = Hidden(names)
    sys.meta_path[:] = [hidden]
    return hidden


def python(*arguments: object) -> "subprocess.CompletedProcess[str]":
    """Run Python, with this checkout's package and tests, to its end."""
    path = os.pathsep.join([str(ROOT / "tests" / "helpers"), str(ROOT / "src")])
    environment = os.environ | {"PYTHONPATH": path, "NO_COLOR": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


if __name__ == "__main__":
    hide(*sys.argv.pop(1).split(","))
    from anchorembed.cli.main import main

    main()
