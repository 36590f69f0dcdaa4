"""--compile, CUDA graphs and oneDNN: a faster update that learns what the plain one does, and resumes to the bit."""

import importlib
import shutil
import subprocess
from functools import partial

import pytest
import torch
import tyro
from conftest import ALGOS, CONTINUOUS, command, every, load, rows, run
from test_resume import same

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
AMD = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
BOX = [-1.0, -0.5], [1.0, 0.5]


@pytest.fixture
def in_float64():
    """Rounding is then far below what a difference in the mathematics makes."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def matmul():
    """How float32 is multiplied on a CPU, where tests may leave a setting."""
    yield torch.backends.mkldnn.matmul
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def agent_of(module, device, compiled=False):
    """An agent with 3 observations and small networks."""
    args, device = module.Args(hidden=(16, 16)), torch.device(device)
    if compiled and module.ALGO == "sac":  # the compiler of torch 2.13 loses what is done in place to one float64
        args.autotune = False
    torch.manual_seed(0)
    if module.ALGO in ("ppo", "trpo", "vpg"):
        agent = module.Agent(args, 3, 2, *BOX, device)
    else:
        agent = module.Agent(args, 3, *([2] if module.ALGO == "dqn" else BOX), device)
    if module.ALGO in ("dqn", "ppo"):  # whose rate is a tensor, in which CUDA's Adam takes float32 alone
        agent.optimizer.lr = agent.optimizer.lr.float()
    return agent


def updates(module, agent, wrap):
    """The update of each gradient step, by its number."""
    if module.ALGO == "td3":
        delayed = [wrap(partial(agent.update, delayed=value)) for value in (False, True)]
        return lambda i: delayed[i % 2]
    update = wrap(agent.update)
    return lambda i: update


def fifty_updates_are_the_plain_ones(module, wrap, device, compiled):
    """Returns those wrapped."""
    plain, wrapped = agent_of(module, device, compiled), agent_of(module, device, compiled)
    ours, theirs = updates(module, plain, lambda update: update), updates(module, wrapped, wrap)
    data = torch.rand(50, 32, sum(plain.columns), generator=torch.Generator().manual_seed(1)).to(device)
    data[..., 3] = data[..., 3].round()  # an action of DQN's
    if module.ALGO == "vpg":  # whose policy steps first
        [agent.improve(data[0]) for agent in (plain, wrapped)]
    for i, batch in enumerate(data):
        if i == 25 and module.ALGO == "ppo":  # whose learning rate falls
            [agent.optimizer.lr.mul_(0.1) for agent in (plain, wrapped)]
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
def test_fifty_compiled_updates_are_the_plain_ones(path, in_float64):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = load(path)
    compiled = fifty_updates_are_the_plain_ones(module, module.compiled, "cpu", True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(compiled)  # each in one piece, and once


@pytest.mark.slow
@needs_compiler
def test_a_compiled_update_learns_the_temperature(sac):
    torch._dynamo.reset()
    plain, other = agent_of(sac, "cpu"), agent_of(sac, "cpu")
    compiled = sac.compiled(other.update)
    for i, batch in enumerate(torch.rand(5, 32, sum(plain.columns), generator=torch.Generator().manual_seed(1))):
        for update in (plain.update, compiled):
            torch.manual_seed(i)
            update(batch)
    assert plain.log_alpha.exp() < 0.2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


@pytest.mark.slow
@needs_compiler
def test_a_notebook_may_compile_one_network_after_another():
    """More than the eight of one function that the compiler takes by default; and what else it compiles is as ever."""
    torch._dynamo.reset()
    vpg = load(next(path for path in ALGOS if path.stem == "vpg"))
    table = importlib.import_module("torch._inductor.decomposition").decompositions
    before = dict(table)
    for width in range(8, 17):
        agent = vpg.Agent(vpg.Args(hidden=(width,)), 3, 2, *BOX, torch.device("cpu"))
        vpg.compiled(agent.update)(torch.rand(32, sum(agent.columns)))
    assert table == before


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)
def test_fifty_captured_updates_are_the_plain_ones(path, compiled, in_float64):
    torch._dynamo.reset()
    module = load(path)

    def wrap(update):
        return module.CudaGraph(module.compiled(update) if compiled else update)

    captured = fifty_updates_are_the_plain_ones(module, wrap, "cuda", compiled)
    assert all(hasattr(one, "metrics") for one in captured)


class Branching:
    """An agent whose update asks for a number."""

    def update(self, batch):
        return super().update(batch * (1.0 if batch.sum() > 0 else 2.0))


@pytest.mark.parametrize(
    "wrap, device, advice",
    [
        ("compiled", "cpu", "leave out --compile"),
        pytest.param("CudaGraph", "cuda", "add --no-cuda-graph", marks=[pytest.mark.gpu, needs_cuda]),
    ],
)
def test_an_update_that_asks_for_a_number_is_refused(sac, wrap, device, advice):
    agent = type("Agent", (Branching, sac.Agent), {})(sac.Args(hidden=(16, 16)), 3, *BOX, torch.device(device))
    update = getattr(sac, wrap)(agent.update)
    with pytest.raises(SystemExit, match=f"(?s).+\nerror: the update cannot be .*: {advice}$"):
        [update(torch.randn(8, 10, device=device)) for _ in range(4)]


@every
def test_train_compiles_every_update(path, tmp_path, monkeypatch):
    module, calls = load(path), []

    def counted(update):
        calls.append(0)

        def count(batch):
            calls[number] += 1
            return update(batch)

        number = len(calls) - 1
        return count

    monkeypatch.setattr(module, "compiled", counted)
    module.train(tyro.cli(module.Args, args=command(path, "--compile", "--run-dir", tmp_path / "run")[2:]))
    assert len(calls) == 1 + (path.stem == "td3") and all(calls)


@pytest.mark.slow
def test_without_a_compiler_it_says_so(tmp_path):
    """And leaves a run that goes on without."""
    none = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    path = next(path for path in ALGOS if path.stem == "sac")
    done = run(path, "--compile", "--run-dir", tmp_path / "run", env=none)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "InvalidCxxCompiler: No working C++ compiler" in done.stderr
    assert done.stderr.endswith("\nerror: the update cannot be compiled, for the reason above: leave out --compile\n")
    assert run(path, "--resume", "--no-compile", "--run-dir", tmp_path / "run", env=none).returncode == 0


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_to_the_bit(tmp_path):
    path = next(path for path in ALGOS if path.stem == "sac")
    subprocess.run(command(path, "--compile", "--run-dir", tmp_path / "whole"), check=True, capture_output=True)
    for name, flag in (("killed", "--compile"), ("plain", "--no-compile")):
        shutil.copytree(tmp_path / "whole", tmp_path / name)  # as it was before its last checkpoint
        (tmp_path / name / "checkpoint.prev.pt").rename(tmp_path / name / "checkpoint.pt")
        subprocess.run(command(path, "--resume", "--run-dir", tmp_path / name, flag), check=True, capture_output=True)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole") != rows(tmp_path / "plain")
    whole, killed = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "killed"))
    assert same(whole["agent"], killed["agent"])


@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_products_by_onednn_are_exact(path):
    """To the rounding of float32: that of bfloat16 is 65536 times as large."""
    module, gradients = load(path), []
    for wrap in (lambda update: update, module.by_onednn):
        torch.manual_seed(0)
        agent = module.Agent(module.Args(), 3, *BOX, torch.device("cpu"))
        updates(module, agent, wrap)(0)(torch.rand(256, sum(agent.columns)))
        gradients.append(agent.critic_optimizer.held)
    for ours, plain in zip(*gradients, strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    "hidden, asked, inside", [("256 256", "none", "bf16"), ("256 16", "none", "none"), ("256", "ieee", "ieee")]
)
def test_train_multiplies_wide_matrices_by_onednn(path, hidden, asked, inside, matmul, tmp_path, monkeypatch):
    """On an AMD, while it learns, and where nobody has said how to multiply."""
    module, seen = load(path), set()

    def update(self, *args, **options):
        seen.add(matmul.fp32_precision)
        return plain(self, *args, **options)

    plain = module.Agent.update
    monkeypatch.setattr(module.Agent, "update", update)
    flags = f"--total-timesteps 210 --hidden {hidden} --eval-every 0 --device cpu --run-dir"
    matmul.fp32_precision = asked
    module.train(tyro.cli(module.Args, args=command(path, *flags.split(), tmp_path / "run")[2:]))
    assert seen == {inside if AMD else asked} and matmul.fp32_precision == asked


def test_an_update_by_onednn_that_fails_leaves_no_setting(sac, matmul):
    with pytest.raises(ZeroDivisionError):
        sac.by_onednn(lambda batch: batch / 0)(1)
    assert matmul.fp32_precision == "none"
