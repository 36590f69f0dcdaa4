"""Time the files of algos/ beside Stable-Baselines3 and SBX, with equal networks and updates.

    python scripts/speed.py                                     every case, three rounds, one thread
    python scripts/speed.py --cases sac-hopper --threads 1 2    with one thread, then with two
    python scripts/speed.py --cases td3-hopper --num-envs 1 4   with one environment, then with four
    python scripts/speed.py --device cuda --compile             on a GPU, where ours use CUDA graphs
    python scripts/speed.py --load results/speed.jsonl          show earlier measurements

To install the peers: pip install stable-baselines3 sbx-rl

Each contestant trains in a process of its own, once for few steps and once for many. Its speed is
the difference in steps divided by the difference in time, so imports, set-up and the random steps
at the beginning cancel out. A process may use as many cores as it has threads. Nothing is
evaluated, and the only checkpoint is the one at the end.

A round times every contestant once, one after the other. The table has the medians of the rounds.
The ratio is the median of the ratios within a round, because the speed of a machine drifts.

The bound is a speed that no implementation in float32 can pass on this machine: the matrix products
of the updates, counted while the file runs, at the rate that products of their size reach, plus the
steps of the bare environment.
"""

import contextlib
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

import gymnasium as gym
import torch
import tyro
from common import ALGOS, load_algo

LABELS = {"ours": "onefile", "sb3": "Stable-Baselines3", "sbx": "SBX"}
PEER_PACKAGES = {"sb3": "stable_baselines3", "sbx": "sbx"}
COLORS = {"ours": "#0072B2", "sb3": "#E69F00", "sbx": "#999999"}


class Case(NamedTuple):
    """What is timed, in our terms and in those of the peers."""

    algo: str
    env_id: str
    lengths: tuple[int, int]  # environment steps of the short run and of the long run
    flags: str  # of our file
    peer_options: dict | None  # arguments of the peers' class; None if they lack the algorithm
    product: tuple[int, int]  # rows and columns of the largest matrix products
    num_envs: int = 1
    rollout: int = 1  # steps of each environment between updates


OFF_POLICY_FLAGS = "--learning-starts 1000 --batch-size 256 --hidden 256 256 --buffer-size 1000000"
OFF_POLICY_OPTIONS = {
    "learning_starts": 1000,
    "batch_size": 256,
    "buffer_size": 1_000_000,
    "train_freq": 1,
    "policy_kwargs": {"net_arch": [256, 256]},
}
ON_POLICY_FLAGS = "--num-steps 1024 --hidden 64 64"

CASES = {
    "sac-hopper": Case(
        algo="sac",
        env_id="Hopper-v4",
        lengths=(1100, 2100),
        flags=OFF_POLICY_FLAGS,
        peer_options=OFF_POLICY_OPTIONS,
        product=(256, 256),
    ),
    "td3-hopper": Case(
        algo="td3",
        env_id="Hopper-v4",
        lengths=(1100, 2600),
        flags=OFF_POLICY_FLAGS,
        peer_options=OFF_POLICY_OPTIONS,
        product=(256, 256),
    ),
    "ddpg-hopper": Case(
        algo="ddpg",
        env_id="Hopper-v4",
        lengths=(1100, 2600),
        flags=OFF_POLICY_FLAGS,
        peer_options=OFF_POLICY_OPTIONS,
        product=(256, 256),
    ),
    "ppo-hopper": Case(
        algo="ppo",
        env_id="Hopper-v4",
        lengths=(4096, 16384),
        flags="--num-steps 2048 --num-minibatches 32 --update-epochs 10 --hidden 64 64",
        peer_options={"n_steps": 2048, "batch_size": 64, "n_epochs": 10},
        product=(64, 64),
        rollout=2048,
    ),
    "ppo-cartpole": Case(
        algo="ppo",
        env_id="CartPole-v1",
        lengths=(10240, 61440),
        flags="--num-steps 128 --num-minibatches 4 --update-epochs 4 --hidden 64 64",
        peer_options={"n_steps": 128, "batch_size": 128, "n_epochs": 4},
        product=(128, 64),
        num_envs=4,
        rollout=128,
    ),
    "dqn-cartpole": Case(
        algo="dqn",
        env_id="CartPole-v1",
        lengths=(4000, 84000),
        flags="--learning-starts 1000 --batch-size 128 --buffer-size 100000 --hidden 128 128 "
        "--train-frequency 10 --target-network-frequency 500 --tau 1 --no-layer-norm "
        "--no-anneal-lr",
        peer_options={
            "learning_starts": 1000,
            "batch_size": 128,
            "buffer_size": 100_000,
            "train_freq": 10,
            "target_update_interval": 500,
            "policy_kwargs": {"net_arch": [128, 128]},
        },
        product=(128, 128),
    ),
    "vpg-hopper": Case(
        algo="vpg",
        env_id="Hopper-v4",
        lengths=(4096, 16384),
        flags=ON_POLICY_FLAGS,
        peer_options=None,
        product=(64, 64),
        rollout=1024,
    ),
    "trpo-hopper": Case(
        algo="trpo",
        env_id="Hopper-v4",
        lengths=(4096, 16384),
        flags=ON_POLICY_FLAGS,
        peer_options=None,
        product=(64, 64),
        rollout=1024,
    ),
}

# The program that the process of a peer runs. Its argument is one JSON object.
PEER_PROGRAM = """
import importlib
import json
import sys
import warnings

warnings.filterwarnings("ignore")
given = json.loads(sys.argv[1])
options = given["options"]
if given["package"] == "stable_baselines3":
    import torch

    torch.set_num_threads(given["threads"])
    options["device"] = given["device"]

import numpy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise

env = make_vec_env(given["env_id"], given["num_envs"], seed=1)
if "train_freq" in options:
    # As many updates per environment step as with one environment.
    options["gradient_steps"] = given["num_envs"]
if given["algo"] in ("td3", "ddpg"):
    zeros = numpy.zeros(env.action_space.shape)
    options["action_noise"] = NormalActionNoise(zeros, zeros + 0.1)
algorithm = getattr(importlib.import_module(given["package"]), given["algo"].upper())
algorithm("MlpPolicy", env, seed=1, **options).learn(given["steps"])
"""


@dataclass
class Args:
    """Time the files of algos/ beside their peers, with equal networks, batches and updates."""

    cases: tuple[Literal[tuple(CASES)], ...] = tuple(CASES)  # what to time
    peers: tuple[Literal["sb3", "sbx"], ...] = ("sb3", "sbx")  # timed where they are installed
    threads: tuple[int, ...] = (1,)  # CPU threads, and cores, of every process
    num_envs: tuple[int, ...] = ()  # environments stepped in turn; default: that of the case
    device: str = "cpu"  # cpu or cuda
    compile: bool = False  # run ours with --compile
    rounds: int = 3  # how often every contestant is timed
    scale: float = 1.0  # factor on the steps that are timed; more steps, less noise
    save: Path | None = None  # append the measurements to this .jsonl file
    load: tuple[Path, ...] = ()  # show the measurements in these files instead of timing
    output: Path = Path("speed.png")  # the figure: .png, .svg or .pdf


# ---- Processes -----------------------------------------------------------------------------------


def command(who, case, steps, threads, args, run_dir):
    """The command line of one contestant's run of `steps` environment steps."""
    if who == "ours":
        flags = (
            f"--env-id {case.env_id} --num-envs {case.num_envs} --total-timesteps {steps} "
            f"--threads {threads} {case.flags} --device {args.device} "
            "--eval-every 0 --checkpoint-every 0"
        ).split()
        if args.compile:
            flags.append("--compile")
        return [sys.executable, str(ALGOS / f"{case.algo}.py"), *flags, "--run-dir", str(run_dir)]
    given = {
        "package": PEER_PACKAGES[who],
        "algo": case.algo,
        "env_id": case.env_id,
        "num_envs": case.num_envs,
        "steps": steps,
        "threads": threads,
        "device": args.device,
        "options": case.peer_options,
    }
    return [sys.executable, "-c", PEER_PROGRAM, json.dumps(given)]


@contextlib.contextmanager
def limit_cores(n):
    """Keep this process and those that it starts to n cores, where the system supports it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def process_seconds(who, case, steps, threads, args):
    """How long a contestant's process takes. Raises RuntimeError if it fails."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder, limit_cores(threads):
        line = command(who, case, steps, threads, args, Path(folder) / "run")
        start = time.perf_counter()
        done = subprocess.run(line, cwd=folder, env=env, capture_output=True)
        seconds = time.perf_counter() - start
    if done.returncode:
        lines = done.stderr.decode().strip().splitlines()
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        raise RuntimeError(f"{LABELS[who]} failed at {case.algo}: {reason}")
    return seconds


# ---- The bound -----------------------------------------------------------------------------------


def shortest_time(function, repeats=5):
    """The shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def operations_per_step(case):
    """Floating-point operations in matrix products, per environment step while learning."""
    iteration = case.rollout * case.num_envs
    more = math.ceil(200 / iteration) * iteration
    counted_short = count_operations(case, case.lengths[0])
    counted_long = count_operations(case, case.lengths[0] + more)
    return (counted_long - counted_short) / more


def count_operations(case, steps):
    """Floating-point operations in the matrix products of a run."""
    from torch.utils.flop_counter import FlopCounterMode

    module = load_algo(case.algo)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        line = command("ours", case, steps, 1, Args(), Path(folder) / "run")
        with FlopCounterMode(display=False) as counter:
            module.train(tyro.cli(module.Args, args=line[2:]))
        return counter.get_total_flops()


def product_rate(case, threads, device):
    """The highest rate of matrix products of the case's size, in operations per second."""
    rows, columns = case.product
    x = torch.randn(rows, columns, device=device)
    y = torch.randn(columns, columns, device=device)
    repeats = 200
    torch.set_num_threads(threads)

    def products():
        for _ in range(repeats):
            torch.mm(x, y)
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    # Our files choose the faster of two libraries, so the bound does too.
    for variant in (products, load_algo("sac").with_onednn(products)):
        variant()  # warm up
        times.append(shortest_time(variant))
    return repeats * 2 * rows * columns**2 / min(times)


def environment_rate(case):
    """The highest speed of the environment alone, under random actions, in steps per second."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    env = gym.make(case.env_id)
    env.action_space.seed(1)
    steps = 2000
    actions = itertools.cycle([env.action_space.sample() for _ in range(steps)])

    def run_environment():
        env.reset(seed=1)
        for _ in range(steps):
            _, _, terminated, truncated, _ = env.step(next(actions))
            if terminated or truncated:
                env.reset()

    return steps / shortest_time(run_environment)


# ---- Measuring -----------------------------------------------------------------------------------


def adapt(case, num_envs, scale):
    """The case with `num_envs` environments and `scale` times the steps that are timed.

    The number of updates per step stays the same: with more environments, the minibatches of a
    rollout grow.
    """
    rows, columns = case.product
    peer_options = case.peer_options
    if case.rollout > 1:
        rows = rows * num_envs // case.num_envs
        if peer_options is not None:
            batch_size = peer_options["batch_size"] * num_envs // case.num_envs
            peer_options = peer_options | {"batch_size": batch_size}
    short, long = case.lengths
    iteration = case.rollout * num_envs
    lengths = []
    for steps in (short, short + scale * (long - short)):
        lengths.append(math.ceil(steps / iteration) * iteration)
    return case._replace(
        num_envs=num_envs,
        lengths=tuple(lengths),
        peer_options=peer_options,
        product=(rows, columns),
    )


def measure(args):
    """Time all contestants in all cases; returns rows for `summarize`. --save writes each row."""
    peers = installed_peers(args.peers)
    warm = set()  # contestants that have run before, by case and threads
    rows = []
    for name, threads, num_envs in itertools.product(
        args.cases, args.threads, args.num_envs or (None,)
    ):
        case = adapt(CASES[name], num_envs or CASES[name].num_envs, args.scale)
        settings = {
            "case": name,
            "threads": threads,
            "num_envs": case.num_envs,
            "device": args.device,
            "compile": args.compile,
        }
        rows.append(settings | measure_bound(case, threads, args.device))
        save(rows[-1], args.save)
        contestants = ["ours", *peers] if case.peer_options is not None else ["ours"]
        for number, who in itertools.product(range(1, args.rounds + 1), contestants):
            key = (who, name, threads, case.num_envs)
            if key not in warm:
                # The first process reads its libraries from the disk, and may compile.
                process_seconds(who, case, case.lengths[0], threads, args)
                warm.add(key)
            speed = measure_speed(who, case, name, threads, args)
            rows.append(settings | {"who": who, "round": number, "sps": speed})
            save(rows[-1], args.save)
            print(
                f"{name}, --threads {threads}, round {number}: {LABELS[who]} {speed:.0f} steps/s",
                flush=True,
            )
    return rows


def installed_peers(peers):
    """Those of the peers that are installed."""
    installed = []
    for peer in peers:
        if importlib.util.find_spec(PEER_PACKAGES[peer]):
            installed.append(peer)
        else:
            print(f"warning: {LABELS[peer]} is not installed, so it is left out", file=sys.stderr)
    return installed


def measure_bound(case, threads, device):
    """The bound and the speed of the environment alone, in steps per second."""
    with limit_cores(threads):
        env_rate = environment_rate(case)
        seconds_per_step = operations_per_step(case) / product_rate(case, threads, device)
    return {"bound": 1 / (1 / env_rate + seconds_per_step), "env": env_rate}


def measure_speed(who, case, name, threads, args):
    """The speed of a contestant while learning, in steps per second."""
    short, long = case.lengths
    short_seconds = process_seconds(who, case, short, threads, args)
    long_seconds = process_seconds(who, case, long, threads, args)
    if long_seconds <= short_seconds:
        raise RuntimeError(f"{name}: {long} steps took no longer than {short}: set --scale 2")
    return (long - short) / (long_seconds - short_seconds)


def save(row, path):
    """Append a row to a .jsonl file, if there is a path."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


SETTINGS = {"case", "threads", "num_envs", "device", "compile"}


def is_measurement(row):
    """Whether a row is one that --save writes."""
    if not isinstance(row, dict) or row.get("case") not in CASES:
        return False
    values = row.keys() - SETTINGS
    return row.keys() >= SETTINGS and values in ({"bound", "env"}, {"who", "round", "sps"})


def load(path):
    """The rows of a file that --save wrote. A last line that was cut off is left out."""
    lines = path.read_text().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                print(f"warning: the last line of {path} is cut off", file=sys.stderr)
                break
            row = None
        if not is_measurement(row):
            raise ValueError(
                f"line {number} of --load {path} is not a measurement: give a file from --save"
            )
        rows.append(row)
    return rows


# ---- Table and figure ----------------------------------------------------------------------------


class Speed(NamedTuple):
    """Steps per second over the rounds."""

    median: float
    lowest: float
    highest: float


class Group(NamedTuple):
    """All measurements with the same settings."""

    title: str
    bound: float
    env_rate: float
    speeds: dict  # contestant -> Speed
    ratios: dict  # peer -> median of our speed divided by its speed


def summarize(rows):
    """One Group for all rows with the same settings, in the order of the rows."""
    rows_of_title = defaultdict(list)
    for row in rows:
        rows_of_title[describe_settings(row)].append(row)
    groups = [summarize_group(title, group) for title, group in rows_of_title.items()]
    return [group for group in groups if group is not None]


def describe_settings(row):
    """The settings of a row as a title."""
    parts = [row["case"], "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"]
    if row["num_envs"] != CASES[row["case"]].num_envs:
        parts.append(f"{row['num_envs']} envs")
    if row["device"] != "cpu":
        parts.append(row["device"])
    if row["compile"]:
        parts.append("compiled")
    return ", ".join(parts)


def summarize_group(title, rows):
    """The Group of these rows; None if they are cut off before the first speed of ours."""
    bounds = []
    env_rates = []
    rounds = defaultdict(dict)  # (measurement, round) -> {contestant: speed}
    for row in rows:
        if "bound" in row:  # a measurement starts with its bound
            bounds.append(row["bound"])
            env_rates.append(row["env"])
        else:
            rounds[len(bounds), row["round"]][row["who"]] = row["sps"]

    speeds_of = defaultdict(list)
    for speeds in rounds.values():
        for who, speed in speeds.items():
            speeds_of[who].append(speed)
    if not bounds or "ours" not in speeds_of:
        return None
    if len(speeds_of) > 1:
        # Only rounds with a peer are comparable with the peers' speeds.
        compared = [speeds for speeds in rounds.values() if "ours" in speeds and len(speeds) > 1]
        speeds_of["ours"] = [speeds["ours"] for speeds in compared]

    ratios = {}
    for peer in PEER_PACKAGES:
        both = [speeds for speeds in rounds.values() if "ours" in speeds and peer in speeds]
        if both:
            ratios[peer] = median(speeds["ours"] / speeds[peer] for speeds in both)
    summary = {who: Speed(median(s), min(s), max(s)) for who, s in speeds_of.items()}
    return Group(title, median(bounds), median(env_rates), summary, ratios)


def format_table(groups):
    """The groups as a table in Markdown."""
    head = ["steps/s, median (range)", *LABELS.values()]
    head += ["ratio to the better", "bound (share)", "environment (share)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for group in groups:
        cells = [group.title]
        for who in LABELS:
            speed = group.speeds.get(who)
            if speed is None:
                cells.append("")
            else:
                cells.append(f"{speed.median:.0f} ({speed.lowest:.0f} to {speed.highest:.0f})")
        cells.append(f"{min(group.ratios.values()):.2f}" if group.ratios else "")
        for limit in (group.bound, group.env_rate):
            cells.append(f"{limit:.0f} ({group.speeds['ours'].median / limit:.0%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(groups, path):
    """Draw a bar for each contestant, as a share of the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 0.6 * len(groups) + 1.2), layout="constrained")
    labelled = set()
    for i, group in enumerate(groups):
        contestants = [who for who in LABELS if who in group.speeds]
        for j, who in enumerate(contestants):
            speed = group.speeds[who]
            share = speed.median / group.bound
            lowest = speed.lowest / group.bound
            highest = speed.highest / group.bound
            y = i + 0.26 * (j - (len(contestants) - 1) / 2)
            axes.barh(
                y,
                share,
                height=0.24,
                xerr=[[share - lowest], [highest - share]],
                color=COLORS[who],
                ecolor="#444444",
                label=None if who in labelled else LABELS[who],
            )
            axes.text(highest + 0.01, y, f"{speed.median:.0f}", va="center", fontsize=8)
            labelled.add(who)
    titles = [group.title.replace(", 1 thread", "") for group in groups]
    axes.set_yticks(range(len(groups)), titles)
    axes.set(xlim=(0, 1.08), ylim=(len(groups) - 0.4, -0.6))
    axes.set_xlabel(
        "steps/s while learning, as a share of the bound:\nmatrix products and environment"
    )
    axes.axvline(1, color="#444444", lw=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(0.9, 0))
    figure.savefig(path, dpi=150)


def check_flags(args):
    """Raise ValueError if a flag has a bad value."""
    for flag, values in (
        ("--threads", args.threads),
        ("--num-envs", args.num_envs),
        ("--rounds", [args.rounds]),
        ("--scale", [args.scale]),
    ):
        if any(value <= 0 for value in values):
            raise ValueError(f"{flag} is {min(values)}; it must be above 0")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: torch finds no GPU; use --device cpu")
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--output {args.output} must end in .png, .svg or .pdf")


def compare(args):
    """Measure or load, then print the table and draw the figure."""
    check_flags(args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.load:
        rows = list(itertools.chain.from_iterable(load(path) for path in args.load))
        if not rows:
            raise ValueError(f"--load {args.load[0]} has no measurement: give a file from --save")
    else:
        rows = measure(args)
    groups = summarize(rows)
    print(format_table(groups))
    draw(groups, args.output)


def main():
    """Compare speeds. Exit status 2: bad input, or a contestant that fails."""
    args = tyro.cli(Args)
    try:
        compare(args)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
