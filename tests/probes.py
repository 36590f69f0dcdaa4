"""Tiny environments whose right values are known on paper; importing registers probe/NAME-v0."""

from functools import partial

import gymnasium as gym
import numpy as np


def reward_1(probe, action):
    return 1.0


def reward_drawn(probe, action):
    return float(probe.draw)


def reward_at_the_end(probe, action):
    return float(probe.time == probe.length)


def reward_near(target, probe, action):
    return 1 - float(abs(action[0] - target))


def reward_of_share(width, probe, action):
    """The best action is half of the width."""
    return 1 - float(action[0] / width - 0.5) ** 2


def reward_of_action(probe, action):
    """The best action is 0.5 in a box, and 2 of 0, 1, 2."""
    if np.ndim(action) == 0:
        return 1 - (float(action) - 2) ** 2
    return 1 - (float(action[0]) - 0.5) ** 2


def reward_with_offset(probe, action):
    """The offset is a thousand times as large as the differences."""
    return 1000 + reward_of_action(probe, action)


def large_reward(probe, action):
    return 2.0**12 * reward_of_action(probe, action)


def reward_in_array(probe, action):
    return -np.square(np.atleast_1d(action))


class Probe(gym.Env):
    """Episodes of `length` steps; observes [time / length, -1 or 1 drawn at the reset].

    Actions are in a Box or, if `discrete`, one of three. Episodes end by termination, or by
    truncation if `terminates` is False.
    """

    def __init__(
        self, length=1, low=-1.0, high=1.0, terminates=True, reward=reward_1, discrete=False
    ):
        self.observation_space = gym.spaces.Box(-10, 10, (2,))
        if discrete:
            self.action_space = gym.spaces.Discrete(3)
        else:
            self.action_space = gym.spaces.Box(np.float32(low), np.float32(high), (1,))
        self.length = length
        self.terminates = terminates
        self.reward = reward

    def obs(self):
        return np.array([self.time / self.length, self.draw], np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        self.draw = self.np_random.choice([-1.0, 1.0])
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action} is not in {self.action_space}"
        self.time += 1
        reward = self.reward(self, action)
        ended = self.time >= self.length
        terminated = ended and self.terminates
        truncated = ended and not self.terminates
        return self.obs(), reward, terminated, truncated, {}


class Both(Probe):
    """Terminated and truncated on the same step, which is a termination."""

    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, terminated, info


class Blind(Probe):
    """Observes nothing. If it observed the time, no action would follow the last observation."""

    def obs(self):
        return np.zeros(2, np.float32)


class Marker(Probe):
    """Observes [1 after a reset, else 0; steps since it]. No next observation has the marker."""

    def obs(self):
        return np.array([float(self.time == 0), self.time], np.float32)


class Reused(Marker):
    """Writes every observation into the same array."""

    array = np.zeros(2, np.float32)

    def obs(self):
        self.array[:] = super().obs()
        return self.array


class Scaling(Probe):
    """Scales the action in place, as some environments do to compute torques."""

    def step(self, action):
        result = super().step(action)
        action *= 0
        return result


class Numbers(Blind):
    """Returns numbers in place of booleans for terminated and truncated."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, int(terminated), int(truncated), info


class Precise(Probe):
    """Has float64 bounds that float32 rounds to the outside, and rewards in arrays of one."""

    def __init__(self, discrete=False):
        super().__init__(length=5, reward=reward_in_array, discrete=discrete)
        if not discrete:
            self.action_space = gym.spaces.Box(-0.1, 0.1, (1,), np.float64)


class Broken(Probe):
    """After `sound` steps, `what` is not a number: reward, observation or reset."""

    steps = 0

    def __init__(self, what, sound=300, discrete=False):
        super().__init__(length=10, discrete=discrete)
        self.what = what
        self.sound = sound

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps += 1
        is_broken = self.steps > self.sound
        if is_broken and self.what == "observation":
            obs = obs * np.nan
        if is_broken and self.what == "reward":
            reward = np.nan
        return obs, reward, terminated, truncated, info

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.steps >= self.sound and self.what == "reset":
            obs = obs * np.nan
        return obs, info


class Unsupported(gym.Env):
    """Has spaces that the algorithms must refuse."""

    def __init__(self, observation_space, action_space):
        self.observation_space = observation_space
        self.action_space = action_space

    def reset(self, seed=None, options=None):
        return self.observation_space.sample(), {}


def counted(**options):
    """An environment that counts its episodes itself."""
    return gym.wrappers.RecordEpisodeStatistics(Probe(length=5, **options))


def float32_box(low, high):
    return gym.spaces.Box(np.array(low, np.float32), np.array(high, np.float32))


BOX = gym.spaces.Box(-1, 1, (2,))
PROBES = {
    "Constant": Probe,
    "Observed": partial(Probe, reward=reward_drawn),
    "Delayed": partial(Probe, length=2, reward=reward_at_the_end),
    "Acted": partial(Probe, reward=reward_of_action),
    "Offset": partial(Probe, reward=reward_with_offset),
    "Large": partial(Probe, reward=large_reward),
    "Above": partial(Probe, low=5.0, high=np.inf, reward=partial(reward_near, 7.0)),
    "Free": partial(Probe, length=5, low=-np.inf, high=np.inf),
    "Unit": partial(Probe, reward=partial(reward_of_share, 1.0)),
    "Narrow": partial(
        Probe, low=-(2.0**-6), high=2.0**-6, reward=partial(reward_of_share, 2.0**-6)
    ),
    "Huge": partial(Probe, low=-(2.0**8), high=2.0**8, reward=partial(reward_of_share, 2.0**8)),
    "Wide": partial(Probe, low=-3.0, high=3.0, reward=partial(reward_near, 2.0)),
    "Cut": partial(Blind, length=5, terminates=False),
    "Ended": partial(Probe, length=5),
    "Counted": counted,
    "Both": partial(Both, length=5),
    "Marker": partial(Marker, length=7, terminates=False),
    "Reused": partial(Reused, length=7, terminates=False),
    "BadReward": partial(Broken, "reward"),
    "BadObservation": partial(Broken, "observation"),
    "BadReset": partial(Broken, "reset"),
    "BadBeginning": partial(Broken, "reset", sound=0),
    "Precise": Precise,
    "Scaling": partial(Scaling, length=5),
    "Numbers": partial(Numbers, length=5, terminates=False),
    "Endless": partial(Probe, length=10**9),
}
UNSUPPORTED = {
    "Image": partial(Unsupported, gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), BOX),
    "Dict": partial(Unsupported, gym.spaces.Dict({"a": BOX}), BOX),
    "Discrete": partial(Unsupported, BOX, gym.spaces.Discrete(2)),
    "FromOne": partial(Unsupported, BOX, gym.spaces.Discrete(2, start=1)),
    "Unbounded": partial(Unsupported, BOX, gym.spaces.Box(-np.inf, np.inf, (1,))),
    "HalfBounded": partial(Unsupported, BOX, float32_box([-1, 0], [1, np.inf])),
    "Integers": partial(Unsupported, BOX, gym.spaces.Box(-3, 3, (1,), np.int32)),
    "NoWidth": partial(Unsupported, BOX, float32_box([-1, 0], [1, 0])),
    "Matrix": partial(Unsupported, BOX, gym.spaces.Box(-1, 1, (2, 2))),
}
for name, make in PROBES.items():
    gym.register(f"probe/{name}-v0", entry_point=make)
    gym.register(f"probe/{name}Discrete-v0", entry_point=make, kwargs={"discrete": True})
for name, make in UNSUPPORTED.items():
    gym.register(f"probe/{name}-v0", entry_point=make)
