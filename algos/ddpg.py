# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch>=2.11",
#     "numpy>=2",
#     "gymnasium[mujoco]>=1.4,<2",
#     "mujoco<5",
#     "tyro>=1,<2",
#     "tqdm>=4.66",
# ]
# ///
"""Deep Deterministic Policy Gradient (DDPG): Q-learning for continuous actions.

Q-learning takes the maximum over all actions, which cannot be enumerated if they are continuous.
DDPG trains a policy to output the best action, by following the gradient of the critic. It can
learn from any transition, so the last `buffer_size` of them are kept and reused.

Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", arXiv 1509.02971

    Policy mu, critic Q, target networks mu' and Q', memory D.
    For each environment step:
        Act with mu and noise, or uniformly at random during the first `learning_starts` steps:
            a = clip(mu(s) + exploration_noise noise, -1, 1),   noise ~ N(0, 1)                (1)
        Store (s, a, r, d, s') in D; d is 1 only where the episode terminated.
        After `learning_starts`, repeat `utd` times on a batch from D:
            y = r + gamma (1 - d) Q'(s', mu'(s'))                                              (2)
            Q minimises            mean 1/2 (Q(s, a) - y)^2                                    (3)
            mu minimises           mean -Q(s, mu(s))                                           (4)
            Q' moves to            Q' + tau (Q - Q'),   mu' to  mu' + tau (mu - mu')           (5)

Usage:
    python algos/ddpg.py --env-id Hopper-v4
    python algos/ddpg.py --resume --run-dir runs/...  # continue; saved flags are the defaults
    from ddpg import Args, load_policy, train         # from Python

Last evaluation after 100k steps, mean of 3 seeds: HalfCheetah-v4 4144, Hopper-v4 380.
After 20k steps, mean of 10 seeds: Pendulum-v1 -153.

What matters beyond the equations:
 1. A time limit is not a termination: d stays 0, and s' is the true last observation of the
    episode, not the first observation of the next one.
 2. The noise is uncorrelated and Gaussian. The authors of TD3 found no benefit in the correlated
    noise of the paper.
 3. `descend` computes gradients for one optimizer's parameters only, so (4) does not train the
    critic.
 4. A step is one step of one environment. `num_envs` changes neither the x-axis nor the number of
    gradient steps per step.
 5. The agent acts in [-1, 1] and an environment wrapper scales actions to the real bounds, so the
    units of actions make no difference. Rewards and observations are used as they are; keep them
    near 1.
 6. Every checkpoint starts new episodes from seeds derived from (seed, step), in every run. A run
    that was killed and resumed with the same flags therefore ends bit-identical to one that was
    not, on a CPU. Ctrl-C adds a checkpoint, so the result differs.
 7. Noise is drawn separately for every environment. Noisy actions are clipped to [-1, 1].

Metrics: loss/critic (3), loss/actor (4); value/mean over the last batch; episode/* for training
episodes; eval/* for deterministic evaluation; speed/sps, environment steps per second.
"""

# Shapes: B batch, N environments, O observation, A action.

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed, nn
from tqdm import tqdm

ALGO = "ddpg"


class Range(NamedTuple):
    """The values that a flag may have, checked by `check_flags`."""

    low: float
    high: float
    text: str


Count = Annotated[int, Range(1, 10**18, "from 1 to 1e18")]
Natural = Annotated[int, Range(0, 10**18, "from 0 to 1e18")]
Positive = Annotated[float, Range(1e-99, 1e18, "above 0 and at most 1e18")]
NonNegative = Annotated[float, Range(0, 1e18, "from 0 to 1e18")]
Fraction = Annotated[float, Range(0, 1, "from 0 to 1")]
Share = Annotated[float, Range(1e-99, 1, "above 0 and at most 1")]
Widths = Annotated[tuple[int, ...], Range(1, 10**18, "from 1 to 1e18")]


@dataclass
class Args:
    """Deep Deterministic Policy Gradient. A step is one step of one environment."""

    learning_starts: Natural = 5_000  # steps of uniformly random actions before learning begins
    buffer_size: Count = 1_000_000  # transitions in the replay memory
    batch_size: Count = 256  # transitions per gradient step
    utd: Positive = 1.0  # update-to-data ratio: gradient steps per environment step
    gamma: Fraction = 0.99  # discount factor
    tau: Share = 0.005  # step size of the target networks
    policy_lr: Positive = 1e-3  # learning rate of the policy
    q_lr: Positive = 1e-3  # learning rate of the critic
    exploration_noise: NonNegative = 0.1  # std of the noise on actions, which span [-1, 1]
    hidden: Widths = (256, 256)  # widths of the hidden layers
    activation: Literal["relu", "tanh", "elu", "silu"] = "relu"  # nonlinearity between layers

    env_id: str = "Hopper-v4"  # gymnasium id; module:Name-v0 imports the module first
    exp_name: str = ALGO  # part of the run folder's name
    seed: Natural = 1  # seed of everything random
    total_timesteps: Count = 1_000_000  # environment steps, summed over environments
    num_envs: Count = 1  # environments stepped in turn
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto takes cuda where there is one
    threads: Count = 2  # CPU threads of torch; use 1 where other runs share the machine
    run_dir: str | None = None  # run folder; default: runs/{env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # continue the run in --run-dir; start it if there is none
    eval_every: Natural = 10_000  # steps between evaluations; 0 for none
    eval_episodes: Count = 10  # episodes per evaluation
    checkpoint_every: Natural = 50_000  # steps between checkpoints; 0 for one at the end
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # mirror metrics.jsonl there
    capture_video: bool = False  # film one episode of every evaluation into videos/
    compile: bool = False  # compile the whole update: loss, gradient and optimizer step
    cuda_graph: bool = True  # on CUDA, capture the update as a graph


ACTIVATIONS = {
    "relu": nn.ReLU(inplace=True),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(inplace=True),
    "silu": nn.SiLU(),
}


def mlp(sizes, activation):
    """Fully connected network: [..., sizes[0]] -> [..., sizes[-1]]."""
    layers = []
    for size_in, size_out in pairwise(sizes):
        layers.append(nn.Linear(size_in, size_out))
        layers.append(ACTIVATIONS[activation])
    return nn.Sequential(*layers[:-1])


def q_values(critic, obs, action):
    """Action values: obs [B, O], action [B, A] -> [B]."""
    return critic(torch.cat((obs, action), -1)).squeeze(-1)


class Actor(nn.Module):
    """The policy mu."""

    def __init__(self, args, spaces):
        super().__init__()
        self.net = mlp((spaces.obs_dim, *args.hidden, spaces.act_dim), args.activation)
        self.exploration_noise = args.exploration_noise

    def forward(self, obs):
        """mu: obs [..., O] -> action [..., A] in [-1, 1]."""
        return self.net(obs).tanh()

    @torch.no_grad()
    def act(self, obs, deterministic=True):
        """Observations [..., O] -> actions [..., A] in [-1, 1], both numpy arrays."""
        device = next(self.parameters()).device
        obs = torch.as_tensor(obs, dtype=torch.float32, device=device)
        action = self(obs)
        if not deterministic:
            noise = self.exploration_noise * torch.randn_like(action)
            action = perturb(action, noise)  # (1)
        return action.cpu().numpy()


def perturb(action, noise):
    """(1): action and noise [..., A] -> action [..., A] in [-1, 1]."""
    return (action + noise).clamp(-1, 1)


def q_target(reward, terminated, next_q, gamma):
    """(2): all [B] -> y [B]."""
    return reward + gamma * (1 - terminated) * next_q


def critic_loss(q, y):
    """(3): q [B], y [B] -> scalar."""
    return 0.5 * (q - y).square().mean()


def actor_loss(q):
    """(4): q [B] -> scalar."""
    return -q.mean()


@torch.no_grad()
def polyak_update(target, source, tau):
    """(5): move the parameters of `target` towards those of `source`."""
    torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def descend(optimizer, loss):
    """One step of `optimizer`. Parameters that it does not hold get no gradient."""
    optimizer.step(torch.autograd.grad(loss, optimizer.parameters_held))


class Agent(nn.Module):
    """Everything that learns."""

    def __init__(self, args, spaces):
        super().__init__()
        self.args = args
        self.spaces = spaces
        critic_sizes = (spaces.obs_dim + spaces.act_dim, *args.hidden, 1)
        self.actor = Actor(args, spaces)
        self.target_actor = Actor(args, spaces)
        self.critic = mlp(critic_sizes, args.activation)
        self.target = mlp(critic_sizes, args.activation)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target_actor.requires_grad_(False)
        self.target.load_state_dict(self.critic.state_dict())
        self.target.requires_grad_(False)

        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.q_lr)

    def random_actions(self, n):
        """Uniformly random actions [n, A] as a numpy array."""
        return (2 * torch.rand(n, self.spaces.act_dim) - 1).numpy()

    def update(self, batch):
        """One gradient step of everything; `batch` as in `train`. Returns scalar tensors to log."""
        obs = batch["obs"]
        next_obs = batch["next_obs"]

        with torch.no_grad():
            next_action = self.target_actor(next_obs)
            next_q = q_values(self.target, next_obs, next_action)  # [B]
            y = q_target(batch["reward"], batch["terminated"], next_q, self.args.gamma)  # (2)
        q = q_values(self.critic, obs, batch["action"])  # [B]
        loss_q = critic_loss(q, y)
        descend(self.critic_optimizer, loss_q)  # (3)

        new_q = q_values(self.critic, obs, self.actor(obs))  # [B]
        loss_pi = actor_loss(new_q)
        metrics = {"loss/critic": loss_q, "loss/actor": loss_pi}
        descend(self.actor_optimizer, loss_pi)  # (4)

        polyak_update(self.target, self.critic, self.args.tau)  # (5)
        polyak_update(self.target_actor, self.actor, self.args.tau)  # (5)
        metrics["value/mean"] = q.mean()
        return {name: value.detach() for name, value in metrics.items()}


def train(args):
    """Train DDPG; returns the last value of every metric. Bad flags raise InputError."""
    device = check_flags(args)
    envs = [make_env(args) for _ in range(args.num_envs)]
    spaces = read_spaces(envs[0], "bounded box")
    agent = Agent(args, spaces).to(device)
    memory = Replay(
        args.buffer_size,
        args.num_envs,
        device,
        obs=(spaces.obs_dim,),
        action=(spaces.act_dim,),
        reward=(),
        terminated=(),
        next_obs=(spaces.obs_dim,),
    )
    run = Run(args, envs, agent=agent, memory=memory)  # opens the folder, restores a checkpoint
    update = accelerate(agent.update, args, device)  # --compile, CUDA graphs

    obs = run.reset_envs()
    metrics = {}
    for step in run.steps(args.num_envs):  # the step at the end of the iteration
        # Act: uniformly at random at first, then from the policy with noise (1).
        if step <= args.learning_starts:
            action = agent.random_actions(args.num_envs)
        else:
            action = agent.actor.act(obs, deterministic=False)
        next_obs, reward, terminated, ended = run.step_envs(action)
        memory.add(obs=obs, action=action, reward=reward, terminated=terminated, next_obs=next_obs)
        obs = run.reset_ended(next_obs, ended)

        # Learn: `utd` gradient steps per environment step.
        for _ in run.updates_due(args.utd, args.learning_starts):
            metrics = update(memory.sample(args.batch_size))

        # Log, evaluate, checkpoint.
        if run.due(1000):
            run.log(metrics | {"speed/sps": run.steps_per_second()})
        if run.due(args.eval_every):
            evaluate(run, agent.actor)
        if run.save_due():
            run.save()
            if run.interrupted:
                break
            # Start new episodes, as a resumed run does.
            obs = run.reset_envs()
            metrics = {}
    return run.finish()


# ==== Plumbing: identical in every file. The algorithm ends here. =================================


class InputError(ValueError):
    """Bad input, described in one sentence that says what to do."""


class Spaces(NamedTuple):
    """Sizes of observations and actions, and the bounds of actions."""

    obs_dim: int
    act_dim: int  # dimensions of an action, or the number of actions to choose from
    low: list | None  # bounds of every dimension; None if actions are discrete
    high: list | None


def check_flags(args):
    """Check all flags, set threads and seed; returns the device. Raises InputError."""
    for name, hint in get_type_hints(type(args), include_extras=True).items():
        check_flag("--" + name.replace("_", "-"), getattr(args, name), hint)
    if args.resume and not args.run_dir:
        raise InputError("--resume needs --run-dir, the folder of the run to continue")
    if getattr(args, "learning_starts", 0) >= args.total_timesteps:
        print(
            "warning: --learning-starts is not below --total-timesteps, so nothing is learned",
            file=sys.stderr,
        )
    if int(os.environ.get("RANK", 0)) > 0 and not distributed.is_initialized():
        raise InputError(f"{ALGO} runs in one process: start it without torchrun")
    torch.set_num_threads(args.threads)
    # Adam's moments of a dead unit decay into denormal numbers, which are slow on a CPU.
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    return find_device(args.device)


def check_flag(flag, value, hint):
    """Raise InputError unless `value` has the type and the range of the annotation `hint`."""
    if get_origin(hint) in (Union, UnionType):  # an optional flag
        if value is not None:
            check_flag(flag, value, get_args(hint)[0])
        return
    bounds = None
    if get_origin(hint) is Annotated:
        bounds = hint.__metadata__[0]
        hint = hint.__origin__

    # tyro checks types on the command line; this covers calls from Python.
    if get_origin(hint) is Literal:
        has_type = value in get_args(hint)
        type_name = "one of " + ", ".join(get_args(hint))
    elif get_origin(hint) is tuple:
        has_type = isinstance(value, tuple | list) and all(type(item) is int for item in value)
        type_name = "a tuple of int"
    else:
        has_type = type(value) is hint or (hint is float and type(value) is int)
        type_name = f"of type {hint.__name__}"
    if not has_type:
        raise InputError(f"{flag} is {value!r}; it must be {type_name}")

    if bounds is not None:
        numbers = value if isinstance(value, tuple | list) else [value]
        if not all(bounds.low <= number <= bounds.high for number in numbers):
            raise InputError(f"{flag} is {value}; it must be {bounds.text}")


def find_device(name):
    """The torch device that --device names."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"--device {name}: {str(error).splitlines()[0]}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)  # CUDA graphs capture on the current device's stream
    return device


def make_env(args, video_folder=None):
    """Make an environment with flat observations [O] whose actions are scaled from [-1, 1].

    Films its episodes if `video_folder` is given. Raises InputError for other observations, and if
    the environment cannot be filmed.
    """
    # Published results are on the v4 environments, which gymnasium calls out of date.
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # module:Name-v0 may name a module in the current folder
    if video_folder is None:
        env = gym.make(args.env_id)
    else:
        env = make_filmed_env(args.env_id, video_folder)

    space = env.observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise InputError(
            f"{args.env_id} observes {space}: wrap it to observe a Box of one dimension"
        )
    if env.spec.max_episode_steps is None:
        # Evaluations must end, so every environment has a limit. This is the one of Atari games.
        env = gym.wrappers.TimeLimit(env, 27_000)
    # Some environments write every observation into the same array, so copy it.
    env = gym.wrappers.TransformObservation(env, np.copy, None)
    # Some environments return the reward as an array of one element.
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())
    if isinstance(env.action_space, gym.spaces.Box):
        scale = action_scaler(env.action_space.low, env.action_space.high)
        env = gym.wrappers.TransformAction(env, scale, None)
    # The usual key, "episode", may be taken by the environment.
    return gym.wrappers.RecordEpisodeStatistics(env, stats_key=ALGO)


def make_filmed_env(env_id, video_folder):
    """Make an environment that films every episode into `video_folder`."""
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")  # render without a screen
    try:
        env = gym.make(env_id, render_mode="rgb_array")
        env.reset()
        env.render()  # if rendering fails, fail now and not at the first evaluation
    except Exception as error:  # every rendering library raises exceptions of its own
        raise InputError(
            f"cannot film {env_id} ({error!r}): leave out --capture-video, or set MUJOCO_GL"
        ) from error
    return gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: True)


def action_scaler(low, high):
    """Returns a function that maps actions [..., A] from [-1, 1] to the box [low, high].

    A dimension without two finite bounds is only shifted: 0 becomes the point nearest to 0.
    """
    center = np.clip(np.zeros_like(low), low, high)
    half_width = np.ones_like(low)
    bounded = np.isfinite(low) & np.isfinite(high)
    center[bounded] = low[bounded] / 2 + high[bounded] / 2
    half_width[bounded] = high[bounded] / 2 - low[bounded] / 2

    def scale(action):
        # Clip: a sample of an unbounded policy can be outside the box, and rounding too.
        return (center + half_width * action).clip(low, high)

    return scale


ACTION_SPACES = {
    "discrete": "Discrete(n) with actions counted from 0",
    "bounded box": "a flat Box of floats with finite bounds",
    "box or discrete": "a flat Box of floats, or Discrete(n) with actions counted from 0",
}


def read_spaces(env, supported):
    """The Spaces of an environment. `supported` is a key of ACTION_SPACES."""
    obs_dim = env.observation_space.shape[0]
    space = env.action_space
    if "discrete" in supported and isinstance(space, gym.spaces.Discrete) and space.start == 0:
        return Spaces(obs_dim, int(space.n), None, None)
    if "box" in supported and isinstance(space, gym.spaces.Box):
        flat = len(space.shape) == 1 and space.dtype.kind == "f"
        bounded = all(0 < width < math.inf for width in (space.high - space.low).flat)
        if flat and (bounded or supported != "bounded box"):
            return Spaces(obs_dim, space.shape[0], space.low.tolist(), space.high.tolist())
    raise InputError(f"{ALGO} needs actions in {ACTION_SPACES[supported]}, not {space}")


class Replay:
    """A ring of the last `capacity` transitions, one tensor per field."""

    def __init__(self, capacity, num_envs, device, **shapes):
        """`shapes` maps the name of a field to the shape of one item, e.g. obs=(11,)."""
        # With a multiple of num_envs, the items of one step never wrap around.
        self.capacity = math.ceil(capacity / num_envs) * num_envs
        self.device = device
        self.added = 0
        self.data = {}
        for name, shape in shapes.items():
            # numpy leaves the memory untouched, so pages that are never filled cost nothing.
            array = np.empty((self.capacity, *shape), np.float32)
            self.data[name] = torch.from_numpy(array).to(device)

    def add(self, **items):
        """Append one item per environment to every field: arrays [N, ...]."""
        start = self.added % self.capacity
        for name, value in items.items():
            tensor = self.data[name]
            if self.device.type == "cpu":
                # Writing through numpy takes 2 microseconds, through torch 32.
                tensor.numpy()[start : start + len(value)] = value
            else:
                tensor[start : start + len(value)] = torch.as_tensor(value, dtype=torch.float32)
        self.added += len(value)

    def __len__(self):
        return min(self.added, self.capacity)

    def sample(self, batch_size):
        """Draw transitions uniformly with replacement -> dict of tensors [B, ...]."""
        index = torch.randint(len(self), (batch_size,), device=self.device)
        return {name: tensor.index_select(0, index) for name, tensor in self.data.items()}

    def state_dict(self):
        """The filled part of the ring, cloned: a slice would be saved with all of its memory."""
        rows = {name: tensor[: len(self)].clone() for name, tensor in self.data.items()}
        return {"added": self.added, "rows": rows}

    def load_state_dict(self, state):
        """Restore what `state_dict` returned."""
        self.added = state["added"]
        for name, tensor in self.data.items():
            tensor[: len(self)].copy_(state["rows"][name])


# Flags that may change on resuming, though some of them change the result. Others must not.
MAY_CHANGE = {
    "total_timesteps",
    "device",
    "threads",
    "run_dir",
    "resume",
    "eval_every",
    "eval_episodes",
    "checkpoint_every",
    "track",
    "capture_video",
    "compile",
    "cuda_graph",
}


class Run:
    """A run folder and its progress: stepping, logging, checkpoints.

    One process writes a folder. A kill at any moment loses nothing that was checkpointed. Metrics
    after the last checkpoint are dropped on resuming.
    """

    def __init__(self, args, envs, **parts):
        """Open or resume a folder. A checkpoint holds the `parts`; one of them is `agent`."""
        self.args = args
        self.envs = envs
        self.parts = parts
        self.total = args.total_timesteps
        self.step = 0  # environment steps so far
        self.stride = (
            args.num_envs
        )  # environment steps per iteration; a whole rollout in some files
        self.first_env = 0  # index of envs[0] among the environments of all processes
        self.interrupted = False
        self.last = {}  # last value of every metric

        self.folder = choose_folder(args)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.metrics_file = open(self.folder / "metrics.jsonl", "ab", buffering=0)
        try:
            lock(self.metrics_file, self.folder)
            self.prepare()
        except BaseException:
            self.metrics_file.close()  # releases the lock, even if a notebook keeps this object
            raise

    def prepare(self):
        """Check and restore what the folder holds, then prepare to evaluate and to log."""
        args = self.args
        path = self.folder / "config.json"
        flags = json.loads(json.dumps(asdict(args)))  # as the file has them: lists for tuples
        config = {"algo": ALGO, "args": flags, "command": sys.argv, "commit": git_commit()}
        config["id"] = os.urandom(4).hex()  # tells apart folders of one name on two machines
        if path.exists():
            saved = json.loads(path.read_text())
            config["id"] = saved.get("id") or config["id"]
        else:
            saved = config  # a new run: nothing to compare with
        self.check_saved_config(saved, flags, path.exists())
        self.restore()

        if args.eval_every:
            videos = self.folder / "videos" if args.capture_video else None
            self.eval_envs = [make_env(args, videos)]
            self.eval_envs += [make_env(args) for _ in range(args.eval_episodes - 1)]
        else:
            self.eval_envs = []
        episode_steps = self.envs[0].spec.max_episode_steps * args.num_envs
        if 0 < args.checkpoint_every < 10 * episode_steps:
            print(
                "warning: every checkpoint cuts the episodes short, "
                f"so set --checkpoint-every to at least 10 episodes, {10 * episode_steps}",
                file=sys.stderr,
            )
        self.tracker = open_tracker(
            args, self.folder, f"{self.folder.name}-{config['id']}", self.step
        )
        (self.folder / "result.json").unlink(missing_ok=True)
        versions = {"python": sys.version.split()[0]}
        for name in ("torch", "gymnasium", "mujoco"):
            versions[name] = getattr(sys.modules.get(name), "__version__", None)
        if self.step < self.total:  # a finished run keeps the config that made it
            self.write("config.json", config | {"versions": versions})

    def check_saved_config(self, saved, flags, config_exists):
        """Raise InputError unless this is a new run, or a resumed one with the same flags."""
        has_run = config_exists or self.metrics_file.seek(0, os.SEEK_END) > 0
        if has_run and not self.args.resume:
            raise InputError(
                f"{self.folder} holds a run: add --resume to continue it, or change --run-dir"
            )
        changed = []
        if saved["algo"] != ALGO:
            changed.append(f"algo {saved['algo']}")
        for name, value in flags.items():
            if name not in MAY_CHANGE and saved["args"].get(name) != value:
                changed.append(f"--{name.replace('_', '-')} {saved['args'].get(name)}")
        if changed:
            raise InputError(
                f"{self.folder} was started with {', '.join(changed)}: "
                "use the same, or choose another --run-dir"
            )

    def restore(self):
        """Load the newest checkpoint that can be read, and drop the metrics that came after it."""
        seconds = 0.0
        metrics_size = 0
        paths = [self.folder / "checkpoint.pt", self.folder / "checkpoint.prev.pt"]
        paths = [path for path in paths if path.exists()]
        restored = False
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.step = state["run"]["step"]
                self.last = state["run"]["last"]
                seconds = state["run"]["seconds"]
                metrics_size = state["run"]["metrics_size"]
                for name, part in self.parts.items():
                    part.load_state_dict(state[name])
                torch.set_rng_state(state["rng"])
                if "cuda_rng" in state and torch.cuda.is_initialized():
                    torch.cuda.set_rng_state(state["cuda_rng"])
            except Exception as error:  # a damaged file can raise anything
                if isinstance(error, OSError | MemoryError) or "allocate" in str(error):
                    raise OSError(f"cannot read {path}, which may be intact: {error}") from error
                print(
                    f"warning: {path} is damaged ({type(error).__name__}: {error})", file=sys.stderr
                )
                continue
            if path != paths[0]:
                # Move the damaged file away: the next checkpoint would keep it and drop this one.
                os.replace(paths[0], self.folder / "checkpoint.damaged.pt")
            print(f"{self.folder}: resuming at step {self.step} of {self.total}", file=sys.stderr)
            restored = True
            break
        if paths and not restored:
            raise InputError(
                f"no checkpoint in {self.folder} can be read: "
                f"move them away to start anew, or use the version of {ALGO}.py that wrote them"
            )
        self.start_time = time.monotonic() - seconds
        self.metrics_file.truncate(min(metrics_size, self.metrics_file.seek(0, os.SEEK_END)))

    def write(self, name, content, keep_old_as=None):
        """Replace a file of the folder at once: write a new one, sync it, rename it."""
        new = self.folder / f"{name}.new"
        try:
            with open(new, "wb") as file:
                if name.endswith(".pt"):
                    torch.save(content, file)
                else:
                    file.write(json.dumps(content, indent=1).encode())
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            raise OSError(
                f"cannot write {new} ({error}): make room, then --resume; earlier files are intact"
            ) from error
        if keep_old_as and (self.folder / name).exists():
            os.replace(self.folder / name, self.folder / keep_old_as)
        os.replace(new, self.folder / name)

    def save(self):
        """Write policy.pt and checkpoint.pt; the last checkpoint becomes checkpoint.prev.pt."""
        agent = self.parts["agent"]
        for name, tensor in agent.state_dict().items():
            if not tensor.isfinite().all():
                raise FloatingPointError(
                    f"{name} not finite at step {self.step}: start anew with a lower learning rate"
                )
        os.fsync(self.metrics_file.fileno())
        policy = {"args": asdict(self.args), "spaces": list(agent.spaces)}
        self.write("policy.pt", policy | {"actor": agent.actor.state_dict()})

        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["rng"] = torch.get_rng_state()
        if torch.cuda.is_initialized():
            state["cuda_rng"] = torch.cuda.get_rng_state()
        state["run"] = {
            "step": self.step,
            "last": self.last,
            "seconds": time.monotonic() - self.start_time,
            "metrics_size": os.fstat(self.metrics_file.fileno()).st_size,
        }
        self.write("checkpoint.pt", state, keep_old_as="checkpoint.prev.pt")

    def finish(self):
        """Write and return the last metrics. Raises KeyboardInterrupt if Ctrl-C ended the run."""
        if self.interrupted and self.step < self.total:
            command = ["python", sys.argv[0], "--resume", "--run-dir", str(self.folder)]
            raise KeyboardInterrupt(
                f"Interrupted at step {self.step}. To resume: {shlex.join(command)} "
                "(the result will differ from an uninterrupted run)"
            )
        self.write("result.json", self.last)
        return self.last

    def steps(self, stride):
        """Yield the step that each iteration ends at. Meanwhile Ctrl-C sets `interrupted`."""
        self.stride = stride
        on_terminal = sys.stderr.isatty()
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread:
            old_handler = signal.signal(signal.SIGINT, self.interrupt)
        try:
            with open(os.devnull, "w") as nowhere:
                file = None if on_terminal else nowhere  # None is stderr
                bar = tqdm(total=self.total, initial=self.step, unit=" steps", file=file)
                while self.step < self.total:
                    yield self.step + stride
                    bar.set_postfix_str(
                        f"return {self.last.get('episode/return', math.nan):.1f}", refresh=False
                    )
                    bar.update(stride)
                    if not on_terminal and self.due(10_000):
                        print(bar, flush=True)
        finally:
            if in_main_thread:
                signal.signal(signal.SIGINT, old_handler)
            self.metrics_file.close()
            for env in [*self.envs, *self.eval_envs]:
                env.close()

    def interrupt(self, signum, frame):
        """Handle Ctrl-C: `train` saves and stops at the end of its current iteration."""
        self.interrupted = True

    def reset_envs(self):
        """Start an episode everywhere, with seeds made of (seed, step) -> observations [N, O]."""
        seeds = self.seeds(self.args.num_envs)
        seeds = seeds[self.first_env : self.first_env + len(self.envs)]
        obs = [env.reset(seed=seed)[0] for env, seed in zip(self.envs, seeds, strict=True)]
        return self.check_finite(np.stack(obs))

    def step_envs(self, action):
        """Step every environment with action [N, ...].

        Returns next_obs [N, O], the last observation where an episode ended; reward, terminated
        and ended (terminated or truncated), all [N].
        """
        self.step += self.args.num_envs
        next_obs = []
        reward = []
        terminated = []
        truncated = []
        for env, env_action in zip(self.envs, action, strict=True):
            result = env.step(env_action)
            next_obs.append(result[0])
            reward.append(result[1])
            terminated.append(result[2])
            truncated.append(result[3])
        next_obs = self.check_finite(np.array(next_obs))
        reward = self.check_finite(np.array(reward))
        terminated = np.array(terminated, bool)
        ended = terminated | np.array(truncated, bool)
        for i in np.flatnonzero(ended):
            env = self.envs[i]
            self.log(
                {"episode/return": env.return_queue[-1], "episode/length": env.length_queue[-1]}
            )
        return next_obs, reward, terminated, ended

    def reset_ended(self, next_obs, ended):
        """Restart the environments whose episode ended -> observations to act on [N, O]."""
        if not ended.any():
            return next_obs
        obs = next_obs.copy()
        for i in np.flatnonzero(ended):
            obs[i], _ = self.envs[i].reset()
        return self.check_finite(obs)

    def check_finite(self, values):
        """Return `values`, observations or rewards, if float32 can hold them."""
        if not np.isfinite(values.astype(np.float32)).all():
            raise FloatingPointError(
                f"reward or observation not finite at step {self.step}: "
                "fix the environment or lower the learning rate"
            )
        return values

    def seeds(self, n, stream=0):
        """n seeds made of (seed, step, stream). Evaluations use stream 1, training stream 0."""
        return (
            np.random.SeedSequence([self.args.seed, self.step, stream]).generate_state(n).tolist()
        )

    def updates_due(self, utd, learning_starts, every=1):
        """The indices of the updates due in this iteration, counted from 0 over the run.

        There are `utd` updates per step, or one every `every` steps, after `learning_starts` steps.
        """
        before = max(0, self.step - self.stride - learning_starts)
        now = max(0, self.step - learning_starts)
        return range(int(utd * before) // every, int(utd * now) // every)

    def due(self, every):
        """Whether this iteration reached a multiple of `every`, or is the last."""
        return self.step >= self.total or (every > 0 and self.step % every < self.stride)

    def save_due(self):
        """Whether a checkpoint is due, or Ctrl-C asked for the last one."""
        return self.due(self.args.checkpoint_every) or self.interrupted

    def steps_per_second(self):
        """Environment steps per second since the run began."""
        return self.step / (time.monotonic() - self.start_time)

    def log(self, metrics):
        """Append a row to metrics.jsonl. Raises FloatingPointError if a number is not finite."""
        metrics = {name: float(value) for name, value in metrics.items()}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} not finite at step {self.step}: lower the learning rate"
            )
        row = {"step": self.step, "wall": round(time.monotonic() - self.start_time, 3)} | metrics
        self.metrics_file.write(json.dumps(row).encode() + b"\n")
        self.tracker(metrics, self.step)
        self.last |= row


def choose_folder(args):
    """--run-dir, or a new folder under runs/."""
    if args.run_dir:
        return Path(args.run_dir)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path("runs", name.replace("/", "-").replace(":", "-"))
    while folder.exists():  # another run started in the same second
        folder = folder.with_name(f"{folder.name}-2")
    return folder


def lock(file, folder):
    """Lock the metrics file, so that no second process writes to the folder."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise InputError(
            f"another process writes to {folder}: wait for it, or choose another --run-dir"
        ) from error
    except (OSError, ImportError) as error:  # some file systems cannot lock; Windows has no fcntl
        print(
            f"warning: {folder} cannot be locked ({error}): start no second run in it",
            file=sys.stderr,
        )


def git_commit():
    """The commit of the repository that holds this file, or None."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    try:
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # git is not installed
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def open_tracker(args, folder, run_name, step):
    """Open what --track names; returns a function that logs a dict of metrics at a step."""

    def log_nowhere(metrics, step):
        pass

    def log_to_tensorboard(metrics, step):
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    def log_to_module(metrics, step):
        module.log(metrics, step=step)

    # `resume` makes a resumed run the same run there.
    options = {"project": "onefile", "name": run_name, "config": asdict(args), "resume": "allow"}
    try:
        if args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(folder, purge_step=step + 1)
            return log_to_tensorboard
        if args.track == "wandb":
            import wandb as module

            module.init(id=run_name, reinit="finish_previous", **options)
            return log_to_module
        if args.track == "trackio":
            import trackio as module

            module.init(**options)
            return log_to_module
    except ImportError as error:
        raise InputError(
            f"--track {args.track} needs a missing package ({error}): pip install {args.track}"
        ) from error
    return log_nowhere


def evaluate(run, actor):
    """Log --eval-episodes deterministic episodes, in environments and with seeds of their own."""
    if not run.eval_envs:
        return
    filmed_env = run.eval_envs[0]
    if run.args.capture_video:
        filmed_env.set_wrapper_attr("name_prefix", f"step-{run.step}")
    obs = {}  # environment -> observation, while its episode lasts
    for env, seed in zip(run.eval_envs, run.seeds(len(run.eval_envs), stream=1), strict=True):
        obs[env], _ = env.reset(seed=seed)
    while obs:
        actions = actor.act(np.stack(list(obs.values())), deterministic=True)
        for env, action in zip(list(obs), actions, strict=True):
            obs[env], _, terminated, truncated, _ = env.step(action)
            if terminated or truncated:
                del obs[env]
    if run.args.capture_video:
        try:
            filmed_env.get_wrapper_attr("stop_recording")()
        except OSError:
            if not run.interrupted:  # Ctrl-C stops ffmpeg too, and the video is lost
                raise

    episodes = np.array([(env.return_queue[-1], env.length_queue[-1]) for env in run.eval_envs])
    mean, length = episodes.mean(0).tolist()
    std = float(episodes.std(0)[0])
    best = max(mean, run.last.get("eval/best", mean))
    run.log({"eval/return": mean, "eval/return_std": std, "eval/length": length, "eval/best": best})
    tqdm.write(f"step {run.step} of {run.total}: return {mean:.1f} +- {std:.1f}, best {best:.1f}")


class Adam(nn.Module):
    """Adam, arXiv 1412.6980, as one fused kernel; in a compiled update, the same written out."""

    def __init__(self, parameters, lr, eps=1e-8):
        """`lr` is a number, or a scalar tensor that a schedule fills."""
        super().__init__()
        self.parameters_held = list(parameters)
        self.eps = eps
        self.beta1 = 0.9
        self.beta2 = 0.999
        if torch.is_tensor(lr):
            self.register_buffer("lr", lr)
        else:
            self.lr = lr
        self.register_buffer("steps", torch.zeros(()))
        for i, parameter in enumerate(self.parameters_held):
            self.register_buffer(f"mean_{i}", torch.zeros_like(parameter))
            self.register_buffer(f"square_{i}", torch.zeros_like(parameter))

    @torch.no_grad()
    def step(self, gradients):
        """Move the parameters, given the gradients of the loss."""
        count = len(self.parameters_held)
        means = [self.get_buffer(f"mean_{i}") for i in range(count)]
        squares = [self.get_buffer(f"square_{i}") for i in range(count)]
        gradients = [gradient.contiguous() for gradient in gradients]
        self.steps += 1
        if torch.compiler.is_compiling():  # the compiler cannot fuse the fused kernel with others
            self.step_written_out(gradients, means, squares)
            return
        torch._fused_adam_(
            self.parameters_held,
            gradients,
            means,
            squares,
            [],
            [self.steps] * count,
            lr=self.lr,
            beta1=self.beta1,
            beta2=self.beta2,
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        # Keep the gradients alive: reallocating them costs 10 % of a SAC step.
        self.gradients = gradients

    def step_written_out(self, gradients, means, squares):
        """The same step in operations that a compiler can fuse."""
        # In float64, because in float32 1 - beta**t loses its digits for small t.
        mean_correction = 1 - self.beta1 ** self.steps.double()
        square_correction = 1 - self.beta2 ** self.steps.double()
        for parameter, gradient, mean, square in zip(
            self.parameters_held, gradients, means, squares, strict=True
        ):
            mean.lerp_(gradient, 1 - self.beta1)
            square.lerp_(gradient.square(), 1 - self.beta2)
            root = (square / square_correction).sqrt() + self.eps
            parameter.sub_(self.lr / mean_correction * mean / root)


def accelerate(update, args, device):
    """`update`, made faster as the flags and the device allow. It computes the same."""
    if args.compile:
        update = compile_update(update)
    if args.cuda_graph and device.type == "cuda" and not distributed.is_initialized():
        update = CudaGraph(update)
    if device.type == "cpu" and min(args.hidden, default=0) >= 256:
        update = with_onednn(update)
    return update


def compile_update(update):
    """Compile `update` into one graph, gradients and optimizers included."""
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import decompositions

    torch._dynamo.config.trace_autograd_ops = True
    torch._dynamo.config.recompile_limit = 256  # a notebook may train many networks
    # Splitting these products from their bias lets the bias fuse with the operations after it.
    aten = torch.ops.aten
    split = torch._decomp.get_decompositions([aten.addmm, aten.baddbmm])

    def backend(graph, inputs):
        # fallback_random draws the same random numbers as the update that is not compiled.
        return compile_fx(
            graph,
            inputs,
            decompositions=decompositions | split,
            config_patches={"fallback_random": True},
        )

    compiled = torch.compile(update, backend=backend, fullgraph=True)

    def call(batch):
        try:
            return compiled(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            raise InputError(
                f"the update cannot be compiled: leave out --compile\n{error}"
            ) from error

    return call


class CudaGraph:
    """Calls `update` three times to warm up, then captures it as a CUDA graph and replays that."""

    def __init__(self, update):
        self.update = update
        self.calls = 0
        self.graph = torch.cuda.CUDAGraph()

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= 3:
            return self.update(batch)
        if self.calls == 4:
            self.batch = {name: tensor.clone() for name, tensor in batch.items()}
            try:
                with torch.cuda.graph(self.graph):
                    self.metrics = self.update(self.batch)
            except RuntimeError as error:
                raise InputError(
                    f"the update cannot be captured: add --no-cuda-graph\n{error}"
                ) from error
        torch._foreach_copy_(list(self.batch.values()), list(batch.values()))
        self.graph.replay()
        return self.metrics


def with_onednn(update):
    """`update` with its matrix products by oneDNN, if this is an AMD processor, where MKL is slow.

    PyTorch calls oneDNN for float32 only with the setting "bf16", which allows rounding to
    bfloat16. A processor without bfloat16 units still computes in float32, as a product below
    checks.
    """
    matmul = torch.backends.mkldnn.matmul
    is_amd = "AMD" in torch.cpu.get_capabilities().get("cpu_name", "")
    if not is_amd or matmul.fp32_precision != "none":
        return update

    def call(function, *inputs):
        matmul.fp32_precision = "bf16"
        try:
            return function(*inputs)
        finally:
            matmul.fp32_precision = "none"

    x = torch.full((256, 256), 1 + 2**-20)  # rounds to 1 in bfloat16
    is_exact = call(torch.mm, x, torch.eye(256)).equal(x)
    return partial(call, update) if is_exact else update


def load_policy(run_dir, deterministic=True):
    """The policy that a run saved: observations [..., O] -> actions, both numpy arrays."""
    saved = torch.load(Path(run_dir, "policy.pt"), map_location="cpu", weights_only=True)
    spaces = Spaces(*saved["spaces"])
    actor = Agent(Args(**saved["args"]), spaces).actor
    actor.load_state_dict(saved["actor"])
    scale = np.asarray  # discrete actions stay as they are
    if spaces.low is not None:
        scale = action_scaler(np.float32(spaces.low), np.float32(spaces.high))

    def policy(obs):
        return scale(actor.act(obs, deterministic=deterministic))

    return policy


def saved_flags(run_dir):
    """The flags of the run in `run_dir`, as Args; the defaults if it holds none."""
    path = Path(run_dir, "config.json")
    if not path.exists():
        return Args()
    flags = {}
    for name, value in json.loads(path.read_text())["args"].items():
        if hasattr(Args, name):
            flags[name] = tuple(value) if isinstance(value, list) else value
    return Args(**flags)


def main():
    """Train with the flags of the command line. Exit status 2 is bad input, 130 is Ctrl-C."""
    args = tyro.cli(Args)
    try:
        if args.resume and args.run_dir:
            args = tyro.cli(Args, default=saved_flags(args.run_dir))
        train(args)
    except KeyboardInterrupt as interrupt:
        print(interrupt, file=sys.stderr)
        sys.exit(130)
    except (
        InputError,
        FloatingPointError,
        OSError,
        RuntimeError,
        MemoryError,
        ImportError,
        json.JSONDecodeError,
        gym.error.Error,
    ) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # not out of memory
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if int(os.environ.get("RANK", 0)) > 0:
        os._exit(0)  # threads of torch.distributed sometimes abort a normal exit


if __name__ == "__main__":
    main()
