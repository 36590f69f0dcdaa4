"""SAC's own mathematics, each formula against a slow reference written here from the paper."""

import copy
import math

import mpmath
import numpy as np
import pytest
import torch

LOW, HIGH = [-0.4, -1.0, 0.0], [0.4, 3.0, 10.0]


def density(u, mean, std):
    """log p of tanh u, the action in half widths of its box: the normal density over a slope taken numerically."""
    with mpmath.workdps(60):
        return float(mpmath.log(mpmath.npdf(u, mean, std)) - mpmath.log(mpmath.diff(mpmath.tanh, u)))


@pytest.mark.parametrize("u", [-10.0, -3.0, -0.1, 0.0, 1.5, 10.0])
def test_log_probability_is_that_of_a_numerical_jacobian(sac, u):
    mean, std = torch.tensor([[0.25, 0.25, -0.5]]), torch.tensor([[0.5, 0.5, 2.0]])
    log_prob = sac.log_prob(torch.full((1, 3), u), (u - mean) / std, std.log())
    truth = sum(density(u, *x) for x in zip(mean[0].tolist(), std[0].tolist()))
    assert log_prob.item() == pytest.approx(truth, rel=1e-5, abs=1e-5)
    if abs(u) == 10:  # the usual form, for which tanh u has rounded to 1
        naive = torch.distributions.Normal(mean, std).log_prob(torch.tensor(u))
        naive -= torch.log(1 - torch.tanh(torch.tensor(u)) ** 2 + 1e-6)
        assert abs(naive.sum().item() - truth) > 1


@pytest.mark.parametrize("written, taken", [(-30, -20), (-1, -1), (5, 2)])
def test_the_spread_of_actions_has_bounds(sac, written, taken):
    actor = sac.Actor(3, LOW, HIGH, (8,), "relu")
    for x in actor.net[-1].parameters():
        x.data.zero_()
    actor.net[-1].bias.data[3:] = written
    torch.testing.assert_close(actor(torch.randn(4, 3))[2], torch.full((4, 3), math.exp(taken)), rtol=1e-5, atol=0)


def test_the_density_of_actions_integrates_to_one_over_the_box(sac):
    """In half widths of it."""
    low, high = torch.tensor([[-1.0], [3.0]], dtype=torch.float64)
    u = torch.linspace(-12, 12, 200_001, dtype=torch.float64)[:, None]
    action, log_prob = sac.squash(u, low, high), sac.log_prob(u, u, torch.zeros_like(u))
    assert torch.trapezoid(log_prob.exp(), action[:, 0] / 2).item() == pytest.approx(1, abs=1e-6)
    assert action.min() >= -1 and action.max() <= 3


def test_actions_stay_in_the_box_to_the_last_bit(sac):
    low, high = torch.tensor([-0.1, 0.1, -3.3]), torch.tensor([0.3, 0.7, 1.1])
    u = torch.tensor([[-50.0], [50.0], [9.01], [-9.01]]).expand(4, 3)
    action = sac.squash(u, low, high)
    assert (action >= low).all() and (action <= high).all()
    assert torch.equal(action[0], low) and torch.equal(action[1], high)


def test_losses_by_hand(sac):
    y = sac.soft_target(
        reward=torch.tensor([1.0, 2.0]),
        terminated=torch.tensor([0.0, 1.0]),
        next_q=torch.tensor([[10.0, 5.0], [8.0, 7.0]]),
        next_log_prob=torch.tensor([-1.0, -3.0]),
        alpha=torch.tensor(0.5),
        gamma=0.9,
    )
    assert y.tolist() == pytest.approx([1 + 0.9 * (8 + 0.5), 2.0])  # the terminal one gets no entropy either
    q = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    assert sac.critic_loss(q, torch.tensor([0.0, 1.0])).item() == pytest.approx((1 + 1) / 4 + (9 + 16) / 4)
    assert sac.actor_loss(q, torch.tensor([2.0, 4.0]), torch.tensor(0.1)).item() == pytest.approx(
        (0.2 - 1 + 0.4 - 2) / 2
    )
    log_alpha = torch.tensor(0.3, requires_grad=True)
    sac.alpha_loss(log_alpha, torch.tensor([1.0, 2.0]), -4.0).backward()
    assert log_alpha.grad.item() == pytest.approx(2.5)  # entropy 1.5 too low by 2.5: alpha rises when descended
    assert sac.alpha_loss(log_alpha, torch.tensor([1.0, 2.0]), -4.0).item() == pytest.approx(0.3 * 2.5)


def test_stacked_critics_are_separate_networks(sac):
    torch.manual_seed(0)
    stacked = sac.mlp((5, 7, 6, 1), "relu", lambda i, o: sac.StackedLinear(2, i, o))
    obs, action = torch.randn(9, 3), torch.randn(9, 2)
    q = sac.q_values(stacked, obs, 2 * action + 1, torch.tensor([-1.0, -1.0]), torch.tensor([3.0, 3.0]))
    assert q.shape == (2, 9)
    q.square().sum().backward()
    for k in range(2):
        alone = torch.nn.Sequential(
            *[m for i, o in ((5, 7), (7, 6), (6, 1)) for m in (torch.nn.Linear(i, o), torch.nn.ReLU())][:-1]
        )
        for single, both in zip(alone[::2], stacked[::2]):
            single.weight.data, single.bias.data = both.weight[k].T.clone(), both.bias[k, 0].clone()
        out = alone(torch.cat((obs, action), -1))[:, 0]
        torch.testing.assert_close(q[k], out)
        out.square().sum().backward()
        for single, both in zip(alone[::2], stacked[::2]):
            torch.testing.assert_close(both.weight.grad[k], single.weight.grad.T)
            torch.testing.assert_close(both.bias.grad[k, 0], single.bias.grad)


def test_stacked_layers_begin_as_linear_ones(sac):
    torch.manual_seed(0)
    layer, linear = sac.StackedLinear(2, 64, 5000), torch.nn.Linear(64, 5000)
    for ours, theirs in ((layer.weight, linear.weight), (layer.bias, linear.bias)):
        assert ours.abs().max().item() == pytest.approx(theirs.abs().max().item(), rel=1e-3)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.03)
    assert not torch.equal(layer.weight[0], layer.weight[1])


def reference_step(agent, optimizers, batch, noises, args):
    """One gradient step of everything, sample by sample and critic by critic, with autograd and Adam alone."""
    width = (agent.columns[0], agent.columns[1])
    rows = [
        (r[: width[0]], r[width[0] : sum(width)], r[sum(width)], r[sum(width) + 1], r[sum(width) + 2 :]) for r in batch
    ]
    critic_optimizer, actor_optimizer, alpha_optimizer = optimizers
    alpha = agent.log_alpha.exp().item()
    center, half = (agent.actor.high + agent.actor.low) / 2, (agent.actor.high - agent.actor.low) / 2

    def act(obs, noise):
        out = agent.actor.net(obs)
        mean, std = out[: width[1]], out[width[1] :].clamp(-20, 2).exp()
        u = mean + std * noise
        normal = torch.distributions.Normal(mean.double(), std.double()).log_prob(u.double())
        log_prob = (normal - torch.log(1 - torch.tanh(u.double()) ** 2)).sum()
        return center + half * torch.tanh(u), log_prob.float(), std

    def q(net, k, obs, action):
        x = torch.cat((obs, (action - center) / half))
        for layer in list(net)[::2]:
            x = x @ layer.weight[k] + layer.bias[k, 0]
            x = x.relu() if layer.weight.shape[-1] > 1 else x
        return x[0]

    loss, values = 0, []
    for (s, a, r, d, s2), noise in zip(rows, noises[0]):
        with torch.no_grad():
            a2, log_prob, _ = act(s2, noise)
            y = r + args.gamma * (1 - d) * (min(q(agent.target, k, s2, a2) for k in range(2)) - alpha * log_prob)
        loss = loss + sum(0.5 * (q(agent.critic, k, s, a) - y) ** 2 for k in range(2)) / len(rows)
        values += [q(agent.critic, k, s, a).item() for k in range(2)]
    metrics = {"loss/critic": loss.item(), "value/mean": np.mean(values), "policy/alpha": alpha}
    critic_optimizer.zero_grad()
    loss.backward()
    critic_optimizer.step()

    loss, log_probs, stds = 0, [], []
    for (s, _, _, _, _), noise in zip(rows, noises[1]):
        a, log_prob, std = act(s, noise)
        loss = loss + (alpha * log_prob - torch.minimum(*[q(agent.critic, k, s, a) for k in range(2)])) / len(rows)
        log_probs.append(log_prob.item())
        stds += std.tolist()
    metrics |= {"loss/actor": loss.item(), "policy/entropy": -np.mean(log_probs), "policy/std": np.mean(stds)}
    actor_optimizer.zero_grad()
    loss.backward()
    actor_optimizer.step()

    alpha_optimizer.zero_grad()
    loss = -agent.log_alpha * (np.mean(log_probs) + agent.target_entropy)
    loss.backward()
    alpha_optimizer.step()
    with torch.no_grad():
        for target, critic in zip(agent.target.parameters(), agent.critic.parameters()):
            target.copy_((1 - args.tau) * target + args.tau * critic)
    return metrics | {"loss/alpha": loss.item()}


def test_update_is_the_pseudocode(sac):
    """Three updates against the reference, by which every loss, its order and its reach are pinned down; and what
    there is to log of them."""
    args = sac.Args(hidden=(8, 8), tau=0.3, policy_lr=1e-2, q_lr=2e-2, batch_size=16, gamma=0.9)
    torch.manual_seed(1)
    agent = sac.Agent(args, 3, [-2.0, 0.0], [2.0, 1.0], torch.device("cpu"))
    slow = copy.deepcopy(agent)
    groups = (slow.critic.parameters(), 2e-2), (slow.actor.parameters(), 1e-2), ([slow.log_alpha], 1e-2)
    optimizers = [torch.optim.Adam(parameters, lr=lr) for parameters, lr in groups]
    for seed in range(3):
        torch.manual_seed(100 + seed)
        batch = torch.randn(16, 3 + 2 + 1 + 1 + 3)
        batch[:, 6] = (torch.arange(16) % 3 == 0).float()
        torch.manual_seed(seed)
        metrics = agent.update(batch)
        torch.manual_seed(seed)
        noises = torch.randn(16, 2), torch.randn(16, 2)
        expected = reference_step(slow, optimizers, batch, noises, args)
        assert {name: x.item() for name, x in metrics.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for (name, ours), theirs in zip(agent.named_parameters(), slow.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda text: f"{name}: {text}")


def test_the_actor_step_leaves_no_trace_in_the_critics(sac):
    args = sac.Args(hidden=(8,), autotune=False)
    agent = sac.Agent(args, 3, [-1.0], [1.0], torch.device("cpu"))
    _, log_prob, _ = agent.actor(torch.randn(4, 3))
    before = [p.clone() for p in agent.critic.parameters()]
    action, log_prob, _ = agent.actor(torch.randn(4, 3))
    q = sac.q_values(agent.critic, torch.randn(4, 3), action, agent.actor.low, agent.actor.high)
    loss = sac.actor_loss(q, log_prob, 0.2)
    sac.descend(agent.actor_optimizer, loss)
    assert [bool(x.any()) for x in agent.actor_optimizer.held] == [True] * len([*agent.actor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(before, agent.critic.parameters()))


def test_adam_takes_gradients_of_any_strides(sac):
    """Such as a sum's, which is one number for all, and that of a transposed weight."""
    scale = torch.arange(6.0).view(2, 3)
    for loss, gradient in ((torch.sum, torch.ones(3, 2)), (lambda w: (w.t() * scale).sum(), scale.t())):
        optimizer = sac.Adam([torch.nn.Parameter(torch.zeros(3, 2))], 1.0)
        sac.descend(optimizer, loss(*optimizer.weights))
        torch.testing.assert_close(optimizer.mean_0, 0.1 * gradient)


@pytest.mark.parametrize("act_dim, target_entropy, expected", [(3, None, -3.0), (3, -0.5, -0.5)])
def test_target_entropy(sac, act_dim, target_entropy, expected):
    args = sac.Args(hidden=(8,), target_entropy=target_entropy)
    assert sac.Agent(args, 3, [-1.0] * act_dim, [1.0] * act_dim, torch.device("cpu")).target_entropy == expected


def test_a_fixed_temperature_stays(sac):
    args = sac.Args(hidden=(8,), autotune=False, alpha=0.07)
    agent = sac.Agent(args, 3, [-1.0], [1.0], torch.device("cpu"))
    metrics = agent.update(torch.randn(16, 9))
    assert agent.log_alpha.exp().item() == pytest.approx(0.07) and "loss/alpha" not in metrics
