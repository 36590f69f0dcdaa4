"""Small agents, batches and runs for the tests of one algorithm."""

import copy

import pytest
import torch

# Arguments of a run of an on-policy file that takes a tenth of a second.
SMALL_ROLLOUT_RUN = {
    "num_steps": 20,
    "num_minibatches": 4,
    "hidden": (8,),
    "eval_every": 0,
    "threads": 1,
    "device": "cpu",
}

# Arguments of a run of an off-policy file that takes a second.
SMALL_REPLAY_RUN = {
    "num_envs": 2,
    "total_timesteps": 400,
    "learning_starts": 100,
    "batch_size": 16,
    "hidden": (8,),
    "eval_every": 0,
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
every_device = pytest.mark.parametrize("device", DEVICES)


def box_spaces(module, obs_dim=3):
    """The spaces of a task with a box of two dimensions that differ in width and center."""
    return module.Spaces(obs_dim, 2, [-3.0, 0.0], [3.0, 1.0])


def discrete_spaces(module, obs_dim=3, actions=3):
    """The spaces of a task with discrete actions."""
    return module.Spaces(obs_dim, actions, None, None)


def rollout_spaces(module, box):
    """The spaces of a task for an on-policy agent: four observations."""
    return box_spaces(module, 4) if box else discrete_spaces(module, 4)


def rollout_agent(module, box, **flags):
    """A small agent of an on-policy file."""
    return module.Agent(module.Args(hidden=(8,), **flags), rollout_spaces(module, box))


def flat(tensors):
    """All numbers of the tensors as one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def replay_agent(module, seed=0, **flags):
    """A small agent whose networks differ from their targets, and a batch with terminations."""
    torch.manual_seed(seed)
    discrete = module.ALGO == "dqn"
    if discrete:
        rates = {"learning_rate": 1e-2}
        spaces = discrete_spaces(module, actions=4)
    else:
        rates = {"policy_lr": 1e-2, "q_lr": 2e-2}
        spaces = box_spaces(module)
    agent = module.Agent(module.Args(hidden=(8,), **(rates | flags)), spaces)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    terminated = (torch.rand(16) < 0.3).float()
    if discrete:
        action = torch.randint(4, (16,)).float()
    else:
        action = agent.actor(torch.randn(16, 3)).detach()
    batch = {
        "obs": torch.randn(16, 3),
        "action": action,
        "reward": torch.randn(16),
        "terminated": terminated,
        "next_obs": torch.randn(16, 3),
    }
    return agent, batch


def transitions(batch):
    """The transitions of a batch, one dict each."""
    rows = []
    for values in zip(*batch.values(), strict=True):
        rows.append(dict(zip(batch, values, strict=True)))
    return rows


class PolicyStep:
    """One step of the policy of VPG or TRPO on random data, and the policy before it."""

    def __init__(self, module, box, dtype=torch.float32, **flags):
        torch.manual_seed(0)
        self.agent = rollout_agent(module, box, **flags).to(dtype)
        obs = torch.randn(64, 4)
        action = torch.randn(64, 2) if box else torch.randint(3, (64,))
        advantage, target = torch.randn(64, 2).T
        batch = {"obs": obs, "action": action, "advantage": advantage, "target": target}
        self.batch = {name: tensor.to(dtype) for name, tensor in batch.items()}
        self.old_actor = copy.deepcopy(self.agent.actor)
        self.metrics = self.agent.update_policy(self.batch)
