"""TD3's own mathematics against slow references."""

import copy

import numpy as np
import pytest
import torch
from common import load_algo
from small_agents import replay_agent, transitions

SMALL_RUN = {
    "env_id": "Pendulum-v1",
    "hidden": (8,),
    "batch_size": 4,
    "eval_every": 0,
    "threads": 1,
    "device": "cpu",
}


@pytest.fixture
def td3():
    return load_algo("td3")


def q_value(critic, k, obs, action):
    """Q_k(s, a) of one transition."""
    return critic(torch.cat((obs, action))[None])[k, 0, 0]


def reference_step(agent, critic_adam, actor_adam, batch, noises, delayed):
    """One gradient step, one transition at a time, with the Adam of torch; returns the losses."""
    rows = transitions(batch)
    critic_loss = 0
    for row, noise in zip(rows, noises, strict=True):
        with torch.no_grad():
            clipped_noise = (0.2 * noise).clamp(-0.5, 0.5)
            next_action = (agent.target_actor(row["next_obs"]) + clipped_noise).clamp(-1, 1)
            next_qs = [q_value(agent.target, k, row["next_obs"], next_action) for k in range(2)]
            y = row["reward"] + 0.99 * (1 - row["terminated"]) * min(next_qs)
        for k in range(2):
            q = q_value(agent.critic, k, row["obs"], row["action"])
            critic_loss = critic_loss + 0.5 * (q - y) ** 2 / len(rows)
    critic_adam.zero_grad()
    critic_loss.backward()
    critic_adam.step()
    if not delayed:
        return critic_loss.item(), None

    actor_loss = 0
    for row in rows:
        q = q_value(agent.critic, 0, row["obs"], agent.actor(row["obs"]))
        actor_loss = actor_loss - q / len(rows)
    actor_adam.zero_grad()
    actor_loss.backward()
    actor_adam.step()

    for target, source in ((agent.target, agent.critic), (agent.target_actor, agent.actor)):
        for p, w in zip(target.parameters(), source.parameters(), strict=True):
            p.data = 0.995 * p.data + 0.005 * w.data
    return critic_loss.item(), actor_loss.item()


@pytest.mark.parametrize("delayed", [False, True])
def test_update_is_the_pseudocode(td3, delayed):
    """Three updates against the reference."""
    agent, batch = replay_agent(td3)
    slow = copy.deepcopy(agent)
    critic_adam = torch.optim.Adam(slow.critic.parameters(), lr=2e-2)
    actor_adam = torch.optim.Adam(slow.actor.parameters(), lr=1e-2)
    for seed in range(3):
        torch.manual_seed(seed)
        metrics = agent.update(batch, delayed=delayed)
        torch.manual_seed(seed)
        noises = torch.randn(16, 2)
        losses = reference_step(slow, critic_adam, actor_adam, batch, noises, delayed)
        assert metrics["loss/critic"].item() == pytest.approx(losses[0], rel=1e-4)
        assert ("loss/actor" in metrics) == delayed
        if delayed:
            assert metrics["loss/actor"].item() == pytest.approx(losses[1], rel=1e-4, abs=1e-6)
        for ours, theirs in zip(agent.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_target_noise_is_clipped_scaled_and_drawn_for_each(td3):
    """Noise of half a half width moves an action by half of the half width of its dimension."""
    torch.manual_seed(0)
    noise = td3.target_noise(torch.zeros(4000, 2), 0.2, 0.5)
    assert noise.abs().max() == 0.5
    assert len(noise.unique()) > 7000
    assert noise.std().item() == pytest.approx(0.2, abs=0.01)
    assert noise.mean().abs() < 0.01

    # The actions [0, 0.5], [2.9, 0.9] and [-2.9, 0.1] in a box from [-3, 0] to [3, 1].
    action = torch.tensor([[0.0, 0.0], [2.9 / 3, 0.8], [-2.9 / 3, -0.8]])
    moved = td3.perturb(action, torch.full((3, 2), 0.5))
    assert (moved.abs() <= 1).all()
    scale = td3.action_scaler(np.float32([-3, 0]), np.float32([3, 1]))
    expected = np.float32([[1.5, 0.75], [3, 1], [-1.4, 0.35]])
    np.testing.assert_allclose(scale(moved.numpy()), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "utd, policy_frequency, steps, policy_steps",
    [(1.0, 2, 41, 10), (1.0, 3, 42, 7), (2.0, 2, 41, 21)],
)
def test_the_policy_moves_at_every_second_gradient_step(
    td3, tmp_path, utd, policy_frequency, steps, policy_steps
):
    """The count is neither inert nor off by one, also with several gradient steps per step."""
    flags = SMALL_RUN | {"utd": utd, "policy_frequency": policy_frequency}
    flags["run_dir"] = str(tmp_path)
    td3.train(td3.Args(total_timesteps=steps, learning_starts=20, **flags))
    agent = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["agent"]
    assert agent["critic_optimizer.steps"] == int(utd * (steps - 20))
    assert agent["actor_optimizer.steps"] == policy_steps


@pytest.mark.parametrize("policy_frequency, known", [(2, True), (10**6, False)])
def test_the_last_loss_of_the_policy_stays_in_the_log(td3, tmp_path, policy_frequency, known):
    """The last of 999 gradient steps before the row leaves the policy alone."""
    flags = SMALL_RUN | {"policy_frequency": policy_frequency, "run_dir": str(tmp_path)}
    result = td3.train(td3.Args(total_timesteps=1000, learning_starts=1, **flags))
    assert "loss/critic" in result
    assert ("loss/actor" in result) == known
