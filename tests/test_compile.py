"""--compile and CUDA graphs: an update in one piece that learns what the plain one does, and resumes to the bit."""

import os
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
import tyro
from conftest import ALGOS, command, every, load, rows
from test_resume import same

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
BOX = [-1.0, -0.5], [1.0, 0.5]


@pytest.fixture
def in_float64():
    """Rounding is then far below what a difference in the mathematics makes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def agent_of(module, device):
    """An agent with 3 observations and small networks."""
    args, device = module.Args(hidden=(16, 16)), torch.device(device)
    torch.manual_seed(0)
    if module.ALGO in ("ppo", "trpo", "vpg"):
        agent = module.Agent(args, 3, 2, *BOX, device)
    else:
        agent = module.Agent(args, 3, *([2] if module.ALGO == "dqn" else BOX), device)
    if module.ALGO in ("dqn", "ppo"):  # whose rate is a tensor, in which CUDA's Adam takes float32 alone
        group = agent.optimizer.param_groups[0]
        group["lr"] = group["lr"].float()
    return agent


def updates(module, agent, wrap):
    """The update of each gradient step, by its number."""
    if module.ALGO == "td3":
        delayed = [wrap(partial(agent.update, delayed=value)) for value in (False, True)]
        return lambda i: delayed[i % 2]
    update = wrap(agent.update)
    return lambda i: update


def fifty_updates_are_the_plain_ones(module, wrap, device):
    """From the first on, before which no optimizer has a state to trace. Returns those wrapped."""
    plain, wrapped = agent_of(module, device), agent_of(module, device)
    ours, theirs = updates(module, plain, lambda update: update), updates(module, wrapped, wrap)
    data = torch.rand(50, 32, sum(plain.columns), generator=torch.Generator().manual_seed(1)).to(device)
    data[..., 3] = data[..., 3].round()  # an action of DQN's
    if module.ALGO == "vpg":  # whose policy steps first
        [agent.improve(data[0]) for agent in (plain, wrapped)]
    for i, batch in enumerate(data):
        if i == 25 and module.ALGO == "ppo":  # whose learning rate falls
            [agent.optimizer.param_groups[0]["lr"].mul_(0.1) for agent in (plain, wrapped)]
        torch.manual_seed(i)
        metrics = ours(i)(batch)
        torch.manual_seed(i)
        torch.testing.assert_close(theirs(i)(batch), metrics, rtol=1e-9, atol=1e-9)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(wrapped.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)
    return {theirs(0), theirs(1)}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)
def test_fifty_compiled_updates_are_the_plain_ones(path, in_float64, capsys):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = load(path)
    compiled = fifty_updates_are_the_plain_ones(module, module.Compiled, "cpu")
    assert all(hasattr(one.update, "__wrapped__") for one in compiled) and not capsys.readouterr().err
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(compiled)  # each in one piece


def test_an_adam_with_other_options_goes_on_as_it_was(sac, capsys):
    """One that a reader may have given weight decay, of which the compiled one would know nothing."""
    agents = []
    for wrap in (lambda update: update, sac.Compiled):
        agents.append(agent := agent_of(sac, "cpu"))
        agent.critic_optimizer.param_groups[0]["weight_decay"] = 10.0
        update = wrap(agent.update)
        for seed in range(4):
            torch.manual_seed(seed)
            update(torch.randn(8, 10))
    assert "goes on without --compile: AssertionError: plain Adam is all it compiles" in capsys.readouterr().err
    for name, value in agents[0].state_dict().items():
        assert torch.equal(agents[1].state_dict()[name], value), name


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)
def test_fifty_captured_updates_are_the_plain_ones(path, compiled, in_float64, capsys):
    torch._dynamo.reset()
    module = load(path)

    def wrap(update):
        return module.CudaGraph(module.Compiled(update) if compiled else update)

    captured = fifty_updates_are_the_plain_ones(module, wrap, "cuda")
    assert all(one.graph and one.calls > 20 for one in captured) and not capsys.readouterr().err


@pytest.mark.gpu
@needs_cuda
def test_an_update_that_waits_for_the_device_goes_on_as_it_was(sac, capsys):
    class Stubborn(sac.Agent):
        def update(self, batch):
            return super().update(batch * (1.0 if batch.sum().item() else 2.0))

    agent = Stubborn(sac.Args(hidden=(16, 16)), 3, *BOX, torch.device("cuda"))
    update, before = sac.CudaGraph(agent.update), []
    for _ in range(6):
        update(torch.randn(8, 10, device="cuda"))
        before.append(agent.critic_optimizer.state_dict()["state"][0]["step"].item())
    assert before == [1, 2, 3, 4, 5, 6]  # each call is one update
    here = f"{Path(__file__).name}, line {Stubborn.update.__code__.co_firstlineno + 1}"
    assert capsys.readouterr().err == f"warning: goes on without a CUDA graph: {here}, waits for the device\n"


def test_an_update_that_needs_a_number_goes_on_as_it_was(sac, capsys):
    class Stubborn(sac.Agent):
        def update(self, batch):
            metrics = super().update(batch)
            return metrics | {"value/mean": torch.tensor(metrics["value/mean"].item())}

    agents = []
    for wrap in (lambda update: update, sac.Compiled):
        torch.manual_seed(0)
        agent = Stubborn(sac.Args(hidden=(16, 16)), 3, *BOX, torch.device("cpu"))
        update = wrap(agent.update)
        agents.append((agent, [update(torch.randn(8, 10)) for _ in range(5)]))
    assert same(agents[0][0].state_dict(), agents[1][0].state_dict()) and same(agents[0][1], agents[1][1])
    warning = capsys.readouterr().err
    assert warning.startswith("warning: goes on without --compile: ") and warning.count("\n") == 1


@every
def test_train_compiles_every_update(path, tmp_path, monkeypatch):
    module, calls = load(path), []

    def compiled(update):
        calls.append(0)

        def count(batch):
            calls[number] += 1
            return update(batch)

        number = len(calls) - 1
        return count

    monkeypatch.setattr(module, "Compiled", compiled)
    module.train(tyro.cli(module.Args, args=command(path, "--compile", "--run-dir", tmp_path / "run")[2:]))
    assert len(calls) == 1 + (path.stem == "td3") and all(calls)


@pytest.mark.slow
def test_without_a_compiler_a_run_goes_on_as_it_was(tmp_path):
    path = next(path for path in ALGOS if path.stem == "sac")
    none = {**os.environ, "CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for flag in ("--compile", "--no-compile"):
        line = command(path, flag, "--run-dir", tmp_path / flag)
        done = subprocess.run(line, check=True, capture_output=True, text=True, env=none)
        assert done.stderr.count("warning: goes on without --compile: ") == (flag == "--compile")
    assert rows(tmp_path / "--compile") == rows(tmp_path / "--no-compile")


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_to_the_bit(tmp_path):
    path = next(path for path in ALGOS if path.stem == "sac")
    done = subprocess.run(
        command(path, "--compile", "--run-dir", tmp_path / "whole"), check=True, capture_output=True, text=True
    )
    assert "without --compile" not in done.stderr
    for name, flag in (("killed", "--compile"), ("plain", "--no-compile")):
        shutil.copytree(tmp_path / "whole", tmp_path / name)  # as it was before its last checkpoint
        (tmp_path / name / "checkpoint.prev.pt").rename(tmp_path / name / "checkpoint.pt")
        subprocess.run(command(path, "--resume", "--run-dir", tmp_path / name, flag), check=True, capture_output=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole") != rows(tmp_path / "plain")
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert same(whole["agent"], killed["agent"])
