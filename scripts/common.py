"""What the scripts share: importing a file of algos/ and reading what runs leave behind."""

import importlib.util
import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

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


def load_run_policy(run_dir, deterministic=True):
    """Load the policy that a run saved, with the algorithm that made it.

    Returns the id of the run's environment and the policy: observations [..., O] -> actions in
    the environment's units, both numpy arrays. Raises ValueError if the folder holds no policy.
    """
    try:
        config = json.loads((run_dir / "config.json").read_bytes())
        algo = config["algo"]
        env_id = config["args"]["env_id"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{run_dir} is not a run: give a folder with a config.json") from None
    if not (run_dir / "policy.pt").exists():
        raise ValueError(
            f"{run_dir} has no policy.pt yet: wait for the first checkpoint of the run"
        )
    if algo not in [path.stem for path in ALGOS.glob("*.py")]:
        raise ValueError(f"{run_dir} was made by {algo}, so put {algo}.py into {ALGOS}")
    module = load_algo(algo)
    try:
        return env_id, module.load_policy(run_dir, deterministic=deterministic)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{algo}.py cannot read {run_dir / 'policy.pt'} ({first_line(error)}): "
            f"use the version of {algo}.py that wrote it"
        ) from error


def first_line(error):
    """The first line of an error's message, or the name of the error if it has none."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


class Curve(NamedTuple):
    """What one run logged, and how it was made."""

    path: str
    env_id: str
    label: str  # the algorithm, and the experiment if it has a name of its own
    seed: int
    rows: list  # dicts with "step" and metrics
    commit: str | None  # of the algorithm; None if unknown
    versions: dict | None  # package -> version; None if unknown
    config: dict | None  # the content of config.json; None for a row of a file of raw curves


def read_curves(path):
    """Read one run folder, or a .jsonl file of raw curves. Raises ValueError if it is neither."""
    if path.is_dir():
        return [read_run_folder(path)]
    if path.suffix != ".jsonl" or not path.exists():
        raise ValueError(f"{path} is neither a folder nor a .jsonl file")
    return read_raw_curves(path)


def read_run_folder(path):
    """The curve of the run in a folder with config.json and metrics.jsonl."""
    config_path = path / "config.json"
    try:
        config = json.loads(config_path.read_bytes())
        args = config["args"]
        curve = Curve(
            path=str(path),
            env_id=args["env_id"],
            label=curve_label(config["algo"], args["exp_name"]),
            seed=args["seed"],
            rows=[],
            commit=config.get("commit"),
            versions=config.get("versions"),
            config=config,
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{config_path} is not the config of a run: repair it or move it away"
        ) from None
    return curve._replace(rows=read_rows(path / "metrics.jsonl"))


def read_raw_curves(path):
    """The curves in a .jsonl file. Environment, label and seed tell its runs apart."""
    rows_of_run = defaultdict(list)
    for number, row in enumerate(read_rows(path), 1):
        try:
            label = curve_label(row["algo"], row.get("exp_name", row["algo"]))
            rows_of_run[row["env_id"], label, row["seed"]].append(row)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(
                f"line {number} of {path} lacks env_id, algo or seed: "
                "to read a metrics.jsonl, give its folder"
            ) from None
    curves = []
    for (env_id, label, seed), rows in rows_of_run.items():
        curves.append(
            Curve(
                path=f"{path}/{env_id}__{label}__{seed}",
                env_id=env_id,
                label=label,
                seed=seed,
                rows=rows,
                commit=rows[0].get("commit"),
                versions=rows[0].get("versions"),
                config=None,
            )
        )
    return curves


def curve_label(algo, exp_name):
    """The algorithm, followed by --exp-name unless that is the algorithm's name."""
    return algo if exp_name == algo else f"{algo} {exp_name}"


def read_rows(path):
    """The rows of a JSONL file. Its last line may be cut short, as in a run under way."""
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is not JSON: repair or remove it"
                ) from None
    return rows
