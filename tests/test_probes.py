"""Environments whose right values are known on paper, through the real `train`.

Each value is what the algorithm must reach within 10 %, and what the well-known mistakes reach lies further off.
"""

import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from conftest import CONTINUOUS, EVERY, ON_POLICY, ROOT, load, probe

REPLAY = {"hidden": (32, 32), "batch_size": 64, "tau": 0.05, "learning_starts": 200, "buffer_size": 2000}
ACTOR_CRITIC = REPLAY | {"policy_lr": 3e-3, "q_lr": 3e-3}
ROLLOUT = {"hidden": (32, 32), "num_steps": 100, "num_minibatches": 4, "norm_obs": False, "norm_reward": False}
FAST = {
    "sac": ACTOR_CRITIC | {"alpha": 1e-3, "autotune": False},
    "td3": ACTOR_CRITIC,
    "ddpg": ACTOR_CRITIC,
    "dqn": REPLAY | {"learning_rate": 3e-3, "train_frequency": 1, "target_network_frequency": 1, "end_e": 0.2},
    "ppo": ROLLOUT | {"learning_rate": 3e-3, "anneal_lr": False},
    "trpo": ROLLOUT | {"vf_lr": 3e-3, "target_kl": 0.05},
    "vpg": ROLLOUT | {"vf_lr": 3e-3, "policy_lr": 3e-2},
}
UNITS = ("Unit", "Narrow", "Huge")  # one task, in boxes of several widths
BOUNDS = ("actor.low", "actor.high", "target_actor.low", "target_actor.high")
LONGER = {"ppo": 3, "trpo": 5, "vpg": 8}  # on-policy files see each step but for one rollout


class Trained:
    """A finished run: its critic and its policy."""

    def __init__(self, path, run_dir, env, gamma, steps=1200, **flags):
        self.module, self.algo = load(path), path.stem
        steps *= LONGER.get(path.stem, 1)
        flags = {**FAST[path.stem], "gamma": gamma, "total_timesteps": steps, "threads": 1, "eval_every": 0, **flags}
        self.args = self.module.Args(env_id=probe(path, env), run_dir=str(run_dir), device="cpu", **flags)
        self.result = self.module.train(self.args)
        self.state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
        self.policy = self.module.load_policy(run_dir)
        init = torch.load(run_dir / "policy.pt", weights_only=True)["init"]
        shape = [init[name] for name in ("obs_dim", "actions", "act_dim", "low", "high") if name in init]
        self.agent = self.module.Agent(self.args, *shape, torch.device("cpu"))
        self.agent.load_state_dict(self.state["agent"])

    def value(self, *obs):
        """The critic's value of `obs`, under the greedy action where it asks for one; the mean of its K heads."""
        obs = torch.tensor([obs], dtype=torch.float32)
        if self.algo in LONGER:
            return self.agent.value(self.agent.actor.normalize(obs)).item()
        if self.algo == "dqn":
            return self.agent.critic(obs).max().item() * self.agent.unit.item()
        action = torch.from_numpy(self.policy(obs.numpy()))
        box = self.agent.actor.low, self.agent.actor.high
        return self.module.q_values(self.agent.critic, obs, action, *box).mean().item()


@pytest.fixture(params=EVERY)
def trained(request, tmp_path):
    return lambda env, gamma=0.9, **flags: Trained(request.param, tmp_path / env, env, gamma, **flags)


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
    if run.algo not in LONGER:  # whose value is of a policy that is not greedy
        assert run.value(0, 1) == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in [*CONTINUOUS, *ON_POLICY] if path.stem != "vpg"], ids=lambda p: p.stem
)
def test_a_wider_box_of_actions(path, tmp_path):
    """Without VPG: far out of the box all its actions are alike, and nothing limits the steps that lead there."""
    run = Trained(path, tmp_path, "Wide", gamma=0.9, steps=1500)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(2, rel=0.1)


def test_a_time_limit_is_not_an_end(trained):
    """Reward 1 for ever is worth 1 / (1 - 0.9) = 10; taken for an end, the limit of 5 steps leaves 4.1."""
    assert trained("Cut", steps=2500).value(0, 0) == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("env", ["Ended", "Both"])
def test_an_end_is_an_end(trained, env):
    run = trained(env)
    assert run.value(0, 1) == pytest.approx((1 - 0.9**5) / (1 - 0.9), rel=0.1)
    assert run.value(0.8, 1) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("path", [ROOT / "algos" / "sac.py"], ids=["sac"])
def test_entropy_is_worth_nothing_after_the_end(path, tmp_path):
    """At temperature 1 over episodes of one step, Q is the reward; with the entropy outside of (1 - d) it is not."""
    run = Trained(path, tmp_path, "Constant", gamma=0.9, alpha=1.0)
    assert run.value(0, 1) == pytest.approx(1, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.4, -1.0])
@pytest.mark.parametrize("path", [ROOT / "algos" / "sac.py"], ids=["sac"])
def test_the_temperature_finds_the_target_entropy(path, tmp_path, target):
    """In half widths of the box [-3, 3], in which the uniform density has log 2 = 0.69 nats."""
    run = Trained(path, tmp_path, "Wide", gamma=0.9, autotune=True, alpha=0.2, target_entropy=target, steps=2000)
    log_prob = run.agent.actor(torch.tensor([[0.0, 1.0]]).expand(4096, 2))[1]
    assert -log_prob.mean().item() == pytest.approx(target, abs=0.15)


@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_a_policy_is_learnt_alike_in_any_units(path, tmp_path):
    """Actions from -1 to 1, and the same a 64th and 256 times as wide, which float32 scales without rounding."""
    flags = {"autotune": True} if path.stem == "sac" else {}
    runs = [Trained(path, tmp_path / env, env, gamma=0.9, steps=600, **flags) for env in UNITS]
    for run in runs[1:]:
        for name, weights in runs[0].state["agent"].items():
            assert name in BOUNDS or weights.equal(run.state["agent"][name]), name
    assert all(run.result["loss/critic"] == runs[0].result["loss/critic"] for run in runs)


def test_dqn_learns_alike_from_rewards_of_any_size(tmp_path):
    runs = [Trained(ROOT / "algos" / "dqn.py", tmp_path / env, env, gamma=0.9) for env in ("Acted", "Large")]
    for name, weights in runs[0].state["agent"].items():
        assert (weights * (2**12 if name == "unit" else 1)).equal(runs[1].state["agent"][name]), name
    assert runs[0].result["loss/critic"] == runs[1].result["loss/critic"]
    assert runs[0].result["value/mean"] * 2**12 == runs[1].result["value/mean"]


@pytest.mark.parametrize("path", ON_POLICY, ids=lambda path: path.stem)
def test_rewards_far_from_zero(path, tmp_path):
    """They differ by a thousandth of their size, of which a bound would leave nothing."""
    run = Trained(path, tmp_path, "Offset", gamma=0.9, norm_reward=True)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("path", ON_POLICY, ids=lambda path: path.stem)
def test_a_box_that_has_one_bound(path, tmp_path):
    """And 0 outside of it: actions begin at the bound."""
    run = Trained(path, tmp_path, "Above", gamma=0.9)
    assert run.policy(np.array([0.0, 1.0]))[0] == pytest.approx(7, abs=0.3)


def test_observations_outlive_the_steps_of_other_environments(sac):
    """Also where all of a kind write into one array."""
    one, other = (sac.make_env(sac.Args(env_id="probe/Reused-v0")) for _ in range(2))
    obs, _ = one.reset(seed=0)
    other.reset(seed=0)
    other.step(np.zeros(1, np.float32))
    assert obs.tolist() == [1, 0]


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("env", ["Marker", "Reused"])
@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_the_memory_holds_what_happened(path, tmp_path, env, num_envs):
    """Rows (s, a, r, d, s'): s' is one step after s in the same episode, at cuts and around the end of the ring too."""
    flags = {"buffer_size": 150, "num_envs": num_envs, "learning_starts": 100, "checkpoint_every": 200}
    run = Trained(path, tmp_path, env, gamma=0.9, steps=400, **flags)
    rows = run.state["memory"]
    assert len(rows) == 150
    marker, time, action, reward, terminated, next_marker, next_time = rows.T
    assert not next_marker.any() and marker.any()
    assert torch.equal(next_time, time + 1) and set(time.tolist()) == set(range(7))
    assert (reward == 1).all() and not terminated.any() and (action.abs() <= 1).all()


@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_the_memory_holds_actions_as_they_were_taken(path, tmp_path):
    run = Trained(path, tmp_path, "Scaling", gamma=0.9, steps=300)
    assert run.state["memory"][:, 2].abs().min() > 0


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("utd", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_gradient_steps_per_environment_step(path, tmp_path, utd, num_envs):
    run = Trained(path, tmp_path, "Constant", gamma=0.9, utd=utd, num_envs=num_envs, steps=301, learning_starts=99)
    steps = run.result["step"]
    assert steps == (301 if num_envs == 1 else 303)  # the last round is whole
    taken = run.state["agent"]["critic_optimizer.steps"].item()
    assert taken == int(utd * (steps - 99))


@pytest.mark.parametrize("path", CONTINUOUS, ids=lambda path: path.stem)
def test_actions_before_learning_are_uniform_in_the_box(path, tmp_path):
    run = Trained(path, tmp_path, "Wide", gamma=0.9, steps=2000, learning_starts=2000, num_envs=2)
    actions = run.state["memory"][:, 2]
    assert (actions.diff() != 0).all()  # for each environment its own
    assert actions.min() > -3 and actions.max() < 3
    counts = torch.histc(actions, 6, -3, 3)
    assert ((counts - 2000 / 6).abs() < 5 * (2000 / 6) ** 0.5).all()
    assert run.state["agent"]["critic_optimizer.steps"] == 0  # nothing was learnt


@pytest.mark.parametrize("num_envs", [1, 3])
def test_dqn_learns_and_moves_its_target_by_environment_steps(tmp_path, num_envs):
    flags = {"train_frequency": 10, "target_network_frequency": 50, "num_envs": num_envs, "learning_starts": 99}
    run = Trained(ROOT / "algos" / "dqn.py", tmp_path, "Marker", gamma=0.9, steps=301, tau=0.5, **flags)
    steps = run.result["step"]
    assert run.state["agent"]["optimizer.steps"].item() == (steps - 99) // 10
    rows = run.state["memory"]
    marker, time, action, reward, terminated, next_marker, next_time = rows.T
    assert len(rows) == steps and not next_marker.any() and torch.equal(next_time, time + 1)
    assert set(action.tolist()) == {0, 1, 2} and not terminated.any()
