"""Tiny environments whose right values are known on paper. Importing this module registers them as probe/NAME-v0."""

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """Observes [time / length, the last observation of `reset`], acts in a Box, and lasts `length` steps."""

    def __init__(self, length=1, low=-1.0, high=1.0, ends=True, reward=lambda probe, action: 1.0):
        self.observation_space = gym.spaces.Box(-10, 10, (2,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.length, self.ends, self.reward = length, ends, reward

    def obs(self):
        return np.array([self.time / self.length, self.draw], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.draw = 0, self.np_random.choice([-1.0, 1.0])
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} lies outside of {self.action_space}"
        self.time += 1
        reward = self.reward(self, action)
        last = self.time >= self.length
        return self.obs(), reward, self.ends and last, not self.ends and last, {}


class Both(Probe):
    """Terminated and truncated on the same step: that is an end."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, terminated, info


class Blind(Probe):
    """Observes nothing: with the time in view, the last observation would be one that is never acted from."""

    def obs(self):
        return np.zeros(2, np.float32)


class Marker(Probe):
    """Observes [1 at a reset and else 0, steps since it]: no next observation may carry the marker."""

    def obs(self):
        return np.array([float(self.time == 0), self.time], np.float32)


class Reused(Marker):
    """The same, but every observation is one array, written over and over."""

    array = np.zeros(2, np.float32)

    def obs(self):
        self.array[:] = super().obs()
        return self.array


class Broken(Probe):
    """Sound for 300 steps, then `what` is not a number."""

    steps = 0

    def __init__(self, what):
        super().__init__(length=10)
        self.what = what

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        bad = self.steps > 300
        if bad and self.what == "observation":
            obs = obs * np.nan
        return obs, np.nan if bad and self.what == "reward" else reward, terminated, truncated, info


class Odd(gym.Env):
    """Nothing to learn from: it exists to be refused."""

    def __init__(self, observation, action):
        self.observation_space, self.action_space = observation, action

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


def delayed(probe, action):
    return float(probe.time == probe.length)


def near(target):
    return lambda probe, action: 1 - float(abs(action[0] - target))


BOX, PAIR = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
for name, make in {
    "Constant": lambda: Probe(),
    "Observed": lambda: Probe(reward=lambda probe, action: float(probe.draw)),
    "Delayed": lambda: Probe(length=2, reward=delayed),
    "Acted": lambda: Probe(reward=lambda probe, action: 1 - (float(action[0]) - 0.5) ** 2),
    "Wide": lambda: Probe(low=-3.0, high=3.0, reward=near(2.0)),
    "Cut": lambda: Blind(length=5, ends=False),
    "Ended": lambda: Probe(length=5),
    "Both": lambda: Both(length=5),
    "Marker": lambda: Marker(length=7, ends=False),
    "Reused": lambda: Reused(length=7, ends=False),
    "BadReward": lambda: Broken("reward"),
    "BadObservation": lambda: Broken("observation"),
    "Endless": lambda: Probe(length=10**9),
    "Image": lambda: Odd(gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Dict": lambda: Odd(gym.spaces.Dict({"a": BOX}), BOX),
    "Discrete": lambda: Odd(BOX, PAIR),
    "Unbounded": lambda: Odd(BOX, gym.spaces.Box(-np.inf, np.inf, (1,))),
    "HalfBounded": lambda: Odd(BOX, gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32))),
    "Integers": lambda: Odd(BOX, gym.spaces.Box(-3, 3, (1,), np.int32)),
    "NoWidth": lambda: Odd(BOX, gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32))),
    "Matrix": lambda: Odd(BOX, gym.spaces.Box(-1, 1, (2, 2))),
}.items():
    gym.register(f"probe/{name}-v0", entry_point=make)
