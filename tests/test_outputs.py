"""What a run shows beside its metrics: trackers, videos, progress."""

import contextlib
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from conftest import ROOT, load, probe, rows, run, two


class Growing(probes.Probe):
    """Three steps; every step of its episodes gives what `rewards` says of them, one after the other."""

    def __init__(self, rewards):
        super().__init__(length=3, reward=lambda probe, action: self.now)
        self.rewards = iter(rewards)

    def reset(self, seed=None, options=None):
        self.now = next(self.rewards)
        return super().reset(seed=seed)


def test_an_evaluation_reports_its_own_episodes(path):
    """Of two environments in three evaluations, the last of which is worse than the one before."""
    module, seen = load(path), []
    envs = [gym.wrappers.RecordEpisodeStatistics(Growing(rewards)) for rewards in ((1, 2, 0), (5, 6, 1))]
    actor = SimpleNamespace(act=lambda obs: np.zeros((len(obs), 1), np.float32))
    logged = SimpleNamespace(args=SimpleNamespace(capture_video=False), eval_envs=envs, actor=actor, last={}, step=7)
    logged.total, logged.log = 9, logged.last.update
    logged.seeds = lambda n, stream: seen.append((n, stream)) or [3] * n
    for mean, std, best in ((9, 6, 9), (12, 6, 12), (1.5, 1.5, 12)):
        module.evaluate(logged)
        assert logged.last == {"eval/return": mean, "eval/return_std": std, "eval/length": 3, "eval/best": best}
    assert seen == [(2, 1)] * 3  # seeds of another stream than those of training


class Filmed(gym.Wrapper):
    """A film that cannot be written to its end."""

    name_prefix = ""

    def stop_recording(self):
        raise BrokenPipeError("ffmpeg is gone")


@two
@pytest.mark.parametrize("interrupted", [False, True])
def test_ctrl_c_which_ends_ffmpeg_too_leaves_the_evaluation_whole(path, interrupted):
    module = load(path)
    actor = SimpleNamespace(act=lambda obs: np.zeros((len(obs), 1), np.float32))
    logged = SimpleNamespace(args=SimpleNamespace(capture_video=True), actor=actor, last={}, step=7, total=9)
    logged.eval_envs = [gym.wrappers.RecordEpisodeStatistics(Filmed(Growing((1, 2))))]
    logged.seeds, logged.log, logged.interrupted = lambda n, stream: [3] * n, logged.last.update, interrupted
    with contextlib.nullcontext() if interrupted else pytest.raises(BrokenPipeError, match="ffmpeg is gone"):
        module.evaluate(logged)
    assert logged.last == (
        {"eval/return": 3, "eval/return_std": 0, "eval/length": 3, "eval/best": 3} if interrupted else {}
    )


@two
def test_every_episode_is_logged_as_it_ends(path):
    module, seen = load(path), []
    training = object.__new__(module.Run)
    training.step, training.log = 0, seen.append
    envs = [gym.wrappers.RecordEpisodeStatistics(Growing([reward] * 9)) for reward in (1, 2, 2)]
    training.reset(envs, [1, 2, 3])
    for _ in range(7):
        training.interact(envs, np.zeros((3, 1), np.float32))
    assert seen == [{"episode/return": r, "episode/length": 3} for r in (3, 6, 6)] * 2


@two
def test_an_environment_may_count_its_episodes_itself(path, tmp_path):
    module, folder = load(path), tmp_path / "run"
    module.train(module.Args(env_id=probe(path, "Counted"), total_timesteps=20, run_dir=str(folder), threads=1))
    assert {row["episode/return"] for row in rows(folder) if "episode/return" in row} == {5}


@two
def test_episodes_without_an_end_are_cut(path):
    """After as many steps as in Atari's games, since an evaluation waits for its episodes."""
    module = load(path)
    env = module.make_env(module.Args(env_id="probe/Endless-v0"))
    env.reset(seed=0)
    for step in range(1, 27_001):
        _, _, terminated, truncated, _ = env.step(np.zeros(1, np.float32))
        assert not terminated and truncated == (step == 27_000)


@two
def test_threads_and_seeds_are_set(path):
    module, before, drawn = load(path), torch.get_num_threads(), []
    try:
        for threads, seed in ((2, 5), (1, 5), (1, 6)):
            module.start(module.Args(threads=threads, seed=seed, device="cpu"), "", "", "gamma")
            assert torch.get_num_threads() == threads
            drawn.append(torch.rand(()).item())
    finally:
        torch.set_num_threads(before)
    assert drawn[0] == drawn[1] != drawn[2]


@two
def test_seeds_are_many_and_depend_on_everything(path):
    module = load(path)
    training, seen = object.__new__(module.Run), []
    for seed, step, stream in ((1, 0, 0), (2, 0, 0), (1, 5, 0), (1, 0, 1)):
        training.args, training.step = SimpleNamespace(seed=seed), step
        seen += training.seeds(3, stream)
    assert len({*seen}) == 12


@pytest.mark.slow
@two
def test_tensorboard_mirrors_the_metrics(path, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    process = run(path, "--track", "tensorboard", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    for name in ("episode/return", "eval/return"):
        theirs = [(event.step, event.value) for event in events.Scalars(name)]
        ours = [(row["step"], row[name]) for row in rows(tmp_path / "run") if name in row]
        assert [step for step, _ in ours] == [step for step, _ in theirs]
        assert all(abs(a - b) < 1e-3 * abs(a) for (_, a), (_, b) in zip(ours, theirs))


@pytest.mark.slow
@two
def test_a_tracker_that_is_not_installed_is_named(path, tmp_path):
    folder, track = tmp_path / "run", ["--track", "trackio", "--run-dir", tmp_path / "run"]
    process = run(path, *track, cwd=tmp_path)
    assert process.returncode != 0 and "No module named 'trackio'" in process.stderr
    assert "Traceback" not in process.stderr
    assert run(path, "--run-dir", folder).returncode == 0  # nothing is left behind that stands in the way
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
    flags = {"seed": seed, "run_dir": f"r{seed}", "total_timesteps": steps, "resume": steps == 900, "threads": 1}
    sac.train(sac.Args(env_id="Pendulum-v1", eval_every=0, track="wandb", **flags))
"""
    env = os.environ | {"WANDB_MODE": "offline", "PYTHONPATH": f"{ROOT / 'algos'}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    ids = [json.loads((tmp_path / folder / "config.json").read_text())["id"] for folder in ("r1", "r2")]
    kept = sorted(folder.name.split("-", 3)[-1] for folder in (tmp_path / "wandb").glob("offline-run-*"))
    assert kept == [f"r1-{ids[0]}", f"r1-{ids[0]}", f"r2-{ids[1]}"]


@pytest.mark.slow
@two
def test_a_run_has_an_id_of_its_own_which_it_keeps(path, tmp_path):
    """What trackers know it by: folders of the same name are others, a run that is resumed is the same one."""
    ids = []
    for folder, flags in (("a/run", []), ("b/run", []), ("a/run", ["--resume"])):
        assert run(path, *flags, "--run-dir", tmp_path / folder).returncode == 0
        ids.append(json.loads((tmp_path / folder / "config.json").read_text())["id"])
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.slow
@two
def test_an_episode_of_every_evaluation_is_filmed(path, tmp_path):
    process = run(path, "--capture-video", "--run-dir", tmp_path / "run")
    assert process.returncode == 0, process.stderr
    videos = sorted(file.name for file in (tmp_path / "run" / "videos").glob("*.mp4"))
    assert [int(re.match(r"step-(\d+)-", name).group(1)) for name in videos] == [200, 400, 600]
    # And at once: before the checkpoint that follows the evaluation.
    film, checkpoint = tmp_path / "run" / "videos" / videos[1], tmp_path / "run" / "checkpoint.prev.pt"
    assert film.stat().st_mtime < checkpoint.stat().st_mtime


@two
def test_progress_is_in_plain_lines_where_there_is_no_terminal(path, tmp_path):
    process = run(path, "--run-dir", tmp_path / "run")
    assert "\r" not in process.stdout + process.stderr
    assert len(re.findall(r"^step \d+ of 600: return", process.stdout, re.M)) == 3
    assert re.search(r"100%.* 600/600 .*steps/s.*return -?\d", process.stdout)
