"""Environments whose right values are known on paper, through the real `train`.

Each expected value is reached within 10 %. Well-known mistakes lead to values further off.
"""

import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from common import load_algo
from conftest import BOX_PATHS, PATHS, ROLLOUT_PATHS, ROOT, marked_slow, probe

from algos import ALGOS

SAC = ROOT / "algos" / "sac.py"
DQN = ROOT / "algos" / "dqn.py"
UNITS = ("Unit", "Narrow", "Huge")  # one task, in boxes of several widths


def path_id(path):
    return path.stem


class Trained:
    """A finished run: its result, checkpoint, agent and policy."""

    def __init__(self, path, run_dir, env, gamma, steps=1200, **flags):
        self.record = ALGOS[path.stem]
        self.module = load_algo(path)
        defaults = self.record.probe_args | {"threads": 1, "eval_every": 0, "device": "cpu"}
        defaults["total_timesteps"] = steps * self.record.probe_steps
        self.args = self.module.Args(
            env_id=probe(path, env), run_dir=str(run_dir), gamma=gamma, **(defaults | flags)
        )
        self.result = self.module.train(self.args)
        self.state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        self.policy = self.module.load_policy(run_dir)
        saved = torch.load(run_dir / "policy.pt", weights_only=True)
        self.agent = self.module.Agent(self.args, self.module.Spaces(*saved["spaces"]))
        self.agent.load_state_dict(self.state["agent"])

    def value(self, *obs):
        """The critic's value of `obs` and, if it needs one, the greedy action; mean of K heads."""
        obs = torch.tensor([obs], dtype=torch.float32)
        if self.record.family == "rollout":
            return self.agent.value(obs).item()  # probes are learned with norm_obs=False
        if self.record.actions == "discrete":
            return self.agent.critic(obs).max().item() * self.agent.reward_unit.item()
        action = torch.from_numpy(self.agent.actor.act(obs.numpy()))
        return self.module.q_values(self.agent.critic, obs, action).mean().item()

    def memory(self, name):
        """One field of the replay memory."""
        return self.state["memory"]["rows"][name]


@pytest.fixture(params=marked_slow(PATHS))
def trained(request, tmp_path):
    """A function that trains each algorithm in a probe."""

    def train(env, gamma=0.9, **flags):
        return Trained(request.param, tmp_path / env, env, gamma, **flags)

    return train


def test_constant_reward(trained):
    assert trained("Constant").value(0, 1) == pytest.approx(1, rel=0.1)


def test_reward_that_depends_on_the_observation(trained):
    run = trained("Observed")
    assert run.value(0, 1) == pytest.approx(1, rel=0.1)
    assert run.value(0, -1) == pytest.approx(-1, rel=0.1)


def test_reward_that_comes_later(trained):
    run = trained("Delayed", gamma=0.5)
    assert run.value(0, 1) == pytest.approx(0.5, rel=0.1)
    assert run.value(0.5, 1) == pytest.approx(1, rel=0.1)


def test_reward_that_depends_on_the_action(trained):
    run = trained("Acted")
    action = run.policy(np.array([0.0, 1.0]))
    if np.ndim(action) == 0:
        assert action == 2
    else:
        assert action[0] == pytest.approx(0.5, abs=0.1)
    if run.record.family == "replay":  # the other family learns the value of the policy with noise
        assert run.value(0, 1) == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("path", [*BOX_PATHS, *ROLLOUT_PATHS], ids=path_id)
def test_a_wider_box_of_actions(path, tmp_path):
    if path.stem == "vpg":
        pytest.skip("nothing bounds VPG's steps: outside the box all its actions are alike")
    run = Trained(path, tmp_path, "Wide", gamma=0.9, steps=1500)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(2, rel=0.1)


def test_a_time_limit_is_not_a_termination(trained):
    """Reward 1 for ever is worth 1 / (1 - 0.9) = 10; a limit of 5 steps as an end leaves 4.1."""
    assert trained("Cut", steps=2500).value(0, 0) == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("env", ["Ended", "Both"])
def test_a_termination_ends_the_return(trained, env):
    run = trained(env)
    assert run.value(0, 1) == pytest.approx((1 - 0.9**5) / (1 - 0.9), rel=0.1)
    assert run.value(0.8, 1) == pytest.approx(1, rel=0.1)


def test_sac_adds_no_entropy_after_a_termination(tmp_path):
    """At temperature 1, in episodes of one step, Q is the reward alone."""
    run = Trained(SAC, tmp_path, "Constant", gamma=0.9, alpha=1.0)
    assert run.value(0, 1) == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.4, -1.0])
def test_sac_reaches_its_target_entropy(tmp_path, target):
    """Actions in [-1, 1], where the uniform distribution has an entropy of log 2 = 0.69 nats."""
    flags = {"autotune": True, "alpha": 0.2, "target_entropy": target}
    run = Trained(SAC, tmp_path, "Wide", gamma=0.9, steps=2000, **flags)
    log_prob = run.agent.actor(torch.tensor([[0.0, 1.0]]).expand(4096, 2))[1]
    assert -log_prob.mean().item() == pytest.approx(target, abs=0.15)


@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_the_units_of_actions_make_no_difference(path, tmp_path):
    """Boxes 1, 1/64 and 256 wide, which float32 scales without rounding: the same weights."""
    flags = {"autotune": True} if path.stem == "sac" else {}
    runs = [Trained(path, tmp_path / env, env, gamma=0.9, steps=600, **flags) for env in UNITS]
    for run in runs[1:]:
        assert run.result["loss/critic"] == runs[0].result["loss/critic"]
        for name, tensor in runs[0].state["agent"].items():
            assert tensor.equal(run.state["agent"][name]), name


def test_with_scale_values_the_size_of_rewards_makes_no_difference_to_dqn(tmp_path):
    """Rewards 2**12 times as large, which float32 scales without rounding: the same weights."""
    runs = []
    for env in ("Acted", "Large"):
        runs.append(Trained(DQN, tmp_path / env, env, gamma=0.9, scale_values=True))
    for name, tensor in runs[0].state["agent"].items():
        factor = 2**12 if name == "reward_unit" else 1
        assert (tensor * factor).equal(runs[1].state["agent"][name]), name
    assert runs[0].result["loss/critic"] == runs[1].result["loss/critic"]
    assert runs[0].result["value/mean"] * 2**12 == runs[1].result["value/mean"]


@pytest.mark.parametrize("path", ROLLOUT_PATHS, ids=path_id)
def test_rewards_far_from_zero(path, tmp_path):
    """Rewards differ by a thousandth of their size, so a bound on them would hide that."""
    run = Trained(path, tmp_path, "Offset", gamma=0.9, norm_reward=True)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("path", ROLLOUT_PATHS, ids=path_id)
def test_a_box_with_one_bound(path, tmp_path):
    """The box is [5, inf), so actions start at the bound."""
    run = Trained(path, tmp_path, "Above", gamma=0.9)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(7, abs=0.3)


def test_observations_outlive_the_steps_of_other_environments(sac):
    """Also if all environments of a class write into one array."""
    first = sac.make_env(sac.Args(env_id="probe/Reused-v0"))
    second = sac.make_env(sac.Args(env_id="probe/Reused-v0"))
    obs, _ = first.reset(seed=0)
    second.reset(seed=0)
    second.step(np.zeros(1, np.float32))
    assert obs.tolist() == [1, 0]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env", ["Marker", "Reused"])
@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_the_memory_holds_what_happened(path, tmp_path, env, num_envs):
    """s' is one step after s in the same episode, at time limits and where the ring wraps too."""
    flags = {"buffer_size": 150, "learning_starts": 100, "checkpoint_every": 200}
    run = Trained(path, tmp_path, env, gamma=0.9, steps=400, num_envs=num_envs, **flags)
    marker, time = run.memory("obs").T
    next_marker, next_time = run.memory("next_obs").T
    assert len(marker) == 150
    assert marker.any()
    assert not next_marker.any()
    assert torch.equal(next_time, time + 1)
    assert set(time.tolist()) == set(range(7))
    assert (run.memory("reward") == 1).all()
    assert not run.memory("terminated").any()
    assert (run.memory("action").abs() <= 1).all()


@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_the_memory_holds_actions_as_they_were_chosen(path, tmp_path):
    """The environment scales the array that it receives in place."""
    run = Trained(path, tmp_path, "Scaling", gamma=0.9, steps=300)
    assert run.memory("action").abs().min() > 0


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("utd", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_gradient_steps_per_environment_step(path, tmp_path, utd, num_envs):
    flags = {"utd": utd, "num_envs": num_envs, "learning_starts": 99, "total_timesteps": 301}
    run = Trained(path, tmp_path, "Constant", gamma=0.9, **flags)
    steps = run.result["step"]
    assert steps == (301 if num_envs == 1 else 303)  # the last iteration is completed
    taken = run.state["agent"]["critic_optimizer.steps"].item()
    assert taken == int(utd * (steps - 99))


@pytest.mark.parametrize("path", BOX_PATHS, ids=path_id)
def test_actions_before_learning_are_uniform(path, tmp_path):
    run = Trained(path, tmp_path, "Wide", gamma=0.9, steps=2000, learning_starts=2000, num_envs=2)
    actions = run.memory("action").flatten()
    assert (actions.diff() != 0).all()  # every environment has its own
    assert actions.min() >= -1
    assert actions.max() <= 1
    counts = torch.histc(actions, 6, -1, 1)
    assert ((counts - 2000 / 6).abs() < 5 * (2000 / 6) ** 0.5).all()
    assert run.state["agent"]["critic_optimizer.steps"] == 0


@pytest.mark.parametrize("num_envs", [1, 3])
def test_dqn_learns_and_moves_its_target_by_environment_steps(tmp_path, num_envs):
    flags = {"train_frequency": 10, "target_network_frequency": 50, "learning_starts": 99}
    run = Trained(DQN, tmp_path, "Marker", gamma=0.9, steps=301, num_envs=num_envs, **flags)
    steps = run.result["step"]
    assert run.state["agent"]["optimizer.steps"].item() == (steps - 99) // 10
    time = run.memory("obs")[:, 1]
    next_marker, next_time = run.memory("next_obs").T
    assert len(time) == steps
    assert not next_marker.any()
    assert torch.equal(next_time, time + 1)
    assert set(run.memory("action").tolist()) == {0, 1, 2}
    assert not run.memory("terminated").any()
