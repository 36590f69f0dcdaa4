"""TRPO's own mathematics against slow references."""

import math

import pytest
import torch
from common import load_algo
from small_agents import PolicyStep, flat, rollout_agent, rollout_spaces

torch.set_num_threads(1)
both_spaces = pytest.mark.parametrize("box", [True, False], ids=["box", "discrete"])


@pytest.fixture
def trpo():
    return load_algo("trpo")


@both_spaces
def test_fisher_product_is_that_of_an_explicit_hessian(trpo, box):
    torch.manual_seed(0)
    args = trpo.Args(hidden=(8,), norm_obs=False)
    actor = trpo.Actor(args, rollout_spaces(trpo, box)).double()
    obs = torch.randn(7, 4, dtype=torch.float64)
    if box:
        torch.nn.init.normal_(actor.log_std, std=0.3)
        old_log_std = actor.log_std.detach()
    parameters = list(actor.parameters())
    names = [name for name, _ in actor.named_parameters()]
    old_out = actor.net(obs).detach()

    def kl(theta):
        """Mean KL divergence from the current policy to that of parameters theta, written out."""
        pieces = theta.split([parameter.numel() for parameter in parameters])
        state = {}
        for name, piece, parameter in zip(names, pieces, parameters, strict=True):
            state[name.removeprefix("net.")] = piece.view_as(parameter)
        log_std = state.pop("log_std", None)
        out = torch.func.functional_call(actor.net, state, (obs,))
        if not box:
            old_log_p = old_out.log_softmax(-1)
            return (old_log_p.exp() * (old_log_p - out.log_softmax(-1))).sum(-1).mean()
        square = (2 * old_log_std).exp() + (old_out - out).square()
        spread = square / (2 * (2 * log_std).exp())
        return (log_std - old_log_std + spread - 0.5).sum(-1).mean()

    theta = torch.nn.utils.parameters_to_vector(parameters).detach()
    hessian = torch.autograd.functional.hessian(kl, theta)
    with torch.no_grad():
        old_policy = actor(obs)
    divergence = trpo.kl_divergence(old_policy, actor(obs)).mean()
    product = trpo.fisher_product(divergence, parameters, damping=0.1)
    for _ in range(3):
        v = torch.randn_like(theta)
        torch.testing.assert_close(product(v), hessian @ v + 0.1 * v, rtol=1e-5, atol=1e-8)


def test_conjugate_gradients_solve(trpo):
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    matrix = root @ root.T + torch.eye(6)
    b = torch.randn(6, dtype=torch.float64)

    def product(v):
        return matrix @ v

    solution = trpo.conjugate_gradient(product, b, 6)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), rtol=1e-6, atol=1e-8)
    assert trpo.conjugate_gradient(product, 0 * b, 6).abs().max() == 0


def random_problem(trpo, seed, box, **flags):
    """An agent, and a batch of its own actions with random advantages."""
    torch.manual_seed(seed)
    agent = rollout_agent(trpo, box, **flags)
    obs = torch.randn(64, 4)
    action = agent.actor.to_numpy()(obs, agent.actor.noise(64))
    advantage, target = torch.randn(64, 2).T
    batch = {
        "obs": obs,
        "action": torch.from_numpy(action).float(),
        "advantage": advantage,
        "target": target,
    }
    return agent, batch


@pytest.mark.parametrize("flags", [{}, {"target_kl": 2.0, "damping": 0.0}], ids=["default", "long"])
def test_a_step_keeps_within_the_divergence_and_gains(trpo, flags):
    """Some of the long steps lose although they are within the divergence."""
    taken = 0
    for seed in range(100):
        agent, batch = random_problem(trpo, seed, box=seed % 2 == 0, **flags)
        old_gain = batch["advantage"].mean().item()  # all ratios are 1
        metrics = agent.update_policy(batch)
        if metrics["policy/step"]:
            taken += 1
            assert 0 < metrics["policy/kl"] <= agent.args.target_kl, seed
            assert -metrics["loss/policy"] > old_gain, seed
    if flags:
        assert taken > 90
    else:
        assert taken == 100


def test_the_natural_gradient_takes_the_whole_step(trpo):
    """Without a search even a step far too long is taken; with it, a shorter one."""
    scales = {}
    for natural_gradient in (True, False):
        flags = {"target_kl": 5.0, "damping": 0.0, "natural_gradient": natural_gradient}
        agent, batch = random_problem(trpo, 0, box=True, **flags)
        scales[natural_gradient] = agent.update_policy(batch)["policy/step"].item()
    assert scales[True] == 1
    assert 0 < scales[False] < 1
    power = math.log(scales[False], 0.8)
    assert power == pytest.approx(round(power), abs=1e-4)


def test_the_policy_stays_where_no_step_will_do(trpo):
    """The only length that is tried is too long."""
    flags = {"target_kl": 5.0, "damping": 0.0, "search_steps": 1}
    agent, batch = random_problem(trpo, 0, box=True, **flags)
    before = [parameter.clone() for parameter in agent.actor.parameters()]
    assert agent.update_policy(batch)["policy/step"] == 0
    for old, new in zip(before, agent.actor.parameters(), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0)


@both_spaces
def test_a_small_natural_step_has_the_divergence_asked_for(trpo, box):
    """(7) holds where the KL divergence is its second order and the equations are solved."""
    flags = {"target_kl": 1e-10, "damping": 1e-6, "cg_iters": 300, "natural_gradient": True}
    agent, batch = random_problem(trpo, 1, box=box, **flags)
    agent = agent.double()
    batch = {name: tensor.double() for name, tensor in batch.items()}
    assert agent.update_policy(batch)["policy/kl"].item() == pytest.approx(1e-10, rel=0.2)


@both_spaces
def test_the_natural_step_is_that_of_the_equations(trpo, box):
    """F step is the gradient of (3). A step that only has the right length fails this."""
    flags = {"target_kl": 1e-8, "damping": 1e-3, "cg_iters": 300, "natural_gradient": True}
    taken = PolicyStep(trpo, box, torch.float64, **flags)
    batch = taken.batch
    old_parameters = list(taken.old_actor.parameters())
    pairs = zip(taken.agent.actor.parameters(), old_parameters, strict=True)
    step = flat([(new - old).detach() for new, old in pairs])
    policy = taken.old_actor(batch["obs"])
    gain = (policy.log_prob(batch["action"]) * batch["advantage"]).mean()
    gradient = trpo.flat_gradient(gain, old_parameters, retain_graph=True)
    with torch.no_grad():
        fixed_policy = taken.old_actor(batch["obs"])
    divergence = trpo.kl_divergence(fixed_policy, policy).mean()
    product = trpo.fisher_product(divergence, old_parameters, damping=1e-3)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(product(step), gradient, 0) > 0.999
    assert cosine(step, gradient, 0) < 0.9
