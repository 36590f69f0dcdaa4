"""On-policy runs that several processes share under torchrun."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from common import load_algo
from conftest import ROLLOUT_PATHS, ROOT, command, rows, run

PPO = ROOT / "algos" / "ppo.py"
SHARED_RUN = ["--num-envs", "4", "--num-steps", "50", "--total-timesteps", "600"]
SHARED_RUN += ["--checkpoint-every", "200", "--eval-every", "200"]


def torchrun(path, *flags, ranks=2):
    """The command line of a small run that `ranks` processes share."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(ranks)]
    return launcher + command(path, *flags)[1:]


def start(line, **options):
    """Start a command line, with its output in pipes."""
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def finish(line):
    """Run a command line to its end."""
    return subprocess.run(line, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("path", ROLLOUT_PATHS, ids=lambda path: path.stem)
def test_two_ranks_learn_what_one_does(path, env, tmp_path):
    """Two ranks with half of the environments each, resumed on the way, get the same weights."""
    flags = [*SHARED_RUN, "--env-id", env]
    if path.stem == "ppo":
        flags.append("--no-anneal-lr")  # the rate depends on the total, which differs here
    if path.stem == "trpo":
        flags += ["--cg-iters", "3"]  # ten iterations make rounding a thousand times larger
    alone = finish(command(path, *flags, "--run-dir", tmp_path / "one"))
    assert alone.returncode == 0, alone.stderr
    for total in (200, 600):
        options = ["--total-timesteps", total, "--run-dir", tmp_path / "two"]
        shared = finish([*torchrun(path, *flags, *options), "--resume"])
        assert shared.returncode == 0, shared.stderr
    one = torch.load(tmp_path / "one" / "checkpoint.pt", weights_only=True)
    two = torch.load(tmp_path / "two" / "checkpoint.pt", weights_only=True)
    assert torch.equal(one["rng"], two["rng"])
    for name, value in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], value, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in rows(tmp_path / "one") if "loss/value" in row] == [200, 400, 600]


def process_ids(launched, folder):
    """The process ids of ranks 0 and 1 of a torchrun, after its first checkpoint."""
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pt").exists():
        assert launched.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pgrep = ["pgrep", "-P", str(launched.pid)]
    ids = {}
    for child in subprocess.run(pgrep, capture_output=True, text=True).stdout.split():
        environment = Path(f"/proc/{child}/environ").read_text().split("\0")
        for rank in (0, 1):
            if f"RANK={rank}" in environment:
                ids[rank] = int(child)
    return ids


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_spares_the_checkpoint(tmp_path):
    folder = tmp_path / "run"
    launched = start(
        torchrun(PPO, *SHARED_RUN, "--total-timesteps", "1000000", "--run-dir", folder)
    )
    os.kill(process_ids(launched, folder)[1], signal.SIGKILL)
    output = "".join(launched.communicate(timeout=120))
    assert launched.returncode != 0
    messages = ("rank 0 lost another rank", "SIGKILL", "Signal 9")
    assert any(message in output for message in messages), output
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["run"]["step"] % 200 == 0
    resumed = run(PPO, "--resume", "--run-dir", folder, "--total-timesteps", "400")
    assert resumed.returncode == 0, resumed.stderr


@pytest.mark.slow
def test_ctrl_c_to_rank_0_alone_saves(tmp_path):
    """The other rank exits without failure: after a failure, torchrun kills rank 0 as it writes."""
    folder = tmp_path / "run"
    flags = [*SHARED_RUN, "--total-timesteps", "1000000", "--run-dir", folder]
    flags += ["--hidden", "3000", "3000"]  # 220 MB to write
    launched = start(torchrun(PPO, *flags))
    os.kill(process_ids(launched, folder)[0], signal.SIGINT)
    output = "".join(launched.communicate(timeout=120))
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["run"]["step"]
    assert f"Interrupted at step {step}. To resume: " in output
    assert "Signal" not in output
    assert "SIG" not in output


@pytest.mark.slow
def test_ranks_with_different_flags_are_refused(tmp_path):
    """This happens on two machines if one of them does not see the run folder."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = []
    for rank, clip_coef in enumerate(("0.1", "0.2")):
        flags = [*SHARED_RUN, "--clip-coef", clip_coef, "--run-dir", tmp_path / str(rank)]
        env = os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(start(command(PPO, *flags), env=env))
    errors = [process.communicate(timeout=200)[1] for process in processes]
    for process in processes:
        assert process.returncode != 0
    assert "rank 0 lost another rank" in errors[0]
    assert (
        "--clip-coef differs between rank 1 and rank 0: "
        "pass all flags on every rank, or share --run-dir"
    ) in errors[1]


def test_environments_that_cannot_be_shared_are_refused(tmp_path):
    flags = [*SHARED_RUN, "--num-envs", "3", "--run-dir", tmp_path / "run"]
    shared = finish(torchrun(PPO, *flags))
    assert shared.returncode != 0
    assert "--num-envs 3 cannot be shared by 2 processes: choose a multiple of 2" in shared.stderr


@pytest.mark.parametrize("path", ROLLOUT_PATHS, ids=lambda path: path.stem)
def test_ranks_refuse_to_compile(path, monkeypatch):
    """A compiled update would leave out what the ranks exchange."""
    module = load_algo(path)
    monkeypatch.setattr(module, "RANKS", 2)
    with pytest.raises(module.InputError, match="--compile works in one process only"):
        module.train(module.Args(compile=True))
