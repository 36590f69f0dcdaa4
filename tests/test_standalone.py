"""Every file alone: copied into an empty folder, without the rest of this repository."""

import json
import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import tyro
from common import load_algo
from conftest import (
    ROLLOUT_PATHS,
    ROOT,
    command,
    env_id,
    every_file,
    one_of_each_family,
    run,
)

# Runs a file as a script, then checks that no module came from the code of this repository. The
# virtual environment may lie inside the repository, so only the folders of code count.
RUN_ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
folders = tuple({folders!r})
for name, module in list(sys.modules.items()):
    assert not (getattr(module, "__file__", None) or "").startswith(folders), name
"""
FOLDERS = [f"{ROOT / name}{os.sep}" for name in ("algos", "kernels", "scripts", "tests")]


def run_alone(script, *flags, cwd):
    """Run a file in a process without environment variables and without user packages."""
    return subprocess.run(
        [sys.executable, "-I", "-c", RUN_ALONE.format(folders=FOLDERS), script, *flags],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "HOME": str(cwd)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@every_file
def test_a_copied_file_runs_alone(path, tmp_path):
    shutil.copy(path, tmp_path)
    flags = ["--learning-starts", "800"]
    if path in ROLLOUT_PATHS:
        flags = ["--num-steps", "500", "--num-minibatches", "10"]
    env = "CartPole-v1" if path.stem == "dqn" else "Hopper-v4"
    flags += ["--env-id", env, "--total-timesteps", "1000", "--threads", "1", "--run-dir", "run"]
    process = run_alone(path.name, *flags, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 1000
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


def test_a_module_of_the_repository_is_noticed(tmp_path):
    """The check above can fail."""
    script = f"import sys; sys.path.append({str(ROOT / 'scripts')!r}); import common"
    (tmp_path / "script.py").write_text(script)
    process = run_alone("script.py", cwd=tmp_path)
    assert process.returncode == 1
    assert "AssertionError: common" in process.stderr


@pytest.mark.slow
@one_of_each_family
def test_an_environment_of_a_module_in_the_current_folder(path, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        "def make():\n"
        f"    return gym.make('{env_id(path)}').unwrapped\n"
        "gym.register('Mine-v0', entry_point=make, max_episode_steps=50)\n"
    )
    process = run(path, "--env-id", "mine:Mine-v0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"mine-Mine-v0__{path.stem}__1__")


@every_file
def test_the_policy_loads_without_an_environment(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    module = load_algo(path)
    policy = module.load_policy(tmp_path / "run")
    sampled = module.load_policy(tmp_path / "run", deterministic=False)
    env = gym.make(env_id(path))
    obs = np.random.default_rng(0).normal(size=(40, 50, *env.observation_space.shape))
    actions = policy(obs)
    assert isinstance(actions, np.ndarray)
    assert actions.shape == (40, 50, *env.action_space.shape)
    for row in actions:
        for action in row:
            assert env.action_space.contains(action)
    np.testing.assert_allclose(policy(obs[2, 3]), actions[2, 3], rtol=1e-5, atol=1e-6)
    assert (policy(obs) == actions).all()
    assert (sampled(obs) != sampled(obs)).any()


@every_file
def test_train_as_a_function(path, tmp_path):
    """As sweeps and notebooks call it: no command line, twice in one process."""
    module = load_algo(path)
    results = []
    for name in ("a", "b"):
        flags = command(path, "--total-timesteps", "400", "--run-dir", tmp_path / name)[2:]
        result = module.train(tyro.cli(module.Args, args=flags))
        del result["wall"]
        del result["speed/sps"]
        results.append(result)
    assert results[0] == results[1]
    assert results[0]["step"] == 400
