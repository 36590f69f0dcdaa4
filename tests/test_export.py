"""scripts/export.py: alone, in a process that knows nothing of the run, both files act as its policy does."""

import shutil
import subprocess
import sys

import numpy as np
import probes  # noqa: F401
import pytest
import torch
import tyro
from conftest import ALGOS, ROOT, command, load

export = load(ROOT / "scripts" / "export.py")

# Every algorithm, both kinds of actions, a box that is not [-1, 1], and what may stand between two layers.
WIDE, CARTPOLE = ("--env-id", "probe/Wide-v0"), ("--env-id", "CartPole-v1")
CASES = {
    "ddpg": ("--activation", "elu"),
    "dqn": ("--dueling",),
    "ppo": WIDE,
    "ppo-discrete": CARTPOLE,
    "sac": (*WIDE, "--hidden", 64, 64),  # of a size that might be put into a file of its own
    "td3": ("--activation", "silu"),
    "trpo": (),
    "vpg": ("--activation", "elu"),
}
# What the docstring of export.py says, with a batch of 1, of 7 and of all.
READER = """
import sys
import numpy as np, onnxruntime, torch

for folder in sys.argv[1:]:
    obs = np.load(f"{folder}/obs.npy")
    program = torch.export.load(f"{folder}/policy.pt2").module()
    session = onnxruntime.InferenceSession(f"{folder}/policy.onnx")
    for name, policy in {
        "pt2": lambda obs: program(torch.from_numpy(obs)).numpy(),
        "onnx": lambda obs: session.run(["action"], {"obs": obs})[0],
    }.items():
        np.save(f"{folder}/{name}.npy", np.concatenate([policy(part) for part in (obs[:1], obs[1:8], obs[8:])]))
"""


def train(name, run_dir):
    """A small run; from it, the module of its algorithm and what policy.pt holds."""
    (path,) = [path for path in ALGOS if path.stem == name.split("-")[0]]
    algo = load(path)
    algo.train(tyro.cli(algo.Args, args=command(path, *CASES[name], "--eval-every", 0, "--run-dir", run_dir)[2:]))
    return algo, torch.load(run_dir / "policy.pt", weights_only=True)


@pytest.fixture(scope="module")
def sac_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    train("sac", folder)
    return folder


def prepare(name, folder):
    """Export a small run into `folder`, with observations, a tenth of them extreme; returns its box and its actions."""
    algo, saved = train(name, folder / "run")
    actor, o, mean, std = saved["actor"], saved["init"]["obs_dim"], 0.0, 1.0
    if "normalize.mean" in actor:  # far from 0 and 1; and actions on both sides of a bound
        mean, std = actor["normalize.mean"], actor["normalize.std"]
        mean.copy_(torch.linspace(-50, 1000, o))
        std.copy_(torch.linspace(0.01, 500, o))
        actor["net.4.weight"] *= 20
        actor["net.4.bias"] += 0.8
        torch.save(saved, folder / "run" / "policy.pt")
    obs = torch.randn(1000, o, generator=torch.Generator().manual_seed(0))
    obs[::10] *= 1e6
    obs = (mean + std * obs).numpy()
    np.save(folder / "obs.npy", obs)
    export.main(export.Args(folder / "run", output_dir=folder))
    return (saved["init"].get("low"), saved["init"].get("high")), algo.load_policy(folder / "run")(obs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [("ppo", "sac"), [name for name in CASES if name not in ("ppo", "sac")]],
)
def test_both_files_act_as_the_policy_does(names, tmp_path):
    """Deterministic, normalised, in the box or discrete, for any batch."""
    expected = {name: prepare(name, tmp_path / name) for name in names}
    subprocess.run([sys.executable, "-c", READER, *expected], cwd=tmp_path, check=True, timeout=120)
    for name, ((low, high), want) in expected.items():
        for kind in ("pt2", "onnx"):
            got = np.load(tmp_path / name / f"{kind}.npy")
            assert (got.dtype, got.shape) == (want.dtype, want.shape), name
            assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), name
            if low:
                assert low <= got.min(0).tolist() and got.max(0).tolist() <= high and np.isin(got, (low, high)).any(), (
                    name
                )
            else:
                assert got.dtype == np.int64 and len(set(got.tolist())) > 1, name


@pytest.mark.slow
def test_the_command(sac_run):
    """Two lines, no noise; beside the run, and nothing else is left there."""
    before = {path.name for path in sac_run.iterdir()}
    typed = [sys.executable, ROOT / "scripts" / "export.py", sac_run]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(sac_run / name) for name in ("policy.pt2", "policy.onnx")]
    assert all(" bytes, within " in line and line.endswith(" on 1000 observations") for line in lines)
    assert {path.name for path in sac_run.iterdir()} == before | {"policy.pt2", "policy.onnx"}
    for name in ("policy.pt2", "policy.onnx"):
        assert str(ROOT).encode() not in (sac_run / name).read_bytes()


ANOTHER = """
import functools, torch

class Actor(torch.nn.Module):
    init = {"obs_dim": 2}
    def act(self, obs, deterministic=True):
        return (torch.as_tensor(obs) + torch.compiler.is_compiling()).numpy()

def load_policy(run_dir, deterministic=True):
    return functools.partial(Actor().act)
"""


def test_what_differs_is_not_kept(tmp_path, monkeypatch):
    """A policy that does one thing here and another while it is exported."""
    monkeypatch.setattr(sys.modules["watch"], "ALGOS", tmp_path)
    (tmp_path / "another.py").write_text(ANOTHER)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"algo": "another", "args": {"env_id": "A-v0"}}')
    (run_dir / "policy.pt").touch()
    with pytest.raises(SystemExit, match="^error: policy.pt2 differs from the policy by .*, more than 1e-05: it was"):
        export.main(export.Args(run_dir))
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "policy.pt"]


def test_how_far_actions_are_apart():
    """In units of the largest action and of the observation above 1; near the policy alone or in a batch will do."""
    obs, size = np.ones((4, 2), np.float32), np.array([0.1, 1, 1, 10])

    def apart(policy, *errors):  # of the exported one, in a batch
        return export.difference(policy, lambda obs: policy(obs) + wrong(obs, errors), obs, size)

    def wrong(obs, errors):
        return np.float32(errors)[:, None] if len(obs) == 4 else 0

    def one(obs):
        return obs[:, :1]

    assert apart(one, 3e-4, 0, 0, 0) == pytest.approx(3e-4, 1e-3)
    assert apart(one, 0, 0, 0, 3e-4) == pytest.approx(3e-5, 1e-2)
    assert apart(lambda obs: 4 * one(obs), 3e-4, 0, 0, 0) == pytest.approx(3e-4 / 4, 1e-2)
    assert apart(lambda obs: 0.1 * one(obs), 3e-4, 0, 0, 0) == pytest.approx(3e-4, 1e-2)
    assert apart(lambda obs: one(obs) + (len(obs) == 1), 1, 1, 1, 1) == 0
    assert not apart(one, 0, 0, np.nan, 0) <= export.TOLERANCE


def test_observations_are_in_units_of_the_normaliser():
    ppo = load(ROOT / "algos" / "ppo.py")
    actor = ppo.Actor(3, 2, None, None, (4,), "tanh", norm_obs=True)
    plain, size = export.observations(actor, 1000)
    actor.normalize.mean.copy_(torch.tensor([1.0, 50.0, -1000.0]))
    actor.normalize.std.copy_(torch.tensor([0.01, 1.0, 100.0]))
    obs, _ = export.observations(actor, 1000)
    assert (plain.shape, plain.dtype, size.min() >= 0.1, size.max() <= 10) == ((1000, 3), np.float32, True, True)
    np.testing.assert_allclose((obs - [1, 50, -1000]) / [0.01, 1, 100], plain, atol=1e-3)
    assert np.std(plain / size[:, None]) == pytest.approx(1, abs=0.05)


def test_bad_input(sac_run, tmp_path, monkeypatch):
    def error(match, run_dir):
        with pytest.raises(SystemExit, match=match):
            export.main(export.Args(run_dir))

    error("^error: .*nonesuch is no run: give the folder", tmp_path / "nonesuch")
    shutil.copytree(sac_run, tmp_path / "run")
    (tmp_path / "run" / "policy.pt").write_bytes(b"torn")
    error("^error: .*sac.py cannot read .*policy.pt: ", tmp_path / "run")
    (tmp_path / "run" / "policy.pt").unlink()
    error("^error: .*run has no policy.pt yet", tmp_path / "run")
    (tmp_path / "run" / "policy.pt").touch()
    (tmp_path / "run" / "config.json").write_text('{"algo": "nonesuch", "args": {"env_id": "A-v0"}}')
    error("^error: .*put nonesuch.py there$", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as where it is not installed
    error("^error: ONNX needs onnxscript: pip install onnxscript$", sac_run)


def test_an_output_dir_that_is_a_file(sac_run, tmp_path):
    (tmp_path / "file").touch()
    typed = [sys.executable, ROOT / "scripts" / "export.py", sac_run, "--output-dir", tmp_path / "file"]
    done = subprocess.run(typed, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
