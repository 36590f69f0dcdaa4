"""Every flag of an algorithm does something: with another value, a small run ends in other weights."""

from dataclasses import fields

import pytest
import torch
from conftest import ALGOS, ON_POLICY, env_id, load

BASE = {"total_timesteps": 300, "num_envs": 2, "eval_every": 0, "threads": 1, "hidden": (16,)}
REPLAY = BASE | {"learning_starts": 100, "batch_size": 16, "buffer_size": 5000}
ROLLOUT = BASE | {"num_steps": 50, "num_minibatches": 2, "update_epochs": 2}
OTHER = {
    "activation": "elu",
    "buffer_size": 120,
    "cg_iters": 1,
    "clip_coef": 1e-3,
    "end_e": 0.9,
    "ent_coef": 0.1,
    "exploration_fraction": 1.0,
    "exploration_noise": 0.9,
    "hidden": (8,),
    "max_grad_norm": 1e-3,
    "noise_clip": 1e-3,
    "num_steps": 30,
    "num_minibatches": 5,
    "search_steps": 1,
    "start_e": 0.5,
    "target_entropy": 0.5,
    "target_kl": 1e-6,
    "update_epochs": 1,
    "utd": 0.5,
}
# What a flag needs beside it to matter in so short a run: a clip that is reached, a search that does not end at once.
WITH = {
    ("ppo", "clip_coef"): {"learning_rate": 0.01, "update_epochs": 4},
    ("sac", "alpha"): {"autotune": False},
    ("trpo", "natural_gradient"): {"target_kl": 0.3, "damping": 1e-5},
    ("trpo", "search_steps"): {"target_kl": 0.3, "damping": 1e-5},
}


def flags_of(path):
    names = [field.name for field in fields(load(path).Args)]
    return names[: names.index("env_id")]


def learnt(path, folder, flags):
    """What a small run of these flags ends with."""
    module = load(path)
    module.train(module.Args(env_id=env_id(path), run_dir=str(folder), **flags))
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def changed(value):
    return not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value / 2


CASES = [pytest.param(path, flag, id=f"{path.stem}-{flag}") for path in ALGOS for flag in flags_of(path)]


@pytest.mark.parametrize("path, flag", CASES)
def test_a_flag_does_something(path, flag, tmp_path):
    base = (ROLLOUT if path in ON_POLICY else REPLAY) | WITH.get((path.stem, flag), {})
    value = base.get(flag, getattr(load(path).Args(), flag))
    other = base | {flag: OTHER[flag] if flag in OTHER else changed(value)}
    one, two = (learnt(path, tmp_path / name, flags) for name, flags in (("a", base), ("b", other)))
    weights = [name for name in one if name.endswith((".weight", ".bias", "log_std"))]
    same = [name for name in weights if name in two and one[name].shape == two[name].shape]
    assert not all(one[name].equal(two[name]) for name in same)
