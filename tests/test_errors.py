"""Bad input and bad luck: one clear sentence, the right exit status, and no saved work lost.

Runs start in processes of their own, as they do for a user.
"""

import json
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from common import load_algo
from conftest import (
    BOX_PATHS,
    ONE_OF_EACH_FAMILY,
    REPLAY_PATHS,
    ROLLOUT_PATHS,
    ROOT,
    command,
    env_id,
    every_file,
    one_of_each_family,
    probe,
    rows,
    run,
)

from algos import ALGOS

PROBES = {"PYTHONPATH": str(ROOT / "tests")}  # where the module of probes:probe/... is


def assert_refused(process, *words, status=2):
    """The process ended with this status and a sentence that has these words, and no traceback."""
    output = process.stdout + process.stderr
    assert process.returncode == status, output
    assert "Traceback" not in output, output
    for word in words:
        assert word.lower() in output.lower(), f"{word!r} is not in: {output}"


def assert_main_refuses(path, tmp_path, monkeypatch, capsys, flags, words):
    """The same, in this process, for input that is refused before anything runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", command(path, *flags.split())[1:])
    with pytest.raises(SystemExit) as stop:
        load_algo(path).main()
    output = "".join(capsys.readouterr())
    assert stop.value.code == 2
    assert len(output.splitlines()) < 20
    for word in words:
        assert word.lower() in " ".join(output.lower().split()), f"{word!r} is not in: {output}"
    assert not list(tmp_path.rglob("*.pt"))


def saved_step(folder, name="checkpoint.pt"):
    """The step of a checkpoint."""
    return torch.load(folder / name, weights_only=True)["run"]["step"]


def case_name(value):
    """The id of a case, from its flags."""
    return value.replace("--", "").replace(" ", "=") if isinstance(value, str) else ""


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id Pendulumm-v1", ["Pendulum", "doesn't exist", "did you mean"]),
        ("--env-id nowhere:Env-v0", ["nowhere"]),
        ("--env-id probes:probe/Image-v0", ["one dimension", "Box(0, 255"]),
        ("--env-id probes:probe/Dict-v0", ["one dimension", "Dict"]),
        ("--device nonsense", ["--device", "nonsense"]),
        ("--num-envs 0", ["--num-envs", "from 1 to 1e18"]),
        ("--total-timesteps -5", ["--total-timesteps", "from 1 to 1e18"]),
        ("--eval-episodes 0", ["--eval-episodes", "from 1 to 1e18"]),
        ("--eval-every -1", ["--eval-every", "from 0 to 1e18"]),
        ("--seed -1", ["--seed", "from 0 to 1e18"]),
        ("--seed 99999999999999999999", ["--seed", "from 0 to 1e18"]),
        ("--threads 0", ["--threads", "from 1 to 1e18"]),
        ("--gamma 1.5", ["--gamma", "0 to 1"]),
        ("--gamma nan", ["--gamma", "0 to 1"]),
        ("--hidden 16 0", ["--hidden", "from 1 to 1e18"]),
        ("--no-such-flag 1", ["no-such-flag"]),
        ("--resume", ["--resume", "--run-dir"]),
    ],
    ids=case_name,
)
def test_bad_flags(path, tmp_path, monkeypatch, capsys, flags, words):
    assert_main_refuses(path, tmp_path, monkeypatch, capsys, flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--env-id CartPole-v1", ["flat Box", "Discrete(2)"]),
        ("--env-id probes:probe/Unbounded-v0", ["finite bounds", "inf"]),
        ("--env-id probes:probe/HalfBounded-v0", ["finite bounds", "inf"]),
        ("--env-id probes:probe/Matrix-v0", ["flat Box", "(2, 2)"]),
        ("--env-id probes:probe/Integers-v0", ["flat Box of floats", "int32"]),
        ("--env-id probes:probe/NoWidth-v0", ["finite bounds"]),
        ("--batch-size 0", ["--batch-size", "from 1 to 1e18"]),
        ("--buffer-size 0", ["--buffer-size", "from 1 to 1e18"]),
        ("--buffer-size 1000000000000", ["Unable to allocate", "(1000000000000"]),
        ("--utd 0", ["--utd", "above 0"]),
        ("--q-lr -1e-3", ["--q-lr", "above 0"]),
        ("--policy-lr nan", ["--policy-lr", "above 0"]),
        ("--utd inf", ["--utd", "1e18"]),
        ("--tau 2", ["--tau", "at most 1"]),
    ],
    ids=case_name,
)
@pytest.mark.parametrize("path", BOX_PATHS, ids=lambda path: path.stem)
def test_bad_flags_of_replay_files_with_box_actions(
    path, tmp_path, monkeypatch, capsys, flags, words
):
    assert_main_refuses(path, tmp_path, monkeypatch, capsys, flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ({"total_timesteps": 1e3}, "--total-timesteps is 1000.0; it must be of type int"),
        ({"hidden": 64}, "--hidden is 64; it must be a tuple of int"),
        ({"activation": "gelu"}, "--activation is 'gelu'; it must be one of relu, tanh, elu, silu"),
        ({"run_dir": Path("run")}, r"--run-dir is .*Path\('run'\); it must be of type str"),
        ({"capture_video": "yes"}, "--capture-video is 'yes'; it must be of type bool"),
        ({"gamma": np.float64(0.9)}, r"--gamma is np.float64\(0.9\); it must be of type float"),
        (
            {"hidden": [64, np.int64(64)]},
            "--hidden is .64, np.int64.64..; it must be a tuple of int",
        ),
        ({"hidden": (64.0,)}, "--hidden is .64.0,.; it must be a tuple of int"),
        ({"num_envs": True}, "--num-envs is True; it must be of type int"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_bad_flags_from_python(path, tmp_path, monkeypatch, flags, words):
    monkeypatch.chdir(tmp_path)
    module = load_algo(path)
    args = {"env_id": env_id(path), "total_timesteps": 1} | flags
    with pytest.raises(ValueError, match=words):
        module.train(module.Args(**args))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "algo, flags, words",
    [
        ("sac", "--alpha 0", ["--alpha", "above 0"]),
        ("td3", "--policy-frequency 0", ["--policy-frequency", "from 1 to 1e18"]),
        ("td3", "--noise-clip -1", ["--noise-clip", "from 0 to 1e18"]),
        ("ddpg", "--exploration-noise nan", ["--exploration-noise", "from 0 to 1e18"]),
        ("dqn", "--env-id Pendulum-v1", ["Discrete(n)", "Box(-2.0"]),
        ("dqn", "--env-id probes:probe/FromOne-v0", ["Discrete(n)", "counted from 0", "start=1"]),
        ("dqn", "--start-e 1.5", ["--start-e", "0 to 1"]),
        ("dqn", "--buffer-size 1000000000000", ["Unable to allocate", "(1000000000000"]),
        ("dqn", "--target-network-frequency 0", ["--target-network-frequency", "from 1 to 1e18"]),
        ("ppo", "--clip-coef 0", ["--clip-coef", "above 0"]),
        ("ppo", "--ent-coef -1", ["--ent-coef", "from 0 to 1e18"]),
        ("ppo", "--target-kl nan", ["--target-kl", "above 0"]),
        ("ppo", "--num-steps 1000000000000 --num-minibatches 1", ["can't allocate memory"]),
        ("sac", "--target-entropy nan", ["--target-entropy is nan", "below 0.693"]),
        ("sac", "--target-entropy 0.7", ["--target-entropy is 0.7", "below 0.693"]),
        ("trpo", "--target-kl 0", ["--target-kl", "above 0"]),
        ("vpg", "--policy-lr inf", ["--policy-lr", "1e18"]),
    ],
    ids=case_name,
)
def test_bad_flags_of_one_algorithm(algo, tmp_path, monkeypatch, capsys, flags, words):
    assert_main_refuses(ROOT / "algos" / f"{algo}.py", tmp_path, monkeypatch, capsys, flags, words)


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--num-minibatches 7", ["--num-minibatches 7", "--num-steps 50", "[1, 2, 5, 10, 25, 50]"]),
        ("--num-steps 1 --num-minibatches 1", ["one step", "raise --num-steps", "--no-norm-adv"]),
        ("--gae-lambda 2", ["--gae-lambda", "0 to 1"]),
        ("--env-id probes:probe/Matrix-v0", ["Discrete(n)", "flat Box", "(2, 2)"]),
        ("--env-id probes:probe/FromOne-v0", ["Discrete(n)", "start=1"]),
        ("--env-id probes:probe/Integers-v0", ["Box of floats", "int32"]),
    ],
    ids=case_name,
)
@pytest.mark.parametrize("path", ROLLOUT_PATHS, ids=lambda path: path.stem)
def test_bad_flags_of_rollout_files(path, tmp_path, monkeypatch, capsys, flags, words):
    assert_main_refuses(path, tmp_path, monkeypatch, capsys, flags, words)


@every_file
@pytest.mark.parametrize("what, step", [("Reward", 301), ("Observation", 301), ("Reset", 300)])
def test_a_number_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(
    path, tmp_path, what, step
):
    process = run(
        path,
        "--env-id",
        f"probes:{probe(path, f'Bad{what}')}",
        "--run-dir",
        tmp_path / "run",
        env=PROBES,
    )
    assert_refused(process, "not finite", f"step {step}", "reward or observation")
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["run"]["step"] == 200
    assert all(value.isfinite().all() for value in state["agent"].values())


def test_a_weight_that_is_not_finite_is_not_saved(sac, tmp_path, monkeypatch):
    """Also where no loss has shown it yet."""
    update = sac.Agent.update
    steps = []

    def spoil(self, batch):
        metrics = update(self, batch)
        steps.append(0)
        if len(steps) == 300:
            self.critic[0].weight.data[0, 0, 0] = torch.inf
        return metrics

    monkeypatch.setattr(sac.Agent, "update", spoil)
    flags = {
        "learning_starts": 100,
        "hidden": (8,),
        "batch_size": 16,
        "checkpoint_every": 200,
        "eval_every": 0,
    }
    with pytest.raises(FloatingPointError, match="critic.0.weight not finite at step 400"):
        sac.train(
            sac.Args(env_id="Pendulum-v1", total_timesteps=600, run_dir=str(tmp_path), **flags)
        )
    assert saved_step(tmp_path) == 200


@pytest.mark.slow
def test_a_loss_that_diverges_stops_the_run(path, tmp_path):
    flags = [ALGOS[path.stem].learning_rate_flag, "1e18"]
    flags += ["--total-timesteps", "2000", "--checkpoint-every", "5000"]
    flags += ["--hidden", "256", "256"]  # the square of 1e18 times so many is beyond float32
    assert_refused(run(path, *flags, "--run-dir", tmp_path / "run"), "not finite", "learning rate")
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        assert "NaN" not in line and "Infinity" not in line


@pytest.fixture(scope="module", params=ONE_OF_EACH_FAMILY)
def finished(request, tmp_path_factory):
    """A finished run, and the file that made it. Copy it before you break it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = run(request.param, "--run-dir", folder)
    assert process.returncode == 0, process.stderr
    return request.param, folder


@pytest.fixture
def copied(finished, tmp_path):
    return finished[0], shutil.copytree(finished[1], tmp_path / "run")


def test_the_run_folder_holds_the_promised_files(finished):
    path, folder = finished
    names = {
        "config.json",
        "metrics.jsonl",
        "checkpoint.pt",
        "checkpoint.prev.pt",
        "policy.pt",
        "result.json",
    }
    assert {file.name for file in folder.iterdir()} == names
    config = json.loads((folder / "config.json").read_text())
    assert config["algo"] == path.stem and {"args", "command", "versions", "commit"} <= set(config)
    assert {"python", "torch", "gymnasium", "mujoco"} == set(config["versions"])
    result = json.loads((folder / "result.json").read_text())
    assert result["step"] == 600 and result["eval/best"] >= result["eval/return"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(list(line)[:2] == ["step", "wall"] for line in lines)
    assert [line["step"] for line in lines if "eval/return" in line] == [200, 400, 600]
    torch.load(folder / "checkpoint.pt", weights_only=True)
    actor = torch.load(folder / "policy.pt", weights_only=True)["actor"]
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in actor.values()), (
        "more than the actor alone"
    )


def test_a_folder_that_holds_a_run_is_not_overwritten(copied):
    path, folder = copied
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert_refused(run(path, "--run-dir", folder), "--resume", "change --run-dir")
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_resuming_a_finished_run_says_so_and_changes_nothing(copied):
    path, folder = copied
    config = json.loads((folder / "config.json").read_text()) | {
        "commit": "that made it",
        "command": ["as typed"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    before = rows(folder), *((folder / f"{name}.json").read_text() for name in ("result", "config"))
    for flags in ((), ("--total-timesteps", "300")):
        process = run(path, "--resume", "--run-dir", folder, *flags)
        assert process.returncode == 0
        assert "at step 600 of " in process.stderr
        assert before == (
            rows(folder),
            *((folder / f"{name}.json").read_text() for name in ("result", "config")),
        )


def test_resuming_takes_the_flags_of_the_run_and_those_typed(copied):
    path, folder = copied
    process = run(
        path, "--resume", "--run-dir", folder, "--total-timesteps", "800", "--eval-every", "400"
    )
    assert process.returncode == 0, process.stderr
    args = json.loads((folder / "config.json").read_text())["args"]
    assert (
        args["env_id"] == env_id(path)
        and args["total_timesteps"] == 800
        and args["hidden"] == [16, 16]
    )
    assert json.loads((folder / "result.json").read_text())["step"] == 800


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, value", [("--gamma", 0.5), ("--seed", 7), ("--num-envs", 2), ("--exp-name", "b")]
)
def test_resuming_with_another_flag_is_refused_by_its_name(copied, flag, value):
    path, folder = copied
    assert_refused(
        run(path, "--resume", "--run-dir", folder, flag, value), flag, "was started with"
    )


@pytest.mark.slow
@one_of_each_family
def test_resuming_an_empty_folder_starts_a_run(path, tmp_path):
    process = subprocess.run(
        [*command(path, "--run-dir", tmp_path / "new"), "--resume"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0 and (tmp_path / "new" / "result.json").exists(), process.stderr


@one_of_each_family
def test_an_environment_that_cannot_be_filmed_is_refused_at_once(
    path, tmp_path, monkeypatch, capsys
):
    flags = "--capture-video --env-id probes:probe/Ended-v0"
    assert_main_refuses(
        path,
        tmp_path,
        monkeypatch,
        capsys,
        flags,
        ["cannot film probes:probe/Ended-v0", "--capture-video"],
    )


@pytest.mark.slow
@one_of_each_family
def test_without_evaluations_nothing_is_filmed(path, tmp_path):
    flags = ["--env-id", f"probes:{probe(path, 'Ended')}", "--capture-video", "--eval-every", 0]
    process = run(path, *flags, "--run-dir", tmp_path / "run", env=PROBES)
    assert process.returncode == 0 and not (tmp_path / "run" / "videos").exists(), process.stderr


@one_of_each_family
def test_checkpoints_that_cut_every_episode_are_warned_about(path, tmp_path):
    for steps, warned in ((1999, True), (2000, False)):  # of Pendulum-v1, whose episodes last 200
        flags = [
            "--env-id",
            "Pendulum-v1",
            "--checkpoint-every",
            steps,
            "--run-dir",
            tmp_path / str(steps),
        ]
        process = run(path, *flags, "--total-timesteps", 50)
        assert process.returncode == 0 and ("at least 10 episodes" in process.stderr) == warned, (
            process.stderr
        )


@one_of_each_family
def test_a_run_too_short_to_learn_from_is_warned_about(path, tmp_path):
    for steps in (200, 201):  # small runs of replay files start to learn after 200 steps
        process = run(path, "--total-timesteps", steps, "--run-dir", tmp_path / str(steps))
        warned = steps == 200 and path.stem == "sac"
        assert process.returncode == 0 and ("nothing is learned" in process.stderr) == warned, (
            process.stderr
        )


@one_of_each_family
def test_a_run_that_failed_can_be_resumed_in_its_process(path, tmp_path):
    """Though the exception, which a notebook keeps, holds on to all that it was raised in."""
    module = load_algo(path)
    kept = []
    flags = {
        "env_id": "probe/BadReward-v0",
        "run_dir": str(tmp_path / "run"),
        "threads": 1,
        "eval_every": 0,
    }
    for resume in (False, True):
        with pytest.raises(FloatingPointError, match="reward or observation not finite") as stop:
            module.train(module.Args(total_timesteps=600, resume=resume, **flags))
        kept.append(stop.value.__traceback__)
    assert all(kept)


@one_of_each_family
def test_a_folder_that_was_refused_is_free_in_its_process(path, tmp_path):
    module = load_algo(path)
    flags = {
        "env_id": probe(path, "Ended"),
        "run_dir": str(tmp_path / "run"),
        "threads": 1,
        "eval_every": 0,
    }
    module.train(module.Args(total_timesteps=10, **flags))
    with pytest.raises(ValueError, match="holds a run") as stop:
        module.train(module.Args(total_timesteps=20, **flags))
    module.train(module.Args(total_timesteps=20, resume=True, **flags))
    assert stop.value.__traceback__  # was kept, and what it was raised in


@one_of_each_family
def test_two_runs_of_one_second_have_folders_of_their_own(path, tmp_path, monkeypatch):
    module = load_algo(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "strftime", lambda text: "now")
    for _ in range(3):
        module.train(
            module.Args(env_id="probe/Ended-v0", total_timesteps=10, eval_every=0, threads=1)
        )
    names = ["probe-Ended-v0__" + f"{path.stem}__1__now{end}" for end in ("", "-2", "-2-2")]
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir()) == names


@one_of_each_family
def test_a_foreign_metrics_file_is_not_emptied(path, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("precious\n")
    assert_refused(run(path, "--run-dir", tmp_path), "--resume", "change --run-dir")
    assert (tmp_path / "metrics.jsonl").read_text() == "precious\n"


@one_of_each_family
def test_the_first_observation_is_checked_too(path, tmp_path):
    process = run(
        path,
        "--env-id",
        f"probes:{probe(path, 'BadBeginning')}",
        "--run-dir",
        tmp_path / "run",
        env=PROBES,
    )
    assert_refused(process, "reward or observation not finite at step 0")


@every_file
def test_bounds_in_float64_and_rewards_in_arrays(path, tmp_path):
    flags = ["--exploration-noise", "1"] if path.stem in ("ddpg", "td3") else []
    process = run(
        path,
        "--env-id",
        f"probes:{probe(path, 'Precise')}",
        "--run-dir",
        tmp_path / "run",
        *flags,
        env=PROBES,
    )
    assert process.returncode == 0, process.stderr


@one_of_each_family
def test_a_world_size_without_a_rank_is_not_torchrun(path, tmp_path):
    process = run(
        path, "--total-timesteps", "200", "--run-dir", tmp_path / "run", env={"WORLD_SIZE": "2"}
    )
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize("path", REPLAY_PATHS, ids=lambda path: path.stem)
def test_replay_files_refuse_torchrun(path, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    module = load_algo(path)
    with pytest.raises(
        ValueError, match=f"{path.stem} runs in one process: start it without torchrun"
    ):
        module.train(
            module.Args(
                env_id=env_id(path), run_dir=str(tmp_path / "run"), total_timesteps=50, eval_every=0
            )
        )
    assert not (tmp_path / "run").exists()


@one_of_each_family
def test_training_in_a_thread(path, tmp_path):
    """As Ray does it, where no signal can be caught."""
    module = load_algo(path)
    results = []
    flags = {
        "env_id": env_id(path),
        "run_dir": str(tmp_path / "run"),
        "eval_every": 0,
        "hidden": (8,),
    }
    if path in ROLLOUT_PATHS:
        flags |= {"num_steps": 50, "num_minibatches": 2}
    args = module.Args(total_timesteps=100, **flags)
    thread = threading.Thread(target=lambda: results.append(module.train(args)))
    thread.start()
    thread.join()
    assert results and results[0]["step"] == 100


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["truncated", "empty", "poisoned", "foreign", "policy"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(copied, damage):
    path, folder = copied
    undisturbed = rows(folder)
    file = folder / "checkpoint.pt"
    if damage == "poisoned":

        class Poison:
            def __reduce__(self):
                return os.mkdir, (str(folder / "poisoned"),)

        torch.save({"agent": Poison()}, file)
    elif damage == "foreign":
        torch.save({"foo": torch.ones(3)}, file)
    elif damage == "policy":
        shutil.copy(folder / "policy.pt", file)
    else:
        file.write_bytes(file.read_bytes()[: 1000 if damage == "truncated" else 0])
    process = run(path, "--resume", "--run-dir", folder)
    assert process.returncode == 0 and "checkpoint.pt is damaged" in process.stderr, process.stderr
    assert not (folder / "poisoned").exists() and (folder / "checkpoint.damaged.pt").exists()
    assert "at step 400 of 600" in process.stderr
    assert rows(folder) == undisturbed
    assert saved_step(folder) == 600
    assert saved_step(folder, "checkpoint.prev.pt") == 400  # not the damaged one


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_read_now_stays(copied):
    """A disk error, here a folder in place of the file, does not mean that the file is damaged."""
    path, folder = copied
    (folder / "checkpoint.pt").rename(folder / "whole")
    (folder / "checkpoint.pt").mkdir()
    before = (folder / "checkpoint.prev.pt").read_bytes()
    assert_refused(
        run(path, "--resume", "--run-dir", folder), "cannot read", "checkpoint.pt", "is a directory"
    )
    assert (folder / "checkpoint.pt").is_dir() and (
        folder / "checkpoint.prev.pt"
    ).read_bytes() == before


@pytest.mark.slow
def test_too_little_memory_for_a_checkpoint_is_not_damage(copied):
    path, folder = copied
    with torch.serialization.skip_data():  # 8 GB, none of which is written
        torch.save({"run": torch.empty(2 * 10**9)}, folder / "checkpoint.pt")
    size = (folder / "checkpoint.pt").stat().st_size
    process = subprocess.run(
        command(path, "--resume", "--run-dir", folder),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33)),
    )
    assert_refused(process, "cannot read", "checkpoint.pt", "allocate")
    assert (folder / "checkpoint.pt").stat().st_size == size and (
        folder / "checkpoint.prev.pt"
    ).exists()


@pytest.mark.slow
def test_two_damaged_checkpoints_are_an_error_and_stay(copied):
    path, folder = copied
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (folder / name).write_bytes(b"nothing")
    before = (folder / "metrics.jsonl").read_bytes()
    assert_refused(run(path, "--resume", "--run-dir", folder), "no checkpoint", "can be read")
    assert (folder / "checkpoint.pt").read_bytes() == b"nothing" and (
        folder / "metrics.jsonl"
    ).read_bytes() == before


def begin(path, folder, *flags):
    """Start a long run in the background and wait until its first checkpoint is there."""
    flags = ["--total-timesteps", "1000000", "--run-dir", folder, *flags]
    process = subprocess.Popen(
        command(path, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.slow
@one_of_each_family
def test_a_second_writer_is_refused(path, tmp_path):
    first = begin(path, tmp_path / "run")
    try:
        assert_refused(run(path, "--resume", "--run-dir", tmp_path / "run"), "another process")
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


@pytest.mark.slow
@one_of_each_family
def test_ctrl_c_saves_and_prints_how_to_resume(path, tmp_path):
    folder = tmp_path / "a run"
    process = begin(path, folder)
    process.send_signal(signal.SIGINT)
    output = "".join(process.communicate(timeout=60))
    assert process.returncode == 130
    assert "Traceback" not in output
    assert f"--resume --run-dir '{folder}' (the result will differ" in output
    step = saved_step(folder)
    assert f"Interrupted at step {step}. To resume: " in output
    again = run(path, "--resume", "--run-dir", folder, "--total-timesteps", step + 400)
    assert (
        again.returncode == 0
        and json.loads((folder / "result.json").read_text())["step"] == step + 400
    )


@pytest.mark.slow
@one_of_each_family
def test_sigterm_stops_without_saving(path, tmp_path):
    process = begin(path, tmp_path / "run")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
    assert saved_step(tmp_path / "run") % 200 == 0


@pytest.mark.slow
def test_a_full_disk_is_reported_and_the_saved_run_can_be_resumed(copied):
    """A limit on the size of a file makes write() fail as a full disk does."""
    path, folder = copied
    size = (folder / "checkpoint.pt").stat().st_size - 1  # no room for another
    flags = ["--resume", "--run-dir", folder, "--total-timesteps", "1000", "--eval-every", "0"]
    process = subprocess.run(
        command(path, *flags),
        capture_output=True,
        text=True,
        timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert_refused(process, "cannot write", "checkpoint.pt", "--resume")
    assert not list(folder.glob("*.new")) and (folder / "checkpoint.pt").stat().st_size == size + 1
    again = run(path, *flags)
    assert again.returncode == 0 and "at step 600 of 1000" in again.stderr, again.stderr
    assert json.loads((folder / "result.json").read_text())["step"] == 1000


@one_of_each_family
def test_a_folder_that_cannot_be_made(path, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run(path, "--run-dir", tmp_path / "file" / "run"), "not a directory")
