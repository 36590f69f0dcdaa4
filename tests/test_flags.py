"""Every flag of an algorithm does something: another value leads to other weights."""

from dataclasses import fields

import pytest
import torch
from common import load_algo
from conftest import PATHS, env_id

from algos import ALGOS

SHORT = {"total_timesteps": 300, "num_envs": 2, "eval_every": 0, "threads": 1, "hidden": (16,)}
SHORT_RUN = {
    "replay": SHORT | {"learning_starts": 100, "batch_size": 16, "buffer_size": 5000},
    "rollout": SHORT | {"num_steps": 50, "num_minibatches": 2, "update_epochs": 2},
}
# Other values than those of `changed`, below.
OTHER_VALUES = {
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
    "target_network_frequency": 10,
    "update_epochs": 1,
    "utd": 0.5,
}


def algorithm_flags(path):
    """The flags of an algorithm, without the run flags."""
    names = [field.name for field in fields(load_algo(path).Args)]
    return names[: names.index("env_id")]


def trained_weights(path, folder, args):
    """The agent's tensors after a short run."""
    module = load_algo(path)
    module.train(module.Args(env_id=env_id(path), run_dir=str(folder), **args))
    return torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]


def changed(value):
    """Another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else value / 2


CASES = []
for path in PATHS:
    for flag in algorithm_flags(path):
        CASES.append(pytest.param(path, flag, id=f"{path.stem}-{flag}"))


@pytest.mark.parametrize("path, flag", CASES)
def test_a_flag_does_something(path, flag, tmp_path):
    record = ALGOS[path.stem]
    args = SHORT_RUN[record.family] | record.flags_need.get(flag, {})
    value = args.get(flag, getattr(load_algo(path).Args(), flag))
    other_value = OTHER_VALUES[flag] if flag in OTHER_VALUES else changed(value)
    before = trained_weights(path, tmp_path / "before", args)
    after = trained_weights(path, tmp_path / "after", args | {flag: other_value})
    differs = False
    for name, tensor in before.items():
        is_weight = name.endswith((".weight", ".bias", "log_std"))
        if is_weight and (name not in after or after[name].shape != tensor.shape):
            continue  # another architecture; the remaining weights must differ too
        if is_weight and not tensor.equal(after[name]):
            differs = True
    assert differs
