"""scripts/sweep.py on a real Ray: grids, bad input, failed runs, lost machines, a killed driver."""

import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path

import pytest
import tyro
import yaml
from common import load_algo
from conftest import ROOT, rows

ray = pytest.importorskip("ray")

import sweep  # noqa: E402  (needs ray)

AZURE = ROOT / "scripts" / "azure"

# Runs of a few seconds with several checkpoints.
SAC = shlex.split(
    """--algos sac --envs Pendulum-v1 --set total-timesteps 3000 --set learning-starts 200
    --set hidden "16 16" --set batch-size 16 --set buffer-size 5000 --set eval-every 500
    --set eval-episodes 1 --set checkpoint-every 500"""
)
# The cluster of a test has the same niceness as one that a sweep starts.
os.environ["RAY_worker_niceness"] = "0"


def start(*flags):
    """Start the script as a user does; returns its process."""
    line = [sys.executable, "scripts/sweep.py", *map(str, flags)]
    return subprocess.Popen(
        line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """Wait for a process; returns its exit status, stdout and stderr."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def wait_for(condition, seconds=120):
    """Wait until `condition` returns something true; returns that."""
    end = time.monotonic() + seconds
    while True:
        result = condition()
        if result:
            return result
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- Grids ---------------------------------------------------------------------------------------


def plan(*flags):
    """The jobs of a command line: {name of the folder: flags}."""
    jobs = sweep.plan(tyro.cli(sweep.Args, args=[str(flag) for flag in flags]))
    return {job.folder.name: " ".join(job.flags) for job in jobs}


def test_every_combination_is_a_run(tmp_path):
    """What varies names the folder and the experiment; every first seed precedes the second."""
    flags = "--algos ppo sac --envs Hopper-v4 Pendulum-v1 --seeds 3 4"
    flags += " --set ppo.clip-coef 0.1 0.2 --set gamma 0.9"
    jobs = plan(*flags.split(), "--run-dir", tmp_path)
    kinds = [
        "Hopper-v4__ppo__clip-coef=0.1",
        "Hopper-v4__ppo__clip-coef=0.2",
        "Pendulum-v1__ppo__clip-coef=0.1",
        "Pendulum-v1__ppo__clip-coef=0.2",
        "Hopper-v4__sac",
        "Pendulum-v1__sac",
    ]
    assert list(jobs) == [f"{kind}__{seed}" for seed in (3, 4) for kind in kinds]
    # Without --total-timesteps on the command line, a resumed run would keep its own.
    common_flags = "--threads 1 --total-timesteps 1000000 --gamma 0.9"
    own_flags = "--clip-coef 0.2 --exp-name clip-coef=0.2 --env-id Pendulum-v1 --seed 4"
    assert jobs["Pendulum-v1__ppo__clip-coef=0.2__4"] == f"{common_flags} {own_flags}"
    assert jobs["Hopper-v4__sac__3"] == f"{common_flags} --env-id Hopper-v4 --seed 3"


def test_values_of_every_kind(tmp_path):
    """Several numbers in a value, booleans, None, flags of one algorithm, the default env."""
    jobs = plan(
        *("--algos", "sac", "--run-dir", tmp_path),
        *("--set", "sac.hidden", "64 64", "8"),
        *("--set", "hidden", "32"),
        *("--set", "autotune", "True", "False"),
        *("--set", "target-entropy", "None"),
        *("--set", "threads", 2),
    )
    assert list(jobs) == [
        "Hopper-v4__sac__hidden=64-64__autotune=True__1",
        "Hopper-v4__sac__hidden=64-64__autotune=False__1",
        "Hopper-v4__sac__hidden=8__autotune=True__1",
        "Hopper-v4__sac__hidden=8__autotune=False__1",
    ]
    assert jobs["Hopper-v4__sac__hidden=64-64__autotune=False__1"].startswith(
        "--threads 2 --total-timesteps 1000000 --hidden 64 64 --no-autotune"
    )


TOML = """
[[grid]]
algos = ["ppo"]
set = {hidden = [[64, 64], 8]}
[[grid]]
algos = "dqn"
seeds = [5, 6]
"""
YAML = """
grid:
- algos: [ppo]
  set: {hidden: [[64, 64], 8]}
- {algos: dqn, seeds: [5, 6]}
"""


@pytest.mark.parametrize(("ending", "text"), [("toml", TOML), ("yaml", YAML)])
def test_a_file_of_grids(tmp_path, ending, text):
    path = tmp_path / f"grid.{ending}"
    path.write_text(text)
    assert set(plan("--file", path, "--run-dir", tmp_path)) == {
        "Hopper-v4__ppo__hidden=64-64__1",
        "Hopper-v4__ppo__hidden=8__1",
        "CartPole-v1__dqn__5",
        "CartPole-v1__dqn__6",
    }


def test_both_files_of_the_docstring_are_the_same_grid(tmp_path):
    (first_line,) = [line for line in sweep.__doc__.splitlines() if "[[grid]]" in line]
    middle = first_line.index("grid:")
    lines = sweep.__doc__.split(first_line)[1].split("\n\n")[0].splitlines()
    lines = [first_line, *lines]
    (tmp_path / "grid.toml").write_text("\n".join(line[4:middle] for line in lines))
    (tmp_path / "grid.yaml").write_text("\n".join(line[middle:] for line in lines))
    jobs = plan("--file", tmp_path / "grid.toml", "--run-dir", tmp_path)
    assert len(jobs) == 18
    assert plan("--file", tmp_path / "grid.yaml", "--run-dir", tmp_path) == jobs


# ---- The live table ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (3599.8, "1:00:00"),
        (90061, "25:01:01"),
    ],
)
def test_a_duration_is_shown_as_hours_minutes_seconds(seconds, text):
    assert sweep.format_duration(seconds) == text


def test_an_evaluation_is_shown_until_the_next_one(tmp_path):
    """Two thousand short episodes follow it."""
    job = sweep.Job(tmp_path / "run", (), 10_000, ROOT / "algos" / "sac.py")
    job.folder.mkdir()
    lines = [{"step": 100, "wall": 1.5, "eval/return": 7.0, "eval/length": 50.0}]
    for n in range(2000):
        wall = 2.0 + n / 9
        lines.append({"step": 101 + n, "wall": wall, "episode/return": n / 7, "episode/length": 20})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (job.folder / "metrics.jsonl").write_text(text)
    _, _, steps, _, evaluation, _ = sweep.table_row(job, "running")
    assert steps == "2,100 / 10,000"
    assert evaluation == "7.0"


# ---- Bad input, found before anything starts -----------------------------------------------------


def check_error(match, **flags):
    """Planning with these flags raises a ValueError with this message."""
    with pytest.raises(ValueError, match=match):
        sweep.plan(sweep.Args(**flags))


def test_the_most_similar_name_is_suggested(tmp_path):
    folder = tmp_path / "none"
    check_error("no algorithm pppo: did you mean ppo", algos=("pppo",), run_dir=folder)
    check_error(
        "no flag of ppo clip-coeff: did you mean clip-coef",
        algos=("ppo",),
        set=(("clip-coeff", "1"),),
        run_dir=folder,
    )
    check_error("Did you mean: `Hopper`", algos=("ppo",), envs=("Hoper-v4",), run_dir=folder)
    check_error(
        "named sca: did you mean sac", algos=("sac",), set=(("sca.tau", "1"),), run_dir=folder
    )
    assert not folder.exists()


def test_bad_flags(tmp_path):
    folder = tmp_path / "none"

    def check_set(match, *settings):
        check_error(match, algos=("ppo",), set=settings, run_dir=folder)

    check_error("environment nowhere:A-v0", algos=("ppo",), envs=("nowhere:A-v0",), run_dir=folder)
    check_error("--algos is missing", run_dir=folder)
    check_set("needs a flag and the values", ())
    check_set("needs the values", ("clip-coef",))
    check_set("--set hidden .*: No closing quotation", ("hidden", '"64'))
    check_set("use --seeds", ("seed", "1"))
    check_set("--set gamma is given twice", ("gamma", "0.9"), ("gamma", "0.8"))
    with pytest.raises(SystemExit, match="2"):  # tyro prints the message and exits
        sweep.plan(sweep.Args(algos=("ppo",), set=(("clip-coef", "wide"),), run_dir=folder))
    assert not folder.exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("algos: [ppo", "is not a grid"),
        ("algos: [ppo]\nenv: [Hopper-v4]", "has env: a grid has"),
        ("seeds: [1]", "is not a grid: it needs algos"),
        ("- ppo", "is not a grid"),
        ("grid: {algos: ppo}", "is not a grid"),
        ("grid: [ppo]", "is not a grid"),
        ("algos: [ppo]\nseeds: [one]", "is not a grid"),
        (
            "seeds: [1, 2]\nset: {gamma: 0.9}\ngrid: [{algos: ppo}]",
            "has seeds, set beside grid: move that into each grid",
        ),
        ("algos: [ppo]\nset: [gamma]", "is not a grid"),
        (
            "grid: [{algos: ppo, set: {gamma: 0.9}}, {algos: ppo, set: {gamma: 0.8}}]",
            "two runs would share",
        ),
    ],
)
def test_a_file_that_is_not_a_grid(tmp_path, text, match):
    (tmp_path / "grid.yaml").write_text(text)
    check_error(match, file=tmp_path / "grid.yaml")
    check_error("cannot read", file=tmp_path / "none.yaml")
    check_error("leave out --algos", file=tmp_path / "grid.yaml", algos=("ppo",))


def test_a_folder_of_a_run_with_other_flags(tmp_path):
    """The run is refused; with the same flags it is accepted. Some flags may differ."""
    folder = tmp_path / "Hopper-v4__sac__1"
    folder.mkdir()
    args = vars(load_algo("sac").Args(tau=0.5, threads=2, total_timesteps=5))
    (folder / "config.json").write_text(json.dumps({"args": args}))
    check_error("holds a run with --tau 0.5, not 0.005", algos=("sac",), run_dir=tmp_path)
    jobs = plan("--algos", "sac", "--set", "tau", 0.5, "--run-dir", tmp_path)
    assert list(jobs) == [folder.name]


def test_bad_input_is_one_line_on_stderr(tmp_path):
    status, out, err = finish(start("--algos", "pppo", "--run-dir", tmp_path))
    assert status == 2
    assert out == ""
    assert err == "error: there is no algorithm pppo: did you mean ppo?\n"


@pytest.mark.slow
def test_more_gpus_than_any_machine_has(tmp_path):
    status, _, err = finish(start(*SAC, "--run-dir", tmp_path, "--gpus", 1000))
    assert status == 2
    assert "error: --gpus 1000 is more than" in err
    assert "Traceback" not in err


# ---- Azure ---------------------------------------------------------------------------------------

# Each code sees the content of a file as `config`.
VALIDATE_RAY = """
import ray.autoscaler._private._azure.config
import ray.autoscaler._private._azure.node_provider
from azure.common.credentials import get_cli_profile
from ray.autoscaler._private.util import prepare_config, validate_config

config = prepare_config(config)
validate_config(config)
spot = config["available_node_types"]["spot"]["node_config"]["azure_arm_parameters"]
same_setup = config["head_setup_commands"] == config["setup_commands"]
print(spot["priority"], spot["imageOffer"], same_setup)
"""
VALIDATE_SKY = """
import sky

task = sky.Task.from_yaml_config(config, env_overrides=[("ACCOUNT", "mine")])
(resources,) = task.resources
print(task.num_nodes, resources.use_spot, resources.cloud, task.envs["ACCOUNT"])
"""


@pytest.mark.slow
def test_azure_files_pass_the_schemas_of_their_tools(tmp_path):
    """With the pinned packages, the tools load our files, and refuse them with a wrong key."""
    venv.create(tmp_path, with_pip=True)
    # SkyPilot's extra [azure] would bring Azure's whole command line, 1.4 GB.
    (version,) = re.findall(r"skypilot\[azure\](==\S+)\"", (AZURE / "sky.yaml").read_text())
    install = [tmp_path / "bin" / "pip", "install", "--quiet"]
    install += ["--no-compile"]  # compiling takes another minute
    install += ["-r", AZURE / "requirements.txt", f"skypilot{version}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr

    def validate(name, code, change=""):
        """Run the code on a file of scripts/azure/; returns its words on stdout, and stderr."""
        load = f"import yaml\nconfig = yaml.safe_load(open({str(AZURE / name)!r}))"
        line = [tmp_path / "bin" / "python", "-c", f"{load}\n{change}\n{code}"]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120, cwd=ROOT)
        return done.stdout.split(), done.stderr

    words, err = validate("ray.yaml", VALIDATE_RAY)
    assert words == ["Spot", "ubuntu-24_04-lts", "True"], err
    _, err = validate("ray.yaml", VALIDATE_RAY, "config['max_worker'] = 8")
    assert "'max_worker' was unexpected" in err
    words, err = validate("sky.yaml", VALIDATE_SKY)
    assert words == ["4", "True", "Azure", "mine"], err
    _, err = validate("sky.yaml", VALIDATE_SKY, "config['resources']['use_spots'] = True")
    assert "use_spots" in err


def test_shell_commands_of_the_azure_files_parse_and_mount_storage_with_locks():
    task = yaml.safe_load((AZURE / "sky.yaml").read_text())
    cluster = yaml.safe_load((AZURE / "ray.yaml").read_text())
    commands = [task["setup"], task["run"]]
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        commands += cluster[key]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert sum("mount -t nfs -o vers=4" in command for command in commands) == 2
    assert "file_mounts" not in task


def test_the_kind_of_file_system(tmp_path):
    assert sweep.file_system(Path("/proc/self")) == "proc"
    assert not sweep.file_system(tmp_path).startswith("fuse")


def test_storage_without_locks_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "file_system", lambda path: "fuse.blobfuse2")  # no such mount here
    message = "is on fuse.blobfuse2, which hides locks from other machines: use NFS"
    with pytest.raises(ValueError, match=message):
        sweep.connect(sweep.Args(run_dir=tmp_path, ray_address="auto"))


# ---- Runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a sweep of three runs that nothing disturbed, and its output."""
    folder = tmp_path_factory.mktemp("undisturbed")
    status, out, err = finish(start(*SAC, "--seeds", 0, 1, 2, "--run-dir", folder))
    assert status == 0, err
    return folder, out


def check_equal(folder, undisturbed_folder):
    """Every run is done and has the rows of the undisturbed one, none twice and none lost."""
    for seed in range(3):
        name = f"Pendulum-v1__sac__{seed}"
        assert (folder / name / "result.json").exists()
        assert rows(folder / name) == rows(undisturbed_folder / name)
        evaluated = [row["step"] for row in rows(folder / name) if "eval/return" in row]
        assert evaluated == [500, 1000, 1500, 2000, 2500, 3000]


def modification_times(paths):
    """{path: time of its last modification}."""
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.slow
def test_a_finished_sweep_started_again_does_nothing(undisturbed):
    folder, out = undisturbed
    assert "3 in all, 0 done" in out
    assert out.count("  done  evaluation ") == 3
    run_dir = folder / "Pendulum-v1__sac__1"
    log = (run_dir / "log.txt").read_text()
    assert log.startswith("$ ")
    assert "step 3000 of 3000: return" in log
    assert json.loads((run_dir / "config.json").read_text())["args"]["threads"] == 1

    before = modification_times(folder.rglob("*"))
    status, out, _ = finish(start(*SAC, "--seeds", 0, 1, 2, "--run-dir", folder))
    assert status == 0
    assert "3 in all, 3 done" in out
    assert modification_times(folder.rglob("*")) == before


def run_processes(folder):
    """The processes of the runs in a folder: {process id: (its parent's id, its run folder)}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            line = (path / "cmdline").read_text().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
        if "--resume" in line and line[-3].startswith(f"{folder}/"):
            found[int(path.name)] = (parent, Path(line[-3]))
    return found


@pytest.mark.slow
def test_a_lost_machine(undisturbed, tmp_path):
    """One of three machines is killed in the middle of a run, which another one resumes."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        machine = cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        flags = ["--seeds", 0, 1, 2, "--run-dir", tmp_path, "--ray-address", cluster.address]
        driver = start(*SAC, *flags)
        wait_for(lambda: len(run_processes(tmp_path)) == 3)
        raylet = machine.all_processes["raylet"][0].process.pid
        children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
        workers = {int(child) for child in children}
        processes = run_processes(tmp_path).values()
        (lost,) = [folder for parent, folder in processes if parent in workers]
        wait_for(lambda: (lost / "checkpoint.pt").exists())
        assert not (lost / "result.json").exists()
        cluster.remove_node(machine, allow_graceful=False)
        status, out, err = finish(driver)
    finally:
        cluster.shutdown()
    assert status == 0, out + err
    assert f"{lost.name}  waiting (lost, try 2)" in out
    assert (lost / "log.txt").read_text().count("$ ") == 2
    check_equal(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_a_killed_driver(undisturbed, tmp_path):
    """Started again, the sweep skips what is done and resumes the rest, whatever is left alive."""
    flags = [*SAC, "--seeds", 0, 1, 2, "--run-dir", tmp_path]
    driver = start(*flags)
    done = wait_for(lambda: list(tmp_path.glob("*/result.json")))
    wait_for(lambda: (tmp_path / "Pendulum-v1__sac__2" / "checkpoint.pt").exists())
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = modification_times(done)
    status, _, err = finish(start(*flags))
    assert status == 0, err
    assert modification_times(done) == before
    check_equal(tmp_path, undisturbed[0])


@pytest.mark.slow
def test_a_run_that_fails_and_one_that_is_killed(tmp_path):
    """The failed run is shown and not repeated, the killed one is resumed, the others continue."""
    flags = """--algos dqn sac --envs Pendulum-v1 CartPole-v1 --set total-timesteps 2000
        --set learning-starts 200 --set hidden 16 --set checkpoint-every 500
        --set eval-episodes 1"""
    driver = start(*flags.split(), "--run-dir", tmp_path)
    killed = tmp_path / "Pendulum-v1__sac__1"
    wait_for((killed / "checkpoint.pt").exists)
    processes = run_processes(tmp_path).items()
    (process,) = [pid for pid, (_, folder) in processes if folder == killed]
    os.kill(process, signal.SIGKILL)
    status, out, err = finish(driver)
    assert status == 1
    assert "Pendulum-v1__sac__1  waiting (lost, try 2)" in out
    done = {path.parent.name for path in tmp_path.glob("*/result.json")}
    assert done == {"Pendulum-v1__sac__1", "CartPole-v1__dqn__1"}
    assert "Pendulum-v1__dqn__1 failed (2):" in err
    assert "error: dqn needs" in err
    assert "2 of 4 runs failed" in err
    assert "Traceback" not in err
    assert (tmp_path / "Pendulum-v1__dqn__1" / "log.txt").read_text().count("$ ") == 1


def processes_with_open(path):
    """The processes that have a file open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # the process has closed this file
                    if os.readlink(link) == str(path):
                        found.add(int(process.name))
    return found


@pytest.mark.slow
def test_a_folder_has_one_writer(tmp_path):
    """A sweep waits for the lock, and the process of a run holds it in case its worker dies."""
    path = tmp_path / "Pendulum-v1__sac__1" / "sweep.lock"
    path.parent.mkdir()
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        driver = start(*SAC, "--run-dir", tmp_path)
        wait_for(lambda: processes_with_open(path) - {os.getpid()})
        time.sleep(2)
        assert not run_processes(tmp_path)
        assert not (path.parent / "log.txt").exists()
    (process,) = wait_for(lambda: run_processes(tmp_path))
    assert process in wait_for(lambda: processes_with_open(path))
    status, _, err = finish(driver)
    assert status == 0, err
