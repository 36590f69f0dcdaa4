"""DDPG's own mathematics against a slow reference."""

import copy

import pytest
import torch
from common import load_algo
from small_agents import replay_agent, transitions


@pytest.fixture
def ddpg():
    return load_algo("ddpg")


def q_value(critic, obs, action):
    """Q(s, a) of one transition."""
    return critic(torch.cat((obs, action)))[0]


def reference_step(agent, critic_adam, actor_adam, batch):
    """One gradient step, one transition at a time, with the Adam of torch; returns the losses."""
    rows = transitions(batch)
    critic_loss = 0
    for row in rows:
        with torch.no_grad():
            next_action = agent.target_actor(row["next_obs"])
            next_q = q_value(agent.target, row["next_obs"], next_action)
            y = row["reward"] + 0.99 * (1 - row["terminated"]) * next_q
        q = q_value(agent.critic, row["obs"], row["action"])
        critic_loss = critic_loss + 0.5 * (q - y) ** 2 / len(rows)
    critic_adam.zero_grad()
    critic_loss.backward()
    critic_adam.step()

    actor_loss = 0
    for row in rows:
        q = q_value(agent.critic, row["obs"], agent.actor(row["obs"]))
        actor_loss = actor_loss - q / len(rows)
    actor_adam.zero_grad()
    actor_loss.backward()
    actor_adam.step()

    for target, source in ((agent.target, agent.critic), (agent.target_actor, agent.actor)):
        for p, w in zip(target.parameters(), source.parameters(), strict=True):
            p.data = 0.995 * p.data + 0.005 * w.data
    return critic_loss.item(), actor_loss.item()


def test_update_is_the_pseudocode(ddpg):
    """Three updates against the reference."""
    agent, batch = replay_agent(ddpg)
    slow = copy.deepcopy(agent)
    critic_adam = torch.optim.Adam(slow.critic.parameters(), lr=2e-2)
    actor_adam = torch.optim.Adam(slow.actor.parameters(), lr=1e-2)
    for _ in range(3):
        metrics = agent.update(batch)
        critic_loss, actor_loss = reference_step(slow, critic_adam, actor_adam, batch)
        assert metrics["loss/critic"].item() == pytest.approx(critic_loss, rel=1e-4)
        assert metrics["loss/actor"].item() == pytest.approx(actor_loss, rel=1e-4, abs=1e-6)
        for ours, theirs in zip(agent.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
