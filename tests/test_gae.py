"""What vpg, trpo and ppo share: advantages, statistics, the policy, and what a rollout holds."""

import itertools

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from common import load_algo
from conftest import ROLLOUT_PATHS
from small_agents import SMALL_ROLLOUT_RUN, rollout_agent, rollout_spaces

torch.set_num_threads(1)
both_spaces = pytest.mark.parametrize("box", [True, False], ids=["box", "discrete"])


@pytest.fixture(params=ROLLOUT_PATHS, ids=lambda path: path.stem)
def module(request):
    """Each on-policy file in turn."""
    return load_algo(request.param)


def advantages_by_definition(reward, value, next_value, terminated, ended, gamma, gae_lambda):
    """A_t as the weighted mean of n-step returns within the episode, one environment, in floats."""
    result = []
    for t in range(len(reward)):
        last = len(reward) - 1
        for k in range(t, len(reward)):
            if ended[k]:
                last = k
                break
        returns = []
        for n in range(1, last - t + 2):
            end = t + n - 1
            rewards = sum(gamma**k * reward[t + k] for k in range(n))
            bootstrap = gamma**n * (1 - terminated[end]) * next_value[end]
            returns.append(rewards + bootstrap - value[t])
        weights = [(1 - gae_lambda) * gae_lambda**n for n in range(len(returns) - 1)]
        weights.append(gae_lambda ** (len(returns) - 1))
        result.append(sum(w * r for w, r in zip(weights, returns, strict=True)))
    return result


def test_gae_by_its_definition_with_ends_and_cuts_everywhere(module):
    """Every one of five steps goes on, terminates or is cut: 3^5 cases, one environment each."""
    cases = list(itertools.product([(0, 0), (1, 1), (0, 1)], repeat=5))
    terminated, ended = torch.tensor(cases, dtype=torch.float64).permute(2, 1, 0)
    torch.manual_seed(0)
    reward, value, next_value = torch.randn(3, 5, len(cases), dtype=torch.float64)
    # Within an episode, s' is the next s.
    next_value[:-1] = torch.where(ended[:-1] == 1, next_value[:-1], value[1:])
    rollout = (reward, value, next_value, terminated, ended)
    advantage = module.gae(*rollout, 0.9, 0.8)
    for i in range(len(cases)):
        columns = [tensor[:, i].tolist() for tensor in rollout]
        expected = advantages_by_definition(*columns, 0.9, 0.8)
        np.testing.assert_allclose(advantage[:, i], expected, atol=1e-12)


def test_gae_leaves_its_arguments_alone(module):
    tensors = [torch.rand(6, 2) for _ in range(5)]
    copies = [tensor.clone() for tensor in tensors]
    module.gae(*tensors, 0.9, 0.8)
    for tensor, copy in zip(tensors, copies, strict=True):
        assert torch.equal(tensor, copy)


def test_one_sample_is_standardized_to_zero(module):
    assert module.standardize(torch.tensor([3.0])).tolist() == [0]
    values = module.standardize(torch.arange(10.0))
    assert values.mean().abs() < 1e-6
    assert values.std(correction=0).item() == pytest.approx(1)


def test_running_moments_are_those_of_all_numbers(module):
    torch.manual_seed(0)
    normalizer = module.Normalizer(3)
    batches = [torch.randn(n, 2, 3) * n + n for n in (4, 1, 30)]
    for batch in batches:
        normalizer.update(batch)
    everything = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(normalizer.mean, everything.mean(0))
    torch.testing.assert_close(normalizer.var, everything.var(0, correction=0))
    assert normalizer.count == len(everything)
    far = normalizer(everything.mean(0) + 1000 * everything.std(0))
    assert (far == 10).all()
    assert normalizer(everything).mean().abs() < 1e-5


def small_actor(module, box):
    """A policy that does not normalise its observations."""
    args = module.Args(hidden=(8,), norm_obs=False)
    return module.Actor(args, rollout_spaces(module, box))


@both_spaces
def test_samples_follow_the_distribution(module, box):
    """The mean of -log p over sampled actions is the entropy of the policy."""
    torch.manual_seed(0)
    actor = small_actor(module, box)
    if box:
        actor.log_std.data = torch.tensor([-1.0, 0.5])
    obs = torch.randn(1, 4).expand(20_000, 4)
    choose = actor.to_numpy()
    policy = actor(obs)
    action = torch.from_numpy(choose(obs.numpy(), actor.noise(len(obs))))
    entropy = policy.entropy()[0].item()
    assert -policy.log_prob(action).mean().item() == pytest.approx(entropy, abs=0.03)
    if not box:
        frequencies = torch.bincount(action, minlength=3) / len(obs)
        torch.testing.assert_close(frequencies, policy.probs[0].detach(), atol=0.02, rtol=0)
    np.testing.assert_allclose(choose(obs[:2].numpy(), 0), policy.mode[:2].detach(), rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu"])
def test_the_policy_in_numpy_is_the_one_in_torch(module, activation):
    """With the normaliser, on observations of any shape, after the parameters changed."""
    torch.manual_seed(0)
    spaces = module.Spaces(4, 3, [-np.inf] * 3, [np.inf] * 3)
    actor = module.Actor(module.Args(hidden=(8, 8), activation=activation), spaces)
    actor.normalize.update(5 + 3 * torch.randn(10, 20, 4))
    for parameter in actor.parameters():
        parameter.data = torch.randn_like(parameter)
    obs = 5 + 20 * np.random.default_rng(0).normal(size=(7, 2, 4))
    normalized = actor.normalize(torch.from_numpy(obs).float())
    assert 0 < (normalized.abs() == 10).float().mean() < 0.5
    expected = actor(normalized).mean.detach().numpy()
    np.testing.assert_allclose(actor.act(obs), expected, rtol=1e-5, atol=1e-5)
    assert actor.act(obs[0, 0]).shape == (3,)
    assert actor.act(obs).dtype == np.float32
    sampled = actor.act(obs, deterministic=False)
    assert sampled.shape == expected.shape
    assert not np.allclose(sampled, expected)


@both_spaces
def test_log_probabilities_are_those_of_the_distribution(module, box):
    torch.manual_seed(0)
    actor = rollout_agent(module, box).actor
    if box:
        actor.log_std.data = torch.tensor([-1.0, 0.5])
    policy = actor(torch.randn(5, 6, 4))
    action = policy.sample()
    torch.testing.assert_close(actor.log_prob(policy, action), policy.log_prob(action))


def test_initial_networks(module):
    """Layers are orthogonal with gain sqrt 2; the last has 0.01 in the policy, 1 in the critic."""
    agent = module.Agent(module.Args(hidden=(16, 16)), rollout_spaces(module, box=True))
    for network, last_gain in ((agent.actor.net, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, last_gain), strict=True):
            singular_values = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(singular_values, torch.full_like(singular_values, gain))
            assert not layer.bias.any()
    assert agent.actor.log_std.tolist() == [-0.5, -0.5]


def test_prepare_makes_a_rollout_a_batch(module):
    """Observations and s' are normalised, rewards divided and not clipped, advantages scaled."""
    torch.manual_seed(0)
    spaces = module.Spaces(3, 2, [-1.0, -1.0], [1.0, 1.0])
    agent = module.Agent(module.Args(hidden=(8,)), spaces)
    agent.actor.normalize.mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    agent.actor.normalize.std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    agent.returns.mean.fill_(7.0)  # rewards keep their mean
    agent.returns.std.fill_(0.25)
    obs = torch.randn(4, 2, 3)
    action = torch.randn(4, 2, 2)
    reward = torch.randn(4, 2)
    reward[1, 0] = 50.0
    ended = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    terminated = ended * torch.tensor([1.0, 0.0])
    following_obs = torch.cat((obs[1:], torch.randn(1, 2, 3)))
    next_obs = torch.where(ended[..., None] == 1, torch.randn(4, 2, 3), following_obs)
    rollout = {
        "obs": obs,
        "action": action,
        "reward": reward,
        "terminated": terminated,
        "ended": ended,
        "next_obs": next_obs,
    }
    batch = agent.prepare(rollout)

    def normalized(x):
        return (x - torch.tensor([1.0, -2.0, 0.0])) / torch.tensor([2.0, 0.5, 1.0])

    with torch.no_grad():
        value = agent.value(normalized(obs))
        next_value = agent.value(normalized(next_obs))
    columns = []
    for i in range(2):
        tensors = (4 * reward, value, next_value, terminated, ended)
        column = [tensor[:, i].tolist() for tensor in tensors]
        columns.append(advantages_by_definition(*column, 0.99, 0.95))
    advantage = torch.tensor(columns).T
    torch.testing.assert_close(batch["obs"], normalized(obs).flatten(0, 1))
    torch.testing.assert_close(batch["action"], action.flatten(0, 1))
    scaled = (advantage - advantage.mean()) / advantage.std(unbiased=False)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(batch["advantage"], scaled.flatten(), **close)
    torch.testing.assert_close(batch["target"], (advantage + value).flatten(), **close)
    if module.ALGO == "ppo":
        old_log_prob = agent.actor(normalized(obs)).log_prob(action).flatten()
        torch.testing.assert_close(batch["log_prob"], old_log_prob.detach(), **close)
    agent.args.norm_adv = False
    batch = agent.prepare(rollout)
    torch.testing.assert_close(batch["advantage"], advantage.flatten(), **close)


def test_what_a_rollout_holds_and_when_its_statistics_move(module, tmp_path, monkeypatch):
    """Every step and environment has its own noise. Observations count after they were used."""
    rollouts = []
    means = []
    counts = []
    prepare = module.Agent.prepare

    def recorded(self, rollout):
        rollouts.append(rollout)
        means.append(self.actor.normalize.mean.clone())
        counts.append(self.actor.normalize.count.item())
        return prepare(self, rollout)

    monkeypatch.setattr(module.Agent, "prepare", recorded)
    flags = SMALL_ROLLOUT_RUN | {"num_envs": 3, "env_id": "probe/Marker-v0"}
    module.train(module.Args(run_dir=str(tmp_path / "run"), total_timesteps=180, **flags))
    assert counts == [0, 60, 120]
    for i, rollout in enumerate(rollouts):
        assert len(rollout["action"].unique()) == 60
        if i > 0:
            earlier = torch.cat([rollout["obs"] for rollout in rollouts[:i]])
            torch.testing.assert_close(means[i], earlier.mean((0, 1)))
        assert not rollout["next_obs"][..., 0].any()
        assert rollout["terminated"].sum() == 0
        assert rollout["ended"].sum() > 0


def test_a_minibatch_of_one_step_teaches(module, tmp_path):
    flags = SMALL_ROLLOUT_RUN | {"num_minibatches": 20, "total_timesteps": 40}
    result = module.train(module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path), **flags))
    assert result["step"] == 40
    assert np.isfinite(result["loss/value"])
    assert result["policy/kl"] > 0


def test_unbounded_actions_are_taken_as_they_are(module, tmp_path):
    """The run can be saved although its bounds are infinite."""
    run_dir = tmp_path / "run"
    flags = SMALL_ROLLOUT_RUN | {"env_id": "probe/Free-v0", "run_dir": str(run_dir)}
    module.train(module.Args(total_timesteps=40, **flags))
    actions = module.load_policy(run_dir, deterministic=False)(np.zeros((1000, 2)))
    assert np.isfinite(actions).all()
    assert actions.std() == pytest.approx(np.exp(-0.5), rel=0.2)


def test_a_loaded_policy_normalizes_as_the_saved_one(module, tmp_path):
    """Statistics are part of the policy."""
    run_dir = tmp_path / "run"
    flags = SMALL_ROLLOUT_RUN | {"num_steps": 50, "num_minibatches": 2, "run_dir": str(run_dir)}
    args = module.Args(env_id="Pendulum-v1", total_timesteps=200, **flags)
    module.train(args)
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)["agent"]
    assert state["actor.normalize.count"] == 200
    assert state["returns.count"] == 200
    saved = torch.load(run_dir / "policy.pt", weights_only=True)
    assert torch.equal(saved["actor"]["normalize.mean"], state["actor.normalize.mean"])
    agent = module.Agent(args, module.Spaces(*saved["spaces"]))
    agent.load_state_dict(state)
    obs = np.array([[0.1, 0.2, 3.0], [5.0, -5.0, 30.0]])  # one of them far from the origin
    space = gym.make("Pendulum-v1").action_space
    expected = module.action_scaler(space.low, space.high)(agent.actor.act(obs))
    policy = module.load_policy(run_dir)
    np.testing.assert_array_equal(policy(obs), expected)
    assert space.contains(policy(obs[0]))


@pytest.mark.parametrize("env", ["Cut", "Numbers"])
def test_sums_of_rewards_stop_at_cuts(module, env, tmp_path):
    """Reward 1, cut at 5 steps, gamma 0.9: sums 1, 1.9, .. 4.0951; rollouts end in between."""
    flags = SMALL_ROLLOUT_RUN | {"num_steps": 12, "gamma": 0.9, "run_dir": str(tmp_path)}
    module.train(module.Args(env_id=f"probe/{env}-v0", total_timesteps=60, **flags))
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    sums = np.array([(1 - 0.9**k) / 0.1 for k in range(1, 6)])
    assert agent["returns.mean"].item() == pytest.approx(sums.mean(), rel=1e-5)
    assert agent["returns.var"].item() == pytest.approx(sums.var(), rel=1e-5)


@pytest.mark.parametrize(
    "checkpoint_every, steps_summed",
    [(20, [*range(20), *range(20)]), (0, [*range(40)])],
    ids=["cut", "uncut"],
)
def test_sums_of_rewards_start_anew_at_a_checkpoint(
    module, tmp_path, checkpoint_every, steps_summed
):
    """Reward 1 without an end: the sums are 1, 1.9, .. until a checkpoint cuts the episode."""
    flags = SMALL_ROLLOUT_RUN | {"gamma": 0.9, "checkpoint_every": checkpoint_every}
    args = module.Args(
        env_id="probe/Endless-v0", total_timesteps=40, run_dir=str(tmp_path), **flags
    )
    module.train(args)
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    sums = np.array([(1 - 0.9 ** (k + 1)) / 0.1 for k in steps_summed])
    assert agent["returns.mean"].item() == pytest.approx(sums.mean(), rel=1e-5)
    assert agent["returns.var"].item() == pytest.approx(sums.var(), rel=1e-5)
