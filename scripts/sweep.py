"""Run a grid of algorithms, environments, seeds and flags on Ray: on this machine or on a cluster.

    python scripts/sweep.py --algos ppo sac --envs Hopper-v4 HalfCheetah-v4 --seeds 0 1 2 \\
        --set ppo.clip-coef 0.1 0.2
    python scripts/sweep.py --algos sac td3 --seeds 0 1 2 \\
        --set hidden "64 64" "256 256" --set sac.autotune True False
    python scripts/sweep.py --file grid.toml --dry-run            print the commands, start nothing
    python scripts/sweep.py --file grid.toml --ray-address auto   use the cluster of this machine

Every combination is a run. --set takes a flag and the values to try. ALGO.FLAG sets a flag of one
algorithm and overrides what is set for all. Put a value of several numbers, or of none, in quotes.
A TOML or YAML file holds one grid, or a list of them:

    [[grid]]                                       grid:
    algos = ["ppo", "trpo"]                        - algos: [ppo, trpo]
    envs = ["Hopper-v4", "Walker2d-v4"]              envs: [Hopper-v4, Walker2d-v4]
    seeds = [1, 2, 3]                                seeds: [1, 2, 3]
    set.total-timesteps = 1000000                    set:
    set."ppo.hidden" = [[64, 64], [256, 256]]          total-timesteps: 1000000
                                                       ppo.hidden: [[64, 64], [256, 256]]

A run is the plain command of its file, with --threads 1 unless --set has another number. Its folder
is named after the environment, the algorithm, the flags that vary and the seed. Its output goes to
log.txt in that folder. A run is done when its result.json has all its steps. Starting the same
sweep again skips what is done and resumes the rest, so this also continues a sweep after its driver
died, and adds seeds.

If the process of a run is killed or its machine is lost, the run is resumed, on another machine if
need be, with the result of an undisturbed run. If a run fails by itself, its last lines are shown
and the other runs continue.

No two processes write to one folder: each run locks sweep.lock in it for as long as any of its
processes lives. On a cluster, --run-dir, the repository and its Python must have the same path on
every machine, and --run-dir must be on storage with locks that all machines see. NFS has them,
blobfuse does not.
"""

import contextlib
import difflib
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
from common import ALGOS, load_algo
from rich.console import Console
from rich.live import Live
from rich.table import Table

PATHS = {path.stem: path for path in sorted(ALGOS.glob("*.py"))}
GRID_KEYS = {"algos", "envs", "seeds", "set"}
# Flags that --set refuses, and what to use instead.
RESERVED = {
    "env_id": "use --envs",
    "seed": "use --seeds",
    "run_dir": "use --run-dir",
    "resume": "leave it out, because every run resumes",
}
TABLE_ROWS = 30  # rows of the live table
STATES = ("running", "failed", "waiting", "done")  # in the order of the live table


@dataclass
class Args:
    """Run a grid of algorithms, environments, seeds and flags on Ray."""

    algos: tuple[str, ...] = ()  # names of files in algos/, without .py
    envs: tuple[str, ...] = ()  # gymnasium ids; default: that of each algorithm
    seeds: tuple[int, ...] = (1,)  # one run for each seed
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()  # FLAG or ALGO.FLAG, values
    file: Path | None = None  # .toml, .yaml or .yml file of grids, instead of the four flags above
    run_dir: Path = Path("runs")  # parent of the run folders
    cpus: float = 1  # CPUs that Ray reserves for a run
    gpus: float = 0  # GPUs, or the fraction of one, that Ray reserves for a run
    retries: int = 5  # how often a run is resumed after its process or machine was lost
    ray_address: str | None = None  # address of a cluster, or auto; default: Ray on this machine
    dry_run: bool = False  # print the commands and start nothing


class Grid(NamedTuple):
    """A grid: every combination of its values is a job."""

    algos: list
    envs: list  # empty for the default of each algorithm
    seeds: list
    settings: list  # (FLAG or ALGO.FLAG, the values to try as typed) for every --set


class Job(NamedTuple):
    """One run of one file of algos/."""

    folder: Path
    flags: tuple  # as typed on a command line
    total: int  # environment steps
    path: Path  # of the algorithm

    def command(self):
        """The command line that starts or resumes the run."""
        line = [sys.executable, str(self.path), *self.flags]
        return [*line, "--run-dir", str(self.folder), "--resume"]

    def is_done(self):
        """Whether the run has all its steps."""
        try:
            result = json.loads((self.folder / "result.json").read_bytes())
            return result["step"] >= self.total
        except (OSError, ValueError, KeyError):
            return False


# ---- Grids ---------------------------------------------------------------------------------------


def read_grids(args):
    """The grids that the flags or --file describe. Raises ValueError if there are none."""
    if args.file is None:
        if () in args.set:
            raise ValueError("--set needs a flag and the values to try")
        settings = [(words[0], list(words[1:])) for words in args.set]
        return [Grid(list(args.algos), list(args.envs), list(args.seeds), settings)]
    if args.algos or args.envs or args.set or args.seeds != Args.seeds:
        raise ValueError(
            f"--file {args.file} says what to run: leave out --algos, --envs, --seeds and --set"
        )
    content = read_content(args.file)
    tables = [content]
    if isinstance(content, dict) and "grid" in content:
        others = content.keys() - {"grid"}
        if others:
            raise ValueError(
                f"--file {args.file} has {', '.join(sorted(others))} beside grid: "
                "move that into each grid"
            )
        tables = content["grid"]
    if not isinstance(tables, list):
        raise not_a_grid(args.file, f"grid is {tables!r}, not a list")
    return [read_grid(args.file, table) for table in tables]


def read_content(path):
    """What a TOML or YAML file holds."""
    try:
        text = path.read_text()
        return tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise not_a_grid(path, " ".join(str(error).split())) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read --file {path}: {error}") from error


def read_grid(path, table):
    """One grid of a file. Raises ValueError if it is none."""
    if not isinstance(table, dict) or "algos" not in table:
        raise not_a_grid(path, f"{table!r} has no algos")
    unknown = {str(key) for key in table} - GRID_KEYS
    if unknown:
        raise ValueError(
            f"--file {path} has {', '.join(sorted(unknown))}: a grid has algos, envs, seeds and set"
        )
    settings = table.get("set", {})
    if not isinstance(settings, dict):
        raise not_a_grid(path, f"set is {settings!r}, not a table of flags")
    try:
        seeds = [int(seed) for seed in as_typed(table.get("seeds", 1))]
    except ValueError as error:
        raise not_a_grid(path, f"seeds are {table['seeds']!r}, not whole numbers") from error
    return Grid(
        algos=as_typed(table["algos"]),
        envs=as_typed(table.get("envs", [])),
        seeds=seeds,
        settings=[(str(flag), as_typed(values)) for flag, values in settings.items()],
    )


def not_a_grid(path, reason):
    """The error for a file that holds no grid."""
    return ValueError(
        f"--file {path} is not a grid: it needs algos and may have envs, seeds and set ({reason})"
    )


def as_typed(values):
    """The values in a file, as a user types them: [[64, 64], True] -> ["64 64", "True"]."""
    if not isinstance(values, list):
        values = [values]
    typed = []
    for value in values:
        items = value if isinstance(value, list) else [value]
        typed.append(" ".join(str(item) for item in items))
    return typed


# ---- Jobs ----------------------------------------------------------------------------------------


def plan(args):
    """The jobs of all grids, checked. The first seed of everything comes before the second."""
    jobs = {}
    for grid in read_grids(args):
        check_grid_names(grid)
        for seed, algo in itertools.product(grid.seeds, grid.algos):
            for env_id, flags in combinations(algo, grid):
                job, parsed = make_job(algo, env_id, seed, flags, args.run_dir)
                if jobs.setdefault(job.folder, job) != job:
                    raise ValueError(
                        f"two runs would share {job.folder}: add exp-name to set in one grid"
                    )
                check_env(algo, env_id)
                check_folder(job, parsed, algo_module(algo).MAY_CHANGE)
    return list(jobs.values())


@cache
def algo_module(name):
    """A file of algos/ as a module, imported once."""
    return load_algo(name)


def check_grid_names(grid):
    """Raise ValueError unless all names of algorithms in a grid exist."""
    if not grid.algos:
        raise ValueError(f"--algos is missing: use some of {' '.join(PATHS)}")
    for algo in grid.algos:
        check_name(algo, PATHS, "algorithm")
    for flag, _ in grid.settings:
        if "." in flag:
            check_name(flag.rpartition(".")[0], grid.algos, "algorithm in the grid named")


def check_name(name, known, kind):
    """Raise ValueError with the most similar known name unless `name` is known."""
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        raise ValueError(f"there is no {kind} {name}: did you mean {similar}?")


def combinations(algo, grid):
    """Every environment with every combination of flags: (env_id, {field of Args: text})."""
    choices = values_to_try(algo, grid.settings)
    varied = [name for name, values in choices.items() if len(values) > 1 and name != "exp_name"]
    for env_id in grid.envs or [algo_module(algo).Args().env_id]:
        for values in itertools.product(*choices.values()):
            flags = dict(zip(choices, values, strict=True))
            label = [f"{flag_name(name)}={flags[name]}" for name in varied]
            if "exp_name" in flags:
                label.insert(0, flags["exp_name"])
            if label:
                flags["exp_name"] = safe_name("__".join(label))
            yield env_id, flags


def values_to_try(algo, settings):
    """What --set says about one algorithm: {field of its Args: values}."""
    known = [flag_name(field.name) for field in fields(algo_module(algo).Args)]
    for_all = {}
    for_this = {}
    for flag, values in settings:
        owner, _, name = flag.rpartition(".")
        if owner not in ("", algo):
            continue
        check_name(flag_name(name), known, f"flag of {algo}")
        name = name.replace("-", "_")
        if name in RESERVED:
            raise ValueError(f"--set cannot set {flag}: {RESERVED[name]}")
        if not values:
            raise ValueError(f"--set {flag} needs the values to try")
        choices = for_this if owner else for_all
        if name in choices:
            raise ValueError(f"--set {flag} is given twice: give all its values at once")
        choices[name] = list(dict.fromkeys(values))
    return for_all | for_this


def make_job(algo, env_id, seed, flags, run_dir):
    """A job, and its flags as parsed by the algorithm."""
    module = algo_module(algo)
    # Without --total-timesteps on the command line, a resumed run would keep its own.
    flags = {"threads": "1", "total_timesteps": str(module.Args().total_timesteps)} | flags
    flags |= {"env_id": env_id, "seed": str(seed)}
    words = []
    for name, value in flags.items():
        words += flag_words(name, value)
    parsed = tyro.cli(module.Args, args=words, prog=f"algos/{algo}.py")

    parts = [env_id, algo, flags.get("exp_name"), str(seed)]
    folder_name = safe_name("__".join(part for part in parts if part))
    folder = Path(os.path.abspath(run_dir)) / folder_name
    return Job(folder, tuple(words), parsed.total_timesteps, PATHS[algo]), parsed


def flag_name(field):
    """The flag of a field of Args, without its leading dashes."""
    return field.replace("_", "-")


def flag_words(field, value):
    """A flag and its value as words of a command line."""
    flag = flag_name(field)
    if value.lower() == "true":
        return [f"--{flag}"]
    if value.lower() == "false":
        return [f"--no-{flag}"]
    try:
        return [f"--{flag}", *shlex.split(value)]
    except ValueError as error:
        raise ValueError(f"--set {flag} {value}: {error}") from error


def safe_name(name):
    """A name of a folder that every file system accepts."""
    return re.sub(r"[^\w.=+-]+", "-", name)


@cache
def check_env(algo, env_id):
    """Raise ValueError unless the environment exists and has observations for the algorithm."""
    module = algo_module(algo)
    try:
        module.make_env(module.Args(env_id=env_id)).close()
    except (gym.error.Error, ImportError, ValueError) as error:
        raise ValueError(f"cannot make environment {env_id}: {error}") from error


def check_folder(job, parsed, may_change):
    """Raise ValueError if the folder holds a run with other flags."""
    try:
        saved = json.loads((job.folder / "config.json").read_bytes())["args"]
    except (OSError, ValueError, KeyError):
        return  # no run, or one that the algorithm will report
    flags = json.loads(json.dumps(vars(parsed)))  # lists for tuples, as in the file
    for name, value in flags.items():
        if name not in may_change and saved.get(name) != value:
            raise ValueError(
                f"{job.folder} holds a run with --{flag_name(name)} {saved.get(name)}, "
                f"not {value}: move it away, or change --run-dir"
            )


# ---- On a machine of the cluster -----------------------------------------------------------------


def execute(job, cwd):
    """Run a job to its end; returns the exit status of its process, negative for a signal."""
    import fcntl  # Unix only; imported late, so that --dry-run works on every system

    job.folder.mkdir(parents=True, exist_ok=True)
    with open(job.folder / "sweep.lock", "w") as lock:
        # A process of a worker that was lost may live on and hold the lock for a while.
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.5)
        if job.is_done():
            return 0
        with open(job.folder / "log.txt", "ab", buffering=0) as log:
            log.write(f"$ {shlex.join(job.command())}\n".encode())
            # The process inherits the lock, so the lock lasts until it and this worker have ended.
            return subprocess.run(
                job.command(),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[lock.fileno()],
            ).returncode


# ---- Progress ------------------------------------------------------------------------------------


class Progress(NamedTuple):
    """How far a run is, by its last metrics."""

    step: int
    steps_per_second: float  # 0 if unknown
    evaluation: float | None  # last eval/return


def read_progress(folder):
    """The progress of the run in a folder, as far as metrics.jsonl tells."""
    last = {}
    # Thousands of episodes may follow the last evaluation, so read enough of the file.
    for line in reversed(last_lines(folder / "metrics.jsonl", 500_000)):
        with contextlib.suppress(ValueError):  # the first and the last line may be incomplete
            row = json.loads(line)
            if isinstance(row, dict):
                last = row | last
        if "eval/return" in last:
            break
    step = last.get("step", 0)
    wall = last.get("wall", 0)
    return Progress(step, step / wall if wall else 0.0, last.get("eval/return"))


def last_lines(path, size=20_000):
    """The lines in the last `size` bytes of a file; none if there is no file."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    return text.replace("\r", "\n").splitlines()


def format_duration(seconds):
    """Seconds as h:mm:ss."""
    seconds = round(seconds)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def table_row(job, state):
    """The row of a job in the live table, as texts."""
    progress = Progress(0, 0.0, None) if state == "waiting" else read_progress(job.folder)
    speed = ""
    time_left = ""
    if progress.steps_per_second:
        speed = f"{progress.steps_per_second:.0f}"
        if state.startswith("running"):
            seconds_left = (job.total - progress.step) / progress.steps_per_second
            time_left = format_duration(seconds_left)
    evaluation = "" if progress.evaluation is None else f"{progress.evaluation:.1f}"
    steps = f"{progress.step:,} / {job.total:,}"
    return job.folder.name, state, steps, speed, evaluation, time_left


def live_table(states, start_time):
    """The live table of {job: state}: running jobs first, as many jobs as there is room for."""
    jobs_in_state = {name: [] for name in STATES}
    for job, state in states.items():
        jobs_in_state[state.split()[0]].append(job)
    counts = [f"{len(jobs)} {name}" for name, jobs in jobs_in_state.items() if jobs]
    title = f"{', '.join(counts)}, {format_duration(time.time() - start_time)}"
    columns = ("run", "state", "step", "steps/s", "evaluation", "time left")
    table = Table(*columns, title=title, title_justify="left")
    ranked = list(itertools.chain.from_iterable(jobs_in_state.values()))
    for job in ranked[:TABLE_ROWS]:
        table.add_row(*table_row(job, states[job]))
    if len(ranked) > TABLE_ROWS:
        table.caption = f"and {len(ranked) - TABLE_ROWS} more"
    return table


# ---- The driver ----------------------------------------------------------------------------------


def connect(args):
    """Start Ray on this machine or join a cluster. Raises ValueError if it cannot run the jobs."""
    if args.ray_address:
        check_locks(args.run_dir)
    # Ray starts workers with niceness 15, so that they yield to everything else on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    try:
        ray.init(
            args.ray_address or "local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"cannot join Ray at --ray-address {args.ray_address} ({reason}): "
            "start the cluster; if it wants a token, set RAY_AUTH_MODE=token"
        ) from error
    check_resource("CPU", "--cpus", args.cpus, args.ray_address)
    check_resource("GPU", "--gpus", args.gpus, args.ray_address)


def check_locks(run_dir):
    """Raise ValueError if other machines do not see locks in the folder."""
    kind = file_system(run_dir)
    if kind.startswith("fuse"):
        raise ValueError(
            f"--run-dir {run_dir} is on {kind}, which hides locks from other machines: use NFS"
        )


def file_system(path):
    """The kind of file system that holds a path, as Linux names it."""
    deepest = ""
    kind = ""
    for line in Path("/proc/mounts").read_text().splitlines():
        words = line.split()
        mount_point = words[1]
        if path.resolve().is_relative_to(mount_point) and len(mount_point) >= len(deepest):
            deepest = mount_point
            kind = words[2]
    return kind


def check_resource(resource, flag, amount, ray_address):
    """Raise ValueError if no machine has the amount that a run needs. A cluster may still grow."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    most = max(machine.get(resource, 0) for machine in machines)
    if amount <= most:
        return
    problem = f"{flag} {amount:g} is more than the {most:g} of any machine"
    if not ray_address:
        raise ValueError(f"{problem}: reduce it")
    print(f"warning: {problem}: waiting for the cluster to start a larger one", file=sys.stderr)


class Driver:
    """Runs jobs as Ray tasks, resumes what was lost and shows the progress."""

    def __init__(self, args, jobs):
        self.retries = args.retries
        self.jobs = jobs
        self.start_time = time.time()
        self.states = {job: "done" if job.is_done() else "waiting" for job in jobs}
        self.tries = Counter()
        self.tasks = {}  # Ray's reference -> (job, time of its submission)
        self.console = Console()
        # Ray retries a task at most 3 times by default; this class counts the tries itself.
        remote = ray.remote(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)
        self.execute = remote(execute)

    def run(self):
        """Run every job that is not done; returns {job: state}."""
        for job in self.jobs:
            if self.states[job] == "waiting":
                self.submit(job)
        with Live(console=self.console, auto_refresh=False, transient=True) as live:
            while self.tasks:
                ended, _ = ray.wait(list(self.tasks), timeout=1)
                for reference in ended:
                    self.collect(reference)
                self.find_started()
                if self.console.is_terminal:
                    live.update(live_table(self.states, self.start_time), refresh=True)
        if self.console.is_terminal:
            self.console.print(live_table(self.states, self.start_time))
        return self.states

    def submit(self, job):
        """Hand a job to Ray, which starts it when a machine has room."""
        self.tries[job] += 1
        reference = self.execute.remote(job, os.getcwd())
        self.tasks[reference] = (job, time.time())

    def collect(self, reference):
        """Note how a task ended; submit its job again if it was lost."""
        job, _ = self.tasks.pop(reference)
        status = task_status(reference)
        was_lost = status == "lost" or (isinstance(status, int) and status < 0)
        if status == 0 and job.is_done():
            _, speed, evaluation = read_progress(job.folder)
            text = "-" if evaluation is None else f"{evaluation:.1f}"
            self.report(job, "done", f"  evaluation {text}  {speed:.0f} steps/s")
        elif was_lost and self.tries[job] <= self.retries:
            self.submit(job)
            self.report(job, f"waiting (lost, try {self.tries[job]})")
        else:
            self.report(job, f"failed ({status})")

    def find_started(self):
        """Note which waiting jobs have started: those with a new line in their log."""
        for job, submitted in self.tasks.values():
            log = job.folder / "log.txt"
            waiting = self.states[job].startswith("waiting")
            if waiting and log.exists() and log.stat().st_mtime > submitted:
                self.report(job, self.states[job].replace("waiting", "running"))

    def report(self, job, state, details=""):
        """Note a state. Without a terminal, there is no live table: print a line."""
        self.states[job] = state
        if not self.console.is_terminal:
            done = sum(state == "done" for state in self.states.values())
            print(f"{done}/{len(self.jobs)}  {job.folder.name}  {state}{details}", flush=True)


def task_status(reference):
    """The exit status of an ended task's process, "lost", or what went wrong in the worker."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        return str(error.cause)  # e.g. the disk is full, or the machine lacks the file
    except ray.exceptions.RayError:
        return "lost"  # the worker or its machine died


def sweep(args):
    """Run the grids; returns how many runs failed. Raises ValueError if input is bad."""
    jobs = plan(args)
    if args.dry_run:
        for job in jobs:
            print(shlex.join(job.command()), "# done" if job.is_done() else "")
        return 0
    done = sum(job.is_done() for job in jobs)
    print(f"{args.run_dir}: {len(jobs)} in all, {done} done", flush=True)
    if done == len(jobs):
        return 0
    try:
        connect(args)
        states = Driver(args, jobs).run()
    finally:
        ray.shutdown()
    failed = [job for job in jobs if states[job] != "done"]
    for job in failed:
        lines = last_lines(job.folder / "log.txt")[-5:]
        print(f"\n{job.folder.name} {states[job]}:", *lines, sep="\n  ", file=sys.stderr)
    if failed:
        print(
            f"error: {len(failed)} of {len(jobs)} runs failed: see log.txt in their folders",
            file=sys.stderr,
        )
    return len(failed)


def main():
    """Sweep. Exit status 1: a run failed; 2: bad input; 130: Ctrl-C."""
    args = tyro.cli(Args)
    try:
        failed = sweep(args)
    except KeyboardInterrupt:
        print("Interrupted. To continue, start the same sweep again.", file=sys.stderr)
        sys.exit(130)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
