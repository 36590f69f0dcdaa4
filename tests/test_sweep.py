"""scripts/sweep.py on a real Ray: the grid, what is refused, runs that fail, lost machines, a driver that is killed."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import venv
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, load, rows

ray = pytest.importorskip("ray")
sweep = load(ROOT / "scripts" / "sweep.py")
AZURE = ROOT / "scripts" / "azure"

# Runs of a few seconds, with checkpoints on the way.
SAC = """--algos sac --envs Pendulum-v1 --set total-timesteps 3000 --set learning-starts 200 --set hidden "16 16"
    --set batch-size 16 --set buffer-size 5000 --set eval-every 500 --set eval-episodes 1 --set checkpoint-every 500"""
SAC = sweep.shlex.split(SAC)
os.environ["RAY_worker_niceness"] = "0"  # in the cluster that is started here, as in one that a sweep starts


def start(*flags):
    """The command as its user types it, as a process under way."""
    args = [sys.executable, "scripts/sweep.py", *map(str, flags)]
    return subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    """(exit status, what it printed, what it complained of)."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def refused(match, **flags):
    with pytest.raises(SystemExit, match=match):
        sweep.plan(sweep.Args(**flags))


def until(happened, seconds=120):
    """Wait for something; returns it."""
    end = time.monotonic() + seconds
    while not (result := happened()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return result


# ---- the grid --------------------------------------------------------------------------------------------------------
def plan(*flags):
    """The runs that a command line asks for, as {folder's name: flags}."""
    runs = sweep.plan(sweep.tyro.cli(sweep.Args, args=[*map(str, flags)]))
    return {run.folder.name: " ".join(run.argv) for run in runs}


def test_every_combination(tmp_path):
    """What varies names the folder and the experiment; the first seed of all comes before the second of any."""
    flags = "--algos ppo sac --envs Hopper-v4 Pendulum-v1 --seeds 3 4 --set ppo.clip-coef 0.1 0.2 --set gamma 0.9"
    runs = plan(*flags.split(), "--run-dir", tmp_path)
    kinds = [f"{env}__ppo__clip-coef={clip}" for env in ("Hopper-v4", "Pendulum-v1") for clip in (0.1, 0.2)]
    kinds += ["Hopper-v4__sac", "Pendulum-v1__sac"]
    assert list(runs) == [f"{kind}__{seed}" for seed in (3, 4) for kind in kinds]
    plain = "--threads 1 --total-timesteps 1000000 --gamma 0.9"  # the steps, or a resumed run would keep its own
    wanted = f"{plain} --clip-coef 0.2 --env-id Pendulum-v1 --seed 4 --exp-name clip-coef=0.2"
    assert runs["Pendulum-v1__ppo__clip-coef=0.2__4"] == wanted
    assert runs["Hopper-v4__sac__3"] == f"{plain} --env-id Hopper-v4 --seed 3"


def test_values_of_many_kinds(tmp_path):
    """Several numbers in one value, booleans, none; what is for one algorithm wins; a default environment."""
    sets = ["--set", "sac.hidden", "64 64", "8", "--set", "hidden", "32", "--set", "autotune", "True", "False"]
    runs = plan(
        "--algos", "sac", *sets, "--set", "target-entropy", "None", "--set", "threads", 2, "--run-dir", tmp_path
    )
    assert list(runs) == [f"Hopper-v4__sac__hidden={h}__autotune={a}__1" for h in ("64-64", 8) for a in (True, False)]
    assert runs["Hopper-v4__sac__hidden=64-64__autotune=False__1"].startswith(
        "--threads 2 --total-timesteps 1000000 --hidden 64 64 --no-autotune"
    )


@pytest.mark.parametrize("ending", ["toml", "yaml"])
def test_a_file_says_the_same(tmp_path, ending):
    grid = {
        "toml": '[[grid]]\nalgos = ["ppo"]\nset = {hidden = [[64, 64], 8]}\n[[grid]]\nalgos = "dqn"\nseeds = [5, 6]\n',
        "yaml": "grid:\n- algos: [ppo]\n  set: {hidden: [[64, 64], 8]}\n- {algos: dqn, seeds: [5, 6]}\n",
    }[ending]
    (tmp_path / f"grid.{ending}").write_text(grid)
    runs = plan("--file", tmp_path / f"grid.{ending}", "--run-dir", tmp_path)
    hidden = {f"Hopper-v4__ppo__hidden={h}__1" for h in ("64-64", "8")}
    assert set(runs) == hidden | {"CartPole-v1__dqn__5", "CartPole-v1__dqn__6"}


# ---- what the table says ---------------------------------------------------------------------------------------------
def test_seconds_as_a_clock():
    assert [sweep.clock(x) for x in (0, 59.4, 59.6, 3599.8, 90061)] == [
        "0:00:00", "0:00:59", "0:01:00", "1:00:00", "25:01:01"
    ]  # fmt: skip


def test_an_evaluation_is_told_until_the_next(tmp_path):
    """Two thousand short episodes after it."""
    run = SimpleNamespace(folder=tmp_path / "run", total=10_000)
    run.folder.mkdir()
    lines = [{"step": 100, "wall": 1.5, "eval/return": 7.0, "eval/length": 50.0}]
    lines += [
        {"step": 101 + n, "wall": 2.0 + n / 9, "episode/return": n / 7, "episode/length": 20} for n in range(2000)
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sweep.row(run, "running")[2:5:2] == ("2,100 / 10,000", "7.0")


# ---- what is refused before anything starts --------------------------------------------------------------------------
def test_the_nearest_match_is_named(tmp_path):
    here = {"run_dir": tmp_path / "none"}
    refused("no algorithm pppo: did you mean ppo", algos=("pppo",), **here)
    refused("flag of ppo clip-coeff: did you mean clip-coef", algos=("ppo",), set=(("clip-coeff", "1"),), **here)
    refused("Did you mean: `Hopper`", algos=("ppo",), envs=("Hoper-v4",), **here)
    refused("no environment nowhere:A-v0", algos=("ppo",), envs=("nowhere:A-v0",), **here)
    refused("named sca: did you mean sac", algos=("sac",), set=(("sca.tau", "1"),), **here)
    refused("2", algos=("ppo",), set=(("clip-coef", "wide"),), **here)  # tyro's exit status, after its message
    refused("needs the values", algos=("ppo",), set=(("clip-coef",),), **here)
    refused("--set hidden .*: No closing quotation", algos=("ppo",), set=(("hidden", '"64'),), **here)
    refused("take --seeds", algos=("ppo",), set=(("seed", "1"),), **here)
    refused("--set gamma is given twice", algos=("ppo",), set=(("gamma", "0.9"), ("gamma", "0.8")), **here)
    refused("--algos is missing", **here)
    assert not here["run_dir"].exists()


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("algos: [ppo", "is no grid"),
        ("algos: [ppo]\nenv: [Hopper-v4]", "has env: a grid has"),
        ("seeds: [1]", "is no grid, which has algos"),
        ("- ppo", "is no grid"),
        ("seeds: [1, 2]\nset: {gamma: 0.9}\ngrid: [{algos: ppo}]", "has seeds, set beside grid: say it inside"),
        ("algos: [ppo]\nset: [gamma]", "is no grid"),
        ("grid: [{algos: ppo, set: {gamma: 0.9}}, {algos: ppo, set: {gamma: 0.8}}]", "two runs would share"),
    ],
)
def test_files_that_are_no_grid(tmp_path, text, match):
    (tmp_path / "grid.yaml").write_text(text)
    refused(match, file=tmp_path / "grid.yaml")
    refused("cannot read", file=tmp_path / "none.yaml")
    refused("leave out --algos", file=tmp_path / "grid.yaml", algos=("ppo",))


def test_a_folder_of_another_run(tmp_path):
    """The same name with other flags is no run to resume."""
    folder = tmp_path / "Hopper-v4__sac__1"
    folder.mkdir()
    args = vars(sweep.load("sac").Args(tau=0.5, threads=2, total_timesteps=5))
    (folder / "config.json").write_text(json.dumps({"args": args}))
    refused("holds a run with --tau 0.5, and not 0.005", algos=("sac",), run_dir=tmp_path)
    assert list(plan("--algos", "sac", "--set", "tau", 0.5, "--run-dir", tmp_path)) == [folder.name]


@pytest.mark.slow
def test_more_than_any_machine_has(tmp_path):
    status, out, err = finish(start(*SAC, "--run-dir", tmp_path, "--gpus", 1000))
    assert status == 1 and "asks for 1000 GPUs" in err and "Traceback" not in err


# ---- the cloud -------------------------------------------------------------------------------------------------------
RAY = """if True:
    import ray.autoscaler._private._azure.config, ray.autoscaler._private._azure.node_provider
    from azure.common.credentials import get_cli_profile
    from ray.autoscaler._private.util import prepare_config, validate_config
    c = prepare_config(c)
    validate_config(c)
    spot = c["available_node_types"]["spot"]["node_config"]["azure_arm_parameters"]
    print(spot["priority"], spot["imageOffer"], c["head_setup_commands"] == c["setup_commands"])
"""
SKY = """if True:
    import sky
    task = sky.Task.from_yaml_config(c, env_overrides=[("ACCOUNT", "mine")])
    (resources,) = task.resources
    print(task.num_nodes, resources.use_spot, resources.cloud, task.envs["ACCOUNT"])
"""


@pytest.mark.slow
def test_azure_by_the_schemas_of_its_tools(tmp_path):
    """In the pinned versions Ray's provider and SkyPilot import, and take our files, not a wrong word in them."""
    venv.create(tmp_path, with_pip=True)
    (pin,) = re.findall(r"skypilot\[azure\](==\S+)\"", (AZURE / "sky.yaml").read_text())
    # Without SkyPilot's extra, which brings the whole of Azure's command line: 1.4 GB.
    install = [tmp_path / "bin" / "pip", "install", "--quiet", "--no-compile"]  # compiling takes a minute more
    install += ["-r", AZURE / "requirements.txt", f"skypilot{pin}"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr

    def validate(name, code, change=""):
        code = f"import yaml\nc = yaml.safe_load(open({str(AZURE / name)!r}))\n{change}\n{code}"
        python = tmp_path / "bin" / "python"
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
        return done.stdout.split(), done.stderr

    assert validate("ray.yaml", RAY)[0] == ["Spot", "ubuntu-24_04-lts", "True"]
    assert "'max_worker' was unexpected" in validate("ray.yaml", RAY, "c['max_worker'] = 8")[1]
    assert validate("sky.yaml", SKY)[0] == ["4", "True", "Azure", "mine"]
    assert "use_spots" in validate("sky.yaml", SKY, "c['resources']['use_spots'] = True")[1]


def test_the_shell_of_the_cloud_is_sound():
    """Every command of both files parses, and what they mount has locks."""
    task, cluster = (sweep.yaml.safe_load((AZURE / name).read_text()) for name in ("sky.yaml", "ray.yaml"))
    commands = [task["setup"], task["run"]]
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        commands += cluster[key]
    for command in commands:
        subprocess.run(["bash", "-n", "-c", command], check=True)
    assert sum("mount -t nfs -o vers=4" in command for command in commands) == 2
    assert "file_mounts" not in task


def test_storage_without_locks_is_refused(tmp_path, monkeypatch):
    assert sweep.filesystem(Path("/proc/self")) == "proc" and not sweep.filesystem(tmp_path).startswith("fuse")
    monkeypatch.setattr(sweep, "filesystem", lambda path: "fuse.blobfuse2")
    with pytest.raises(SystemExit, match="is on fuse.blobfuse2, whose locks other machines don't see: use NFS"):
        sweep.connect(sweep.Args(run_dir=tmp_path, ray_address="auto"))


# ---- runs ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def calm(tmp_path_factory):
    """A sweep of three runs that nothing disturbed: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("calm")
    status, out, err = finish(start(*SAC, "--seeds", 0, 1, 2, "--run-dir", folder))
    assert status == 0, err
    return folder, out


def as_calm(folder, calm):
    """Every run has ended, with the rows of the undisturbed one: none twice, none lost."""
    for seed in range(3):
        name = f"Pendulum-v1__sac__{seed}"
        assert (folder / name / "result.json").exists()
        assert rows(folder / name) == rows(calm[0] / name)
        assert [row["step"] for row in rows(folder / name) if "eval/return" in row] == [*range(500, 3001, 500)]


@pytest.mark.slow
def test_a_sweep_and_again(calm):
    """Runs are done in the end, with logs; the same command starts nothing, a longer one resumes, a seed is added."""
    folder, out = calm
    assert "3 in all, 0 done" in out and out.count("  done  evaluation ") == 3
    log = (folder / "Pendulum-v1__sac__1" / "log.txt").read_text()
    assert log.startswith("$ ") and "step 3000 of 3000: return" in log
    assert json.loads((folder / "Pendulum-v1__sac__1" / "config.json").read_text())["args"]["threads"] == 1
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    status, out, _ = finish(start(*SAC, "--seeds", 0, 1, 2, "--run-dir", folder))
    assert status == 0 and "3 in all, 3 done" in out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def processes(folder):
    """The processes of the runs in a folder: {process: (its parent, the folder of its run)}."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_text().split("\0")
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if "--resume" in command and command[-3].startswith(f"{folder}/"):
            found[int(path.name)] = parent, Path(command[-3])
    return found


@pytest.mark.slow
def test_a_machine_is_lost(calm, tmp_path):
    """Of three machines one is killed without grace in the middle of a run."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        machines = [cluster.add_node(num_cpus=1) for _ in range(2)]
        driver = start(*SAC, "--seeds", 0, 1, 2, "--run-dir", tmp_path, "--ray-address", cluster.address)
        until(lambda: len(processes(tmp_path)) == 3)
        raylet = machines[0].all_processes["raylet"][0].process.pid
        workers = {int(p) for p in Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()}
        (lost,) = [folder for parent, folder in processes(tmp_path).values() if parent in workers]
        until(lambda: (lost / "checkpoint.pt").exists())
        assert not (lost / "result.json").exists()
        cluster.remove_node(machines[0], allow_graceful=False)
        status, out, err = finish(driver)
    finally:
        cluster.shutdown()
    assert status == 0, out + err
    assert f"{lost.name}  waiting (lost, try 2)" in out
    assert (lost / "log.txt").read_text().count("$ ") == 2
    as_calm(tmp_path, calm)


@pytest.mark.slow
def test_the_driver_is_killed(calm, tmp_path):
    """Started again, it leaves alone what is finished, resumes the rest, and no process of the first one disturbs."""
    command = *SAC, "--seeds", 0, 1, 2, "--run-dir", tmp_path
    driver = start(*command)
    done = until(lambda: list(tmp_path.glob("*/result.json")))
    until(lambda: (tmp_path / "Pendulum-v1__sac__2" / "checkpoint.pt").exists())
    driver.send_signal(signal.SIGKILL)
    driver.communicate()
    before = {path: path.stat().st_mtime_ns for path in done}
    status, out, err = finish(start(*command))
    assert status == 0, err
    assert {path: path.stat().st_mtime_ns for path in done} == before
    as_calm(tmp_path, calm)


@pytest.mark.slow
def test_a_run_that_fails_and_one_that_is_killed(tmp_path):
    """The first is shown with its last lines and not tried again, the second is resumed, and others go on."""
    flags = """--algos dqn sac --envs Pendulum-v1 CartPole-v1 --set total-timesteps 2000 --set learning-starts 200
        --set hidden 16 --set checkpoint-every 500 --set eval-episodes 1"""
    driver = start(*flags.split(), "--run-dir", tmp_path)
    wanted = tmp_path / "Pendulum-v1__sac__1"
    until((wanted / "checkpoint.pt").exists)
    os.kill(next(pid for pid, (_, folder) in processes(tmp_path).items() if folder == wanted), signal.SIGKILL)
    status, out, err = finish(driver)
    assert status == 1 and "Pendulum-v1__sac__1  waiting (lost, try 2)" in out
    assert {path.parent.name for path in tmp_path.glob("*/result.json")} == {
        "Pendulum-v1__sac__1",
        "CartPole-v1__dqn__1",
    }
    assert "Pendulum-v1__dqn__1 failed (1):" in err and "error: dqn needs" in err
    assert "2 of 4 runs failed" in err and "Traceback" not in err
    assert (tmp_path / "Pendulum-v1__dqn__1" / "log.txt").read_text().count("$ ") == 1


def holders(path):
    """The processes that have a file open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):  # it has closed that one
                    if os.readlink(link) == str(path):
                        found.add(int(process.name))
    return found


@pytest.mark.slow
def test_a_folder_has_one_writer(tmp_path):
    """Whoever holds the lock is waited for; and a run's own process holds it too, lest it outlive its worker."""
    path = tmp_path / "Pendulum-v1__sac__1" / "sweep.lock"
    path.parent.mkdir()
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        driver = start(*SAC, "--run-dir", tmp_path)
        until(lambda: holders(path) - {os.getpid()})
        time.sleep(2)
        assert not processes(tmp_path) and not (path.parent / "log.txt").exists()
    [process] = until(lambda: processes(tmp_path))
    assert process in until(lambda: holders(path))
    status, _, err = finish(driver)
    assert status == 0, err
