"""SAC's own mathematics, each formula against a slow reference written here from the paper."""

import copy
import math

import mpmath
import numpy as np
import pytest
import torch
from small_agents import box_spaces, transitions


def bounded_spaces(sac, act_dim):
    """Spaces of three observations and a box of `act_dim` dimensions."""
    return sac.Spaces(3, act_dim, [-1.0] * act_dim, [1.0] * act_dim)


def random_batch(act_dim, terminated):
    """A batch of 16 random transitions."""
    return {
        "obs": torch.randn(16, 3),
        "action": torch.randn(16, act_dim),
        "reward": torch.randn(16),
        "terminated": terminated,
        "next_obs": torch.randn(16, 3),
    }


def log_density(u, mean, std):
    """log p of the action tanh u: a normal density over the slope of tanh, taken numerically."""
    with mpmath.workdps(60):
        slope = mpmath.diff(mpmath.tanh, u)
        return float(mpmath.log(mpmath.npdf(u, mean, std)) - mpmath.log(slope))


@pytest.mark.parametrize("u", [-10.0, -3.0, -0.1, 0.0, 1.5, 10.0])
def test_log_probability_is_that_of_a_numerical_jacobian(sac, u):
    mean = torch.tensor([[0.25, 0.25, -0.5]])
    std = torch.tensor([[0.5, 0.5, 2.0]])
    log_prob = sac.log_prob(torch.full((1, 3), u), (u - mean) / std, std.log())
    pairs = zip(mean[0].tolist(), std[0].tolist(), strict=True)
    expected = sum(log_density(u, *pair) for pair in pairs)
    assert log_prob.item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
    if abs(u) == 10:  # the usual form fails where tanh u rounds to 1
        usual = torch.distributions.Normal(mean, std).log_prob(torch.tensor(u))
        usual -= torch.log(1 - torch.tanh(torch.tensor(u)) ** 2 + 1e-6)
        assert abs(usual.sum().item() - expected) > 1


@pytest.mark.parametrize("output, expected", [(-30, -20), (-1, -1), (5, 2)])
def test_the_log_of_the_standard_deviation_is_bounded(sac, output, expected):
    actor = sac.Actor(sac.Args(hidden=(8,)), bounded_spaces(sac, 3))
    for parameter in actor.net[-1].parameters():
        parameter.data.zero_()
    actor.net[-1].bias.data[3:] = output
    std = actor(torch.randn(4, 3))[2]
    torch.testing.assert_close(std, torch.full((4, 3), math.exp(expected)), rtol=1e-5, atol=0)


def test_the_density_of_actions_integrates_to_one_over_the_box(sac):
    """Also after scaling to a box from -1 to 3, in its half widths."""
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    density = sac.log_prob(u, u, torch.zeros_like(u)).exp()
    action = u.tanh()
    assert torch.trapezoid(density, action[:, 0]).item() == pytest.approx(1, abs=1e-6)
    scale = sac.action_scaler(np.array([-1.0]), np.array([3.0]))
    scaled = torch.from_numpy(scale(action.numpy()))[:, 0]
    assert torch.trapezoid(density, scaled / 2).item() == pytest.approx(1, abs=1e-6)
    assert scaled.min() >= -1
    assert scaled.max() <= 3


def test_actions_are_the_tanh_of_u(sac):
    """Of the mean if deterministic; otherwise of a normal sample, as `forward` draws it."""
    torch.manual_seed(0)
    actor = sac.Actor(sac.Args(hidden=(8,)), box_spaces(sac))
    obs = torch.randn(16, 3)
    mean, log_std = actor.mean_and_log_std(obs)
    np.testing.assert_allclose(actor.act(obs.numpy()), mean.tanh().detach(), rtol=1e-5)
    torch.manual_seed(1)
    action, log_prob, _ = actor(obs)
    torch.manual_seed(1)
    noise = torch.randn(16, 2)
    u = mean + log_std.exp() * noise
    torch.testing.assert_close(action, u.tanh())
    torch.testing.assert_close(log_prob, sac.log_prob(u, noise, log_std))
    torch.manual_seed(1)
    acted = actor.act(obs.numpy(), deterministic=False)
    np.testing.assert_allclose(acted, action.detach(), rtol=1e-5)


def test_losses_by_hand(sac):
    y = sac.soft_target(
        reward=torch.tensor([1.0, 2.0]),
        terminated=torch.tensor([0.0, 1.0]),
        next_q=torch.tensor([[10.0, 5.0], [8.0, 7.0]]),
        next_log_prob=torch.tensor([-1.0, -3.0]),
        alpha=torch.tensor(0.5),
        gamma=0.9,
    )
    # After a termination there is no entropy either.
    assert y.tolist() == pytest.approx([1 + 0.9 * (8 + 0.5), 2.0])
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    loss = sac.critic_loss(q, torch.tensor([0.0, 1.0]))
    assert loss.item() == pytest.approx((1 + 1) / 4 + (9 + 16) / 4)
    loss = sac.actor_loss(q, torch.tensor([2.0, 4.0]), torch.tensor(0.1))
    assert loss.item() == pytest.approx((0.2 - 1 + 0.4 - 2) / 2)
    log_alpha = torch.tensor(0.3, requires_grad=True)
    loss = sac.alpha_loss(log_alpha, torch.tensor([1.0, 2.0]), -4.0)
    loss.backward()
    # The log-probability is 1.5 and the target entropy -4, so the entropy is too high by 2.5.
    assert log_alpha.grad.item() == pytest.approx(2.5)
    assert loss.item() == pytest.approx(0.3 * 2.5)


def single_critic(stacked, k):
    """Critic k of a stack of critics, as a network of its own."""
    layers = []
    for layer in stacked:
        if not hasattr(layer, "weight"):
            layers.append(torch.nn.ReLU())
            continue
        linear = torch.nn.Linear(*layer.weight.shape[1:])
        linear.weight.data = layer.weight[k].T.clone()
        linear.bias.data = layer.bias[k, 0].clone()
        layers.append(linear)
    return torch.nn.Sequential(*layers)


def test_stacked_critics_are_separate_networks(sac):
    torch.manual_seed(0)
    args = sac.Args(hidden=(7, 6))
    stacked = sac.Agent(args, box_spaces(sac)).critic
    obs = torch.randn(9, 3)
    action = torch.randn(9, 2)
    q = sac.q_values(stacked, obs, action)
    assert q.shape == (2, 9)
    q.square().sum().backward()
    for k in range(2):
        single = single_critic(stacked, k)
        out = single(torch.cat((obs, action), -1))[:, 0]
        torch.testing.assert_close(q[k], out)
        out.square().sum().backward()
        for linear, layer in zip(single[::2], stacked[::2], strict=True):
            torch.testing.assert_close(layer.weight.grad[k], linear.weight.grad.T)
            torch.testing.assert_close(layer.bias.grad[k, 0], linear.bias.grad)


def test_stacked_layers_start_as_linear_ones(sac):
    torch.manual_seed(0)
    layer = sac.StackedLinear(2, 64, 5000)
    linear = torch.nn.Linear(64, 5000)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    assert not torch.equal(layer.weight[0], layer.weight[1])


class Reference:
    """Gradient steps transition by transition and critic by critic, with the Adam of torch."""

    def __init__(self, agent, args):
        self.agent = agent
        self.args = args
        self.critic_adam = torch.optim.Adam(agent.critic.parameters(), lr=args.q_lr)
        self.actor_adam = torch.optim.Adam(agent.actor.parameters(), lr=args.policy_lr)
        self.alpha_adam = torch.optim.Adam([agent.log_alpha], lr=args.policy_lr)

    def act(self, obs, noise):
        """Action, log-probability and standard deviations for one observation."""
        mean, log_std = self.agent.actor.net(obs).chunk(2)
        std = log_std.clamp(-20, 2).exp()
        u = mean + std * noise
        normal = torch.distributions.Normal(mean.double(), std.double()).log_prob(u.double())
        log_prob = (normal - torch.log(1 - torch.tanh(u.double()) ** 2)).sum()
        return torch.tanh(u), log_prob.float(), std

    def q(self, network, k, obs, action):
        """Q_k(s, a) of one transition."""
        x = torch.cat((obs, action))
        for layer in network[::2]:
            x = x @ layer.weight[k] + layer.bias[k, 0]
            if layer is not network[-1]:
                x = x.relu()
        return x[0]

    def step(self, batch, next_noises, noises):
        """One gradient step of everything; returns the metrics."""
        agent = self.agent
        args = self.args
        rows = transitions(batch)
        alpha = agent.log_alpha.exp().item()
        metrics = {"policy/alpha": alpha}

        loss = 0
        values = []
        for row, noise in zip(rows, next_noises, strict=True):
            with torch.no_grad():
                next_action, log_prob, _ = self.act(row["next_obs"], noise)
                next_qs = [self.q(agent.target, k, row["next_obs"], next_action) for k in range(2)]
                next_value = min(next_qs) - alpha * log_prob
                y = row["reward"] + args.gamma * (1 - row["terminated"]) * next_value
            for k in range(2):
                q = self.q(agent.critic, k, row["obs"], row["action"])
                loss = loss + 0.5 * (q - y) ** 2 / len(rows)
                values.append(q.item())
        metrics["loss/critic"] = loss.item()
        metrics["value/mean"] = np.mean(values)
        self.descend(self.critic_adam, loss)

        loss = 0
        log_probs = []
        stds = []
        for row, noise in zip(rows, noises, strict=True):
            action, log_prob, std = self.act(row["obs"], noise)
            qs = [self.q(agent.critic, k, row["obs"], action) for k in range(2)]
            loss = loss + (alpha * log_prob - torch.minimum(*qs)) / len(rows)
            log_probs.append(log_prob.item())
            stds += std.tolist()
        metrics["loss/actor"] = loss.item()
        metrics["policy/entropy"] = -np.mean(log_probs)
        metrics["policy/std"] = np.mean(stds)
        self.descend(self.actor_adam, loss)

        loss = -agent.log_alpha * (np.mean(log_probs) + agent.target_entropy)
        metrics["loss/alpha"] = loss.item()
        self.descend(self.alpha_adam, loss)

        with torch.no_grad():
            pairs = zip(agent.target.parameters(), agent.critic.parameters(), strict=True)
            for target, critic in pairs:
                target.copy_((1 - args.tau) * target + args.tau * critic)
        return metrics

    def descend(self, adam, loss):
        """One step of an optimizer."""
        adam.zero_grad()
        loss.backward()
        adam.step()


def test_update_is_the_pseudocode(sac):
    """Three updates against the reference, which fix every loss, their order and the metrics."""
    args = sac.Args(hidden=(8, 8), tau=0.3, policy_lr=1e-2, q_lr=2e-2, batch_size=16, gamma=0.9)
    torch.manual_seed(1)
    agent = sac.Agent(args, box_spaces(sac))
    reference = Reference(copy.deepcopy(agent), args)
    for seed in range(3):
        torch.manual_seed(100 + seed)
        batch = random_batch(2, terminated=(torch.arange(16) % 3 == 0).float())
        torch.manual_seed(seed)
        metrics = agent.update(batch)
        torch.manual_seed(seed)
        next_noises = torch.randn(16, 2)
        noises = torch.randn(16, 2)
        expected = reference.step(batch, next_noises, noises)
        metrics = {name: value.item() for name, value in metrics.items()}
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
        theirs = dict(reference.agent.named_parameters())
        for name, parameter in agent.named_parameters():
            np.testing.assert_allclose(
                parameter.detach(), theirs[name].detach(), rtol=1e-4, atol=2e-5, err_msg=name
            )


def test_the_actor_step_leaves_no_trace_in_the_critics(sac):
    agent = sac.Agent(sac.Args(hidden=(8,), autotune=False), bounded_spaces(sac, 1))
    before = [parameter.clone() for parameter in agent.critic.parameters()]
    action, log_prob, _ = agent.actor(torch.randn(4, 3))
    q = sac.q_values(agent.critic, torch.randn(4, 3), action)
    sac.descend(agent.actor_optimizer, sac.actor_loss(q, log_prob, 0.2))
    assert len(agent.actor_optimizer.gradients) == len(list(agent.actor.parameters()))
    for gradient in agent.actor_optimizer.gradients:
        assert gradient.any()
    for old, new in zip(before, agent.critic.parameters(), strict=True):
        assert torch.equal(old, new)
        assert new.grad is None


def test_adam_takes_the_gradient_of_a_sum(sac):
    """Its strides are 0: all elements are one number."""
    optimizer = sac.Adam([torch.nn.Parameter(torch.zeros(3, 2))], 1.0)
    sac.descend(optimizer, torch.sum(*optimizer.parameters_held))
    torch.testing.assert_close(optimizer.mean_0, 0.1 * torch.ones(3, 2))


def test_adam_takes_the_gradient_of_a_transposed_weight(sac):
    """Its strides are those of the transposed tensor."""
    scale = torch.arange(6.0).view(2, 3)
    weight = torch.nn.Parameter(torch.zeros(3, 2))
    optimizer = sac.Adam([weight], 1.0)
    sac.descend(optimizer, (weight.t() * scale).sum())
    torch.testing.assert_close(optimizer.mean_0, 0.1 * scale.t())


@pytest.mark.parametrize("target_entropy, expected", [(None, -3.0), (-0.5, -0.5)])
def test_target_entropy(sac, target_entropy, expected):
    args = sac.Args(hidden=(8,), target_entropy=target_entropy)
    assert sac.Agent(args, bounded_spaces(sac, 3)).target_entropy == expected


def test_a_fixed_temperature_stays(sac):
    args = sac.Args(hidden=(8,), autotune=False, alpha=0.07)
    agent = sac.Agent(args, bounded_spaces(sac, 1))
    metrics = agent.update(random_batch(1, terminated=torch.zeros(16)))
    assert agent.log_alpha.exp().item() == pytest.approx(0.07)
    assert "loss/alpha" not in metrics
