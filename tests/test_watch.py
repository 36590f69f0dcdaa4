"""scripts/watch.py on real runs: what it plays, prints and films."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import watch
from common import load_algo
from conftest import ROOT

SMALL_RUN = (
    "--total-timesteps 400 --learning-starts 300 --buffer-size 400 --hidden 16 16 --batch-size 16 "
    "--device cpu --threads 1 --eval-every 200 --eval-episodes 2 --checkpoint-every 200"
)


def train(algo, env_id, run_dir, cwd=ROOT):
    """Train a small run as a user does."""
    command = [sys.executable, str(ROOT / "algos" / f"{algo}.py"), *SMALL_RUN.split()]
    command += ["--env-id", env_id, "--run-dir", str(run_dir)]
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """The folder of a run of SAC on Pendulum."""
    folder = tmp_path_factory.mktemp("runs") / "pendulum"
    train("sac", "Pendulum-v1", folder)
    return folder


@pytest.fixture(autouse=True)
def no_display(monkeypatch):
    """Hide the display, as on a server. Variables that watch sets are restored afterwards."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", "egl"))


def describe_video(path):
    """The number of frames, the seconds, the size, and whether a frame differs from the first."""
    import imageio_ffmpeg

    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(path))
    reader = imageio_ffmpeg.read_frames(str(path))
    size = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8) for frame in reader]
    reader.close()
    moves = any((frame != frames[0]).any() for frame in frames[1:])
    return count, seconds, size, moves


def printed_episodes(text):
    """The (return, length) of each printed episode."""
    found = re.findall(r"^episode \d+: return (\S+), length (\d+)$", text, re.M)
    return [(float(total), int(length)) for total, length in found]


def printed_summary(text):
    """The mean and std of the return, then of the length, as printed."""
    pattern = r"^mean \+- std: return (\S+) \+- (\S+), length (\S+) \+- (\S+)$"
    return [float(number) for number in re.search(pattern, text, re.M).groups()]


# Videos and windows


def test_the_command_prints_returns_and_films_every_state(run_dir):
    pytest.importorskip("pygame")
    command = [sys.executable, "scripts/watch.py", str(run_dir), "--episodes", "2"]
    command += ["--max-steps", "40"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    episodes = printed_episodes(process.stdout)
    returns = [total for total, _ in episodes]
    assert [length for _, length in episodes] == [40, 40]
    assert returns[0] != returns[1]
    mean_return, std_return, mean_length, std_length = printed_summary(process.stdout)
    assert (mean_length, std_length) == (40, 0)
    assert mean_return == pytest.approx(np.mean(returns), abs=0.011)
    assert std_return == pytest.approx(np.std(returns), abs=0.011)
    video = run_dir / "videos" / "watch.mp4"
    assert process.stdout.splitlines()[-1] == str(video)
    count, seconds, size, moves = describe_video(video)
    assert count == 2 * 41
    assert moves
    assert size == (500, 500)
    assert seconds == pytest.approx(82 / 30, abs=0.1)  # the environment's 30 frames a second
    assert "DeprecationWarning" not in process.stderr


def test_output_can_be_a_gif(run_dir, tmp_path, capsys):
    pytest.importorskip("pygame")
    output = tmp_path / "deep" / "a.gif"
    episodes = watch.watch(watch.Args(run_dir, episodes=2, max_steps=15, output=output))
    rounded = [(round(total, 2), length) for total, length in episodes]
    assert printed_episodes(capsys.readouterr().out) == rounded
    assert [length for _, length in episodes] == [15, 15]
    count, seconds, size, moves = describe_video(output)
    assert output.read_bytes()[:3] == b"GIF"
    assert count == 2 * 16
    assert moves
    assert size == (500, 500)
    assert seconds == pytest.approx(32 / 30, abs=0.05)


@pytest.mark.parametrize(
    ("ending", "size", "count"), [("mp4", (52, 42), 50), ("gif", (51, 41), 20)]
)
def test_videos_of_odd_size_and_125_frames_a_second(tmp_path, ending, size, count):
    """H.264 takes only even sizes, and a GIF has at most 50 frames a second."""
    frames = np.random.default_rng(0).integers(0, 255, (50, 41, 51, 3), dtype=np.uint8)
    path = tmp_path / f"a.{ending}"
    video = watch.open_video(path, frames[0], 125)
    for frame in frames:
        video.send(frame)
    video.close()
    found_count, seconds, found_size, moves = describe_video(path)
    assert found_count == count
    assert found_size == size
    assert moves
    assert seconds == pytest.approx(50 / 125, abs=0.03)


def test_a_window_is_the_default_with_a_display(run_dir, tmp_path, monkeypatch):
    """A window leaves no file."""
    pytest.importorskip("pygame")
    copied = tmp_path / "run"
    shutil.copytree(run_dir, copied, ignore=shutil.ignore_patterns("videos"))
    with pytest.raises(ValueError, match="no display: use --render video"):
        watch.watch(watch.Args(copied, render="window"))
    monkeypatch.setenv("DISPLAY", ":0")  # pygame's dummy driver still draws nowhere
    episodes = watch.watch(watch.Args(copied, episodes=1, max_steps=3))
    assert episodes[0][1] == 3
    assert not (copied / "videos").exists()


# Policies


def play(run_dir, **flags):
    """Watch without rendering."""
    return watch.watch(watch.Args(run_dir, render="none", **flags))


def test_deterministic_and_sampled_actions_are_reproducible(run_dir):
    """--sample changes the actions, but not where the episodes start."""
    deterministic = play(run_dir, max_steps=100, episodes=2)
    sampled = play(run_dir, max_steps=100, episodes=2, sample=True)
    assert deterministic == play(run_dir, max_steps=100, episodes=2)
    assert sampled == play(run_dir, max_steps=100, episodes=2, sample=True)
    # An episode does not depend on the episodes that follow.
    assert deterministic[0] == play(run_dir, max_steps=100, episodes=1)[0]
    assert deterministic != sampled
    assert deterministic != play(run_dir, max_steps=100, episodes=2, seed=1)
    assert sampled != play(run_dir, max_steps=100, episodes=2, sample=True, seed=1)
    # A step of Pendulum costs angle^2 + 0.1 velocity^2 + 0.001 action^2, with |action| <= 2.
    first_reward, _ = play(run_dir, max_steps=1, episodes=1)[0]
    first_reward_sampled, _ = play(run_dir, max_steps=1, episodes=1, sample=True)[0]
    assert first_reward == pytest.approx(first_reward_sampled, abs=0.01)


def test_returns_are_those_of_load_policy_in_a_plain_loop(run_dir):
    watched = play(run_dir, episodes=1, seed=3)
    policy = load_algo("sac").load_policy(run_dir)
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=np.random.SeedSequence(3).generate_state(1).tolist()[0])
    total = 0.0
    length = 0
    done = False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total += reward
        length += 1
        done = terminated or truncated
    assert watched == [(pytest.approx(total, rel=1e-12), length)]


PLAIN_INT_ENV = """
import gymnasium as gym
import numpy as np


class PlainInt(gym.Env):
    '''Episodes of one step. The reward is the action, plus 10 if it is a plain int.'''

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        return None

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward = float(action)
        if type(action) is int:
            reward += 10
        return np.zeros(1, np.float32), reward, True, False, {}


gym.register("PlainInt-v0", PlainInt)
"""


def test_discrete_actions_in_an_environment_of_the_current_folder(tmp_path, monkeypatch):
    """The environment gets plain ints. It renders nothing, so it cannot be filmed."""
    (tmp_path / "plain_int_env.py").write_text(PLAIN_INT_ENV)
    train("dqn", "plain_int_env:PlainInt-v0", tmp_path / "run", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # watch appends the current folder
    action = int(load_algo("dqn").load_policy(tmp_path / "run")(np.zeros(1, np.float32)))
    assert play(tmp_path / "run", episodes=2) == [(10.0 + action, 1), (10.0 + action, 1)]
    error = r"cannot render plain_int_env:PlainInt-v0: render\(\) returns no picture.*--render none"
    with pytest.raises(ValueError, match=error):
        watch.watch(watch.Args(tmp_path / "run", render="video"))


def test_bounds_in_float64_and_rewards_in_arrays():
    """0.1 in float32 lies above 0.1 in float64."""
    env = watch.make_env("probes:probe/Precise-v0", None)

    def policy(obs):
        return np.array([0.1], np.float32)

    def show_nothing():
        pass

    total, length = watch.play(env, policy, 0, 10, show_nothing)
    assert total == pytest.approx(-0.05)
    assert length == 5


# Errors


def check_error(match, run_dir, **flags):
    """Expect an error whose message matches."""
    with pytest.raises(ValueError, match=match):
        watch.watch(watch.Args(run_dir, **{"render": "none"} | flags))


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", '{"algo": "sac", "args": {}}'])
def test_a_folder_without_a_valid_config_is_an_error(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    check_error("is not a run: give a folder with a config.json$", tmp_path)


def test_a_run_without_a_checkpoint_or_algorithm_is_an_error(tmp_path):
    config = {"algo": "nonesuch", "args": {"env_id": "Pendulum-v1"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    check_error("no policy.pt yet: wait for the first checkpoint", tmp_path)
    (tmp_path / "policy.pt").write_bytes(b"torn")
    check_error("made by nonesuch, so put nonesuch.py into", tmp_path)


def test_a_missing_environment_is_an_error(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["args"]["env_id"] = "Nonesuch-v0"
    path.write_text(json.dumps(config))
    check_error("cannot make Nonesuch-v0", tmp_path / "run")


def test_flags_out_of_range_are_errors(run_dir):
    check_error("--episodes is 0; it must be 1 or more", run_dir, episodes=0)
    check_error("--max-steps is -1; it must be 0 or more", run_dir, max_steps=-1)
    check_error("--seed is -1; it must be 0 or more", run_dir, seed=-1)
    check_error("must end in .mp4 or .gif", run_dir, output=Path("a.avi"))
    check_error(
        "--render none makes no video: use --render video",
        run_dir,
        output=Path("a.mp4"),
        render="none",
    )


def test_an_algorithm_that_does_not_exist_is_an_error(tmp_path):
    """The error names the algorithms that exist."""
    with pytest.raises(ValueError, match=r"there is no .*nonesuch\.py: give one of .*ppo, sac"):
        load_algo("nonesuch")
    with pytest.raises(ValueError, match=r"there is no .*missing\.py: .* or the path of a file"):
        load_algo(tmp_path / "missing.py")


def test_a_damaged_policy_is_an_error(run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "policy.pt").write_bytes(b"torn")
    check_error("sac.py cannot read .*policy.pt", tmp_path / "run")


def test_the_command_prints_an_error_as_one_line(tmp_path):
    command = [sys.executable, "scripts/watch.py", str(tmp_path)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stderr == f"error: {tmp_path} is not a run: give a folder with a config.json\n"
