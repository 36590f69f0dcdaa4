"""Each file alone: copied into an empty folder, in a process that sees nothing of this repository."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, load, run

ALONE = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
seen = [m for m in sys.modules.values() if (getattr(m, "__file__", None) or "").startswith({root!r} + "/")]
assert not seen, seen
"""


@pytest.mark.parametrize("env", ["Hopper-v4"])
def test_a_copied_file_runs_alone(path, tmp_path, env):
    shutil.copy(path, tmp_path)
    flags = ["--env-id", env, "--total-timesteps", "1000", "--learning-starts", "800", "--threads", "1"]
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
def test_an_environment_of_ones_own_from_the_folder_one_is_in(path, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import gymnasium as gym\n"
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\n"
        "gym.register('Mine-v0', entry_point=PendulumEnv, max_episode_steps=50)\n"
    )
    process = run(path, "--env-id", "mine:Mine-v0", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith(f"mine-Mine-v0__{path.stem}__1__")


def test_the_policy_loads_without_an_environment(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    module = load(path)
    policy, sampled = (module.load_policy(tmp_path / "run", deterministic=d) for d in (True, False))
    obs = np.random.default_rng(0).normal(size=(4, 5, 3))
    action = policy(obs)
    assert isinstance(action, np.ndarray) and action.shape == (4, 5, 1) and (np.abs(action) <= 2).all()
    np.testing.assert_allclose(policy(obs[2, 3]), action[2, 3], rtol=1e-5, atol=1e-6)
    assert (policy(obs) == action).all() and (sampled(obs) != sampled(obs)).any()


def test_train_as_a_function(path, tmp_path):
    """What a sweep or a notebook does: no command line, twice in one process."""
    module = load(path)
    results = []
    for name in ("a", "b"):
        args = module.Args(
            env_id="Pendulum-v1",
            total_timesteps=400,
            learning_starts=200,
            hidden=(16,),
            batch_size=16,
            threads=1,
            eval_every=200,
            eval_episodes=1,
            run_dir=str(tmp_path / name),
        )
        results.append(module.train(args))
    a, b = ({k: v for k, v in result.items() if k != "wall" and k != "speed/sps"} for result in results)
    assert a == b and a["step"] == 400
