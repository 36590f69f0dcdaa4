"""Time the files of algos/ against their peers, in turns, with the same networks, batches and numbers of updates.

    python scripts/speed.py                                      every case, three rounds, one thread
    python scripts/speed.py --cases sac-hopper --threads 1 2     an axis: everyone with one thread, then with two
    python scripts/speed.py --cases td3-hopper --num-envs 1 4    and with one environment, then with four
    python scripts/speed.py --device cuda --compile              on CUDA, where ours are captured as graphs
    python scripts/speed.py --load results/speed.jsonl           the table and the figure of what was measured before

Every run is a whole process, of which there are two lengths: steps/s are the difference of the steps over the
difference of the times, so that imports, set-up and the random steps at first cancel out. All are kept to as many cores
as they have threads. A round times each contestant once, one after the other; what is quoted are the medians of the
rounds, and the ratio is the median of the ratios within a round, since a machine's speed drifts. Peers run where they
are installed: `pip install stable-baselines3 sbx-rl`. There are no evaluations, and no checkpoint but the last.

The bound is what no way of writing it could pass here in float32: the matrix products of the updates, counted while the
file runs, at the rate that this machine reaches on products of their size, plus the bare stepping of the environment.
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

ALGOS = Path(__file__).resolve().parent.parent / "algos"
PEERS = {"sb3": "stable_baselines3", "sbx": "sbx"}
NAMES = {"ours": "onefile", "sb3": "Stable-Baselines3", "sbx": "SBX"}


class Case(NamedTuple):
    """What is timed, in our words and in theirs."""

    algo: str
    env_id: str
    lengths: tuple[int, int]  # environment steps of the short run and of the long one
    flags: str  # ours
    theirs: dict | None  # arguments of the peers' class, if they have one
    product: tuple[int, int]  # rows and columns of the matrix products that the rate is measured on
    num_envs: int = 1
    rollout: int = 1  # steps of each environment that are collected before learning


OFF_POLICY = "--learning-starts 1000 --batch-size 256 --hidden 256 256 --buffer-size 1000000"
REPLAY = {"learning_starts": 1000, "batch_size": 256, "buffer_size": 1_000_000, "train_freq": 1}
REPLAY["policy_kwargs"] = {"net_arch": [256, 256]}
DQN = "--learning-starts 1000 --batch-size 128 --buffer-size 100000 --hidden 128 128"
DQN += " --train-frequency 10 --target-network-frequency 500 --tau 1 --no-layer-norm --no-anneal-lr"
THEIR_DQN = {"learning_starts": 1000, "batch_size": 128, "buffer_size": 100_000, "train_freq": 10}
THEIR_DQN |= {"target_update_interval": 500, "policy_kwargs": {"net_arch": [128, 128]}}
PPO = "--num-steps 2048 --num-minibatches 32 --update-epochs 10 --hidden 64 64"
THEIR_PPO = {"n_steps": 2048, "batch_size": 64, "n_epochs": 10}
SMALL_PPO = "--num-steps 128 --num-minibatches 4 --update-epochs 4 --hidden 64 64"
THEIR_SMALL_PPO = {"n_steps": 128, "batch_size": 128, "n_epochs": 4}
CASES = {
    "sac-hopper": Case("sac", "Hopper-v4", (1100, 2100), OFF_POLICY, REPLAY, (256, 256)),
    "td3-hopper": Case("td3", "Hopper-v4", (1100, 2600), OFF_POLICY, REPLAY, (256, 256)),
    "ddpg-hopper": Case("ddpg", "Hopper-v4", (1100, 2600), OFF_POLICY, REPLAY, (256, 256)),
    "ppo-hopper": Case("ppo", "Hopper-v4", (4096, 16384), PPO, THEIR_PPO, (64, 64), 1, 2048),
    "ppo-cartpole": Case("ppo", "CartPole-v1", (10240, 61440), SMALL_PPO, THEIR_SMALL_PPO, (128, 64), 4, 128),
    "dqn-cartpole": Case("dqn", "CartPole-v1", (4000, 84000), DQN, THEIR_DQN, (128, 128)),
    "vpg-hopper": Case("vpg", "Hopper-v4", (4096, 16384), "--num-steps 1024 --hidden 64 64", None, (64, 64), 1, 1024),
    "trpo-hopper": Case("trpo", "Hopper-v4", (4096, 16384), "--num-steps 1024 --hidden 64 64", None, (64, 64), 1, 1024),
}

# What a peer's process runs.
PEER = """
import json, sys, warnings
warnings.filterwarnings("ignore")
library, algo, env_id, num_envs, steps, threads, device, options = json.loads(sys.argv[1])
if library == "stable_baselines3":
    import torch
    torch.set_num_threads(threads)
    options["device"] = device
import importlib, numpy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.noise import NormalActionNoise
env = make_vec_env(env_id, num_envs, seed=1)
if "train_freq" in options:
    options["gradient_steps"] = num_envs  # as many for each step as with one environment
if algo in ("td3", "ddpg"):
    size = env.action_space.shape
    options["action_noise"] = NormalActionNoise(numpy.zeros(size), 0.1 * numpy.ones(size))
getattr(importlib.import_module(library), algo.upper())("MlpPolicy", env, seed=1, **options).learn(steps)
"""


@dataclass
class Args:
    """Time the files of algos/ against their peers, in turns, with the same networks, batches and updates."""

    cases: tuple[Literal[tuple(CASES)], ...] = tuple(CASES)  # what to time
    peers: tuple[Literal["sb3", "sbx"], ...] = ("sb3", "sbx")  # against whom, where installed
    threads: tuple[int, ...] = (1,)  # CPU threads, and cores to run on
    num_envs: tuple[int, ...] = ()  # environments side by side; none is what the case has
    device: str = "cpu"  # cpu or cuda
    compile: bool = False  # run ours with --compile
    rounds: int = 3  # times that everyone is timed
    scale: float = 1.0  # of the steps that are timed: more of them, less noise
    save: Path | None = None  # append what was measured to this .jsonl file
    load: tuple[Path, ...] = ()  # show what these files hold, and time nothing
    output: Path = Path("speed.png")  # the figure


def command(who, case, steps, threads, args, run_dir):
    """The command line of a contestant's run of so many steps."""
    if who == "ours":
        flags = f"--env-id {case.env_id} --num-envs {case.num_envs} --total-timesteps {steps} --threads {threads}"
        flags += (
            f" {case.flags} --device {args.device} --eval-every 0 --checkpoint-every 0" + " --compile" * args.compile
        )
        return [sys.executable, str(ALGOS / f"{case.algo}.py"), *flags.split(), "--run-dir", str(run_dir)]
    options = (PEERS[who], case.algo, case.env_id, case.num_envs, steps, threads, args.device, case.theirs)
    return [sys.executable, "-c", PEER, json.dumps(options)]


@contextlib.contextmanager
def cores(n):
    """What is started within keeps to n cores, where the system has a way to say so."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:n])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def seconds(who, case, steps, threads, args):
    """How long a whole process takes. A failure raises SystemExit with its last line."""
    with tempfile.TemporaryDirectory() as folder, cores(threads):
        line = command(who, case, steps, threads, args, Path(folder) / "run")
        began = time.perf_counter()
        done = subprocess.run(
            line, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True
        )
        took = time.perf_counter() - began
    if done.returncode:
        last = ["killed", *done.stderr.decode().strip().splitlines()][-1]
        sys.exit(f"error: {NAMES[who]} failed at {case.algo}: {last}")
    return took


def best(function, repeats=5):
    """The shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def load(algo):
    """A file of algos/ as a module."""
    spec = importlib.util.spec_from_file_location(algo, ALGOS / f"{algo}.py")
    module = sys.modules[algo] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operations(case):
    """Floating-point operations in matrix products, per environment step: what a longer run counts more of."""
    from torch.utils.flop_counter import FlopCounterMode

    module, whole = load(case.algo), case.rollout * case.num_envs
    counts, more = [], math.ceil(200 / whole) * whole
    for steps in (case.lengths[0], case.lengths[0] + more):
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
            line = command("ours", case, steps, 1, Args(), Path(folder) / "run")
            with FlopCounterMode(display=False) as counter:
                module.train(tyro.cli(module.Args, args=line[2:]))
            counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / more


def product_rate(case, threads, device):
    """Floating-point operations a second in products of the case's size, at best: by MKL or, where it may, oneDNN."""
    (rows, columns), repeats = case.product, 200
    x, y = torch.randn(rows, columns, device=device), torch.randn(columns, columns, device=device)
    torch.set_num_threads(threads)

    def products():
        for _ in range(repeats):
            x @ y
        device.startswith("cuda") and torch.cuda.synchronize()

    ways = products, load("sac").by_onednn(products)
    [way() for way in ways]
    return repeats * 2 * rows * columns**2 / min(best(way) for way in ways)


def environment_rate(case):
    """Steps a second of the environment alone, under random actions, at best."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    env, steps = gym.make(case.env_id), 2000
    env.action_space.seed(1)
    actions = itertools.cycle([env.action_space.sample() for _ in range(steps)])

    def stepping():
        env.reset(seed=1)
        for _ in range(steps):
            _, _, terminated, truncated, _ = env.step(next(actions))
            if terminated or truncated:
                env.reset()

    return steps / best(stepping)


def lengthen(case, num_envs, scale):
    """The case with so many environments and as many updates a step, its second length scaled, both whole rollouts."""
    (short, long), theirs, (rows, columns) = case.lengths, case.theirs, case.product
    if case.rollout > 1:  # minibatches are parts of it
        rows = rows * num_envs // case.num_envs
        theirs = theirs and theirs | {"batch_size": theirs["batch_size"] * num_envs // case.num_envs}
    whole = case.rollout * num_envs
    lengths = [math.ceil(n / whole) * whole for n in (short, short + scale * (long - short))]
    return case._replace(num_envs=num_envs, lengths=lengths, theirs=theirs, product=(rows, columns))


def measure(args):
    """Time all contestants of all cases -> rows for `summary`, each of which is saved as soon as it is there."""
    peers = [peer for peer in args.peers if importlib.util.find_spec(PEERS[peer])]
    for peer in args.peers:
        peer in peers or print(f"{NAMES[peer]} is not installed, and left out", file=sys.stderr)
    rows, warm = [], []

    def note(row):
        rows.append(row)
        if args.save:
            args.save.parent.mkdir(parents=True, exist_ok=True)
            with open(args.save, "a") as file:
                file.write(json.dumps(row) + "\n")

    for name, threads, num_envs in itertools.product(args.cases, args.threads, args.num_envs or (None,)):
        case = lengthen(CASES[name], num_envs or CASES[name].num_envs, args.scale)
        about = {"case": name, "threads": threads, "num_envs": case.num_envs}
        about |= {"device": args.device, "compile": args.compile}
        with cores(threads):
            alone, products = environment_rate(case), operations(case) / product_rate(case, threads, args.device)
        note(about | {"bound": 1 / (1 / alone + products), "env": alone})
        for number in range(1, args.rounds + 1):
            for who in ["ours", *(peers if case.theirs else [])]:
                if (who, case, threads) not in warm:  # the first process reads its libraries from the disk, or compiles
                    seconds(who, case, case.lengths[0], threads, args)
                    warm.append((who, case, threads))
                short, long = (seconds(who, case, steps, threads, args) for steps in case.lengths)
                if long <= short:
                    sys.exit(f"error: {name}: {case.lengths[1]} steps took no longer than {case.lengths[0]}: --scale 2")
                sps = (case.lengths[1] - case.lengths[0]) / (long - short)
                note(about | {"who": who, "round": number, "sps": sps})
                print(f"{name}, --threads {threads}, round {number}: {NAMES[who]} {sps:.0f} steps/s", flush=True)
    return rows


def read(path):
    """The rows of a file that --save wrote; of one that was cut off, those before."""
    for number, line in enumerate(lines := path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                print(f"warning: the last line of {path} is cut off, and left out", file=sys.stderr)
                return
            row = None
        if not isinstance(row, dict) or row.get("case") not in CASES:
            sys.exit(f"error: {path}, line {number} is no measurement: give what --save has written")
        yield row


def summary(rows):
    """Rows as measured -> [(title, bound, env, {who: (median, least, most)}, {peer: median ratio})]."""
    groups = defaultdict(list)
    for row in rows:
        key = f"{row['case']}, {row['threads']} thread{'s' * (row['threads'] > 1)}"
        key += f", {row['num_envs']} envs" * (row["num_envs"] != CASES[row["case"]].num_envs)
        groups[key + f", {row['device']}" * (row["device"] != "cpu") + ", compiled" * row["compile"]].append(row)
    result = []
    for title, group in groups.items():
        times, rounds, limits = defaultdict(list), defaultdict(dict), []
        for row in group:
            if "bound" in row:
                limits.append((row["bound"], row["env"]))
            else:
                times[row["who"]].append(row["sps"])
                rounds[len(limits), row["round"]][row["who"]] = row["sps"]
        if not times["ours"]:
            continue  # a measurement that was cut off before it had anything to compare
        if len(times) > 1:  # a round without peers says nothing beside theirs
            times["ours"] = [r["ours"] for r in rounds.values() if "ours" in r and len(r) > 1]
        speeds = {who: (median(sps), min(sps), max(sps)) for who, sps in times.items()}
        ratios = {who: [r["ours"] / r[who] for r in rounds.values() if {"ours", who} <= {*r}] for who in PEERS}
        ratios = {who: median(values) for who, values in ratios.items() if values}
        result.append((title, *map(median, zip(*limits)), speeds, ratios))
    return result


def table(groups):
    """The summary as a table in Markdown."""
    head = ["steps/s, median (range)", *NAMES.values(), "ratio to the better", "bound (share)", "environment (share)"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for title, most, alone, speeds, ratios in groups:
        cells = [f"{s[0]:.0f} ({s[1]:.0f} to {s[2]:.0f})" if (s := speeds.get(who)) else "" for who in NAMES]
        cells.append(f"{min(ratios.values()):.2f}" if ratios else "")
        cells += [f"{limit:.0f} ({speeds['ours'][0] / limit:.0%})" for limit in (most, alone)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(groups, path):
    """A bar for each contestant, as a share of the bound."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    colors = {"ours": "#0072B2", "sb3": "#E69F00", "sbx": "#999999"}
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(groups) + 1.2), layout="constrained")
    for i, (_, most, _, speeds, _) in enumerate(groups):
        for j, who in enumerate(who for who in NAMES if who in speeds):
            middle, least, greatest = (x / most for x in speeds[who])
            error = [[middle - least], [greatest - middle]]
            label = NAMES[who] if not any(who in group[3] for group in groups[:i]) else None
            y = i + 0.26 * (j - (len(speeds) - 1) / 2)
            axes.barh(y, middle, 0.24, xerr=error, color=colors[who], ecolor="#444444", label=label)
            axes.text(max(greatest, middle) + 0.01, y, f"{speeds[who][0]:.0f}", va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), [group[0].replace(", 1 thread", "") for group in groups])
    axes.set(xlim=(0, 1.08), ylim=(len(groups) - 0.4, -0.6))
    axes.set_xlabel("steps/s while learning, as a share of the bound:\nmatrix products and environment")
    axes.axvline(1, color="#444444", lw=1)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right", bbox_to_anchor=(0.9, 0))
    figure.savefig(path, dpi=150)


def main(args):
    """Measure or load, then show. Bad input raises SystemExit with a sentence."""
    if least := [n for n in (*args.threads, *args.num_envs, args.rounds, args.scale) if n <= 0]:
        sys.exit(f"error: threads, environments, rounds and scale must be above 0, and one is {least[0]}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit(f"error: --device {args.device}, and torch sees no GPU here")
    if args.output.suffix not in (".png", ".svg", ".pdf"):
        sys.exit(f"error: --output {args.output} must end in .png, .svg or .pdf")
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        loaded = [row for path in args.load for row in read(path)]
        if args.load and not loaded:
            sys.exit(f"error: {args.load[0]} holds no measurement: give what --save has written")
        groups = summary(loaded or measure(args))
        print(table(groups))
        draw(groups, args.output)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        sys.exit(f"error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main(tyro.cli(Args))
