"""The mathematics of vpg, trpo and ppo against slow references, and many ranks against one."""

import copy
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from conftest import ON_POLICY, ROOT, command, load, rows, run

torch.set_num_threads(1)
SMALL_RUN = {"num_steps": 20, "num_minibatches": 4, "hidden": (8,), "eval_every": 0, "threads": 1, "device": "cpu"}

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])])


@pytest.fixture(params=ON_POLICY, ids=lambda path: path.stem)
def module(request):
    return load(request.param)


@pytest.fixture
def ppo():
    return load(ROOT / "algos" / "ppo.py")


@pytest.fixture
def trpo():
    return load(ROOT / "algos" / "trpo.py")


def advantages_by_definition(reward, value, next_value, terminated, ended, gamma, lam):
    """A_t as the lambda-weighted mean of n-step returns within the episode, one environment, in Python numbers."""
    result = []
    for t in range(len(reward)):
        last = next((k for k in range(t, len(reward)) if ended[k]), len(reward) - 1)
        returns = []
        for n in range(1, last - t + 2):
            total = sum(gamma**k * reward[t + k] for k in range(n))
            returns.append(total + gamma**n * (1 - terminated[t + n - 1]) * next_value[t + n - 1] - value[t])
        weights = [(1 - lam) * lam**n for n in range(len(returns) - 1)] + [lam ** (len(returns) - 1)]
        result.append(sum(w * r for w, r in zip(weights, returns)))
    return result


def test_gae_by_its_definition_with_ends_and_cuts_everywhere(module):
    """Five steps, each of which goes on, terminates or is cut: all 3^5 cases, as environments side by side."""
    cases = list(itertools.product([(0, 0), (1, 1), (0, 1)], repeat=5))
    terminated, ended = torch.tensor(cases, dtype=torch.float64).permute(2, 1, 0)
    torch.manual_seed(0)
    reward, value, next_value = torch.randn(3, 5, len(cases), dtype=torch.float64)
    next_value[:-1] = torch.where(ended[:-1] == 1, next_value[:-1], value[1:])  # s' is the next s within an episode
    ours = module.gae(reward, value, next_value, terminated, ended, 0.9, 0.8)
    for i in range(len(cases)):
        column = [x[:, i].tolist() for x in (reward, value, next_value, terminated, ended)]
        np.testing.assert_allclose(ours[:, i], advantages_by_definition(*column, 0.9, 0.8), atol=1e-12)


def test_gae_leaves_its_arguments_alone(module):
    tensors = [torch.rand(6, 2) for _ in range(5)]
    before = [x.clone() for x in tensors]
    module.gae(*tensors, 0.9, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before))


def test_running_moments_are_those_of_all_numbers(module):
    torch.manual_seed(0)
    normalizer, batches = module.Normalizer(3), [torch.randn(n, 2, 3) * n + n for n in (4, 1, 30)]
    for batch in batches:
        normalizer.update(batch)
    everything = torch.cat(batches).flatten(0, 1)
    torch.testing.assert_close(normalizer.mean, everything.mean(0))
    torch.testing.assert_close(normalizer.var, everything.var(0, correction=0))
    assert normalizer.count == len(everything)
    far = normalizer(everything.mean(0) + 1000 * everything.std(0))
    assert (far == 10).all() and normalizer(everything).mean().abs() < 1e-5


def actor(module, box, **options):
    low, high = ([-3.0, 0.0], [3.0, 1.0]) if box else (None, None)
    return module.Actor(4, 2 if box else 3, low, high, (8,), "tanh", **{"norm_obs": False, **options})


@pytest.mark.parametrize("box", [True, False])
def test_samples_follow_the_distribution(module, box):
    """Noise turned into actions has the log-probabilities that the policy says: mean -log p is its entropy."""
    torch.manual_seed(0)
    policy = actor(module, box)
    if box:
        policy.log_std.data = torch.tensor([-1.0, 0.5])
    obs = torch.randn(1, 4).expand(20_000, 4)
    choose, distribution = policy.in_numpy(), policy(obs)
    action = torch.from_numpy(choose(obs.numpy(), policy.noise(len(obs)))[0])
    assert -distribution.log_prob(action).mean().item() == pytest.approx(distribution.entropy()[0].item(), abs=0.03)
    if not box:
        share = torch.bincount(action, minlength=3) / len(obs)
        torch.testing.assert_close(share, distribution.probs[0].detach(), atol=0.02, rtol=0)
    np.testing.assert_allclose(choose(obs[:2].numpy(), 0)[0], distribution.mode[:2].detach(), rtol=1e-5)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu"])
def test_the_policy_in_numpy_is_the_one_in_torch(module, activation):
    """For any activation, with the normaliser, on observations of any shape; and it is the policy of now."""
    torch.manual_seed(0)
    policy = module.Actor(4, 3, [-np.inf] * 3, [np.inf] * 3, (8, 8), activation, True)
    policy.normalize.update(5 + 3 * torch.randn(10, 20, 4))
    for parameter in policy.parameters():
        parameter.data = torch.randn_like(parameter)
    obs = 5 + 20 * np.random.default_rng(0).normal(size=(7, 2, 4))
    x = policy.normalize(torch.from_numpy(obs).float())
    assert 0 < (x.abs() == 10).float().mean() < 0.5
    expected = policy(x).mean.detach().numpy()
    np.testing.assert_allclose(policy.act(obs), expected, rtol=1e-5, atol=1e-5)
    assert policy.act(obs[0, 0]).shape == (3,) and policy.act(obs).dtype == np.float32
    sampled = policy.act(obs, deterministic=False)
    assert sampled.shape == expected.shape and not np.allclose(sampled, expected)


def test_actions_fit_the_box_per_dimension(module):
    policy, unbounded = actor(module, True), module.Actor(4, 2, [-np.inf, -1.0], [np.inf] * 2, (8,), "tanh", False)
    for network in (policy.net, unbounded.net):
        network[-1].weight.data.zero_()  # so that an action is its noise
    _, to_env = policy.in_numpy()(np.zeros((4, 4)), np.float32([[0, 0], [1, 1], [-9, 9], [0.5, -0.5]]))
    assert to_env.tolist() == [[0, 0.5], [3, 1], [-3, 1], [1.5, 0.25]]
    assert unbounded.in_numpy()(np.zeros(4), np.float32([7, -7]))[1].tolist() == [7, -1]


def test_what_networks_begin_as(module):
    """Orthogonal layers of gain sqrt 2, the policy's last 0.01 and the value function's 1; a spread of 0.6."""
    agent = module.Agent(module.Args(hidden=(16, 16)), 4, 2, [-3.0, 0.0], [3.0, 1.0], torch.device("cpu"))
    for network, last in ((agent.actor.net, 0.01), (agent.critic, 1.0)):
        for layer, gain in zip(network[::2], (2**0.5, 2**0.5, last), strict=True):
            gains = torch.linalg.svdvals(layer.weight)
            torch.testing.assert_close(gains, torch.full_like(gains, gain))
            assert not layer.bias.any()
    assert agent.actor.log_std.tolist() == [-0.5, -0.5]


def test_the_ppo_loss_by_hand(ppo):
    """Ratios 2, 2, 1/2, 1/2 and advantages of both signs, at clip 0.2."""
    log_ratio = torch.tensor([2.0, 2.0, 0.5, 0.5]).log()
    loss = ppo.policy_loss(log_ratio, torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert loss.item() == pytest.approx(-(1.2 - 2 + 0.5 - 0.8) / 4)


def test_the_ppo_loss_is_the_papers(ppo):
    """Clipped as the paper writes it, at random ratios, advantages and clip coefficients."""
    torch.manual_seed(0)
    log_ratio, advantage, clip = torch.randn(1000), torch.randn(1000), 0.3
    ratio = log_ratio.exp()
    expected = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()
    torch.testing.assert_close(ppo.policy_loss(log_ratio, advantage, clip), expected)


def test_clipped_samples_have_no_gradient(ppo):
    log_ratio = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0], requires_grad=True)
    ppo.policy_loss(log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0]), 0.2).backward()
    assert (log_ratio.grad != 0).tolist() == [False, False, True, True, True]


@pytest.mark.parametrize("box", [True, False])
def test_log_probabilities_are_those_of_the_distribution(module, box):
    torch.manual_seed(0)
    bounds = ([-1.0, -1.0], [1.0, 1.0]) if box else (None, None)
    agent = module.Agent(module.Args(hidden=(8,)), 4, 2 if box else 3, *bounds, torch.device("cpu"))
    if box:
        agent.actor.log_std.data = torch.tensor([-1.0, 0.5])
    policy = agent.actor(torch.randn(5, 6, 4))
    action = policy.sample()
    ours = agent.log_prob(policy, action if box else action[..., None])
    torch.testing.assert_close(ours, policy.log_prob(action))


@pytest.mark.parametrize("ent_coef", [0.0, 0.3])
def test_the_ppo_update_descends_the_sum_of_its_losses(ppo, ent_coef):
    """(6), whose gradient is the momentum of the optimizer after one step."""
    torch.manual_seed(0)
    agent = ppo.Agent(ppo.Args(hidden=(8,), ent_coef=ent_coef), 4, 3, None, None, torch.device("cpu"))
    obs, action = torch.randn(32, 4), torch.randint(3, (32,))
    log_prob = agent.actor(obs).log_prob(action).detach() + 0.3 * torch.randn(32)
    advantage, target = torch.randn(2, 32)
    policy, value = agent.actor(obs), agent.value(obs)
    ratio = (policy.log_prob(action) - log_prob).exp()
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
    loss = -surrogate + 0.5 * (0.5 * (value - target).square().mean()) - ent_coef * policy.entropy().mean()
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, agent.optimizer.weights)])
    gradient *= min(1, 0.5 / gradient.norm().item())
    agent.update(torch.cat((obs, torch.stack((action, log_prob, advantage, target), -1)), -1))
    state = agent.optimizer.state_dict()
    momentum = torch.cat([state[f"mean_{i}"].flatten() for i in range(len(agent.optimizer.weights))])
    torch.testing.assert_close(momentum, 0.1 * gradient, rtol=1e-4, atol=1e-7)


def test_the_gradient_is_clipped_to_its_norm(ppo):
    x = torch.nn.Parameter(torch.zeros(4))
    for scale, norm in ((10.0, 0.5), (0.1, 0.2)):
        optimizer = ppo.Adam([x], lr=1.0)
        ppo.descend(optimizer, scale * x.sum(), 0.5)
        assert optimizer.held[0].norm().item() == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("as_tensor", [False, True])
@DEVICES
def test_descending_takes_the_steps_of_torchs_adam(ppo, device, as_tensor):
    torch.manual_seed(0)
    ours, theirs = (ppo.mlp((3, 8, 2), "tanh", 1.0).to(device) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    rate = torch.tensor(0.1, device=device) if as_tensor else 0.1
    one, other = ppo.Adam(ours.parameters(), rate, 1e-5), torch.optim.Adam(theirs.parameters(), 0.1, eps=1e-5)
    one.to(device)
    for _ in range(5):
        x = torch.randn(16, 3, device=device)
        ppo.descend(one, ours(x).square().mean(), float("inf"))
        other.zero_grad()
        theirs(x).square().mean().backward()
        other.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("box", [True, False])
def test_fisher_vector_product_is_that_of_an_explicit_hessian(trpo, box):
    torch.manual_seed(0)
    policy, obs = actor(trpo, box).double(), torch.randn(7, 4, dtype=torch.float64)
    if box:
        torch.nn.init.normal_(policy.log_std, std=0.3)
    parameters = [*policy.parameters()]
    names = [name for name, _ in policy.named_parameters()]
    old = [x.detach() for x in (policy.net(obs), getattr(policy, "log_std", torch.zeros(1)))]

    def kl(theta):
        """Mean KL divergence from the policy as it is to the one with parameters theta, written out."""
        pieces = theta.split([p.numel() for p in parameters])
        state = {name: piece.view_as(p) for name, piece, p in zip(names, pieces, parameters)}
        head = torch.func.functional_call(policy.net, {k[4:]: v for k, v in state.items() if k != "log_std"}, (obs,))
        if not box:
            p, q = old[0].log_softmax(-1), head.log_softmax(-1)
            return (p.exp() * (p - q)).sum(-1).mean()
        log_std = state["log_std"]
        spread = ((2 * old[1]).exp() + (old[0] - head).square()) / (2 * (2 * log_std).exp())
        return (log_std - old[1] + spread - 0.5).sum(-1).mean()

    theta = torch.nn.utils.parameters_to_vector(parameters).detach()
    hessian = torch.autograd.functional.hessian(kl, theta)
    with torch.no_grad():
        fixed = policy(obs)
    product = trpo.fisher_product(trpo.kl_divergence(fixed, policy(obs)).mean(), parameters, damping=0.1)
    for _ in range(3):
        v = torch.randn_like(theta)
        torch.testing.assert_close(product(v), hessian @ v + 0.1 * v, rtol=1e-5, atol=1e-8)


def test_conjugate_gradients_solve(trpo):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(6), torch.randn(6, dtype=torch.float64)
    solution = trpo.conjugate_gradient(lambda v: matrix @ v, b, 6)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert trpo.conjugate_gradient(lambda v: matrix @ v, 0 * b, 6).abs().max() == 0


def trpo_problem(trpo, seed, box, **flags):
    """An agent, and a rollout of random numbers for it."""
    torch.manual_seed(seed)
    args = trpo.Args(hidden=(8,), **flags)
    bounds = ([-1.0, -1.0], [1.0, 1.0]) if box else (None, None)
    agent = trpo.Agent(args, 4, 2 if box else 3, *bounds, torch.device("cpu"))
    obs = torch.randn(64, 4)
    action = torch.from_numpy(agent.actor.in_numpy()(obs, agent.actor.noise(64))[0]).float()
    return agent, torch.cat((obs, action.view(64, -1), torch.randn(64, 2)), -1)


@pytest.mark.parametrize("flags", [{}, {"target_kl": 2.0, "damping": 0.0}])
def test_a_trpo_step_keeps_within_the_divergence_and_gains(trpo, flags):
    """The second flags give steps so long that some of those within the divergence lose."""
    taken = 0
    for seed in range(100):
        agent, batch = trpo_problem(trpo, seed, box=seed % 2 == 0, **flags)
        gain = batch[:, -2].mean().item()  # L before the step: all ratios are 1
        metrics = agent.improve(batch)
        if metrics["policy/step"]:
            taken += 1
            assert 0 < metrics["policy/kl"] <= agent.args.target_kl and -metrics["loss/policy"] > gain, seed
    assert taken == 100 if not flags else taken > 90


def test_the_natural_gradient_takes_the_whole_step(trpo):
    """Without a search even a step far too long is taken; with it, a shorter one."""
    scales = []
    for natural in (True, False):
        agent, batch = trpo_problem(trpo, 0, box=True, target_kl=5.0, damping=0.0, natural_gradient=natural)
        scales.append(agent.improve(batch)["policy/step"].item())
    assert scales[0] == 1 and 0 < scales[1] < 1
    assert math.log(scales[1], 0.8) == pytest.approx(round(math.log(scales[1], 0.8)), abs=1e-4)


def test_where_no_step_will_do_the_policy_stays(trpo):
    """One trial of a step that is too long."""
    agent, batch = trpo_problem(trpo, 0, box=True, target_kl=5.0, damping=0.0, search_steps=1)
    before = [p.clone() for p in agent.actor.parameters()]
    assert agent.improve(batch)["policy/step"] == 0
    for old, new in zip(before, agent.actor.parameters()):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


def test_a_small_natural_step_has_the_divergence_asked_for(trpo):
    """(6), where the KL divergence is its second order and the equations are solved."""
    flags = {"target_kl": 1e-10, "damping": 1e-6, "cg_iters": 300, "natural_gradient": True}
    for box in (True, False):
        agent, batch = trpo_problem(trpo, 1, box=box, **flags)
        assert agent.double().improve(batch.double())["policy/kl"].item() == pytest.approx(1e-10, rel=0.2)


def test_a_rollout_becomes_rows_to_learn_from(module):
    """Observations normalised, also s', rewards divided, never clipped, advantages by their definition, then scaled."""
    torch.manual_seed(0)
    agent = module.Agent(module.Args(hidden=(8,)), 3, 2, [-1.0, -1.0], [1.0, 1.0], torch.device("cpu"))
    agent.actor.normalize.mean.copy_(torch.tensor([1.0, -2.0, 0.0]))
    agent.actor.normalize.std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    agent.returns.mean.fill_(7.0)  # which nothing is to use
    agent.returns.std.fill_(0.25)
    obs, action, reward = torch.randn(4, 2, 3), torch.randn(4, 2, 2), torch.randn(4, 2)
    reward[1, 0] = 50.0
    ended = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    terminated = ended * torch.tensor([1.0, 0.0])
    next_obs = torch.where(ended[..., None] == 1, torch.randn(4, 2, 3), torch.cat((obs[1:], torch.randn(1, 2, 3))))
    rows = agent.prepare(obs, action, reward, terminated, ended, next_obs)

    def normal(x):
        return (x - torch.tensor([1.0, -2.0, 0.0])) / torch.tensor([2.0, 0.5, 1.0])

    with torch.no_grad():
        value, next_value = agent.value(normal(obs)), agent.value(normal(next_obs))
    columns = zip(*(x.T.tolist() for x in (4 * reward, value, next_value, terminated, ended)))
    advantage = torch.tensor([advantages_by_definition(*column, 0.99, 0.95) for column in columns]).T
    torch.testing.assert_close(rows[..., :3], normal(obs))
    torch.testing.assert_close(rows[..., 3:5], action)
    weight = (advantage - advantage.mean()) / advantage.std(unbiased=False)
    torch.testing.assert_close(rows[..., -2], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows[..., -1], advantage + value, rtol=1e-4, atol=1e-5)
    agent.args.norm_adv = False
    rows = agent.prepare(obs, action, reward, terminated, ended, next_obs)
    torch.testing.assert_close(rows[..., -2], advantage, rtol=1e-4, atol=1e-5)


def test_what_a_rollout_holds_and_when_its_statistics_move(module, tmp_path, monkeypatch):
    """Noise of its own for every step and environment; observations counted once they are learnt from."""
    seen, prepare = [], module.Agent.prepare

    def noted(self, *rollout):
        seen.append((*rollout, self.actor.normalize.mean.clone(), self.actor.normalize.count.item()))
        return prepare(self, *rollout)

    monkeypatch.setattr(module.Agent, "prepare", noted)
    flags = SMALL_RUN | {"num_envs": 3, "env_id": "probe/Marker-v0", "total_timesteps": 180}
    module.train(module.Args(run_dir=str(tmp_path / "run"), **flags))
    assert len(seen) == 3
    for i, (obs, action, reward, terminated, ended, next_obs, mean, count) in enumerate(seen):
        assert len(action.unique()) == 60 and count == 60 * i
        if i:
            torch.testing.assert_close(mean, torch.cat([s[0] for s in seen[:i]]).mean((0, 1)))
        assert not next_obs[..., 0].any() and terminated.sum() == 0 and ended.sum() > 0


def test_what_ppo_logs(ppo):
    torch.manual_seed(0)
    agent = ppo.Agent(ppo.Args(hidden=(8,)), 4, 3, None, None, torch.device("cpu"))
    obs, action, old = torch.randn(64, 4), torch.randint(3, (64,)), 0.3 * torch.randn(64)
    policy = agent.actor(obs)
    log_ratio = policy.log_prob(action).detach() - old
    rows = torch.cat((obs, torch.stack((action, old, torch.randn(64), torch.randn(64)), -1)), -1)
    metrics = agent.measure(rows)
    ratio = log_ratio.exp()
    expected = {"policy/entropy": policy.entropy().mean(), "value/mean": agent.value(obs).mean()}
    expected["policy/kl"] = (ratio - 1 - log_ratio).mean()
    expected["policy/clip_frac"] = ((ratio < 0.8) | (ratio > 1.2)).float().mean()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value.detach())


def one_step(module, box, dtype=torch.float32, **flags):
    """A step of the policy of VPG or TRPO: the agent, its batch, its policy before, and what it logs."""
    torch.manual_seed(0)
    bounds = ([-1.0, -1.0], [1.0, 1.0]) if box else (None, None)
    agent = module.Agent(module.Args(hidden=(8,), **flags), 4, 2 if box else 3, *bounds, torch.device("cpu"))
    obs, action = torch.randn(64, 4), torch.randn(64, 2) if box else torch.randint(3, (64, 1))
    agent, batch = agent.to(dtype), torch.cat((obs, action, torch.randn(64, 2)), -1).to(dtype)
    old = copy.deepcopy(agent.actor)
    return agent, batch, old, agent.improve(batch)


@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize("algo, flags", [("vpg", {"policy_lr": 0.3}), ("trpo", {"target_kl": 0.3})])
def test_what_vpg_and_trpo_log(algo, flags, box):
    """The divergence from old to new, written out; the entropy of the policy that chose the actions."""
    agent, batch, actor, metrics = one_step(load(ROOT / "algos" / f"{algo}.py"), box, **flags)
    obs, action = batch[:, :4], batch[:, 4:6] if box else batch[:, 4]
    with torch.no_grad():
        old, new = actor(obs), agent.actor(obs)
        kl = [
            (p.log_prob(x) - q.log_prob(x)).mean() for p, q in ((old, new), (new, old)) for x in [p.sample((20_000,))]
        ]
        ratio = (new.log_prob(action) - old.log_prob(action)).exp()
        loss = -(ratio * batch[:, -2]) if algo == "trpo" else -old.log_prob(action) * batch[:, -2]
    assert abs(kl[0] - kl[1]) > 0.1 * kl[0]
    assert metrics["policy/kl"].item() == pytest.approx(kl[0].item(), rel=0.03)
    assert metrics["policy/entropy"].item() == pytest.approx(old.entropy().mean().item(), rel=1e-4)
    assert metrics["loss/policy"].item() == pytest.approx(loss.mean().item(), rel=1e-4)
    value, target = agent.value(obs).detach(), batch[:, -1]
    metrics = agent.update(batch)
    assert metrics["value/mean"].item() == pytest.approx(value.mean().item())
    assert metrics["loss/value"].item() == pytest.approx((0.5 * (value - target) ** 2).mean().item())


@pytest.mark.parametrize("box", [True, False])
def test_the_natural_step_is_that_of_the_equations(trpo, box):
    """F step is the gradient of (3), which a step that merely has the right length is not."""
    flags = {"target_kl": 1e-8, "damping": 1e-3, "cg_iters": 300, "natural_gradient": True}
    agent, batch, old, _ = one_step(trpo, box, torch.float64, **flags)
    pairs = [*zip(agent.actor.parameters(), old.parameters())]
    step = torch.cat([(new - before).detach().flatten() for new, before in pairs])
    obs, parameters = batch[:, :4], [before for _, before in pairs]
    policy = old(obs)
    log_prob = agent.log_prob(policy, batch[:, 4:-2]) if not box else policy.log_prob(batch[:, 4:6])
    gradient = trpo.flat_gradient((log_prob * batch[:, -2]).mean(), parameters, retain_graph=True)
    with torch.no_grad():
        fixed = old(obs)
    product = trpo.fisher_product(trpo.kl_divergence(fixed, policy).mean(), parameters, damping=1e-3)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(product(step), gradient, 0) > 0.999 > 0.9 > cosine(step, gradient, 0)


@pytest.mark.parametrize("algo", ["vpg", "trpo"])
def test_one_step_of_the_policy_and_many_of_the_value_function(algo, tmp_path, monkeypatch):
    module, sizes = load(ROOT / "algos" / f"{algo}.py"), {"improve": [], "update": []}
    for name, noted in sizes.items():
        step = getattr(module.Agent, name)
        monkeypatch.setattr(
            module.Agent, name, lambda self, rows, step=step, noted=noted: noted.append(len(rows)) or step(self, rows)
        )
    flags = SMALL_RUN | {"num_envs": 3, "update_epochs": 5, "total_timesteps": 120}
    module.train(module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path), **flags))
    assert sizes == {"improve": [60] * 2, "update": [15] * 2 * 5 * 4}


def test_rows_of_a_minibatch_come_equally_from_every_environment(ppo, tmp_path, monkeypatch):
    """As `train` draws them: each step of the rollout once an epoch, each environment as often as another."""
    seen, prepare = [], ppo.Agent.prepare

    def numbered(self, *rollout):
        rows = prepare(self, *rollout)
        rows[..., 0] = torch.arange(3.0)  # the environment
        rows[..., 1] = torch.arange(8.0)[:, None]  # the step
        return rows

    monkeypatch.setattr(ppo.Agent, "prepare", numbered)
    monkeypatch.setattr(ppo.Agent, "update", lambda self, batch: seen.append(batch))
    flags = {"num_envs": 3, "num_steps": 8, "num_minibatches": 4, "update_epochs": 2, "hidden": (8,), "eval_every": 0}
    args = ppo.Args(env_id="Pendulum-v1", total_timesteps=24, run_dir=str(tmp_path / "run"), norm_obs=False, **flags)
    ppo.train(args)
    assert len(seen) == 8
    for batch in seen:
        assert sorted(batch[:, 0].tolist()) == [0, 0, 1, 1, 2, 2]
    for epoch in (seen[:4], seen[4:]):
        assert len({tuple(row) for batch in epoch for row in batch.tolist()}) == 24
    orders = [torch.cat([batch[:, 1] for batch in epoch]) for epoch in (seen[:4], seen[4:])]
    assert not orders[0].equal(orders[1]) and not orders[0].equal(orders[0].sort().values)


def torchrun(path, *flags, ranks=2):
    """The command line of a small run shared by `ranks` processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return launch + command(path, *flags)[1:]


SHARED = "--num-envs 4 --num-steps 50 --total-timesteps 600 --checkpoint-every 200 --eval-every 200".split()


@pytest.mark.slow
@pytest.mark.parametrize("env", ["Pendulum-v1", "CartPole-v1"])
@pytest.mark.parametrize("path", ON_POLICY, ids=lambda path: path.stem)
def test_two_ranks_learn_what_one_does(path, env, tmp_path):
    """Half of the environments each, killed and resumed on the way: the weights of one process with all of them."""
    flags = [*SHARED, "--env-id", env]
    flags += ["--no-anneal-lr"] if path.stem == "ppo" else []  # it falls with the total
    flags += ["--cg-iters", "3"] if path.stem == "trpo" else []  # ten of them make rounding a thousand times larger
    subprocess.run(command(path, *flags, "--run-dir", tmp_path / "one"), check=True, capture_output=True, timeout=300)
    for steps in (200, 600):
        typed = [*flags, "--total-timesteps", steps, "--run-dir", tmp_path / "two"]
        done = subprocess.run([*torchrun(path, *typed), "--resume"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two"))
    assert torch.equal(one["rng"][0], two["rng"][0])
    for name, value in one["agent"].items():
        torch.testing.assert_close(two["agent"][name], value, rtol=1e-4, atol=1e-5)
    assert [row["step"] for row in rows(tmp_path / "one") if "loss/value" in row] == [200, 400, 600]


def ranks_of(process, folder):
    """The processes of both ranks of a torchrun, once their first checkpoint is there."""
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    environments = {child: Path(f"/proc/{child}/environ").read_text() for child in children}
    return [next(int(c) for c in children if f"\0RANK={rank}\0" in environments[c]) for rank in (0, 1)]


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_others_and_spares_the_checkpoint(tmp_path, ppo):
    folder = tmp_path / "run"
    flags = [*SHARED, "--total-timesteps", "1000000", "--run-dir", folder]
    process = subprocess.Popen(
        torchrun(ROOT / "algos" / "ppo.py", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _, second = ranks_of(process, folder)
    os.kill(second, signal.SIGKILL)
    said = "".join(process.communicate(timeout=120))
    assert process.returncode != 0
    assert "rank 0 has lost another one" in said or "SIGKILL" in said or "Signal 9" in said, said
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["run"][0] % 200 == 0
    again = run(ROOT / "algos" / "ppo.py", "--resume", "--run-dir", folder, "--total-timesteps", "400")
    assert again.returncode == 0, again.stderr


@pytest.mark.slow
def test_ctrl_c_to_rank_0_alone_saves(tmp_path):
    """The others wait for it, or end as no failure, for which torchrun would kill it while it writes."""
    folder = tmp_path / "run"
    flags = [
        *SHARED,
        "--total-timesteps",
        "1000000",
        "--hidden",
        "3000",
        "3000",
        "--run-dir",
        folder,
    ]  # 220 MB to write
    process = subprocess.Popen(
        torchrun(ROOT / "algos" / "ppo.py", *flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    first, _ = ranks_of(process, folder)
    os.kill(first, signal.SIGINT)
    said = "".join(process.communicate(timeout=120))
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["run"][0]
    assert f"step {step}: " in said and "Signal" not in said and "SIG" not in said, said


@pytest.mark.slow
def test_ranks_with_other_flags_are_refused(tmp_path):
    """As on two machines of which one does not see the run folder that the other resumes from."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = []
    for rank, clip in enumerate(("0.1", "0.2")):
        flags = [*SHARED, "--clip-coef", clip, "--run-dir", tmp_path / str(rank)]
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        line = command(ROOT / "algos" / "ppo.py", *flags)
        processes.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode for process in processes)
    assert "rank 0 has lost another one" in said[0]
    assert "rank 1 has another clip_coef than rank 0: type all flags, or share --run-dir" in said[1]


@pytest.mark.parametrize("path", ON_POLICY, ids=lambda path: path.stem)
def test_actions_without_bounds_are_taken_as_they_are(path, tmp_path):
    """And the run is saved, whose infinite bounds are no weights."""
    module = load(path)
    module.train(module.Args(env_id="probe/Free-v0", total_timesteps=40, run_dir=str(tmp_path / "run"), **SMALL_RUN))
    actions = module.load_policy(tmp_path / "run", deterministic=False)(np.zeros((1000, 2)))
    assert np.isfinite(actions).all() and actions.std() == pytest.approx(np.exp(-0.5), rel=0.2)


def test_environments_that_cannot_be_shared_are_refused(tmp_path):
    flags = [*SHARED, "--num-envs", "3", "--run-dir", tmp_path / "run"]
    done = subprocess.run(torchrun(ROOT / "algos" / "ppo.py", *flags), capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "cannot be shared by 2 ranks" in done.stderr


def test_a_policy_that_was_normalised_acts_alike_when_loaded(module, tmp_path):
    """Statistics are part of the policy: what is loaded acts as the agent that was saved, far from the origin too."""
    flags = {"num_steps": 50, "num_minibatches": 2, "hidden": (8,), "eval_every": 0, "threads": 1, "device": "cpu"}
    args = module.Args(env_id="Pendulum-v1", total_timesteps=200, run_dir=str(tmp_path / "run"), **flags)
    module.train(args)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["agent"]
    assert state["actor.normalize.count"] == 200 and state["returns.count"] == 200
    policy = module.load_policy(tmp_path / "run")
    assert torch.equal(policy.func.__self__.normalize.mean, state["actor.normalize.mean"])
    space = gym.make("Pendulum-v1").action_space
    assert space.contains(policy(np.array([0.1, 0.2, 3.0])))


@pytest.mark.parametrize("target_kl, epochs", [(None, 3), (1e-12, 1)])
def test_an_epoch_too_far_is_the_last_of_its_rollout(ppo, tmp_path, monkeypatch, target_kl, epochs):
    """As measured over all of the rollout."""
    measured, rates, measure = [], [], ppo.Agent.measure

    def watched(self, rows):
        measured.append(len(rows))
        rates.append(self.optimizer.lr.item())
        return measure(self, rows)

    monkeypatch.setattr(ppo.Agent, "measure", watched)
    flags = SMALL_RUN | {"update_epochs": 3, "target_kl": target_kl, "total_timesteps": 40}
    result = ppo.train(ppo.Args(env_id="Pendulum-v1", run_dir=str(tmp_path), **flags))
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    assert state["optimizer.steps"] == 2 * epochs * 4 and result["policy/kl"] > 0
    assert measured == [20] * (4 if target_kl else 2)
    assert rates[-1] == pytest.approx(3e-4 / 2)  # half of it is left in the second of two


def test_the_divergence_is_the_estimator_that_is_never_negative(ppo):
    """E[(r - 1) - log r] over the samples of the old policy, r the ratio of new to old."""
    torch.manual_seed(0)
    args = ppo.Args(hidden=(8,))
    agent = ppo.Agent(args, 4, 3, None, None, torch.device("cpu"))
    obs, action, log_ratio = torch.randn(32, 4), torch.randint(3, (32,)), torch.randn(32)
    log_prob = agent.actor(obs).log_prob(action).detach()
    batch = torch.cat((obs, torch.stack((action, log_prob - log_ratio, torch.randn(32), torch.randn(32)), -1)), -1)
    metrics = agent.measure(batch)
    assert metrics["policy/kl"].item() == pytest.approx((log_ratio.exp() - 1 - log_ratio).mean().item(), rel=1e-4)
    clipped = ((log_ratio.exp() - 1).abs() > 0.2).float().mean().item()
    assert metrics["policy/clip_frac"].item() == pytest.approx(clipped)


def test_minibatches_of_one_step_teach(module, tmp_path):
    flags = SMALL_RUN | {"num_minibatches": 20, "total_timesteps": 40}
    result = module.train(module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path), **flags))
    assert result["step"] == 40 and np.isfinite(result["loss/value"]) and result["policy/kl"] > 0


def test_one_sample_is_standardised_to_zero(module):
    assert module.standardize(torch.tensor([3.0])).tolist() == [0]
    values = module.standardize(torch.arange(10.0))
    assert values.mean().abs() < 1e-6 and values.std(correction=0).item() == pytest.approx(1)


@pytest.mark.parametrize("env", ["Cut", "Numbers"])
def test_rewards_are_scaled_by_sums_that_stop_at_cuts(module, env, tmp_path):
    """Reward 1, cut at 5 steps, gamma 0.9: the sums are 1, 1.9, .. 4.0951, also where a rollout ends in between."""
    args = module.Args(env_id=f"probe/{env}-v0", total_timesteps=60, gamma=0.9, run_dir=str(tmp_path), **SMALL_RUN)
    args.num_steps = 12
    module.train(args)
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    sums = np.array([(1 - 0.9**k) / 0.1 for k in range(1, 6)])
    assert agent["returns.mean"].item() == pytest.approx(sums.mean(), rel=1e-5)
    assert agent["returns.var"].item() == pytest.approx(sums.var(), rel=1e-5)


def test_sums_of_rewards_begin_anew_at_a_checkpoint(module, tmp_path):
    """Reward 1 without an end: 1, 1.9, .. over the 20 steps of a rollout, twice where a checkpoint cuts them."""
    for every, lasting in ((20, [*range(20)] * 2), (0, range(40))):
        flags = SMALL_RUN | {"gamma": 0.9, "checkpoint_every": every, "run_dir": str(tmp_path / str(every))}
        module.train(module.Args(env_id="probe/Endless-v0", total_timesteps=40, **flags))
        agent = torch.load(tmp_path / str(every) / "checkpoint.pt", weights_only=True)["agent"]
        sums = np.array([(1 - 0.9 ** (k + 1)) / 0.1 for k in lasting])
        assert agent["returns.mean"].item() == pytest.approx(sums.mean(), rel=1e-5)
        assert agent["returns.var"].item() == pytest.approx(sums.var(), rel=1e-5)


def test_many_ranks_are_not_compiled(module, monkeypatch):
    """A compiled update would leave out what the ranks exchange."""
    monkeypatch.setattr(module, "RANKS", 2)
    with pytest.raises(SystemExit, match="--compile is for one process"):
        module.train(module.Args(compile=True))


@DEVICES
def test_a_resumed_run_goes_on_to_lower_its_learning_rate(ppo, tmp_path, monkeypatch, device):
    """Where a graph or a compiled update reads it: in a tensor on the device."""
    agents = []

    class Agent(ppo.Agent):
        def __init__(self, *args):
            super().__init__(*args)
            agents.append(self)

    monkeypatch.setattr(ppo, "Agent", Agent)
    flags = {**SMALL_RUN, "env_id": "CartPole-v1", "run_dir": str(tmp_path / "run"), "device": device}
    ppo.train(ppo.Args(**flags, total_timesteps=100))
    ppo.train(ppo.Args(**flags, total_timesteps=200, resume=True))
    rate = agents[1].optimizer.lr
    assert rate.device.type == device and rate.item() == pytest.approx(3e-4 * 20 / 200)  # of the last of ten rollouts
