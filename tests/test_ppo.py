"""PPO's own mathematics against slow references."""

import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from common import load_algo
from small_agents import SMALL_ROLLOUT_RUN, every_device, flat, rollout_agent

torch.set_num_threads(1)


@pytest.fixture
def ppo():
    return load_algo("ppo")


def test_the_loss_by_hand(ppo):
    """Ratios 2, 2, 1/2, 1/2 and advantages of both signs, at clip 0.2."""
    ratio = torch.tensor([2.0, 2.0, 0.5, 0.5])
    loss = ppo.policy_loss(ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8) / 4)


def test_the_loss_is_that_of_the_paper(ppo):
    """At random ratios, advantages and clip coefficients."""
    torch.manual_seed(0)
    ratio = torch.randn(1000).exp()
    advantage = torch.randn(1000)
    for clip in (0.1, 0.3):
        clipped = ratio.clamp(1 - clip, 1 + clip)
        expected = -torch.minimum(ratio * advantage, clipped * advantage).mean()
        torch.testing.assert_close(ppo.policy_loss(ratio, advantage, clip), expected)


def test_clipped_samples_have_no_gradient(ppo):
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0])
    ppo.policy_loss(log_ratio.exp(), advantage, 0.2).backward()
    assert (log_ratio.grad != 0).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_the_update_descends_the_sum_of_its_losses(ppo, ent_coef):
    """The gradient of (5) shows in the momentum of the optimizer after one step."""
    torch.manual_seed(0)
    agent = rollout_agent(ppo, box=False, ent_coef=ent_coef)
    optimizer = agent.optimizer
    obs = torch.randn(32, 4)
    action = torch.randint(3, (32,))
    old_log_prob = agent.actor(obs).log_prob(action).detach() + 0.3 * torch.randn(32)
    advantage, target = torch.randn(2, 32)
    policy = agent.actor(obs)
    ratio = (policy.log_prob(action) - old_log_prob).exp()
    loss_pi = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    loss_v = 0.5 * (agent.value(obs) - target).square().mean()
    loss = loss_pi + 0.5 * loss_v - ent_coef * policy.entropy().mean()
    gradient = flat(torch.autograd.grad(loss, optimizer.parameters_held))
    gradient *= min(1, 0.5 / gradient.norm().item())
    batch = {
        "obs": obs,
        "action": action.float(),
        "log_prob": old_log_prob,
        "advantage": advantage,
        "target": target,
    }
    agent.update(batch)
    count = len(optimizer.parameters_held)
    momentum = flat([optimizer.get_buffer(f"mean_{i}") for i in range(count)])
    torch.testing.assert_close(momentum, 0.1 * gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale, norm", [(10.0, 0.5), (0.1, 0.2)])
def test_the_gradient_is_clipped_to_a_norm(ppo, scale, norm):
    x = torch.nn.Parameter(torch.zeros(4))
    optimizer = ppo.Adam([x], lr=1.0)
    ppo.descend(optimizer, scale * x.sum(), 0.5)
    assert optimizer.gradients[0].norm().item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("lr_as_tensor", [False, True])
@every_device
def test_descend_takes_the_steps_of_torch_adam(ppo, device, lr_as_tensor):
    torch.manual_seed(0)
    ours = ppo.mlp((3, 8, 2), "tanh", 1.0).to(device)
    theirs = ppo.mlp((3, 8, 2), "tanh", 1.0).to(device)
    theirs.load_state_dict(ours.state_dict())
    lr = torch.tensor(0.1, device=device) if lr_as_tensor else 0.1
    our_adam = ppo.Adam(ours.parameters(), lr, 1e-5)
    our_adam.to(device)
    their_adam = torch.optim.Adam(theirs.parameters(), 0.1, eps=1e-5)
    for _ in range(5):
        x = torch.randn(16, 3, device=device)
        ppo.descend(our_adam, ours(x).square().mean(), float("inf"))
        their_adam.zero_grad()
        theirs(x).square().mean().backward()
        their_adam.step()
    for our_parameter, their_parameter in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(our_parameter, their_parameter)


def measured_batch(agent, n):
    """A batch of n random steps, and the logarithms of its ratios of new to old probabilities."""
    obs = torch.randn(n, 4)
    action = torch.randint(3, (n,))
    log_ratio = torch.randn(n)
    batch = {
        "obs": obs,
        "action": action.float(),
        "log_prob": agent.actor(obs).log_prob(action).detach() - log_ratio,
        "advantage": torch.randn(n),
        "target": torch.randn(n),
    }
    return batch, log_ratio


def test_the_divergence_is_the_estimator_that_is_never_negative(ppo):
    """E[(r - 1) - log r] over samples of the old policy; r is the ratio of new to old."""
    torch.manual_seed(0)
    agent = rollout_agent(ppo, box=False)
    batch, log_ratio = measured_batch(agent, 32)
    metrics = agent.measure(batch)
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert metrics["policy/kl"].item() == pytest.approx(expected, rel=1e-4)
    clipped = ((log_ratio.exp() - 1).abs() > 0.2).float().mean().item()
    assert metrics["policy/clip_frac"].item() == pytest.approx(clipped)


def test_what_ppo_logs(ppo):
    torch.manual_seed(0)
    agent = rollout_agent(ppo, box=False)
    batch, _ = measured_batch(agent, 64)
    batch["log_prob"] = 0.3 * torch.randn(64)
    metrics = agent.measure(batch)
    policy = agent.actor(batch["obs"])
    value = agent.value(batch["obs"])
    log_ratio = policy.log_prob(batch["action"]) - batch["log_prob"]
    ratio = log_ratio.exp()
    gain = ratio * batch["advantage"]
    clipped_gain = ratio.clamp(0.8, 1.2) * batch["advantage"]
    expected = {
        "loss/policy": -torch.minimum(gain, clipped_gain).mean(),
        "loss/value": (0.5 * (value - batch["target"]) ** 2).mean(),
        "policy/entropy": policy.entropy().mean(),
        "value/mean": value.mean(),
        "policy/kl": (ratio - 1 - log_ratio).mean(),
        "policy/clip_frac": ((ratio < 0.8) | (ratio > 1.2)).float().mean(),
    }
    assert metrics.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(metrics[name], tensor.detach())


def test_a_minibatch_has_equally_many_steps_of_every_environment(ppo, tmp_path, monkeypatch):
    """An epoch has every step of the rollout once, in an order of its own."""
    minibatches = []
    prepare = ppo.Agent.prepare

    def numbered(self, rollout):
        batch = prepare(self, rollout)
        numbers = torch.arange(24)
        batch["obs"][:, 0] = numbers % 3  # the environment
        batch["obs"][:, 1] = numbers // 3  # the step
        return batch

    def recorded(self, batch):
        minibatches.append(batch["obs"])

    monkeypatch.setattr(ppo.Agent, "prepare", numbered)
    monkeypatch.setattr(ppo.Agent, "update", recorded)
    flags = SMALL_ROLLOUT_RUN | {"num_envs": 3, "num_steps": 8, "update_epochs": 2}
    flags |= {"norm_obs": False, "run_dir": str(tmp_path / "run")}
    ppo.train(ppo.Args(env_id="Pendulum-v1", total_timesteps=24, **flags))
    assert len(minibatches) == 8
    for rows in minibatches:
        assert sorted(rows[:, 0].tolist()) == [0, 0, 1, 1, 2, 2]
    orders = []
    for epoch in (torch.cat(minibatches[:4]), torch.cat(minibatches[4:])):
        assert len({tuple(row) for row in epoch.tolist()}) == 24
        orders.append(epoch[:, 1])
    assert not orders[0].equal(orders[1])
    assert not orders[0].equal(orders[0].sort().values)


@pytest.mark.parametrize("target_kl, epochs", [(None, 3), (1e-12, 1)])
def test_an_epoch_too_far_is_the_last_of_its_rollout(ppo, tmp_path, monkeypatch, target_kl, epochs):
    """The divergence is measured over the whole rollout."""
    sizes = []
    rates = []
    measure = ppo.Agent.measure

    def recorded(self, batch):
        sizes.append(len(batch["obs"]))
        rates.append(self.optimizer.lr.item())
        return measure(self, batch)

    monkeypatch.setattr(ppo.Agent, "measure", recorded)
    flags = SMALL_ROLLOUT_RUN | {"update_epochs": 3, "target_kl": target_kl}
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=40, run_dir=str(tmp_path), **flags)
    result = ppo.train(args)
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    assert agent["optimizer.steps"] == 2 * epochs * 4
    assert result["policy/kl"] > 0
    assert sizes == [20] * (4 if target_kl else 2)
    assert rates[-1] == pytest.approx(3e-4 / 2)  # half of the run is left in the second rollout


@every_device
def test_a_resumed_run_lowers_its_learning_rate_further(ppo, tmp_path, monkeypatch, device):
    """The rate is a tensor on the device, where a graph or a compiled update reads it."""
    agents = []

    class RecordedAgent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append(self)

    monkeypatch.setattr(ppo, "Agent", RecordedAgent)
    flags = SMALL_ROLLOUT_RUN | {"env_id": "CartPole-v1", "device": device}
    flags["run_dir"] = str(tmp_path / "run")
    ppo.train(ppo.Args(**flags, total_timesteps=100))
    ppo.train(ppo.Args(**flags, total_timesteps=200, resume=True))
    rate = agents[1].optimizer.lr
    assert rate.device.type == device
    assert rate.item() == pytest.approx(3e-4 * 20 / 200)  # in the last of ten rollouts
