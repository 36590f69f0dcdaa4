"""--compile, CUDA graphs and oneDNN: faster updates that compute the same as the plain one."""

import shutil
import subprocess
from functools import partial

import pytest
import torch
import tyro
from common import load_algo
from conftest import BOX_PATHS, PATHS, ROOT, command, every_file, rows, run
from test_run_folder import same

from algos import ALGOS

SAC = ROOT / "algos" / "sac.py"
IS_AMD = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
OBS_DIM = 3
BATCH_SIZE = 32

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def path_id(path):
    return path.stem


@pytest.fixture
def in_float64():
    """In float64, rounding is far below any difference in the mathematics."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def matmul():
    """The setting for float32 products on a CPU, restored afterwards."""
    yield torch.backends.mkldnn.matmul
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def make_agent(module, device="cpu", **flags):
    """An agent with small networks; two actions, in a box if the algorithm supports one."""
    flags = {"hidden": (16, 16)} | flags
    if ALGOS[module.ALGO].actions == "discrete":
        spaces = module.Spaces(OBS_DIM, 2, None, None)
    else:
        spaces = module.Spaces(OBS_DIM, 2, [-1.0, -0.5], [1.0, 0.5])
    torch.manual_seed(0)
    agent = module.Agent(module.Args(**flags), spaces).to(device)
    optimizer = getattr(agent, "optimizer", None)
    if optimizer is not None and torch.is_tensor(optimizer.lr):
        # CUDA's fused Adam takes a learning rate in float32 only.
        optimizer.lr = optimizer.lr.float()
    return agent


def make_batches(module, count, batch_size=BATCH_SIZE, device="cpu"):
    """Random batches with the fields of the algorithm's family."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.rand(batch_size, *shape, generator=generator).to(device)

    batches = []
    for _ in range(count):
        discrete = ALGOS[module.ALGO].actions == "discrete"
        batch = {"obs": random(OBS_DIM), "action": random().round() if discrete else random(2)}
        if ALGOS[module.ALGO].family == "replay":
            names = ("reward", "terminated")
            batch["next_obs"] = random(OBS_DIM)
        else:
            names = ("log_prob", "advantage", "target")
        for name in names:
            batch[name] = random()
        batches.append(batch)
    return batches


def wrapped_updates(agent, wrap):
    """The functions of a batch that `train` accelerates, wrapped: one, or TD3's two."""
    if ALGOS[agent_module(agent)].updates == 2:
        return [wrap(partial(agent.update, delayed=delayed)) for delayed in (False, True)]
    return [wrap(agent.update)]


def agent_module(agent):
    """The name of the file that an agent comes from."""
    return type(agent).__module__


def as_it_is(update):
    return update


def assert_fifty_updates_are_the_plain_ones(module, wrap, device, **flags):
    """Fifty updates give the same metrics and weights -> the wrapped functions."""
    plain = make_agent(module, device, **flags)
    other = make_agent(module, device, **flags)
    plain_updates = wrapped_updates(plain, as_it_is)
    other_updates = wrapped_updates(other, wrap)
    batches = make_batches(module, 50, device=device)
    if module.ALGO == "vpg":  # the policy learns before the value function
        plain.update_policy(batches[0])
        other.update_policy(batches[0])
    for i, batch in enumerate(batches):
        if i == 25 and module.ALGO == "ppo":  # the learning rate falls during a run
            plain.optimizer.lr.mul_(0.1)
            other.optimizer.lr.mul_(0.1)
        torch.manual_seed(i)
        expected = plain_updates[i % len(plain_updates)](batch)
        torch.manual_seed(i)
        metrics = other_updates[i % len(other_updates)](batch)
        torch.testing.assert_close(metrics, expected, rtol=1e-9, atol=1e-9)
    state = other.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9, msg=name)
    return other_updates


def compile_flags(module):
    """The compiler of torch 2.13 loses in-place changes of a float64 scalar, SAC's temperature."""
    return {"autotune": False} if module.ALGO == "sac" else {}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("path", PATHS, ids=path_id)
def test_fifty_compiled_updates_are_the_plain_ones(path, in_float64):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module = load_algo(path)
    updates = assert_fifty_updates_are_the_plain_ones(
        module, module.compile_update, "cpu", **compile_flags(module)
    )
    # Every update is one graph, compiled once.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == len(updates)


@pytest.mark.slow
@needs_compiler
def test_a_compiled_update_learns_the_temperature(sac):
    torch._dynamo.reset()
    plain = make_agent(sac)
    other = make_agent(sac)
    compiled = sac.compile_update(other.update)
    for i, batch in enumerate(make_batches(sac, 5)):
        torch.manual_seed(i)
        plain.update(batch)
        torch.manual_seed(i)
        compiled(batch)
    assert plain.log_alpha.exp() < 0.2
    state = other.state_dict()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(state[name], value, msg=name)


@pytest.mark.slow
@needs_compiler
def test_a_notebook_can_compile_many_networks():
    """The compiler's default limit is eight; its own table of decompositions stays as it was."""
    from torch._inductor.decomposition import decompositions

    torch._dynamo.reset()
    vpg = load_algo("vpg")
    before = dict(decompositions)
    (batch,) = make_batches(vpg, 1)
    for width in range(8, 17):
        agent = make_agent(vpg, hidden=(width,))
        vpg.compile_update(agent.update)(batch)
    assert decompositions == before


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("path", PATHS, ids=path_id)
def test_fifty_captured_updates_are_the_plain_ones(path, compiled, in_float64):
    torch._dynamo.reset()
    module = load_algo(path)

    def wrap(update):
        return module.CudaGraph(module.compile_update(update) if compiled else update)

    flags = compile_flags(module) if compiled else {}
    updates = assert_fifty_updates_are_the_plain_ones(module, wrap, "cuda", **flags)
    for update in updates:
        assert hasattr(update, "metrics")


@pytest.mark.parametrize(
    "wrap, device, remedy",
    [
        ("compile_update", "cpu", "leave out --compile"),
        pytest.param(
            "CudaGraph", "cuda", "add --no-cuda-graph", marks=[pytest.mark.gpu, needs_cuda]
        ),
    ],
)
def test_an_update_that_branches_on_numbers_is_refused(sac, wrap, device, remedy):
    agent = make_agent(sac, device)

    def branching(batch):
        if batch["reward"].sum() > 0:
            return agent.update(batch)
        return {}

    update = getattr(sac, wrap)(branching)
    with pytest.raises(ValueError, match=f"^the update cannot be .*: {remedy}\n.+"):
        for batch in make_batches(sac, 4, device=device):
            update(batch)


@every_file
def test_train_compiles_every_update(path, tmp_path, monkeypatch):
    module = load_algo(path)
    calls = []  # of each update

    def counted(update):
        number = len(calls)
        calls.append(0)

        def count(batch):
            calls[number] += 1
            return update(batch)

        return count

    monkeypatch.setattr(module, "compile_update", counted)
    flags = command(path, "--compile", "--run-dir", tmp_path / "run")[2:]
    module.train(tyro.cli(module.Args, args=flags))
    assert len(calls) == ALGOS[path.stem].updates
    assert min(calls) > 0


@pytest.mark.slow
def test_without_a_compiler_the_run_says_so_and_can_go_on(tmp_path):
    none = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = run(SAC, "--compile", "--run-dir", tmp_path / "run", env=none)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "error: the update cannot be compiled: leave out --compile" in done.stderr
    assert "InvalidCxxCompiler: No working C++ compiler" in done.stderr
    again = run(SAC, "--resume", "--no-compile", "--run-dir", tmp_path / "run", env=none)
    assert again.returncode == 0


@pytest.mark.slow
@needs_compiler
def test_a_compiled_run_resumes_to_the_bit(tmp_path):
    finish(command(SAC, "--compile", "--run-dir", tmp_path / "whole"))
    for name, flag in (("killed", "--compile"), ("plain", "--no-compile")):
        # The folder as it was before its last checkpoint.
        shutil.copytree(tmp_path / "whole", tmp_path / name)
        (tmp_path / name / "checkpoint.prev.pt").rename(tmp_path / name / "checkpoint.pt")
        finish(command(SAC, "--resume", "--run-dir", tmp_path / name, flag))
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole") != rows(tmp_path / "plain")
    whole = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    killed = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)
    assert same(whole["agent"], killed["agent"])


def finish(line):
    """Run a command line to its end."""
    subprocess.run(line, check=True, capture_output=True, timeout=300)


@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_products_by_onednn_are_exact(path):
    """Exact up to the rounding of float32; that of bfloat16 is 65,536 times as large."""
    module = load_algo(path)
    gradients = []
    (batch,) = make_batches(module, 1, batch_size=256)
    for wrap in (as_it_is, module.with_onednn):
        agent = make_agent(module, hidden=(256, 256))
        wrapped_updates(agent, wrap)[0](batch)
        gradients.append(agent.critic_optimizer.gradients)
    for ours, plain in zip(*gradients, strict=True):
        assert (ours - plain).abs().max() <= 1e-5 * plain.abs().max()


@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
@pytest.mark.parametrize(
    "hidden, setting, during_update",
    [("256 256", "none", "bf16"), ("256 16", "none", "none"), ("256", "ieee", "ieee")],
)
def test_train_uses_onednn_for_wide_networks(
    path, hidden, setting, during_update, matmul, tmp_path, monkeypatch
):
    """On an AMD, during updates, and only if nobody chose a precision."""
    module = load_algo(path)
    seen = set()
    plain = module.Agent.update

    def update(self, *args, **options):
        seen.add(matmul.fp32_precision)
        return plain(self, *args, **options)

    monkeypatch.setattr(module.Agent, "update", update)
    flags = f"--total-timesteps 210 --hidden {hidden} --eval-every 0 --device cpu --run-dir"
    matmul.fp32_precision = setting
    line = command(path, *flags.split(), tmp_path / "run")[2:]
    module.train(tyro.cli(module.Args, args=line))
    assert seen == {during_update if IS_AMD else setting}
    assert matmul.fp32_precision == setting


def test_an_update_with_onednn_that_fails_restores_the_setting(sac, matmul):
    def failing(batch):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sac.with_onednn(failing)({})
    assert matmul.fp32_precision == "none"
