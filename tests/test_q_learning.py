"""The mathematics of ddpg, td3 and dqn against slow references."""

import copy

import numpy as np
import probes  # noqa: F401  (registers the environments)
import pytest
import torch
from conftest import ROOT, load, probe

LOW, HIGH = [-3.0, 0.0], [3.0, 1.0]


@pytest.fixture(params=["ddpg", "td3"])
def module(request):
    return load(ROOT / "algos" / f"{request.param}.py")


@pytest.fixture
def td3():
    return load(ROOT / "algos" / "td3.py")


@pytest.fixture
def dqn():
    return load(ROOT / "algos" / "dqn.py")


def agent_of(module, seed=0, **flags):
    """A small agent whose networks differ from their targets, and a batch with ends in it."""
    torch.manual_seed(seed)
    args = (
        module.Args(hidden=(8,), learning_rate=1e-2, **flags)
        if module.ALGO == "dqn"
        else module.Args(hidden=(8,), **{"policy_lr": 1e-2, "q_lr": 2e-2, **flags})
    )
    shape = (3, 4) if module.ALGO == "dqn" else (3, LOW, HIGH)
    agent = module.Agent(args, *shape, torch.device("cpu"))
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ends = (torch.rand(16, 1) < 0.3).float()
    action = torch.randint(4, (16, 1)).float() if module.ALGO == "dqn" else agent.actor(torch.randn(16, 3)).detach()
    return agent, torch.cat((torch.randn(16, 3), action, torch.randn(16, 1), ends, torch.randn(16, 3)), -1)


@pytest.mark.parametrize("name", ["ddpg", "dqn", "sac", "td3"])
def test_targets_begin_as_copies_and_learn_nothing(name):
    module = load(ROOT / "algos" / f"{name}.py")
    shape = (3, 4) if name == "dqn" else (3, LOW, HIGH)
    agent = module.Agent(module.Args(hidden=(8,)), *shape, torch.device("cpu"))
    pairs = [(agent.critic, agent.target)]
    if name in ("ddpg", "td3"):
        pairs.append((agent.actor, agent.target_actor))
    for online, target in pairs:
        for one, other in zip(online.parameters(), target.parameters(), strict=True):
            assert one.equal(other) and not other.requires_grad and one.data_ptr() != other.data_ptr()


TRAIN = {"num_envs": 2, "total_timesteps": 400, "learning_starts": 100, "batch_size": 16}
TRAIN |= {"hidden": (8,), "eval_every": 0}


def test_the_rhythm_of_dqn(dqn, tmp_path, monkeypatch):
    """Epsilon falls from the first step on; the target moves in its own rhythm; who acts is the network of now."""
    seen, count = [], {"move": 0, "update": 0, "in_numpy": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            count[name] += 1
            return function(*args, **kwargs)

        return call

    greedy = dqn.epsilon_greedy
    monkeypatch.setattr(dqn, "epsilon_greedy", lambda a, epsilon, n: seen.append(epsilon) or greedy(a, epsilon, n))
    monkeypatch.setattr(dqn.Agent, "move_target", counted("move", dqn.Agent.move_target))
    monkeypatch.setattr(dqn.Agent, "update", counted("update", dqn.Agent.update))
    monkeypatch.setattr(dqn.QNetwork, "in_numpy", counted("in_numpy", dqn.QNetwork.in_numpy))
    flags = {"train_frequency": 4, "target_network_frequency": 10, "start_e": 0.9, "end_e": 0.1}
    args = dqn.Args(env_id="CartPole-v1", run_dir=str(tmp_path / "run"), exploration_fraction=0.5, **TRAIN, **flags)
    dqn.train(args)
    np.testing.assert_allclose(seen, [max(0.1, 0.9 - 0.8 * step / 200) for step in range(2, 401, 2)])
    assert count == {"update": 300 // 4, "move": 300 // 10, "in_numpy": 1 + 300 // 4}


@pytest.mark.parametrize("name", ["ddpg", "sac", "td3"])
def test_who_acts_explores(name, tmp_path, monkeypatch):
    module, seen = load(ROOT / "algos" / f"{name}.py"), []
    act = module.Actor.act

    def noted(self, obs, *args, **kwargs):
        seen.append(kwargs)
        return act(self, obs, *args, **kwargs)

    monkeypatch.setattr(module.Actor, "act", noted)
    args = module.Args(env_id="Pendulum-v1", run_dir=str(tmp_path / "run"), **TRAIN)
    module.train(args)
    assert len(seen) == 150 and all(kwargs == {"deterministic": False} for kwargs in seen)


@pytest.mark.parametrize("name", ["ddpg", "dqn", "sac", "td3"])
def test_all_of_the_memory_is_drawn_from(name, tmp_path, monkeypatch):
    """Batches of the size asked for, in which old steps and new ones occur."""
    module, seen = load(ROOT / "algos" / f"{name}.py"), []
    update = module.Agent.update
    monkeypatch.setattr(
        module.Agent, "update", lambda self, batch, **kw: seen.append(batch) or update(self, batch, **kw)
    )
    flags = TRAIN | {"num_envs": 1, "env_id": probe(ROOT / "algos" / f"{name}.py", "Endless")}
    module.train(module.Args(run_dir=str(tmp_path / "run"), eval_episodes=1, **flags))
    assert all(len(batch) == 16 for batch in seen)
    steps = torch.cat([batch[:, 0] for batch in seen]).mul(1e9).round().unique()
    assert len(steps) > 330 and steps.min() < 10 and steps.max() > 360


@pytest.mark.parametrize("delayed", [False, True])
def test_update_is_the_pseudocode(module, delayed):
    """Three updates, one row at a time and with plain Adam, against those of the file."""
    if module.ALGO == "ddpg" and not delayed:
        pytest.skip("DDPG delays nothing")
    heads = 2 if module.ALGO == "td3" else 1
    agent, batch = agent_of(module)
    slow = copy.deepcopy(agent)
    pairs = [(slow.critic, 2e-2), (slow.actor, 1e-2)]
    adams = [torch.optim.Adam([*network.parameters()], lr=lr) for network, lr in pairs]
    half, low, high = torch.tensor([3.0, 0.5]), torch.tensor(LOW), torch.tensor(HIGH)

    def q(critic, k, s, a):
        x = torch.cat((s, (a - (low + high) / 2) / half))[None]
        return critic(x)[(k, 0, 0) if heads == 2 else (0, 0)]

    for number in range(3):
        torch.manual_seed(number)
        options = {"delayed": delayed} if heads == 2 else {}
        metrics = agent.update(batch, **options)
        torch.manual_seed(number)
        noise = torch.randn(16, 2) if heads == 2 else torch.zeros(16, 2)
        loss = 0
        for row, e in zip(batch, noise):
            s, a, r, d, s2 = row[:3], row[3:5], row[5], row[6], row[7:]
            with torch.no_grad():
                e = (0.2 * e).clamp(-0.5, 0.5) * half
                a2 = torch.maximum(torch.minimum(slow.target_actor(s2) + e, high), low)
                y = r + 0.99 * (1 - d) * min(q(slow.target, k, s2, a2) for k in range(heads))
            loss = loss + sum(0.5 * (q(slow.critic, k, s, a) - y) ** 2 for k in range(heads)) / len(batch)
        adams[0].zero_grad()
        loss.backward()
        adams[0].step()
        assert metrics["loss/critic"].item() == pytest.approx(loss.item(), rel=1e-4)
        if delayed:
            loss = sum(-q(slow.critic, 0, s, slow.actor(s)) for s in batch[:, :3]) / len(batch)
            adams[1].zero_grad()
            loss.backward()
            adams[1].step()
            assert metrics["loss/actor"].item() == pytest.approx(loss.item(), rel=1e-4, abs=1e-6)
            for target, source in ((slow.target, slow.critic), (slow.target_actor, slow.actor)):
                for p, w in zip(target.parameters(), source.parameters()):
                    p.data = 0.995 * p.data + 0.005 * w.data
        for ours, theirs in zip(agent.parameters(), slow.parameters()):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_target_noise_is_clipped_scaled_and_drawn_for_each(td3):
    torch.manual_seed(0)
    noise = td3.target_noise(torch.zeros(4000, 2), 0.2, 0.5)
    assert noise.abs().max() == 0.5 and len(noise.unique()) > 7000
    assert noise.std().item() == pytest.approx(0.2, abs=0.01) and noise.mean().abs() < 0.01
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    moved = td3.perturb(torch.tensor([[0.0, 0.5], [2.9, 0.9], [-2.9, 0.1]]), torch.full((3, 2), 0.5), low, high)
    torch.testing.assert_close(moved, torch.tensor([[1.5, 0.75], [3, 1], [-1.4, 0.35]]))


def test_exploration_is_drawn_for_each_environment_and_stays_in_the_box(module):
    agent, _ = agent_of(module, exploration_noise=0.3)
    obs = torch.randn(1, 3).expand(5000, 3).numpy()
    action, still = (torch.from_numpy(agent.actor.act(obs, deterministic=d)) for d in (False, True))
    assert (still == still[0]).all() and len(action[:, 0].unique()) > 4000
    assert (action >= torch.tensor(LOW)).all() and (action <= torch.tensor(HIGH)).all()
    inner = ((action > torch.tensor(LOW)) & (action < torch.tensor(HIGH))).all(-1)
    spread = (action - still)[inner].std(0) / torch.tensor([3.0, 0.5])
    assert (spread > 0.15).all() and (spread < 0.31).all()


def test_the_policy_moves_at_every_second_gradient_step(td3, tmp_path):
    """At the second, fourth, ...: neither inert nor off by one, also where a step has several gradient steps."""
    flags = {"hidden": (8,), "batch_size": 4, "eval_every": 0, "learning_starts": 20, "threads": 1, "device": "cpu"}
    for utd, frequency, total, policy in ((1.0, 2, 41, 10), (1.0, 3, 42, 7), (2.0, 2, 41, 21)):
        folder = tmp_path / f"{utd}-{frequency}"
        args = td3.Args(env_id="Pendulum-v1", total_timesteps=total, run_dir=str(folder), utd=utd, **flags)
        args.policy_frequency = frequency
        td3.train(args)
        state = torch.load(folder / "checkpoint.pt", weights_only=True)["agent"]
        taken = [state[f"{name}_optimizer.steps"].item() for name in ("critic", "actor")]
        assert taken == [int(utd * (total - 20)), policy]


@pytest.mark.parametrize("frequency, known", [(2, True), (10**6, False)])
def test_the_last_loss_of_the_policy_stays_in_the_log(td3, tmp_path, frequency, known):
    """Where 999 gradient steps come before the row, of which the last is none of the policy."""
    flags = {"hidden": (8,), "batch_size": 4, "eval_every": 0, "learning_starts": 1, "threads": 1, "device": "cpu"}
    args = td3.Args(env_id="Pendulum-v1", total_timesteps=1000, run_dir=str(tmp_path), **flags)
    args.policy_frequency = frequency
    result = td3.train(args)
    assert "loss/critic" in result and ("loss/actor" in result) == known


def test_dqn_targets_by_hand(dqn):
    """One batch through the file's update, its loss from numbers: plain, double, dueling."""
    for double in (False, True):
        for dueling in (False, True):
            agent, batch = agent_of(dqn, double=double, dueling=dueling, gamma=0.9)  # so Q is ten times the output
            batch[:, 4] *= 10
            loss, errors = 0.0, []
            for row in batch:
                s, a, r, d, s2 = row[:3], int(row[3]), row[4].item(), row[5].item(), row[6:]
                outputs = agent.critic.net(s2), agent.target.net(s2), agent.critic.net(s)
                net, target, now = ((10 * x).tolist() for x in outputs)
                if dueling:
                    net, target, now = ([x[0] + y - sum(x[1:]) / 4 for y in x[1:]] for x in (net, target, now))
                chosen = net.index(max(net)) if double else target.index(max(target))
                error = abs(now[a] - (r + 0.9 * (1 - d) * target[chosen]))
                errors.append(error)
                loss += (0.5 * error**2 if error < 10 else 10 * error - 50) / len(batch)
            assert min(errors) < 10 < max(errors)  # both branches
            assert agent.update(batch)["loss/critic"].item() == pytest.approx(loss, rel=1e-4)


def test_without_a_discount_dqn_has_a_horizon_all_the_same(dqn):
    agent, batch = agent_of(dqn, gamma=1.0)
    assert agent.horizon == 1000 and np.isfinite(agent.update(batch)["loss/critic"].item())


def test_the_dqn_update_moves_the_network_and_not_its_target(dqn):
    agent, batch = agent_of(dqn, tau=0.5)
    before = copy.deepcopy(agent)
    agent.update(batch)
    assert all(torch.equal(a, b) for a, b in zip(agent.target.parameters(), before.target.parameters()))
    assert not any(torch.equal(a, b) for a, b in zip(agent.critic.parameters(), before.critic.parameters()))
    agent.move_target()
    for ours, old, new in zip(agent.target.parameters(), before.target.parameters(), agent.critic.parameters()):
        torch.testing.assert_close(ours, (old + new) / 2)


def test_epsilon_falls_as_it_should(dqn):
    values = [dqn.linear_schedule(1.0, 0.05, 50, step) for step in (0, 25, 50, 51, 1000)]
    assert values == pytest.approx([1, 0.525, 0.05, 0.05, 0.05]) and dqn.linear_schedule(
        1.0, 0.1, 0, 1
    ) == pytest.approx(0.1)


@pytest.mark.parametrize("activation", ["relu", "tanh", "elu", "silu"])
@pytest.mark.parametrize("dueling", [True, False])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_the_greedy_action_in_numpy_is_the_one_in_torch(dqn, activation, dueling, layer_norm):
    torch.manual_seed(0)
    network = dqn.QNetwork(3, 4, (8, 8), activation, dueling, layer_norm, 100.0)
    for parameter in network.parameters():
        parameter.data = torch.randn_like(parameter)
    obs = 3 * torch.randn(50, 20, 3)
    expected = network(obs).argmax(-1).numpy()
    assert (network.act(obs.numpy()) == expected).mean() > 0.99  # rounding may turn the closest of them
    assert len(np.unique(expected)) > 1 and network.act(obs[0, 0].numpy()).shape == ()


@pytest.mark.parametrize("layer_norm", [True, False])
def test_layers_are_normalised_before_their_non_linearity(dqn, layer_norm):
    """Each row for itself: their scale and what they have in common make no difference."""
    torch.manual_seed(0)
    network, obs = dqn.QNetwork(3, 4, (64, 64), "tanh", False, layer_norm, 1.0), torch.randn(10, 3)
    before = network(obs)
    for layer in (network.net[0], network.net[2]):
        layer.weight.data = 10 * layer.weight + 1
        layer.bias.data = 10 * layer.bias + 1
    assert torch.allclose(network(obs), before, atol=1e-3) == layer_norm
    torch.testing.assert_close(network(obs[:1]), network(obs)[:1])


@pytest.mark.parametrize("anneal", [True, False])
def test_the_learning_rate_of_dqn_falls_with_the_steps_of_the_whole_run(dqn, tmp_path, monkeypatch, anneal):
    adams, adam = [], dqn.Adam
    monkeypatch.setattr(dqn, "Adam", lambda *args: adams.append(adam(*args)) or adams[-1])
    flags = {"learning_starts": 10, "eval_every": 0, "run_dir": str(tmp_path / "run"), "anneal_lr": anneal}
    for total, last in ((100, 90), (400, 370)):  # steps, and the one of the last update
        dqn.train(dqn.Args(total_timesteps=total, resume=last > 90, learning_rate=0.1, train_frequency=40, **flags))
        assert adams[-1].lr.item() == pytest.approx(0.1 * (1 - anneal * last / total))


def test_epsilon_greedy(dqn):
    """Uniform with probability epsilon, each environment for itself; greedy otherwise."""
    agent, _ = agent_of(dqn)
    obs = torch.randn(1, 3).expand(8000, 3).numpy()
    greedy = agent.critic.act(obs)
    assert (greedy == greedy[0]).all() and greedy[0] == agent.critic(torch.from_numpy(obs[0])).argmax().item()
    assert (agent.critic.act(obs, 0.4) != greedy).mean() == pytest.approx(0.4 * 3 / 4, abs=0.02)
    counts = torch.bincount(torch.from_numpy(agent.critic.act(obs, 1.0)), minlength=4)
    assert ((counts - 2000).abs() < 200).all()
