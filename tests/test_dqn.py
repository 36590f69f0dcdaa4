"""DQN's own mathematics against slow references."""

import copy
import itertools

import numpy as np
import pytest
import torch
from common import load_algo
from small_agents import SMALL_REPLAY_RUN, discrete_spaces, replay_agent, transitions


@pytest.fixture
def dqn():
    return load_algo("dqn")


def q_values(network, obs, scale, dueling):
    """The action values of one observation as a list, written out."""
    outputs = [scale * output for output in network.net(obs).tolist()]
    if not dueling:
        return outputs
    value = outputs[0]
    advantages = outputs[1:]
    mean = sum(advantages) / len(advantages)
    return [value + advantage - mean for advantage in advantages]


@pytest.mark.parametrize("scale_values", [False, True], ids=["mnih", "scaled"])
@pytest.mark.parametrize("dueling", [False, True], ids=["plain", "dueling"])
@pytest.mark.parametrize("double", [False, True], ids=["single", "double"])
def test_update_loss_by_hand(dqn, double, dueling, scale_values):
    """With --scale-values and gamma 0.9, values and errors are in units of 10 rewards."""
    flags = {"double": double, "dueling": dueling, "scale_values": scale_values}
    agent, batch = replay_agent(dqn, gamma=0.9, **flags)
    unit = 10 if scale_values else 1
    batch["reward"] *= unit
    loss = 0.0
    errors = []
    for row in transitions(batch):
        q = q_values(agent.critic, row["obs"], unit, dueling)
        next_q = q_values(agent.critic, row["next_obs"], unit, dueling)
        target_q = q_values(agent.target, row["next_obs"], unit, dueling)
        chooser = next_q if double else target_q
        best = chooser.index(max(chooser))
        going_on = 1 - row["terminated"].item()
        y = row["reward"].item() + 0.9 * going_on * target_q[best]
        error = abs(q[int(row["action"])] - y)
        errors.append(error)
        if error < unit:
            loss += 0.5 * error**2 / 16
        else:
            loss += unit * (error - 0.5 * unit) / 16
    assert min(errors) < unit < max(errors)  # both branches
    assert agent.update(batch)["loss/critic"].item() == pytest.approx(loss, rel=1e-4)


def test_scaled_values_are_in_units_of_the_mean_reward(dqn):
    """Zeros do not count. A hundred times the reward and its unit give the same step."""
    agent, batch = replay_agent(dqn, scale_values=True)
    other = copy.deepcopy(agent)
    agent.set_reward_unit(torch.tensor([0.0, 2.0, -4.0, 0.0]))
    assert agent.reward_unit == 3
    agent.set_reward_unit(torch.zeros(4))
    assert agent.reward_unit == 1
    other.reward_unit.fill_(100.0)
    loss = agent.update(batch)["loss/critic"]
    other_loss = other.update(batch | {"reward": 100 * batch["reward"]})["loss/critic"]
    torch.testing.assert_close(other_loss, loss)


def test_without_a_discount_the_horizon_is_finite(dqn):
    agent, batch = replay_agent(dqn, gamma=1.0, scale_values=True)
    assert dqn.horizon(1.0) == 1000
    assert agent.critic.scale == 1000
    assert agent.delta == 1000
    assert np.isfinite(agent.update(batch)["loss/critic"].item())


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_the_update_moves_the_network_and_not_its_target(dqn, tau):
    agent, batch = replay_agent(dqn)
    before = copy.deepcopy(agent)
    agent.update(batch)
    for new, old in zip(agent.target.parameters(), before.target.parameters(), strict=True):
        assert torch.equal(new, old)
    for new, old in zip(agent.critic.parameters(), before.critic.parameters(), strict=True):
        assert not torch.equal(new, old)
    dqn.polyak_update(agent.target, agent.critic, tau)
    targets = agent.target.parameters()
    old_targets = before.target.parameters()
    for new, old, source in zip(targets, old_targets, agent.critic.parameters(), strict=True):
        torch.testing.assert_close(new, (1 - tau) * old + tau * source)


def test_the_target_is_copied_by_default(dqn):
    assert dqn.Args().tau == 1
    agent, _ = replay_agent(dqn)
    dqn.polyak_update(agent.target, agent.critic, agent.args.tau)
    for new, source in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(new, source)


def test_epsilon_falls_as_it_should(dqn):
    values = [dqn.linear_schedule(1.0, 0.05, 50, step) for step in (0, 25, 50, 51, 1000)]
    assert values == pytest.approx([1, 0.525, 0.05, 0.05, 0.05])
    assert dqn.linear_schedule(1.0, 0.1, 0, 1) == pytest.approx(0.1)


def test_epsilon_greedy(dqn):
    """Uniform with probability epsilon, each environment for itself; greedy otherwise."""
    agent, _ = replay_agent(dqn)
    obs = torch.randn(1, 3).expand(8000, 3).numpy()
    greedy = agent.critic.act(obs)
    assert (greedy == greedy[0]).all()
    assert greedy[0] == agent.critic(torch.from_numpy(obs[0])).argmax().item()
    explored = dqn.epsilon_greedy(greedy, 0.4, 4)
    assert (explored != greedy).mean() == pytest.approx(0.4 * 3 / 4, abs=0.02)
    counts = torch.bincount(torch.from_numpy(dqn.epsilon_greedy(greedy, 1.0, 4)), minlength=4)
    assert ((counts - 2000).abs() < 200).all()


def test_a_policy_that_is_not_deterministic_explores_with_end_e(dqn):
    agent, _ = replay_agent(dqn, end_e=0.4)
    obs = torch.randn(1, 3).expand(8000, 3).numpy()
    explored = agent.actor.act(obs, deterministic=False)
    share = (explored != agent.actor.act(obs)).mean()
    assert share == pytest.approx(0.4 * 3 / 4, abs=0.02)


SWITCHES = list(itertools.product([True, False], repeat=3))


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu"])
@pytest.mark.parametrize("dueling, layer_norm, scale_values", SWITCHES)
def test_the_greedy_action_in_numpy_is_the_one_in_torch(
    dqn, activation, dueling, layer_norm, scale_values
):
    torch.manual_seed(0)
    flags = {"dueling": dueling, "layer_norm": layer_norm, "scale_values": scale_values}
    args = dqn.Args(hidden=(8, 8), activation=activation, **flags)
    network = dqn.QNetwork(args, discrete_spaces(dqn, actions=4))
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    obs = 3 * torch.randn(50, 20, 3)
    expected = network(obs).argmax(-1).numpy()
    # Rounding may decide between the closest action values.
    assert (network.act(obs.numpy()) == expected).mean() > 0.99
    assert len(np.unique(expected)) > 1
    assert network.act(obs[0, 0].numpy()).shape == ()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_layers_are_normalized_before_their_nonlinearity(dqn, layer_norm):
    """A factor and an offset that all units of a layer share make no difference to any row."""
    torch.manual_seed(0)
    args = dqn.Args(hidden=(64, 64), activation="tanh", layer_norm=layer_norm)
    network = dqn.QNetwork(args, discrete_spaces(dqn, actions=4))
    obs = torch.randn(10, 3)
    before = network(obs)
    linear_layers = [layer for layer in network.net if isinstance(layer, torch.nn.Linear)]
    assert len(linear_layers) == 3
    for layer in linear_layers[:-1]:
        layer.weight.data = 10 * layer.weight + 1
        layer.bias.data = 10 * layer.bias + 1
    assert torch.allclose(network(obs), before, atol=1e-3) == layer_norm
    torch.testing.assert_close(network(obs[:1]), network(obs)[:1])


def test_when_dqn_learns_and_moves_its_target(dqn, tmp_path, monkeypatch):
    """Epsilon falls from the first step on. The current network acts."""
    epsilons = []
    acting = []
    counts = {"update": 0, "polyak_update": 0}
    originals = {
        "epsilon_greedy": dqn.epsilon_greedy,
        "update": dqn.Agent.update,
        "polyak_update": dqn.polyak_update,
        "to_numpy": dqn.QNetwork.to_numpy,
    }
    updates_at_to_numpy = []

    def epsilon_greedy(action, epsilon, actions):
        epsilons.append(epsilon)
        acting.append(updates_at_to_numpy[-1] == counts["update"])
        return originals["epsilon_greedy"](action, epsilon, actions)

    def update(self, batch):
        counts["update"] += 1
        return originals["update"](self, batch)

    def polyak_update(target, source, tau):
        counts["polyak_update"] += 1
        return originals["polyak_update"](target, source, tau)

    def to_numpy(self):
        updates_at_to_numpy.append(counts["update"])
        return originals["to_numpy"](self)

    monkeypatch.setattr(dqn, "epsilon_greedy", epsilon_greedy)
    monkeypatch.setattr(dqn.Agent, "update", update)
    monkeypatch.setattr(dqn, "polyak_update", polyak_update)
    monkeypatch.setattr(dqn.QNetwork, "to_numpy", to_numpy)
    flags = {"train_frequency": 4, "target_network_frequency": 10, "exploration_fraction": 0.5}
    flags |= {"start_e": 0.9, "end_e": 0.1, "run_dir": str(tmp_path / "run")}
    dqn.train(dqn.Args(env_id="CartPole-v1", **SMALL_REPLAY_RUN, **flags))
    expected = [max(0.1, 0.9 - 0.8 * step / 200) for step in range(2, 401, 2)]
    np.testing.assert_allclose(epsilons, expected)
    assert counts == {"update": 300 // 4, "polyak_update": 300 // 10}
    assert all(acting)


@pytest.mark.parametrize("anneal_lr", [True, False])
def test_the_learning_rate_falls_with_the_steps_of_the_whole_run(
    dqn, tmp_path, monkeypatch, anneal_lr
):
    """A resumed run with a larger total continues on the schedule of that total."""
    rates = []
    update = dqn.Agent.update

    def recorded(self, batch):
        rates.append(self.optimizer.lr.item())
        return update(self, batch)

    monkeypatch.setattr(dqn.Agent, "update", recorded)
    flags = {"learning_starts": 10, "eval_every": 0, "run_dir": str(tmp_path / "run")}
    flags |= {"anneal_lr": anneal_lr, "learning_rate": 0.1, "train_frequency": 40}
    for total, updates_at in ((100, [50, 90]), (400, [130, 170, 210, 250, 290, 330, 370])):
        rates.clear()
        dqn.train(dqn.Args(total_timesteps=total, resume=total > 100, **flags))
        expected = [0.1 * (1 - step / total) if anneal_lr else 0.1 for step in updates_at]
        assert rates == pytest.approx(expected)
