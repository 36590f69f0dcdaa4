"""Watch the policy of a run: play episodes in a window or into a video, and print their returns.

    python scripts/watch.py runs/...                        a window, or a video without a display
    python scripts/watch.py runs/... --output hopper.gif    always a video
    python scripts/watch.py runs/... --render none --episodes 100 --sample

The folder needs config.json and policy.pt, so a run under way can be watched from its first
checkpoint on. The policy is the one that load_policy of the run's algorithm returns. Each episode
has its own seed, so the third of 5 episodes starts like the third of 100, sampled or not.
"""

import ctypes.util
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from common import first_line, load_run_policy

# ffmpeg's filters by file ending. H.264 needs even sizes. A GIF has at most 50 frames a second and
# 256 colours. Each frame gets a palette of its own: one palette for all of them would keep the
# whole film in memory.
FILTERS = {
    ".mp4": "pad=ceil(iw/2)*2:ceil(ih/2)*2",
    ".gif": "fps=min({fps}\\,50),split[a][b];"
    "[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1",
}

Render = Literal["auto", "window", "video", "none"]


@dataclass
class Args:
    """Watch the policy of a run: play episodes in a window or into a video."""

    run_dir: tyro.conf.Positional[Path]  # the folder of a run
    episodes: int = 5  # number of episodes
    sample: bool = False  # sample actions as in training, instead of acting deterministically
    max_steps: int = 0  # limit of an episode; 0: the environment's, or else 27,000
    render: Render = "auto"  # auto: a window if there is a display and no --output, else a video
    output: Path | None = None  # the video, .mp4 or .gif; default: RUN_DIR/videos/watch.mp4
    seed: int = 0  # seed of the episodes and of sampled actions


def watch(args):
    """Play the episodes; returns [(return, length), ...]. Raises ValueError if input is bad."""
    output, render = check_flags(args)
    torch.set_num_threads(1)  # faster for one observation at a time
    env_id, policy = load_run_policy(args.run_dir, deterministic=not args.sample)
    render_mode = {"window": "human", "video": "rgb_array", "none": None}[render]
    env = make_env(env_id, render_mode)
    # Evaluations of the training files have the same limit of 27,000 steps.
    max_steps = args.max_steps or env.spec.max_episode_steps or 27_000
    video = None
    if render == "video":
        video = open_video(output, env.render(), env.metadata.get("render_fps", 30))

    def show_state():
        if video:
            video.send(np.ascontiguousarray(env.render()))

    torch.manual_seed(args.seed)
    seeds = np.random.SeedSequence(args.seed).generate_state(args.episodes).tolist()
    episodes = []
    try:
        for number, seed in enumerate(seeds, 1):
            total, length = play(env, policy, seed, max_steps, show_state)
            episodes.append((total, length))
            print(f"episode {number}: return {total:.2f}, length {length}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped in episode {len(episodes) + 1}")
    finally:
        if video:
            video.close()
        env.close()
    if episodes:
        print_summary(episodes)
    if video:
        print(output)
    return episodes


def check_flags(args):
    """Check the flags; returns the path of a video and how to render, which is not "auto"."""
    if args.episodes < 1:
        raise ValueError(f"--episodes is {args.episodes}; it must be 1 or more")
    if args.max_steps < 0:
        raise ValueError(f"--max-steps is {args.max_steps}; it must be 0 or more")
    if args.seed < 0:
        raise ValueError(f"--seed is {args.seed}; it must be 0 or more")
    output = args.output or args.run_dir / "videos" / "watch.mp4"
    if output.suffix not in FILTERS:
        raise ValueError(f"--output {output} must end in .mp4 or .gif")
    if args.output and args.render in ("window", "none"):
        raise ValueError(
            f"--render {args.render} makes no video: use --render video, or leave out --output"
        )
    render = args.render
    if render == "auto":
        render = "window" if has_display() and not args.output else "video"
    if render == "window" and not has_display():
        raise ValueError("there is no display: use --render video")
    return output, render


def has_display():
    """Whether a window can open. Systems other than Linux always have a display."""
    if sys.platform != "linux":
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_env(env_id, render_mode):
    """Make the environment of a run. Raises ValueError if it cannot be made or rendered."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # module:Name-v0 may name a module in the current folder
    if not has_display():
        # Neither MuJoCo nor pygame detects a missing display. MuJoCo reads its variable on import.
        has_egl = ctypes.util.find_library("EGL")
        os.environ.setdefault("MUJOCO_GL", "egl" if has_egl else "osmesa")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    # Make it without rendering first, to tell a missing environment from failing graphics.
    try:
        env = gym.make(env_id)
    except (gym.error.Error, ImportError, RuntimeError) as error:
        raise ValueError(f"cannot make {env_id}: {error}") from error
    if render_mode is None:
        return env
    env.close()
    try:
        env = gym.make(env_id, render_mode=render_mode)
        env.reset()
        if render_mode == "rgb_array" and np.ndim(env.render()) != 3:
            raise ValueError("render() returns no picture")
    except Exception as error:  # every rendering library raises exceptions of its own
        raise ValueError(
            f"cannot render {env_id}: {first_line(error)}. "
            "Install what it names, set MUJOCO_GL, or use --render none"
        ) from error
    return env


def open_video(path, frame, fps):
    """Open a video for frames like `frame`: send() writes a frame at once, close() ends it."""
    try:
        import imageio_ffmpeg
    except ImportError:
        raise ValueError(
            "a video needs imageio-ffmpeg: pip install imageio-ffmpeg, or use --render none"
        ) from None
    path.parent.mkdir(parents=True, exist_ok=True)
    is_gif = path.suffix == ".gif"
    height, width = frame.shape[:2]
    video = imageio_ffmpeg.write_frames(
        str(path),
        (width, height),
        fps=fps,
        codec="gif" if is_gif else "libx264",
        pix_fmt_out="pal8" if is_gif else "yuv420p",
        macro_block_size=1,
        ffmpeg_log_level="error",
        output_params=["-vf", FILTERS[path.suffix].format(fps=fps)],
    )
    video.send(None)  # starts the generator
    return video


def play(env, policy, seed, max_steps, show_state):
    """Play one episode; returns its return and its length. Calls `show_state` at every state."""
    space = env.action_space
    obs, _ = env.reset(seed=seed)
    total = 0.0
    length = 0
    done = False
    show_state()
    while not done and length < max_steps:
        action = policy(obs)
        if isinstance(space, gym.spaces.Discrete):
            action = int(action)
        else:
            # Rounding to float32 can push an action outside float64 bounds.
            action = action.astype(space.dtype).clip(space.low, space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        total += np.asarray(reward).item()  # some environments return an array of one element
        length += 1
        done = terminated or truncated
        show_state()
    return total, length


def print_summary(episodes):
    """Print the mean and the standard deviation of returns and lengths."""
    mean_return, mean_length = np.mean(episodes, 0)
    std_return, std_length = np.std(episodes, 0)
    print(
        f"mean +- std: return {mean_return:.2f} +- {std_return:.2f}, "
        f"length {mean_length:.1f} +- {std_length:.1f}"
    )


def main():
    """Watch with the flags of the command line. Exit status 2 is bad input."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        watch(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
