"""Watch the policy of a run: play episodes in a window or into a video, and print what they return.

    python scripts/watch.py runs/...                             a window where there is a display, else a video
    python scripts/watch.py runs/... --output hopper.gif         a video, in any case
    python scripts/watch.py runs/... --render none --episodes 100 --sample

It needs config.json and policy.pt, so a run that goes on can be watched from its first checkpoint. Whatever
algos/ALGO.py made the run also reads its policy: its load_policy(run_dir, deterministic) is all that is asked of it.
Episodes start from seeds of their own, so that the third of 5 is the third of 100, sampled or not.
"""

import ctypes.util
import importlib.util
import json
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

ALGOS = Path(__file__).resolve().parent.parent / "algos"

# What ffmpeg does to the frames. h264 wants even sizes. A gif shows no more than 50 frames a second and 256 colours,
# which are chosen anew for each frame: a palette for the whole film would need all of its frames in memory.
FILTERS = {
    ".mp4": "pad=ceil(iw/2)*2:ceil(ih/2)*2",
    ".gif": "fps=min({fps}\\,50),split[a][b];[a]palettegen=stats_mode=single[p];[b][p]paletteuse=new=1",
}


@dataclass
class Args:
    """Watch the policy of a run: play episodes in a window or into a video, and print what they return."""

    run_dir: tyro.conf.Positional[Path]  # the folder of a run
    episodes: int = 5  # how many to play
    sample: bool = False  # draw the actions from the policy, as in training, in place of its best guess
    max_steps: int = 0  # steps after which an episode is cut; 0: by the environment, or after 27,000
    render: Literal["auto", "window", "video", "none"] = "auto"  # a video with --output or without a display
    output: Path | None = None  # the video, .mp4 or .gif; None is RUN_DIR/videos/watch.mp4
    seed: int = 0  # of the episodes and the sampled actions


def load(run_dir, deterministic):
    """The id of the environment in which a run took place, and its policy: obs -> action, in numpy."""
    try:
        config = json.loads((run_dir / "config.json").read_bytes())
        algo, env_id = config["algo"], config["args"]["env_id"]
    except (OSError, ValueError, KeyError, TypeError):
        sys.exit(f"error: {run_dir} is no run: give the folder in which a run's config.json lies")
    if not (run_dir / "policy.pt").exists():
        sys.exit(f"error: {run_dir} has no policy.pt yet: the first checkpoint of the run writes it")
    files = {path.stem: path for path in ALGOS.glob("*.py")}
    if algo not in files:
        sys.exit(f"error: {run_dir} was made by {algo}, which is not in {ALGOS}: put {algo}.py there")
    spec = importlib.util.spec_from_file_location(algo, files[algo])
    module = sys.modules[algo] = importlib.util.module_from_spec(spec)  # a dataclass looks for its module there
    spec.loader.exec_module(module)
    try:
        return env_id, module.load_policy(run_dir, deterministic=deterministic)
    except Exception as error:  # whatever a damaged file, or one of another version of the algorithm, makes it raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(f"error: {files[algo]} cannot read {run_dir / 'policy.pt'}: {reason} Is it of another version?")


def has_display():
    """Whether a window can open. Only Linux says."""
    return sys.platform != "linux" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_env(env_id, mode):
    """The environment as the run knew it, drawn as `mode` says, which is None, "human" or "rgb_array"."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    sys.path += [os.getcwd()] * (os.getcwd() not in sys.path)  # the module of module:Name-v0 may lie there
    if not has_display():  # tell MuJoCo, before it is imported, and pygame to do without, which they do not see
        os.environ.setdefault("MUJOCO_GL", "egl" if ctypes.util.find_library("EGL") else "osmesa")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
    try:
        env = gym.make(env_id)  # plain, to tell an environment that is missing from one that cannot be drawn
    except (gym.error.Error, ImportError, RuntimeError) as error:
        sys.exit(f"error: cannot make {env_id}: {error}")
    if mode is None:
        return env
    env.close()
    try:
        env = gym.make(env_id, render_mode=mode)
        env.reset()
        if mode == "rgb_array" and np.ndim(env.render()) != 3:
            raise ValueError("it gives no picture")
        return env
    except Exception as error:  # every library that draws has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        sys.exit(f"error: cannot draw {env_id}: {reason}. Install what it names, set MUJOCO_GL, or take --render none")


def open_video(path, frame, fps):
    """A generator of imageio_ffmpeg: send() it frames and close() it. It holds none of them."""
    try:
        import imageio_ffmpeg
    except ImportError:
        sys.exit("error: a video needs imageio-ffmpeg: pip install imageio-ffmpeg, or --render none")
    path.parent.mkdir(parents=True, exist_ok=True)
    codec, pixels = ("gif", "pal8") if path.suffix == ".gif" else ("libx264", "yuv420p")
    filters = ["-vf", FILTERS[path.suffix].format(fps=fps)]
    size, how = frame.shape[1::-1], {"codec": codec, "pix_fmt_out": pixels, "macro_block_size": 1}
    video = imageio_ffmpeg.write_frames(
        str(path), size, fps=fps, ffmpeg_log_level="error", output_params=filters, **how
    )
    video.send(None)
    return video


def play(env, policy, seed, max_steps, show):
    """One episode; returns its return and its length. `show` is called for every state."""
    obs, _ = env.reset(seed=seed)
    total, length, done = 0.0, 0, False
    show()
    while not done and length < max_steps:
        action, space = policy(obs), env.action_space
        discrete = isinstance(space, gym.spaces.Discrete)
        action = int(action) if discrete else action.astype(space.dtype).clip(space.low, space.high)
        obs, reward, terminated, truncated, _ = env.step(action)
        total, length, done = total + np.asarray(reward).item(), length + 1, terminated or truncated
        show()
    return total, length


def main(args):
    """Play the episodes; returns their returns and lengths [episodes, 2]. Bad input raises SystemExit."""
    if args.episodes < 1 or args.max_steps < 0 or args.seed < 0:
        sys.exit("error: --episodes must be 1 or more, --max-steps and --seed 0 or more")
    output = args.output or args.run_dir / "videos" / "watch.mp4"
    if output.suffix not in FILTERS:
        sys.exit(f"error: --output {output} must end in .mp4 or .gif")
    if args.output and args.render in ("window", "none"):
        sys.exit(f"error: --render {args.render} makes no video: take --render video, or leave out --output")
    render = args.render
    if render == "auto":
        render = "window" if has_display() and not args.output else "video"
    if render == "window" and not has_display():
        sys.exit("error: there is no display: take --render video")
    torch.set_num_threads(1)  # for one observation at a time more are slower
    env_id, policy = load(args.run_dir, not args.sample)
    env = make_env(env_id, {"window": "human", "video": "rgb_array", "none": None}[render])
    max_steps = args.max_steps or env.spec.max_episode_steps or 27_000  # as in the evaluations of algos/
    video = None
    if render == "video":
        video = open_video(output, env.render(), env.metadata.get("render_fps", 30))

    def show():
        if video:
            video.send(np.ascontiguousarray(env.render()))

    torch.manual_seed(args.seed)
    episodes = []
    try:
        for seed in np.random.SeedSequence(args.seed).generate_state(args.episodes).tolist():
            episodes.append(play(env, policy, seed, max_steps, show))
            print(f"episode {len(episodes)}: return {episodes[-1][0]:.2f}, length {episodes[-1][1]}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped in episode {len(episodes) + 1}")
    finally:
        if video:
            video.close()
        env.close()
    if episodes:
        (mean, length), (std, spread) = np.mean(episodes, 0), np.std(episodes, 0)
        print(f"mean +- std: return {mean:.2f} +- {std:.2f}, length {length:.1f} +- {spread:.1f}")
    if video:
        print(output)
    return episodes


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except OSError as error:
        sys.exit(f"error: {error}")
