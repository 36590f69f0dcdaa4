"""Run a grid of algorithms, environments, seeds and flags on Ray: on this machine, or on a cluster.

    python scripts/sweep.py --algos ppo sac --envs Hopper-v4 HalfCheetah-v4 --seeds 0 1 2 --set ppo.clip-coef 0.1 0.2
    python scripts/sweep.py --algos sac td3 --set hidden "64 64" "256 256" --set sac.autotune True False --seeds 0 1 2
    python scripts/sweep.py --file grid.toml --dry-run                  the commands, and nothing is started
    python scripts/sweep.py --file grid.toml --ray-address auto         on the cluster that this machine belongs to

Every combination is a run. --set takes a flag of the algorithms and its values, and with ALGO. in front it is for that
algorithm alone, in place of what is said for all. A value of several numbers, or none, is quoted. A file, TOML or YAML,
says the same, and may say it several times over:

    [[grid]]                                       grid:
    algos = ["ppo", "trpo"]                        - algos: [ppo, trpo]
    envs = ["Hopper-v4", "Walker2d-v4"]              envs: [Hopper-v4, Walker2d-v4]
    seeds = [1, 2, 3]                                seeds: [1, 2, 3]
    set = { total-timesteps = 1000000, "ppo.hidden" = [[64, 64], [256, 256]] }        # set: {total-timesteps: ...

A run is the plain command of its file, with --threads 1 if nothing else is --set, in a folder named after the
environment, the algorithm, the flags that vary and the seed; what it prints goes to log.txt there. One whose
result.json has all its steps is done. The same command again skips these and resumes the others, so it is also the way
to go on after the driver died, or to add seeds.

A run whose process is killed, or whose machine is lost, is resumed on another one, and ends as if nothing had happened.
One that fails by itself is shown with its last lines, and the others go on. No two processes ever write to one folder:
each run holds sweep.lock in it, for as long as any process of it lives. On a cluster --run-dir, the repository and its
Python have the same path on every machine. There --run-dir is on storage that honours flock between machines, as NFS
does and blobfuse does not.
"""

import contextlib
import difflib
import importlib.util
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from collections import Counter
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import ray
import tyro
import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

ALGOS = {path.stem: path for path in sorted((Path(__file__).resolve().parent.parent / "algos").glob("*.py"))}
OURS = {"env_id": "--envs", "seed": "--seeds", "run_dir": "--run-dir", "resume": "nothing: it is always on"}
SHOWN = 30  # runs in the live table, those under way first


@dataclass
class Args:
    """Run a grid of algorithms, environments, seeds and flags on Ray."""

    algos: tuple[str, ...] = ()  # names of files in algos/
    envs: tuple[str, ...] = ()  # gymnasium ids; none is what each algorithm has by default
    seeds: tuple[int, ...] = (1,)  # of the runs
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # FLAG or ALGO.FLAG, then the values to try
    file: Path | None = None  # a .toml, .yaml or .yml file with such grids, in place of the four above
    run_dir: Path = Path("runs")  # where the folders of the runs go
    cpus: float = 1  # CPUs that Ray sets aside for a run
    gpus: float = 0  # GPUs, or the part of one
    retries: int = 5  # how many times a run is resumed after its process or machine was lost
    ray_address: str | None = None  # a cluster's, or auto; None starts Ray on this machine
    dry_run: bool = False  # print the commands


class Run(NamedTuple):
    """One run of the grid."""

    folder: Path
    argv: tuple  # the flags, as typed
    total: int  # steps
    path: Path  # of the algorithm

    def command(self):
        """The command line that begins the run, or resumes it."""
        return [sys.executable, str(self.path), *self.argv, "--run-dir", str(self.folder), "--resume"]

    def done(self):
        """Whether it got to its end."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((self.folder / "result.json").read_bytes())["step"] >= self.total
        return False


# ---- the grid --------------------------------------------------------------------------------------------------------
def nearest(name, names, what):
    """The name, if it is one of them; else the end, with the one that is most like it."""
    if name not in names:
        close = difflib.get_close_matches(name, names, 1, 0)
        sys.exit(f"error: there is no {what} {name}: did you mean {close[0]}?")
    return name


def load(algo):
    """A file of algos/ as a module."""
    if algo not in sys.modules:
        spec = importlib.util.spec_from_file_location(algo, ALGOS[algo])
        sys.modules[algo] = importlib.util.module_from_spec(spec)  # a dataclass looks for its module there
        spec.loader.exec_module(sys.modules[algo])
    return sys.modules[algo]


def texts(values):
    """The values of a flag, as a file has them -> as they are typed: [[64, 64], True] -> ["64 64", "True"]."""
    values = values if isinstance(values, list) else [values]
    return [" ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values]


def read_grids(args):
    """The grids that are asked for: dicts with algos, envs, seeds and set, which is [(flag, values as texts)]."""
    if not args.file:
        return [{"algos": args.algos, "envs": args.envs, "seeds": args.seeds, "set": [(s[0], s[1:]) for s in args.set]}]
    if (args.algos, args.envs, args.seeds, args.set) != ((), (), (1,), ()):
        sys.exit(f"error: {args.file} says what to run: leave out --algos, --envs, --seeds and --set")
    try:
        text = args.file.read_text()
        content = tomllib.loads(text) if args.file.suffix == ".toml" else yaml.safe_load(text)
        if "grid" in content and (beside := content.keys() - {"grid"}):
            sys.exit(f"error: {args.file} has {', '.join(sorted(beside))} beside grid: say it inside of each grid")
        grids = [{"envs": [], "seeds": 1, "set": {}} | grid for grid in content.get("grid", [content])]
        for grid in grids:
            if unknown := grid.keys() - {"algos", "envs", "seeds", "set"}:
                sys.exit(f"error: {args.file} has {', '.join(sorted(unknown))}: a grid has algos, envs, seeds and set")
            grid["set"] = [(flag, texts(values)) for flag, values in grid["set"].items()]
            grid["algos"], grid["envs"] = texts(grid["algos"]), texts(grid["envs"])
            grid["seeds"] = [int(seed) for seed in texts(grid["seeds"])]
        return grids
    except (OSError, UnicodeDecodeError) as error:
        sys.exit(f"error: cannot read {args.file}: {error}")
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        sys.exit(f"error: {args.file} is no grid, which has algos and may have envs, seeds and set: {error!r}")


def axes(algo, settings):
    """What --set says for one algorithm: {flag as its field is named: values}."""
    known, own, said = [dashed(field.name) for field in fields(load(algo).Args)], {}, set()
    for flag, values in sorted(settings, key=lambda setting: "." in setting[0]):  # what is for one wins
        whose, _, name = flag.rpartition(".")
        if whose in ("", algo):
            name = nearest(name.replace("_", "-"), known, f"flag of {algo}").replace("-", "_")
            if name in OURS:
                sys.exit(f"error: --set {flag} is not for you to set: take {OURS[name]}")
            if not values:
                sys.exit(f"error: --set {flag} needs the values to try")
            if (whose, name) in said:
                sys.exit(f"error: --set {flag} is given twice: give all its values at once")
            said.add((whose, name))
            own[name] = list(dict.fromkeys(values))
    return own


def dashed(name):
    """A field of Args as its flag is called."""
    return name.replace("_", "-")


def safe(name):
    """A name without what a folder's can't have everywhere."""
    return re.sub(r"[^\w.=+-]+", "-", name)


def typed(name, value):
    """A flag and its value as they are typed: booleans have no value, some flags have many."""
    if value.lower() in ("true", "false"):
        return [f"--{'no-' * (value.lower() == 'false')}{dashed(name)}"]
    try:
        return [f"--{dashed(name)}", *shlex.split(value)]
    except ValueError as error:
        sys.exit(f"error: --set {dashed(name)} {value}: {error}")


def plan(args):
    """Every run of the grids, each parsed by its own file. All seeds of a kind come late: first, one of each kind."""
    runs = {}
    for grid in read_grids(args):
        if not grid["algos"]:
            sys.exit(f"error: --algos is missing: take some of {' '.join(ALGOS)}")
        algos = [nearest(algo, ALGOS, "algorithm") for algo in grid["algos"]]
        for flag, _ in grid["set"]:
            "." in flag and nearest(flag.rpartition(".")[0], algos, "algorithm in the grid named")
        for seed, algo in itertools.product(grid["seeds"], algos):
            module, own = load(algo), axes(algo, grid["set"])
            envs = grid["envs"] or [module.Args().env_id]
            steps = str(module.Args().total_timesteps)  # typed, since a run that is resumed has its own otherwise
            for env_id, values in itertools.product(envs, itertools.product(*own.values())):
                chosen = {"threads": "1", "total_timesteps": steps} | dict(zip(own, values))
                named = [f"{dashed(name)}={chosen[name]}" for name in own if len(own[name]) > 1 and name != "exp_name"]
                label = safe("__".join([chosen[name] for name in own if name == "exp_name"] + named))
                chosen |= {"env_id": env_id, "seed": str(seed)} | ({"exp_name": label} if label else {})
                argv = [part for item in chosen.items() for part in typed(*item)]
                parsed = tyro.cli(module.Args, args=argv, prog=f"algos/{algo}.py")
                name = "__".join(filter(None, (env_id, algo, label, str(seed))))
                folder = Path(os.path.abspath(args.run_dir)) / safe(name)
                run = Run(folder, tuple(argv), parsed.total_timesteps, ALGOS[algo])
                if runs.setdefault(folder, run) != run:
                    sys.exit(f"error: two runs would share {folder}: set exp-name in one of the grids")
                check_env(algo, parsed.env_id)
                check_folder(run, parsed)
    return list(runs.values())


@cache
def check_env(algo, env_id):
    """Whether there is such an environment, of which an algorithm can observe something."""
    try:
        load(algo).make_env(load(algo).Args(env_id=env_id)).close()
    except (gym.error.Error, ImportError) as error:
        sys.exit(f"error: no environment {env_id}: {error}")


def check_folder(run, parsed):
    """Whether what the folder holds already, if anything, is of the same run."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads((run.folder / "config.json").read_bytes())["args"]
        ours = json.loads(json.dumps(vars(parsed)))
        names = [*ours][: [*ours].index("device")]  # what may not change
        for name in names:
            if name != "total_timesteps" and saved[name] != ours[name]:
                here = f"--{dashed(name)} {saved[name]}, and not {ours[name]}"
                sys.exit(f"error: {run.folder} holds a run with {here}: move it away, or take another --run-dir")


# ---- on a machine of the cluster -------------------------------------------------------------------------------------
def execute(run, cwd):
    """Run one to its end, once nobody else does -> the exit status of its process, negative for a signal."""
    import fcntl  # here, so that --dry-run and the messages work on any system

    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "sweep.lock", "w") as lock:
        while True:  # what is left of a run whose worker was lost may live on for a while
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.5)
        if run.done():
            return 0
        with open(run.folder / "log.txt", "ab", buffering=0) as log:
            log.write(f"$ {shlex.join(run.command())}\n".encode())
            # The process inherits the lock, which lasts until both of us are gone.
            files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": [lock.fileno()]}
            return subprocess.run(run.command(), cwd=cwd, **files).returncode


# ---- the driver ------------------------------------------------------------------------------------------------------
def tail(path, size=20_000):
    """The last whole lines of a file, of at most so many bytes."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read().decode(errors="replace").replace("\r", "\n").splitlines()
    except OSError:
        return []


def progress(run):
    """What metrics.jsonl says last: {"step", "wall", "eval/return"}, as far as there is any."""
    last = {}
    for line in reversed(tail(run.folder / "metrics.jsonl", 500_000)):  # episodes by the thousand may follow the last
        with contextlib.suppress(ValueError):  # the first and the last line may be torn
            last = json.loads(line) | last if line.startswith("{") else last
        if "eval/return" in last:
            break
    return last


def clock(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def row(run, state):
    """A row of the table, as texts."""
    last = progress(run) if state != "waiting" else {}
    step, wall = last.get("step", 0), last.get("wall", 0)
    rate = step / wall if wall else 0
    left = clock((run.total - step) / rate) if rate and state.startswith("running") else ""
    returned = f"{last['eval/return']:.1f}" if "eval/return" in last else ""
    return run.folder.name, state, f"{step:,} / {run.total:,}", f"{rate:.0f}" if rate else "", returned, left


def picture(states, began):
    """The live table: what is under way, then what failed, waits and is done, as far as there is room."""
    order = {"running": 0, "failed": 1, "waiting": 2, "done": 3}
    ranked = sorted(states, key=lambda run: order[states[run].split()[0]])
    count = {name: sum(state.startswith(name) for state in states.values()) for name in order}
    title = (
        ", ".join(f"{number} {name}" for name, number in count.items() if number) + f", {clock(time.time() - began)}"
    )
    table = Table("run", "state", "step", "steps/s", "evaluation", "time left", title=title, title_justify="left")
    for run in ranked[:SHOWN]:
        table.add_row(*row(run, states[run]))
    if len(ranked) > SHOWN:
        table.caption = f"and {len(ranked) - SHOWN} more"
    return table


def filesystem(path):
    """The kind of file system that a path is on, as Linux names it."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    return max((len(place), kind) for place, kind in mounts if path.resolve().is_relative_to(place))[1]


def connect(args):
    """Start Ray on this machine, or join the cluster."""
    if args.ray_address and (kind := filesystem(args.run_dir)).startswith("fuse"):
        sys.exit(f"error: {args.run_dir} is on {kind}, whose locks other machines don't see: use NFS")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of 15, which would yield to whatever else runs here
    try:
        ray.init(args.ray_address or "local", include_dashboard=False, log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        sys.exit(
            f"error: cannot join Ray at {args.ray_address}: {reason}; if it wants a token, set RAY_AUTH_MODE=token"
        )
    for name, asked in (("CPU", args.cpus), ("GPU", args.gpus)):
        most = max(node["Resources"].get(name, 0) for node in ray.nodes() if node["Alive"])
        if asked > most:
            problem = f"a run asks for {asked:g} {name}s, and no machine has more than {most:g}"
            if not args.ray_address:
                sys.exit(f"error: {problem}: ask for less")
            print(f"warning: {problem}: waiting for the cluster to start one that has", file=sys.stderr)


def drive(args, runs):
    """Run what is not done -> {run: state}."""
    began, tries, tasks = time.time(), Counter(), {}
    states = {run: "done" if run.done() else "waiting" for run in runs}
    task = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)(execute)
    console = Console()

    def submit(run):
        tries[run] += 1
        tasks[task.remote(run, os.getcwd())] = run, time.time()

    def tell(run, state, more=""):
        """Note a state; without a terminal, on a line of its own."""
        states[run] = state
        done = sum(state == "done" for state in states.values())
        not console.is_terminal and print(f"{done}/{len(runs)}  {run.folder.name}  {state}{more}", flush=True)

    for run in runs:
        states[run] == "waiting" and submit(run)
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while tasks:
            ready, _ = ray.wait(list(tasks), timeout=1)
            for reference in ready:
                run, _ = tasks.pop(reference)
                try:
                    status = ray.get(reference)
                except ray.exceptions.RayTaskError as error:  # the disk is full, or the file is not on that machine
                    status = str(error.cause)
                except ray.exceptions.RayError:  # the worker or its machine is gone
                    status = "lost"
                killed = status == "lost" or isinstance(status, int) and status < 0
                if status == 0 and run.done():
                    _, _, _, rate, returned, _ = row(run, "done")
                    tell(run, "done", f"  evaluation {returned or '-'}  {rate} steps/s")
                elif killed and tries[run] <= args.retries:
                    submit(run)
                    tell(run, f"waiting (lost, try {tries[run]})")
                else:
                    tell(run, f"failed ({status})")
            for run, since in tasks.values():
                log = run.folder / "log.txt"
                if states[run].startswith("waiting") and log.exists() and log.stat().st_mtime > since:
                    tell(run, states[run].replace("waiting", "running"))
            if console.is_terminal:
                live.update(picture(states, began), refresh=True)
    console.is_terminal and console.print(picture(states, began))
    return states


def main(args):
    """Plan, run, and say what failed. Bad input raises SystemExit before anything starts, and so do failures after."""
    runs = plan(args)
    if args.dry_run:
        for run in runs:
            print(shlex.join(run.command()), "# done" * run.done())
        return
    todo = sum(not run.done() for run in runs)
    print(f"{args.run_dir}: {len(runs)} in all, {len(runs) - todo} done", flush=True)
    if not todo:
        return
    connect(args)
    try:
        states = drive(args, runs)
    except KeyboardInterrupt:
        sys.exit("stopped: the same command goes on from the last checkpoints")
    finally:
        ray.shutdown()
    failed = [run for run, state in states.items() if state != "done"]
    for run in failed:
        print(f"\n{run.folder.name} {states[run]}:", *tail(run.folder / "log.txt")[-5:], sep="\n  ", file=sys.stderr)
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: see log.txt in their folders")


if __name__ == "__main__":
    main(tyro.cli(Args))
