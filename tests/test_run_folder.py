"""A run folder: bit-identical resuming, evaluations, trackers, videos, progress, memory."""

import contextlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from common import load_algo
from conftest import PATHS, ROOT, command, every_file, one_of_each_family, probe, rows, run

from algos import ALGOS

TIMES = {"wall", "seconds", "speed/sps", "metrics_size"}  # what depends on the clock

# The environments in which each algorithm is killed, with one and with three of them.
KILLED = []
for file in PATHS:
    for environment, count in itertools.product(ALGOS[file.stem].resume_envs, (1, 3)):
        case = pytest.param(file, environment, count, id=f"{file.stem}-{environment}-{count}")
        KILLED.append(case)


def same(ours, theirs):
    """Whether two nested structures are equal to the last bit, except for times."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        if ours.keys() != theirs.keys():
            return False
        return all(same(ours[key], theirs[key]) for key in ours.keys() - TIMES)
    if isinstance(ours, list | tuple):
        pairs = zip(ours, theirs, strict=True)
        return len(ours) == len(theirs) and all(same(a, b) for a, b in pairs)
    return ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("path, env, num_envs", KILLED)
def test_killed_three_times_it_ends_bit_equal(path, env, num_envs, tmp_path):
    flags = [
        "--env-id",
        env,
        "--num-envs",
        num_envs,
        "--total-timesteps",
        1800,
        "--checkpoint-every",
        300,
    ]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    start = time.monotonic()
    finish(command(path, *flags, "--run-dir", whole))
    seconds = time.monotonic() - start

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
    finish([*command(path, *flags, "--run-dir", killed), "--resume"])
    details = f"killed {moments} seconds after its starts; a whole run took {seconds} seconds"
    assert_same_end(killed, whole, details)


def finish(line):
    """Run a command line to its end."""
    subprocess.run(line, check=True, capture_output=True, timeout=300)


def assert_same_end(killed, whole, details=""):
    """Both runs logged the same and ended with the same files."""
    assert rows(killed) == rows(whole), details
    for name in ("checkpoint.pt", "policy.pt"):
        ours = torch.load(killed / name, weights_only=True)
        theirs = torch.load(whole / name, weights_only=True)
        for state in (ours, theirs):
            state.pop("args", None)  # --run-dir and --resume differ
        assert same(ours, theirs), f"{name}: {details}"


@every_file
@pytest.mark.parametrize("num_envs", [1, 2])
def test_from_the_checkpoint_before_the_last_it_ends_bit_equal(path, num_envs, tmp_path):
    """As if killed after the last rows were logged and before the last checkpoint was written."""
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    flags = ["--num-envs", num_envs, "--checkpoint-every", 250]
    finish(command(path, *flags, "--run-dir", whole))
    killed.mkdir()
    shutil.copy(whole / "config.json", killed / "config.json")
    shutil.copy(whole / "metrics.jsonl", killed / "metrics.jsonl")
    shutil.copy(whole / "checkpoint.prev.pt", killed / "checkpoint.pt")
    step = torch.load(killed / "checkpoint.pt", weights_only=True)["run"]["step"]
    assert 400 < step < 600 <= rows(killed)[-1]["step"]
    finish(command(path, "--resume", "--run-dir", killed))
    assert_same_end(killed, whole)
    clock = [
        json.loads(line)["wall"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
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
        finish(command(path, "--seed", seed, "--run-dir", tmp_path / name))
    assert rows(tmp_path / "a") == rows(tmp_path / "b") != rows(tmp_path / "c")


@pytest.mark.slow
def test_evaluation_does_not_touch_training(path, tmp_path):
    """A run learns the same, however often it is evaluated."""
    for name, steps in (("often", 100), ("never", 0)):
        finish(command(path, "--eval-every", steps, "--run-dir", tmp_path / name))
    often = torch.load(tmp_path / "often" / "checkpoint.pt", weights_only=True)
    never = torch.load(tmp_path / "never" / "checkpoint.pt", weights_only=True)
    assert same(often["agent"], never["agent"])
    assert same(often["rng"], never["rng"])
    assert not any("eval/return" in row for row in rows(tmp_path / "never"))


class Growing(probes.Probe):
    """Episodes of three steps; each takes the next of `rewards` as the reward of all its steps."""

    def __init__(self, rewards, discrete=False):
        super().__init__(length=3, reward=self.current_reward, discrete=discrete)
        self.rewards = iter(rewards)

    def current_reward(self, probe, action):
        return self.now

    def reset(self, seed=None, options=None):
        self.now = next(self.rewards)
        return super().reset(seed=seed)


class UnfinishedVideo(gym.Wrapper):
    """An environment whose video cannot be finished."""

    name_prefix = ""

    def stop_recording(self):
        raise BrokenPipeError("ffmpeg is gone")


def open_run(path, folder, **flags):
    """A real Run of an untrained agent -> the module, the run and the agent."""
    module = load_algo(path)
    flags = {"env_id": probe(path, "Ended"), "threads": 1, "device": "cpu"} | flags
    args = module.Args(run_dir=str(folder), **flags)
    envs = [module.make_env(args) for _ in range(args.num_envs)]
    supported = {"box": "bounded box", "discrete": "discrete", "both": "box or discrete"}
    spaces = module.read_spaces(envs[0], supported[ALGOS[path.stem].actions])
    agent = module.Agent(args, spaces)
    run = module.Run(args, envs, agent=agent)
    return module, run, agent


def with_statistics(module, env):
    """An environment with the statistics that Run reads."""
    return gym.wrappers.RecordEpisodeStatistics(env, stats_key=module.ALGO)


def test_an_evaluation_reports_its_own_episodes(path, tmp_path):
    """Two environments in three evaluations; the last one is worse than the one before."""
    module, run, agent = open_run(path, tmp_path / "run", eval_episodes=2)
    discrete = ALGOS[path.stem].actions == "discrete"
    run.eval_envs = []
    for rewards in ((1, 2, 0), (5, 6, 1)):
        run.eval_envs.append(with_statistics(module, Growing(rewards, discrete)))
    for mean, std, best in ((9, 6, 9), (12, 6, 12), (1.5, 1.5, 12)):
        run.step += 7
        module.evaluate(run, agent.actor)
        last = {name: value for name, value in run.last.items() if name.startswith("eval/")}
        assert last == {
            "eval/return": mean,
            "eval/return_std": std,
            "eval/length": 3,
            "eval/best": best,
        }


@one_of_each_family
@pytest.mark.parametrize("interrupted", [False, True])
def test_ctrl_c_that_ends_ffmpeg_too_leaves_the_evaluation_whole(path, interrupted, tmp_path):
    module, run, agent = open_run(path, tmp_path / "run", eval_episodes=1)
    run.args.capture_video = True
    run.eval_envs = [with_statistics(module, UnfinishedVideo(Growing((1, 2))))]
    run.interrupted = interrupted
    refused = pytest.raises(BrokenPipeError, match="ffmpeg is gone")
    with contextlib.nullcontext() if interrupted else refused:
        module.evaluate(run, agent.actor)
    assert ("eval/return" in run.last) == interrupted


@one_of_each_family
def test_every_episode_is_logged_when_it_ends(path, tmp_path):
    module, run, _ = open_run(path, tmp_path / "run", num_envs=3)
    run.envs = [with_statistics(module, Growing([reward] * 9)) for reward in (1, 2, 2)]
    obs = run.reset_envs()
    for _ in range(7):
        next_obs, _, _, ended = run.step_envs(np.zeros((3, 1), np.float32))
        obs = run.reset_ended(next_obs, ended)
        assert (obs[ended, 0] == 0).all()
    logged = [
        (row["step"], row["episode/return"], row["episode/length"]) for row in rows(run.folder)
    ]
    assert logged == [(step, 3 * reward, 3) for step in (9, 18) for reward in (1, 2, 2)]


@one_of_each_family
def test_an_environment_may_count_its_episodes_itself(path, tmp_path):
    module = load_algo(path)
    folder = tmp_path / "run"
    module.train(
        module.Args(
            env_id=probe(path, "Counted"), total_timesteps=20, run_dir=str(folder), threads=1
        )
    )
    assert {row["episode/return"] for row in rows(folder) if "episode/return" in row} == {5}


@one_of_each_family
def test_episodes_without_an_end_are_cut(path):
    """After as many steps as in Atari's games, since an evaluation waits for its episodes."""
    module = load_algo(path)
    env = module.make_env(module.Args(env_id="probe/Endless-v0"))
    env.reset(seed=0)
    for step in range(1, 27_001):
        _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        assert not terminated and truncated == (step == 27_000)


@one_of_each_family
def test_threads_and_seeds_are_set(path):
    module = load_algo(path)
    threads_before = torch.get_num_threads()
    drawn = []
    try:
        for threads, seed in ((2, 5), (1, 5), (1, 6)):
            module.check_flags(module.Args(threads=threads, seed=seed, device="cpu"))
            assert torch.get_num_threads() == threads
            drawn.append(torch.rand(()).item())
    finally:
        torch.set_num_threads(threads_before)
    assert drawn[0] == drawn[1] != drawn[2]


@one_of_each_family
def test_seeds_depend_on_seed_step_and_stream(path, tmp_path):
    seen = []
    for seed, step, stream in ((1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 1)):
        _, run, _ = open_run(path, tmp_path / f"{seed}-{step}-{stream}", seed=seed)
        run.step = step
        seen += run.seeds(3, stream)
    assert len(set(seen)) == 12


@pytest.mark.slow
@one_of_each_family
def test_tensorboard_mirrors_the_metrics(path, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = run(path, "--track", "tensorboard", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("episode/return", "eval/return"):
        theirs = [(event.step, event.value) for event in events.Scalars(name)]
        ours = [(row["step"], row[name]) for row in rows(tmp_path / "run") if name in row]
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        for (_, value), (_, mirrored) in zip(ours, theirs, strict=True):
            assert abs(value - mirrored) < 1e-3 * abs(value)


@pytest.mark.slow
@one_of_each_family
def test_a_tracker_that_is_not_installed_is_named(path, tmp_path):
    folder = tmp_path / "run"
    track = ["--track", "trackio", "--run-dir", folder]
    process = run(path, *track, cwd=tmp_path)
    assert process.returncode != 0 and "No module named 'trackio'" in process.stderr
    assert "Traceback" not in process.stderr
    assert (
        run(path, "--run-dir", folder).returncode == 0
    )  # nothing is left behind that stands in the way
    result = (folder / "result.json").read_bytes()
    assert "No module named 'trackio'" in run(path, "--resume", *track, cwd=tmp_path).stderr
    assert (folder / "result.json").read_bytes() == result  # that run is as done as it was


@pytest.mark.slow
def test_runs_of_one_process_are_apart_at_wandb(tmp_path):
    """Two seeds, then the first one resumed, which is the same run there."""
    pytest.importorskip("wandb")
    code = """
import sac
for seed, steps in ((1, 600), (2, 600), (1, 900)):
    flags = {"seed": seed, "run_dir": f"r{seed}", "total_timesteps": steps, "threads": 1}
    flags["resume"] = steps == 900
    sac.train(sac.Args(env_id="Pendulum-v1", eval_every=0, track="wandb", **flags))
"""
    env = os.environ | {
        "WANDB_MODE": "offline",
        "PYTHONPATH": f"{ROOT / 'algos'}:{os.environ.get('PYTHONPATH', '')}",
    }
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    ids = [
        json.loads((tmp_path / folder / "config.json").read_text())["id"] for folder in ("r1", "r2")
    ]
    kept = sorted(
        folder.name.split("-", 3)[-1] for folder in (tmp_path / "wandb").glob("offline-run-*")
    )
    assert kept == [f"r1-{ids[0]}", f"r1-{ids[0]}", f"r2-{ids[1]}"]


@pytest.mark.slow
@one_of_each_family
def test_a_run_has_an_id_of_its_own_which_it_keeps(path, tmp_path):
    """Trackers know a run by it: it differs between folders of one name and stays on resuming."""
    ids = []
    for folder, flags in (("a/run", []), ("b/run", []), ("a/run", ["--resume"])):
        assert run(path, *flags, "--run-dir", tmp_path / folder).returncode == 0
        ids.append(json.loads((tmp_path / folder / "config.json").read_text())["id"])
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.slow
@one_of_each_family
def test_an_episode_of_every_evaluation_is_filmed(path, tmp_path):
    process = run(path, "--capture-video", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    videos = sorted(file.name for file in (tmp_path / "run" / "videos").glob("*.mp4"))
    assert [int(re.match(r"step-(\d+)-", name).group(1)) for name in videos] == [200, 400, 600]
    # A video is complete before the checkpoint that follows the evaluation.
    video = tmp_path / "run" / "videos" / videos[1]
    checkpoint = tmp_path / "run" / "checkpoint.prev.pt"
    assert video.stat().st_mtime < checkpoint.stat().st_mtime


@one_of_each_family
def test_progress_is_in_plain_lines_where_there_is_no_terminal(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert "\r" not in process.stdout + process.stderr
    assert len(re.findall(r"^step \d+ of 600: return", process.stdout, re.M)) == 3
    assert re.search(r"100%.* 600/600 .*steps/s.*return -?\d", process.stdout)


@pytest.mark.slow
def test_a_million_transitions_of_hopper(sac, tmp_path):
    """They take 4 bytes per number and no more, when they are stored; a checkpoint takes 2 s."""
    steps = 1_000_000
    fields = {"obs": (11,), "action": (3,), "reward": (), "terminated": (), "next_obs": (11,)}
    content = steps * (11 + 3 + 1 + 1 + 11) * 4
    before = resident_bytes()
    memory = sac.Replay(steps, 1, torch.device("cpu"), **fields)
    assert resident_bytes() - before < 0.1 * content
    for tensor in memory.data.values():
        tensor.normal_()
    memory.added = steps
    assert resident_bytes() - before < 1.1 * content

    args = sac.Args(total_timesteps=steps, run_dir=str(tmp_path / "run"), threads=1, device="cpu")
    envs = [sac.make_env(args)]
    agent = sac.Agent(args, sac.read_spaces(envs[0], "bounded box"))
    run = sac.Run(args, envs, agent=agent, memory=memory)
    run.step = steps
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        run.save()
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 2, seconds
    assert (run.folder / "checkpoint.pt").stat().st_size < 1.1 * content

    restored = sac.Replay(steps, 1, torch.device("cpu"), **fields)
    run.metrics_file.close()
    args.resume = True
    sac.Run(args, envs, agent=agent, memory=restored)
    assert len(restored) == steps
    for name, tensor in memory.data.items():
        assert torch.equal(restored.data[name], tensor)


def resident_bytes():
    """Bytes of this process that are in physical memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
