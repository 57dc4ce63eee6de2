"""The `callbacks` package under a name that no other project has.

`import sparsity.callbacks` gives the classes of the top-level `callbacks` package, the same objects; where another
project's `callbacks` comes first on the path, it loads ours from beside this package instead.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HOME = Path(__file__).parents[1] / "callbacks" / "__init__.py"


def _is_ours(origin: str | None) -> bool:
    return origin is not None and Path(origin).resolve() == HOME.resolve()


def _load() -> ModuleType:
    found = sys.modules.get("callbacks")
    origin = found.__file__ if found else getattr(importlib.util.find_spec("callbacks"), "origin", None)
    if _is_ours(origin):
        return importlib.import_module("callbacks")
    spec = importlib.util.spec_from_file_location(__name__, HOME, submodule_search_locations=[str(HOME.parent)])
    if spec is None or spec.loader is None:
        raise ImportError(f"the callbacks package is missing from beside {Path(__file__).parent}: reinstall")
    package = sys.modules[__name__] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


_package = _load()
sys.modules[__name__] = _package
for _name, _module in list(sys.modules.items()):
    if _name.startswith("callbacks.") and _package.__name__ == "callbacks":
        # Submodules need the second name too, or importing one by it would make a second copy of its classes.
        sys.modules[f"sparsity.{_name}"] = _module
