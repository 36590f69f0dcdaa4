"""VPG, and what TRPO shares with it: one step of the policy, many of the value function."""

import pytest
import torch
from common import load_algo
from small_agents import SMALL_ROLLOUT_RUN, PolicyStep, flat

torch.set_num_threads(1)


@pytest.fixture
def vpg():
    return load_algo("vpg")


def test_the_loss_by_hand(vpg):
    """A likely good action and an unlikely bad one."""
    loss = vpg.policy_loss(torch.tensor([-0.5, -3.0]), torch.tensor([2.0, -1.0]))
    assert loss.item() == pytest.approx(-(-1.0 + 3.0) / 2)


@pytest.mark.parametrize("box", [True, False], ids=["box", "discrete"])
def test_the_step_follows_the_policy_gradient(vpg, box):
    """The gradient of (3) shows in the momentum of the optimizer after one step."""
    step = PolicyStep(vpg, box)
    batch = step.batch
    log_prob = step.old_actor(batch["obs"]).log_prob(batch["action"])
    loss = -(log_prob * batch["advantage"]).mean()
    gradient = flat(torch.autograd.grad(loss, list(step.old_actor.parameters())))
    optimizer = step.agent.actor_optimizer
    count = len(optimizer.parameters_held)
    momentum = flat([optimizer.get_buffer(f"mean_{i}") for i in range(count)])
    torch.testing.assert_close(momentum, 0.1 * gradient, rtol=1e-4, atol=1e-7)


def sampled_divergence(p, q):
    """The KL divergence from p to q, estimated from actions of p."""
    action = p.sample((20_000,))
    return (p.log_prob(action) - q.log_prob(action)).mean().item()


@pytest.mark.parametrize("box", [True, False], ids=["box", "discrete"])
@pytest.mark.parametrize("algo, flags", [("vpg", {"policy_lr": 0.3}), ("trpo", {"target_kl": 0.3})])
def test_what_vpg_and_trpo_log(algo, flags, box):
    """The divergence is that from old to new; the entropy is that of the old policy."""
    step = PolicyStep(load_algo(algo), box, **flags)
    batch = step.batch
    metrics = step.metrics
    with torch.no_grad():
        old = step.old_actor(batch["obs"])
        new = step.agent.actor(batch["obs"])
        old_to_new = sampled_divergence(old, new)
        new_to_old = sampled_divergence(new, old)
        old_log_prob = old.log_prob(batch["action"])
        if algo == "trpo":
            ratio = (new.log_prob(batch["action"]) - old_log_prob).exp()
            loss = -(ratio * batch["advantage"]).mean()
        else:
            loss = -(old_log_prob * batch["advantage"]).mean()
    assert abs(old_to_new - new_to_old) > 0.1 * old_to_new
    assert metrics["policy/kl"].item() == pytest.approx(old_to_new, rel=0.03)
    assert metrics["policy/entropy"].item() == pytest.approx(old.entropy().mean().item(), rel=1e-4)
    assert metrics["loss/policy"].item() == pytest.approx(loss.item(), rel=1e-4)

    value = step.agent.value(batch["obs"]).detach()
    loss = (0.5 * (value - batch["target"]) ** 2).mean()
    metrics = step.agent.update(batch)
    assert metrics["value/mean"].item() == pytest.approx(value.mean().item())
    assert metrics["loss/value"].item() == pytest.approx(loss.item())


@pytest.mark.parametrize("algo", ["vpg", "trpo"])
def test_one_step_of_the_policy_and_many_of_the_value_function(algo, tmp_path, monkeypatch):
    module = load_algo(algo)
    sizes = {"update_policy": [], "update": []}
    originals = {name: getattr(module.Agent, name) for name in sizes}

    def update_policy(self, batch):
        sizes["update_policy"].append(len(batch["obs"]))
        return originals["update_policy"](self, batch)

    def update(self, batch):
        sizes["update"].append(len(batch["obs"]))
        return originals["update"](self, batch)

    monkeypatch.setattr(module.Agent, "update_policy", update_policy)
    monkeypatch.setattr(module.Agent, "update", update)
    flags = SMALL_ROLLOUT_RUN | {"num_envs": 3, "update_epochs": 5, "total_timesteps": 120}
    module.train(module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path), **flags))
    assert sizes == {"update_policy": [60] * 2, "update": [15] * 2 * 5 * 4}
