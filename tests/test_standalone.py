"""Each file alone: copied into an empty folder, in a process that sees nothing of this repository."""

import json
import os
import shutil
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import tyro
from conftest import ON_POLICY, ROOT, command, env_id, every, load, run, two

ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
seen = [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith({root!r} + "/")]
assert not seen, seen
"""


@every
def test_a_copied_file_runs_alone(path, tmp_path):
    shutil.copy(path, tmp_path)
    flags = ["--num-steps", "500", "--num-minibatches", "10"] if path in ON_POLICY else ["--learning-starts", "800"]
    flags += ["--env-id", "CartPole-v1" if path.stem == "dqn" else "Hopper-v4", "--total-timesteps", "1000"]
    flags += ["--threads", "1"]
    process = subprocess.run(
        [sys.executable, "-I", "-c", ALONE.format(root=str(ROOT)), path.name, *flags, "--run-dir", "run"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "run" / "result.json").read_text())["step"] == 1000
    assert json.loads((tmp_path / "run" / "config.json").read_text())["commit"] is None


@pytest.mark.slow
@two
def test_an_environment_of_ones_own_from_the_folder_one_is_in(path, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        f"gym.register('Mine-v0', entry_point=lambda: gym.make('{env_id(path)}').unwrapped, max_episode_steps=50)\n"
    )
    process = run(path, "--env-id", "mine:Mine-v0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"mine-Mine-v0__{path.stem}__1__")


@every
def test_the_policy_loads_without_an_environment(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    module = load(path)
    policy, sampled = (module.load_policy(tmp_path / "run", deterministic=d) for d in (True, False))
    env = gym.make(env_id(path))
    obs = np.random.default_rng(0).normal(size=(40, 50, *env.observation_space.shape))
    action = policy(obs)
    assert isinstance(action, np.ndarray) and action.shape == (40, 50, *env.action_space.shape)
    assert all(env.action_space.contains(one) for row in action for one in row)
    np.testing.assert_allclose(policy(obs[2, 3]), action[2, 3], rtol=1e-5, atol=1e-6)
    assert (policy(obs) == action).all() and (sampled(obs) != sampled(obs)).any()


@every
def test_train_as_a_function(path, tmp_path):
    """What a sweep or a notebook does: no command line, twice in one process."""
    module = load(path)
    results = []
    for name in ("a", "b"):
        flags = command(path, "--total-timesteps", "400", "--run-dir", tmp_path / name)[2:]
        results.append(module.train(tyro.cli(module.Args, args=flags)))
    a, b = ({k: v for k, v in result.items() if k != "wall" and k != "speed/sps"} for result in results)
    assert a == b and a["step"] == 400
