"""What the tests share: the files of algos/ as modules, and a way to run one of them as a user does, in a process."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALGOS = sorted((ROOT / "algos").glob("*.py"))
sys.path.append(str(ROOT / "scripts"))  # where a script finds another, as it does when it is run

# Flags that make a run of 600 steps take a second after the imports, and an environment that the algorithm can act in.
REPLAY = "--learning-starts 200 --hidden 16 16 --batch-size 16 --buffer-size 5000"
ROLLOUT = "--num-steps 50 --num-minibatches 2 --update-epochs 2 --hidden 16 16"
SMALL = {
    "ddpg": f"--env-id Pendulum-v1 {REPLAY}",
    "dqn": f"--env-id CartPole-v1 {REPLAY}",
    "ppo": f"--env-id Pendulum-v1 {ROLLOUT}",
    "sac": f"--env-id Pendulum-v1 {REPLAY}",
    "td3": f"--env-id Pendulum-v1 {REPLAY}",
    "trpo": f"--env-id Pendulum-v1 {ROLLOUT}",
    "vpg": f"--env-id CartPole-v1 {ROLLOUT}",
}
CONTINUOUS = [path for path in ALGOS if path.stem in ("ddpg", "sac", "td3")]  # those that know nothing but boxes
ON_POLICY = [path for path in ALGOS if path.stem in ("ppo", "trpo", "vpg")]


def in_files(names, quick):
    """The files of algos/ of these names as parameters, slow but for those named in `quick`."""
    marks = {name: () if name in quick else pytest.mark.slow for name in names}
    return [pytest.param(path, marks=marks[path.stem], id=path.stem) for path in ALGOS if path.stem in marks]


# What the plumbing does is tried in one file that has a memory and one that has rollouts, since its text is the same in
# all, and what takes seconds in every file; but where the slow tests are left out, only in SAC's.
TWO = in_files(["ppo", "sac"], ["sac"])
EVERY = in_files([path.stem for path in ALGOS], ["sac"])
two, every = (pytest.mark.parametrize("path", files) for files in (TWO, EVERY))


def env_id(path):
    """The environment of an algorithm's small run."""
    return SMALL[path.stem].split()[1]


def probe(path, name):
    """An environment of probes.py, with the actions that the algorithm takes."""
    return f"probe/{name}Discrete-v0" if path.stem == "dqn" else f"probe/{name}-v0"


def load(path):
    """Import a file of algos/ or scripts/ by its path, which is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=ALGOS, ids=lambda path: path.stem)
def path(request):
    """Each file of algos/ in turn."""
    return request.param


@pytest.fixture
def sac():
    return load(ROOT / "algos" / "sac.py")


def command(path, *flags):
    """The command line of a small run on one thread; later flags win over earlier ones."""
    small = [*SMALL[path.stem].split(), "--total-timesteps", "600", "--eval-every", "200", "--eval-episodes", "2"]
    small += ["--device", "cpu"]  # where runs are to be equal to the last bit
    typed = [str(flag) for flag in flags]
    if "--resume" in typed:
        small = []
    return [sys.executable, str(path), *small, "--checkpoint-every", "200", "--threads", "1", *typed]


def run(path, *flags, cwd=None, env=None):
    """Run it to its end; returns the finished process with its output as text."""
    env = {**os.environ, "SDL_VIDEODRIVER": "dummy", **(env or {})}
    return subprocess.run(command(path, *flags), cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def rows(run_dir):
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "wall" and not k.startswith("speed/")} for row in lines]
