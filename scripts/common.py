"""What the scripts share."""

import importlib.util
import sys
from pathlib import Path

ALGOS = Path(__file__).resolve().parent.parent / "algos"


def load_algo(name_or_path):
    """Import a file of algos/ by its name, such as "sac", or any file by its path.

    Raises ValueError if there is no such file.
    """
    path = Path(name_or_path)
    if path.suffix != ".py":
        path = ALGOS / f"{name_or_path}.py"
    if not path.exists():
        names = ", ".join(sorted(file.stem for file in ALGOS.glob("*.py")))
        raise ValueError(f"there is no {path}: give one of {names}, or the path of a file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module
