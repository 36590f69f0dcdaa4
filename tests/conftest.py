"""What the tests share: the files of algos/, and how to run one of them as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from algos import ALGOS, SMALL_REPLAY, SMALL_ROLLOUT

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "scripts"))  # scripts import each other from their own folder

from common import load_algo  # noqa: E402  (needs the path above)

PATHS = sorted((ROOT / "algos").glob("*.py"))
missing = [path.stem for path in PATHS if path.stem not in ALGOS]
if missing:
    raise pytest.UsageError(f"add a record for {', '.join(missing)} to ALGOS in tests/algos.py")


def select(**fields):
    """The files whose record has these values, e.g. select(family="replay", actions="box")."""
    chosen = []
    for path in PATHS:
        record = ALGOS[path.stem]._asdict()
        if all(record[name] == value for name, value in fields.items()):
            chosen.append(path)
    return chosen


ROLLOUT_PATHS = select(family="rollout")
REPLAY_PATHS = select(family="replay")
BOX_PATHS = select(actions="box")


def marked_slow(paths):
    """The files as test parameters. All but SAC's are slow, so -m "not slow" runs one of them."""
    params = []
    for path in paths:
        marks = () if path.stem == "sac" else pytest.mark.slow
        params.append(pytest.param(path, marks=marks, id=path.stem))
    return params


# The plumbing is the same text in every file, so one file of each family stands for all.
ONE_OF_EACH_FAMILY = marked_slow([ROOT / "algos" / "ppo.py", ROOT / "algos" / "sac.py"])
one_of_each_family = pytest.mark.parametrize("path", ONE_OF_EACH_FAMILY)
every_file = pytest.mark.parametrize("path", marked_slow(PATHS))


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def path(request):
    """Each file of algos/ in turn."""
    return request.param


@pytest.fixture
def sac():
    return load_algo("sac")


def env_id(path):
    """The environment of an algorithm's small run."""
    return ALGOS[path.stem].env_id


def probe(path, name):
    """The id of an environment of probes.py, with actions that the algorithm supports."""
    return (
        f"probe/{name}Discrete-v0" if ALGOS[path.stem].actions == "discrete" else f"probe/{name}-v0"
    )


def command(path, *flags):
    """The command line of a small run on one thread; later flags override earlier ones."""
    flags = [str(flag) for flag in flags]
    line = [sys.executable, str(path)]
    if "--resume" not in flags:
        record = ALGOS[path.stem]
        line += ["--env-id", record.env_id]
        line += (SMALL_REPLAY if record.family == "replay" else SMALL_ROLLOUT).split()
        line += ["--total-timesteps", "600", "--eval-every", "200", "--eval-episodes", "2"]
        line += ["--device", "cpu"]  # only CPU runs are bit-identical
    return [*line, "--checkpoint-every", "200", "--threads", "1", *flags]


def run(path, *flags, cwd=None, env=None):
    """Run `command` to its end; returns the finished process with its output as text."""
    env = {**os.environ, "SDL_VIDEODRIVER": "dummy", **(env or {})}
    return subprocess.run(
        command(path, *flags), cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def rows(run_dir):
    """The rows of metrics.jsonl without times."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    kept = []
    for line in lines:
        row = json.loads(line)
        del row["wall"]
        row.pop("speed/sps", None)
        kept.append(row)
    return kept
