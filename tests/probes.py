"""Tiny environments whose right values are known on paper. Importing this module registers them as probe/NAME-v0."""

from functools import partial

import gymnasium as gym
import numpy as np


class Probe(gym.Env):
    """Observes [time / length, what `reset` drew], acts in a Box or chooses among three, and lasts `length` steps."""

    def __init__(
        self,
        length=1,
        low=-1.0,
        high=1.0,
        ends=True,
        reward=lambda probe, action: 1.0,
        discrete=False,
    ):
        self.observation_space = gym.spaces.Box(-10, 10, (2,))
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        if discrete:
            self.action_space = gym.spaces.Discrete(3)
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


class Scaling(Probe):
    """Scales the action that it is given in place, as some do to get at torques."""

    def step(self, action):
        result = super().step(action)
        action *= 0
        return result


class Numbers(Blind):
    """Says with numbers, not booleans, that an episode is over."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, int(terminated), int(truncated), info


class Precise(Probe):
    """Takes float64 in bounds that a float32 would leave, and gives its reward as an array of one."""

    def __init__(self, discrete=False):
        super().__init__(
            length=5,
            reward=lambda probe, action: -np.square(np.atleast_1d(action)),
            discrete=discrete,
        )
        if not discrete:
            self.action_space = gym.spaces.Box(-0.1, 0.1, (1,), np.float64)


class Broken(Probe):
    """Sound for some steps, then `what` is not a number."""

    steps = 0

    def __init__(self, what, sound=300, discrete=False):
        super().__init__(length=10, discrete=discrete)
        self.what, self.sound = what, sound

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        bad = self.steps > self.sound
        if bad and self.what == "observation":
            obs = obs * np.nan
        return obs, np.nan if bad and self.what == "reward" else reward, terminated, truncated, info

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs * np.nan if self.steps >= self.sound and self.what == "reset" else obs, info


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


def relatively(width, probe, action):
    """Best is 0.5 of the width."""
    return 1 - float(action[0] / width - 0.5) ** 2


def squarely(probe, action):
    """Best is 0.5 in a box, and 2 of 0, 1, 2."""
    return (
        1 - (float(action) - 2) ** 2 if np.ndim(action) == 0 else 1 - (float(action[0]) - 0.5) ** 2
    )


def offset(probe, action):
    """A thousand times further from 0 than its spread."""
    return 1000 + squarely(probe, action)


def large(probe, action):
    return 2.0**12 * squarely(probe, action)


BOX, PAIR = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(2)
for name, make in {
    "Constant": Probe,
    "Observed": partial(Probe, reward=lambda probe, action: float(probe.draw)),
    "Delayed": partial(Probe, length=2, reward=delayed),
    "Acted": partial(Probe, reward=squarely),
    "Offset": partial(Probe, reward=offset),
    "Large": partial(Probe, reward=large),
    "Above": partial(Probe, low=5.0, high=np.inf, reward=near(7.0)),
    "Free": partial(Probe, length=5, low=-np.inf, high=np.inf),
    "Unit": partial(Probe, low=-1.0, high=1.0, reward=partial(relatively, 1.0)),
    "Narrow": partial(Probe, low=-(2.0**-6), high=2.0**-6, reward=partial(relatively, 2.0**-6)),
    "Huge": partial(Probe, low=-(2.0**8), high=2.0**8, reward=partial(relatively, 2.0**8)),
    "Wide": partial(Probe, low=-3.0, high=3.0, reward=near(2.0)),
    "Cut": partial(Blind, length=5, ends=False),
    "Ended": partial(Probe, length=5),
    "Counted": lambda **kind: gym.wrappers.RecordEpisodeStatistics(Probe(length=5, **kind)),
    "Both": partial(Both, length=5),
    "Marker": partial(Marker, length=7, ends=False),
    "Reused": partial(Reused, length=7, ends=False),
    "BadReward": partial(Broken, "reward"),
    "BadObservation": partial(Broken, "observation"),
    "BadReset": partial(Broken, "reset"),
    "BadBeginning": partial(Broken, "reset", sound=0),
    "Precise": Precise,
    "Scaling": partial(Scaling, length=5),
    "Numbers": partial(Numbers, length=5, ends=False),
    "Endless": partial(Probe, length=10**9),
    "Image": partial(Odd, gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Dict": partial(Odd, gym.spaces.Dict({"a": BOX}), BOX),
    "Discrete": partial(Odd, BOX, PAIR),
    "FromOne": partial(Odd, BOX, gym.spaces.Discrete(2, start=1)),
    "Unbounded": partial(Odd, BOX, gym.spaces.Box(-np.inf, np.inf, (1,))),
    "HalfBounded": partial(
        Odd, BOX, gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32))
    ),
    "Integers": partial(Odd, BOX, gym.spaces.Box(-3, 3, (1,), np.int32)),
    "NoWidth": partial(
        Odd, BOX, gym.spaces.Box(np.array([-1, 0], np.float32), np.array([1, 0], np.float32))
    ),
    "Matrix": partial(Odd, BOX, gym.spaces.Box(-1, 1, (2, 2))),
}.items():
    gym.register(f"probe/{name}-v0", entry_point=make)
    gym.register(
        f"probe/{name}Discrete-v0", entry_point=make, kwargs={"discrete": True}
    )  # not meant for Odd
