"""scripts/export.py: in a process that knows nothing of the run, both files act as its policy."""

import shutil
import subprocess
import sys

import common
import export
import numpy as np
import probes  # noqa: F401  (registers environments)
import pytest
import torch
import tyro
from common import load_algo
from conftest import PATHS, ROOT, command

from algos import ALGOS

# Each algorithm with the flags of its record. One more case covers discrete actions of a file that
# has both kinds.
CASES = {path.stem: (path, ALGOS[path.stem].export_flags) for path in PATHS}
CASES["ppo-discrete"] = (ROOT / "algos" / "ppo.py", ("--env-id", "CartPole-v1"))
FAST_CASES = ("ppo", "sac")
SLOW_CASES = tuple(name for name in CASES if name not in FAST_CASES)

# The use that the docstring of export.py shows, with batches of 1, 7 and the rest.
READER = """
import sys
import numpy as np, onnxruntime, torch

for folder in sys.argv[1:]:
    obs = np.load(f"{folder}/obs.npy")
    program = torch.export.load(f"{folder}/policy.pt2").module()
    session = onnxruntime.InferenceSession(f"{folder}/policy.onnx")
    pt2_actions = []
    onnx_actions = []
    for batch in (obs[:1], obs[1:8], obs[8:]):
        pt2_actions.append(program(torch.from_numpy(batch)).numpy())
        (action,) = session.run(["action"], {"obs": batch})
        onnx_actions.append(action)
    np.save(f"{folder}/pt2.npy", np.concatenate(pt2_actions))
    np.save(f"{folder}/onnx.npy", np.concatenate(onnx_actions))
"""


def train(case, run_dir):
    """Train for a few steps; returns the module of the algorithm and the content of policy.pt."""
    path, flags = CASES[case]
    algo = load_algo(path)
    line = command(path, *flags, "--eval-every", 0, "--run-dir", run_dir)
    algo.train(tyro.cli(algo.Args, args=line[2:]))
    return algo, torch.load(run_dir / "policy.pt", weights_only=True)


def run_script(*flags):
    """Run export.py as a user does."""
    line = [sys.executable, ROOT / "scripts" / "export.py", *flags]
    return subprocess.run(line, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def sac_run(tmp_path_factory):
    """The folder of a run of SAC."""
    folder = tmp_path_factory.mktemp("export") / "run"
    train("sac", folder)
    return folder


def export_case(case, folder):
    """Train and export into `folder`, and save observations, a tenth of them extreme.

    Returns the spaces of the run and the policy's actions for the observations.
    """
    algo, saved = train(case, folder / "run")
    spaces = algo.Spaces(*saved["spaces"])
    mean = 0.0
    std = 1.0
    if "normalize.mean" in saved["actor"]:
        # Make the normaliser matter, and actions large enough for both bounds to matter.
        mean = saved["actor"]["normalize.mean"]
        std = saved["actor"]["normalize.std"]
        mean.copy_(torch.linspace(-50, 1000, spaces.obs_dim))
        std.copy_(torch.linspace(0.01, 500, spaces.obs_dim))
        saved["actor"]["net.4.weight"] *= 20
        saved["actor"]["net.4.bias"] += 0.8
        torch.save(saved, folder / "run" / "policy.pt")
    obs = torch.randn(1000, spaces.obs_dim, generator=torch.Generator().manual_seed(0))
    obs[::10] *= 1e6
    obs = (mean + std * obs).numpy()
    np.save(folder / "obs.npy", obs)
    export.export(export.Args(folder / "run", output_dir=folder))
    return spaces, algo.load_policy(folder / "run")(obs)


@pytest.mark.slow
@pytest.mark.parametrize("cases", [FAST_CASES, SLOW_CASES], ids=["ppo-sac", "others"])
def test_both_files_act_as_the_policy_does(cases, tmp_path):
    """The actions are equal to rounding, have the same type, and use and respect the bounds."""
    expected = {case: export_case(case, tmp_path / case) for case in cases}
    subprocess.run([sys.executable, "-c", READER, *expected], cwd=tmp_path, check=True, timeout=120)
    for case, (spaces, actions) in expected.items():
        for kind in ("pt2", "onnx"):
            exported = np.load(tmp_path / case / f"{kind}.npy")
            assert (exported.dtype, exported.shape) == (actions.dtype, actions.shape), case
            assert np.abs(exported - actions).max() <= 1e-5 * np.abs(actions).max(), case
            if spaces.low is None:
                assert exported.dtype == np.int64, case
                assert len(set(exported.tolist())) > 1, case
            else:
                assert (exported >= spaces.low).all(), case
                assert (exported <= spaces.high).all(), case
                assert np.isin(exported, (spaces.low, spaces.high)).any(), case


@pytest.mark.slow
def test_the_command_prints_two_lines_and_leaves_two_files(sac_run):
    before = {path.name for path in sac_run.iterdir()}
    done = run_script(sac_run)
    assert done.returncode == 0
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    names = ("policy.pt2", "policy.onnx")
    assert [line.split(": ")[0] for line in lines] == [str(sac_run / name) for name in names]
    assert all(" bytes, within " in line for line in lines)
    assert all(line.endswith(" on 1000 observations") for line in lines)
    assert {path.name for path in sac_run.iterdir()} == before | set(names)
    for name in names:
        assert str(ROOT).encode() not in (sac_run / name).read_bytes()


# An algorithm with a policy that acts differently while it is exported.
INCONSISTENT_ALGO = """
from typing import NamedTuple
import torch

class Args:
    pass

class Spaces(NamedTuple):
    obs_dim: int
    act_dim: int
    low: list
    high: list

class Actor(torch.nn.Module):
    def act(self, obs, deterministic=True):
        action = torch.as_tensor(obs)
        if torch.compiler.is_compiling():
            action = action + 1
        return action.numpy()

class Agent:
    def __init__(self, args, spaces):
        self.actor = Actor()

def load_policy(run_dir, deterministic=True):
    return Actor().act
"""


def test_a_file_that_differs_from_the_policy_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ALGOS", tmp_path)
    (tmp_path / "inconsistent.py").write_text(INCONSISTENT_ALGO)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.json").write_text('{"algo": "inconsistent", "args": {"env_id": "A-v0"}}')
    torch.save({"args": {}, "spaces": [2, 2, None, None], "actor": {}}, run_dir / "policy.pt")
    with pytest.raises(ValueError, match="^policy.pt2 differs from the policy by .*1e-05: neither"):
        export.export(export.Args(run_dir))
    assert sorted(path.name for path in run_dir.iterdir()) == ["config.json", "policy.pt"]


def test_the_difference_is_relative_to_the_largest_action_and_to_the_observation():
    obs = np.ones((4, 2), np.float32)
    size = np.array([0.1, 1, 1, 10])

    def difference(policy, *errors):
        """The difference that is found if `errors` are added to the exported actions of a batch."""

        def exported(obs):
            if len(obs) == 1:
                return policy(obs)
            return policy(obs) + np.float32(errors)[:, None]

        return export.largest_difference(policy, exported, obs, size)

    def policy(obs):
        return obs[:, :1]

    def four_times(obs):
        return 4 * policy(obs)

    def a_tenth(obs):
        return 0.1 * policy(obs)

    assert difference(policy, 3e-4, 0, 0, 0) == pytest.approx(3e-4, 1e-3)
    assert difference(policy, 0, 0, 0, 3e-4) == pytest.approx(3e-5, 1e-2)
    assert difference(four_times, 3e-4, 0, 0, 0) == pytest.approx(3e-4 / 4, 1e-2)
    assert difference(a_tenth, 3e-4, 0, 0, 0) == pytest.approx(3e-4, 1e-2)
    assert not difference(policy, 0, 0, np.nan, 0) <= export.TOLERANCE


def test_an_action_may_be_close_to_that_of_the_observation_alone_or_in_a_batch():
    obs = np.ones((4, 2), np.float32)

    def policy(obs):
        action = obs[:, :1]
        return action + 1 if len(obs) == 1 else action

    def always_as_alone(obs):
        return obs[:, :1] + 1

    assert export.largest_difference(policy, always_as_alone, obs, np.ones(4)) == 0


def test_observations_are_in_units_of_the_normaliser():
    ppo = load_algo("ppo")
    spaces = ppo.Spaces(3, 2, [-1.0, -1.0], [1.0, 1.0])
    actor = ppo.Actor(ppo.Args(hidden=(4,), norm_obs=True), spaces)
    plain, size = export.random_observations(actor.state_dict(), 3, 1000)
    actor.normalize.mean.copy_(torch.tensor([1.0, 50.0, -1000.0]))
    actor.normalize.std.copy_(torch.tensor([0.01, 1.0, 100.0]))
    obs, _ = export.random_observations(actor.state_dict(), 3, 1000)
    assert plain.shape == (1000, 3)
    assert plain.dtype == np.float32
    assert size.min() >= 0.1
    assert size.max() <= 10
    np.testing.assert_allclose((obs - [1, 50, -1000]) / [0.01, 1, 100], plain, atol=1e-3)
    assert np.std(plain / size[:, None]) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        ([-2.0, 0.0], [2.0, 1.0]),
        ([-np.inf, 0.5, -np.inf], [np.inf, np.inf, -0.25]),  # dimensions without two finite bounds
        ([-3e38, 0.1], [3e38, 0.7]),  # high - low overflows in float32
    ],
)
def test_actions_are_scaled_to_the_box_as_by_the_algorithm(low, high):
    half_widths = np.random.default_rng(0).normal(size=(100, len(low))).astype(np.float32)
    scale = load_algo("sac").action_scaler(np.float32(low), np.float32(high))
    exported = export.ActionScaler(low, high)(torch.from_numpy(half_widths)).numpy()
    with np.errstate(over="ignore"):
        expected = scale(half_widths)
    np.testing.assert_array_equal(exported, expected)


def test_bad_input_raises_a_value_error(sac_run, tmp_path, monkeypatch):
    def check(match, run_dir):
        with pytest.raises(ValueError, match=match):
            export.export(export.Args(run_dir))

    check("nonesuch is not a run: give a folder with a config.json", tmp_path / "nonesuch")
    shutil.copytree(sac_run, tmp_path / "run")
    (tmp_path / "run" / "policy.pt").write_bytes(b"torn")
    check("sac.py cannot read .*policy.pt", tmp_path / "run")
    (tmp_path / "run" / "policy.pt").unlink()
    check("run has no policy.pt yet", tmp_path / "run")
    (tmp_path / "run" / "policy.pt").touch()
    config = '{"algo": "nonesuch", "args": {"env_id": "A-v0"}}'
    (tmp_path / "run" / "config.json").write_text(config)
    check("made by nonesuch, so put nonesuch.py into ", tmp_path / "run")
    monkeypatch.setitem(sys.modules, "onnxscript", None)  # as if it were not installed
    check("^ONNX needs missing packages: pip install onnxscript$", sac_run)


def test_an_output_dir_that_is_a_file(sac_run, tmp_path):
    (tmp_path / "file").touch()
    done = run_script(sac_run, "--output-dir", tmp_path / "file")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_is_no_run_is_one_line_on_stderr(tmp_path):
    done = run_script(tmp_path / "nonesuch")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
