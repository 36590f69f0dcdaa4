"""A run that is killed at any moment and resumed gives the metrics and the weights of one that was left alone."""

import json
import os
import random
import shutil
import subprocess
import time

import pytest
import torch
from conftest import ROOT, command, every, rows

# The environments that each algorithm is killed in, with one and with three environments side by side.
CASES = [
    (ROOT / "algos" / f"{algo}.py", env, num_envs)
    for algo, envs in {
        "sac": ["Pendulum-v1", "InvertedPendulum-v4", "Hopper-v4"],
        "td3": ["Hopper-v4"],
        "ddpg": ["Hopper-v4"],
        "dqn": ["CartPole-v1"],
        "vpg": ["CartPole-v1"],
        "trpo": ["Hopper-v4"],
        "ppo": ["Hopper-v4"],
    }.items()
    for env in envs
    for num_envs in (1, 3)
]
TIMELESS = {"wall", "speed/sps"}


def same(ours, theirs):
    """Bit-equal, whatever is nested in what, but for times."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours.keys() - TIMELESS)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs))
    return ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("path, env, num_envs", CASES, ids=[f"{p.stem}-{e}-{n}" for p, e, n in CASES])
def test_killed_three_times_it_ends_bit_equal(path, env, num_envs, tmp_path):
    flags = ["--env-id", env, "--num-envs", num_envs, "--total-timesteps", 1800, "--checkpoint-every", 300]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    began = time.monotonic()
    subprocess.run(command(path, *flags, "--run-dir", whole), check=True, capture_output=True, timeout=300)
    seconds = time.monotonic() - began

    moments = [random.Random(os.urandom(8)).uniform(0.2, 1) * seconds for _ in range(3)]
    for moment in moments:
        process = subprocess.Popen(
            [*command(path, *flags, "--run-dir", killed), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    last = [*command(path, *flags, "--run-dir", killed), "--resume"]
    subprocess.run(last, check=True, capture_output=True, timeout=300)

    same_end(killed, whole, f"killed {moments} seconds after its starts, where a whole run took {seconds}")


def same_end(killed, whole, told=""):
    """What both runs logged, and what they ended with."""
    assert rows(killed) == rows(whole), told
    for name in ("checkpoint.pt", "policy.pt"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (killed, whole))
        for state in (ours, theirs):
            state.pop("args", None)  # run_dir and resume differ
            if "run" in state:
                step, _, metrics, _ = state.pop("run")  # without the seconds, and the bytes that they take up
                state["metrics"] = {"step": step, **metrics}
        assert same(ours, theirs), f"{name}: {told}"


@every
@pytest.mark.parametrize("num_envs", [1, 2])
def test_from_the_checkpoint_before_the_last_it_ends_bit_equal(path, num_envs, tmp_path):
    """Killed when the rows after it were logged, and the last checkpoint was not yet there."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = command(path, "--num-envs", num_envs, "--checkpoint-every", 250, "--run-dir", whole)
    subprocess.run(process, check=True, capture_output=True, timeout=300)
    killed.mkdir()
    for old, new in (("config.json",) * 2, ("metrics.jsonl",) * 2, ("checkpoint.prev.pt", "checkpoint.pt")):
        shutil.copy(whole / old, killed / new)
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["run"][0]
    assert 400 < step < 600 and rows(killed)[-1]["step"] >= 600
    process = command(path, "--resume", "--run-dir", killed)
    subprocess.run(process, check=True, capture_output=True, timeout=300)
    same_end(killed, whole)
    clock = [json.loads(line)["wall"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert clock == sorted(clock)


def test_bit_equality_can_fail():
    """The comparison above sees the last bit of a weight."""
    a = {"x": [torch.ones(2), {"wall": 1, "y": 2.0}]}
    assert same(a, {"x": [torch.ones(2), {"wall": 3, "y": 2.0}]})
    assert not same(a, {"x": [torch.ones(2) * (1 + 2**-23), {"wall": 1, "y": 2.0}]})
    assert not same(a, {"x": [torch.ones(2), {"wall": 1, "y": 2.0000000000000004}]})


@pytest.mark.slow
def test_two_runs_of_a_seed_agree_and_two_seeds_do_not(path, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        process = command(path, "--seed", seed, "--run-dir", tmp_path / name)
        subprocess.run(process, check=True, capture_output=True, timeout=300)
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.slow
def test_evaluation_does_not_touch_training(path, tmp_path):
    """However often it is evaluated, a run learns the same."""
    for name, steps in (("often", 100), ("never", 0)):
        process = command(path, "--eval-every", steps, "--run-dir", tmp_path / name)
        subprocess.run(process, check=True, capture_output=True, timeout=300)
    often, never = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("often", "never"))
    assert same(often["agent"], never["agent"]) and same(often["rng"], never["rng"])
    assert not any("eval/return" in row for row in rows(tmp_path / "never"))
