"""What ddpg, dqn, sac and td3 share: targets, memory and exploration; and how actions scale."""

import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from common import load_algo
from conftest import BOX_PATHS, REPLAY_PATHS, probe
from small_agents import SMALL_REPLAY_RUN, box_spaces, discrete_spaces, replay_agent

every_replay_file = pytest.mark.parametrize("path", REPLAY_PATHS, ids=lambda path: path.stem)
every_box_file = pytest.mark.parametrize("path", BOX_PATHS, ids=lambda path: path.stem)


@every_replay_file
def test_targets_start_as_copies_and_learn_nothing(path):
    module = load_algo(path)
    spaces = discrete_spaces(module) if path.stem == "dqn" else box_spaces(module)
    agent = module.Agent(module.Args(hidden=(8,)), spaces)
    pairs = [(agent.critic, agent.target)]
    if path.stem in ("ddpg", "td3"):
        pairs.append((agent.actor, agent.target_actor))
    for online, target in pairs:
        for parameter, copy in zip(online.parameters(), target.parameters(), strict=True):
            assert parameter.equal(copy)
            assert not copy.requires_grad
            assert parameter.data_ptr() != copy.data_ptr()


@every_box_file
def test_the_policy_explores_after_learning_starts(path, tmp_path, monkeypatch):
    module = load_algo(path)
    calls = []
    act = module.Actor.act

    def recorded(self, obs, **options):
        calls.append(options)
        return act(self, obs, **options)

    monkeypatch.setattr(module.Actor, "act", recorded)
    module.train(
        module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path / "run"), **SMALL_REPLAY_RUN)
    )
    assert calls == [{"deterministic": False}] * 150


@every_replay_file
def test_batches_are_drawn_from_the_whole_memory(path, tmp_path, monkeypatch):
    """Batches have the size asked for, and hold old steps and new ones."""
    module = load_algo(path)
    batches = []
    update = module.Agent.update

    def recorded(self, batch, **options):
        batches.append(batch)
        return update(self, batch, **options)

    monkeypatch.setattr(module.Agent, "update", recorded)
    flags = SMALL_REPLAY_RUN | {"num_envs": 1, "env_id": probe(path, "Endless")}
    module.train(module.Args(run_dir=str(tmp_path / "run"), eval_episodes=1, **flags))
    for batch in batches:
        for tensor in batch.values():
            assert len(tensor) == 16
    times = torch.cat([batch["obs"][:, 0] for batch in batches])
    steps = times.mul(1e9).round().unique()
    assert len(steps) > 330
    assert steps.min() < 10
    assert steps.max() > 360


@pytest.mark.parametrize("algo", ["ddpg", "td3"])
def test_exploration_is_drawn_for_each_environment_and_stays_in_the_box(algo):
    module = load_algo(algo)
    agent, _ = replay_agent(module, exploration_noise=0.3)
    obs = torch.randn(1, 3).expand(5000, 3).numpy()
    noisy = torch.from_numpy(agent.actor.act(obs, deterministic=False))
    greedy = torch.from_numpy(agent.actor.act(obs, deterministic=True))
    assert (greedy == greedy[0]).all()
    assert len(noisy[:, 0].unique()) > 4000
    assert (noisy.abs() <= 1).all()
    inside = (noisy.abs() < 1).all(-1)
    spread = (noisy - greedy)[inside].std(0)
    assert (spread > 0.15).all()
    assert (spread < 0.31).all()


# The scaling of actions is plumbing: the same text in every file.


@pytest.fixture
def module(path):
    """Each file of algos/ in turn."""
    return load_algo(path)


def test_actions_are_scaled_per_dimension(module):
    """Half widths count from the center; an unbounded side has the units of the environment."""
    scale = module.action_scaler(np.float32([-3, 0]), np.float32([3, 1]))
    action = scale(np.float32([[0, 0], [1, 1], [-9, 9], [0.5, -0.5]]))
    assert action.tolist() == [[0, 0.5], [3, 1], [-3, 1], [1.5, 0.25]]
    scale = module.action_scaler(np.float32([-np.inf, -1]), np.float32([np.inf, np.inf]))
    assert scale(np.float32([7, -7])).tolist() == [7, -1]


def test_scaled_actions_stay_in_the_box_to_the_last_bit(module):
    """Actions at the edge of [-1, 1] and beyond it, in a box with bounds that float32 rounds."""
    low = np.float32([-0.1, 0.1, -3.3])
    high = np.float32([0.3, 0.7, 1.1])
    u = torch.tensor([[-50.0], [50.0], [9.01], [-9.01]]).expand(4, 3)
    action = module.action_scaler(low, high)(u.tanh().numpy())
    assert action.dtype == np.float32
    assert (action >= low).all()
    assert (action <= high).all()
    # Center, half width and their sum are rounded once each, by half a unit in the last place.
    unit = np.spacing(np.maximum(np.abs(low), np.abs(high)))
    assert (action[0] - low <= 1.5 * unit).all()
    assert (high - action[1] <= 1.5 * unit).all()


def test_random_actions_stay_in_random_boxes(module):
    """Without the clip, rounding puts 18 % of these actions outside of their box."""
    rng = np.random.default_rng(0)
    bounds = np.sort(rng.normal(size=(2, 1000)), axis=0).astype(np.float32)
    action = rng.choice([-1, 1], size=(100, 1000)).astype(np.float32)
    scaled = module.action_scaler(*bounds)(action)
    assert (scaled >= bounds[0]).all()
    assert (scaled <= bounds[1]).all()
