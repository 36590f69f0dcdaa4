# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "numpy>=2", "gymnasium[mujoco]>=1.4,<2", "mujoco<5", "tyro>=1,<2", "tqdm>=4.66"]
# ///
"""Proximal Policy Optimization (PPO): many steps on the same data, none of which may go far.

A policy gradient is right only for the policy that collected the data. PPO takes many steps on it all the same, and
clips the objective where new and old probability differ too much: to go further gains nothing.

Schulman et al. 2017, "Proximal Policy Optimization Algorithms", https://arxiv.org/abs/1707.06347
(1), (2): "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438

    policy pi, value function V
    for each rollout of `num_steps` steps of each environment, (s, a, r, d, s') with d 1 where it terminated:
        a ~ pi(. | s)
        delta_t = r_t + gamma (1 - d_t) V(s'_t) - V(s_t)                                                         (1)
        A_t = delta_t + gamma gae_lambda (1 - e_t) A_t+1, e 1 where an episode ended; R_t = A_t + V(s_t)         (2)
        for each of `update_epochs` epochs, for each of `num_minibatches` parts of the rollout, drawn anew:
            w = pi(a | s) / pi_old(a | s)                                                                        (3)
            pi descends               mean -min(w A, clip(w, 1 - clip_coef, 1 + clip_coef) A)                    (4)
            V descends                mean 1/2 (V(s) - R)^2                                                      (5)
            together                  (4) + vf_coef (5) - ent_coef mean entropy of pi(. | s)                     (6)

    python algos/ppo.py --env-id Hopper-v4             or, in Python:   from ppo import Args, load_policy, train
    python algos/ppo.py --resume --run-dir runs/...    takes up a run, whose own flags are the defaults
    torchrun --nproc-per-node 4 algos/ppo.py --num-envs 8      shares the environments among four processes

Final at 1M steps, mean (95 %) of 6 seeds, beside CleanRL's training returns: HalfCheetah-v4 4948 +- 1895, 1443;
Hopper-v4 3049 +- 995, 2383; Walker2d-v4 4923 +- 884, 2288. Of 10 seeds: CartPole-v1 at 500k 500 in each, 490;
Acrobot-v1 at 300k -79 +- 7, -86 at 500k. Hopper-v4 with --compile at 6832 steps/s, SB3 2175, SBX 2374.

Metrics, over the rollout once it is learnt from: loss/policy (4), loss/value (5), value/mean, policy/entropy, policy/kl
from old to new, policy/clip_frac, how often w is clipped; episode/*, training episodes as they end; eval/*,
deterministic episodes; speed/sps, environment steps a second since the run began, everything included.

What matters beyond the equations:
 1. (1) takes V(s') of the last observation where time cut an episode short, and 0 only where it terminated.
 2. Advantages are normalised over the rollout, which makes the learning rate fit any reward.
 3. Observations are normalised, rewards divided by the spread of their discounted sum, by running statistics. Those
    of s move only between rollouts: old and new probabilities of (3) see the same s. Evaluation moves none.
 4. A minibatch takes equally from every environment, so that ranks can share it.
 5. The policy's last layer starts at a hundredth of its size, and its spread in a box at 0.6 half widths, not 1.
 6. Gradients are clipped to norm `max_grad_norm`, and the learning rate falls linearly to 0 over the run.
 7. A step is one step of one environment, all ranks together; the run is rounded up to whole rollouts.
 8. Checkpoints begin new episodes, seeded by (seed, step), in every run: killed and resumed, it is bit-equal on a CPU.
"""

# Shapes: T steps of a rollout, N environments of this rank, O observation, A action, B batch.

import importlib
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
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import distributed, nn
from torch.distributions import Categorical, Independent, Normal
from tqdm import tqdm

ALGO = "ppo"


@dataclass
class Args:
    """Proximal Policy Optimization. A step is one step of one environment."""

    num_steps: int = 2048  # steps of each environment in a rollout
    update_epochs: int = 10  # times that a rollout is gone through
    num_minibatches: int = 32  # minibatches of a rollout in an epoch
    learning_rate: float = 3e-4  # of policy and value function
    anneal_lr: bool = True  # let the learning rate fall to 0 over the run
    gamma: float = 0.99  # discount
    gae_lambda: float = 0.95  # weight of the later steps in the advantage
    clip_coef: float = 0.2  # how far the ratio of probabilities may leave 1
    norm_adv: bool = True  # normalise the advantages of a rollout
    ent_coef: float = 0.0  # weight of the entropy
    vf_coef: float = 0.5  # weight of the value loss
    max_grad_norm: float = 0.5  # norm that gradients are clipped to
    target_kl: float | None = None  # an epoch that leaves the mean KL above is the rollout's last
    norm_obs: bool = True  # normalise observations by running statistics
    norm_reward: bool = True  # scale rewards by the running spread of their discounted sum
    hidden: tuple[int, ...] = (64, 64)  # widths of the hidden layers
    activation: Literal["relu", "tanh", "elu", "silu"] = "tanh"  # non-linearity between layers

    env_id: str = "Hopper-v4"  # gymnasium id; module:Name-v0 imports the module first
    exp_name: str = ALGO  # part of the run folder's name
    seed: int = 1  # of everything random
    total_timesteps: int = 1_000_000  # environment steps, all environments together
    num_envs: int = 1  # environments side by side
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one
    threads: int = 1  # CPU threads of torch
    run_dir: str | None = None  # None is runs/{env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # go on from the last checkpoint in --run-dir
    eval_every: int = 50_000  # steps between evaluations; 0 for none, not even at the end
    eval_episodes: int = 10  # episodes in an evaluation
    checkpoint_every: int = 50_000  # steps between checkpoints; 0 for one at the end alone
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where to mirror metrics.jsonl
    capture_video: bool = False  # film an episode of every evaluation into videos/
    compile: bool = False  # compile the update, gradients and optimizers included
    cuda_graph: bool = True  # on CUDA, capture the update as a graph


ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "elu": nn.ELU, "silu": nn.SiLU}
IN_NUMPY = {"relu": lambda x: np.maximum(x, 0), "tanh": np.tanh, "silu": lambda x: x / 2 * (1 + np.tanh(x / 2))}
IN_NUMPY["elu"] = lambda x: np.where(x > 0, x, np.expm1(x.clip(None, 0)))


def mlp(sizes, activation, gain):
    """Layers of `sizes`, the last drawn with `gain`, `activation` between: [..., sizes[0]] -> [..., sizes[-1]]."""
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (nn.Linear(i, o), ACTIVATIONS[activation]())][:-1]
    for layer in layers[::2]:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else 2**0.5)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def standardize(x):
    """x [B] less its mean, over its standard deviation, both over all ranks."""
    x = x - mean_over_ranks(x.mean())
    return x / (mean_over_ranks(x.square().mean()).sqrt() + 1e-8)


def descend(optimizer, loss, max_norm):
    """A step of `optimizer` on the gradient, averaged over the ranks and clipped to norm `max_norm`."""
    gradients = torch.autograd.grad(loss, optimizer.weights)
    gradient = mean_over_ranks(torch.cat([g.flatten() for g in gradients]))
    gradient = gradient * (max_norm / (gradient.norm() + 1e-6)).clamp(max=1)
    optimizer.step([part.view_as(g) for g, part in zip(gradients, gradient.split([g.numel() for g in gradients]))])


class Normalizer(nn.Module):
    """Running mean and variance, [..., D] -> the same with mean 0 and variance 1, clipped to 10."""

    def __init__(self, dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("var", torch.ones(dim))
        self.register_buffer("std", torch.ones(dim))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        return ((x - self.mean) / self.std).clamp(-10, 10)

    def update(self, x):
        """Take in x [T, N, D], as Chan et al. 1983 merge two sets of numbers."""
        mean = mean_over_ranks(x.mean((0, 1)))
        var = mean_over_ranks((x - mean).square().mean((0, 1)))
        n = x[..., 0].numel() * RANKS
        share, delta = n / (self.count + n), mean - self.mean
        self.mean += share * delta
        self.var += share * (var - self.var + (1 - share) * delta.square())
        self.std.copy_((self.var + 1e-8).sqrt())
        self.count += n


class Actor(nn.Module):
    """The policy: obs [..., O] -> a distribution over `act_dim` actions, or [..., A] in half widths of their box."""

    def __init__(self, obs_dim, act_dim, low, high, hidden, activation, norm_obs):
        """`low` and `high` are the box's bounds, and None for a choice among act_dim actions."""
        super().__init__()
        self.init = {"obs_dim": obs_dim, "act_dim": act_dim, "low": low, "high": high, "hidden": hidden}
        self.init |= {"activation": activation, "norm_obs": norm_obs}
        self.normalize = Normalizer(obs_dim) if norm_obs else nn.Identity()
        self.net = mlp((obs_dim, *hidden, act_dim), activation, 0.01)
        self.discrete = low is None
        if not self.discrete:
            self.log_std = nn.Parameter(torch.full((act_dim,), -0.5))
            low, high = torch.tensor(low), torch.tensor(high)
            bounded = (high - low).isfinite()  # other actions are taken as they are, but begin within their bound
            self.register_buffer("low", low)
            self.register_buffer("high", high)
            self.register_buffer("center", torch.where(bounded, (low + high) / 2, low.clamp(0).minimum(high)))
            self.register_buffer("width", torch.where(bounded, (high - low) / 2, 1.0))

    def forward(self, obs):
        """Here, obs is normalised already, since a rollout is gone through many times."""
        head = self.net(obs)
        if self.discrete:
            return Categorical(logits=head, validate_args=False)  # what is not finite shows in the losses
        return Independent(Normal(head, self.log_std.exp(), validate_args=False), 1, validate_args=False)

    def noise(self, *shape):
        """What `in_numpy` turns into samples: [*shape, A], drawn on the CPU, so that it is the same on every device."""
        shape = *shape, self.init["act_dim"]
        if self.discrete:
            return -torch.empty(shape).exponential_().log().numpy()  # Gumbel noise
        return (torch.randn(shape) * self.log_std.detach().exp().cpu()).numpy()

    def in_numpy(self):
        """The policy of now as a function of arrays, since on a few rows numpy takes a fifth of the time of torch.

        obs [..., O], noise [..., A] or 0 for the mode -> action [...] or [..., A], and as environments take it.
        """
        state = {name: x.cpu().numpy() for name, x in self.state_dict().items()}
        *hidden, last = [(state[f"net.{i}.weight"].T, state[f"net.{i}.bias"]) for i in range(0, len(self.net), 2)]
        activate = IN_NUMPY[self.init["activation"]]

        def choose(obs, noise):
            x = np.asarray(obs, np.float32)
            if self.init["norm_obs"]:
                x = ((x - state["normalize.mean"]) / state["normalize.std"]).clip(-10, 10)
            for weight, bias in hidden:
                x = activate(x @ weight + bias)
            action = x @ last[0] + last[1] + noise
            if self.discrete:
                return (action.argmax(-1),) * 2
            return action, (state["center"] + state["width"] * action).clip(state["low"], state["high"])

        return choose

    def act(self, obs, deterministic=True):
        """obs [..., O] -> action [...] or [..., A], in numpy."""
        return self.in_numpy()(obs, 0 if deterministic else self.noise(*np.shape(obs)[:-1]))[1]


def gae(reward, value, next_value, terminated, ended, gamma, gae_lambda):
    """(1), (2): all [T, N], next_value of the last observation where an episode ended -> advantages [T, N]."""
    delta = reward + gamma * (1 - terminated) * next_value - value
    advantage, decay = delta.cpu().numpy(), (gamma * gae_lambda * (1 - ended)).cpu().numpy()
    for t in range(len(delta) - 2, -1, -1):  # in numpy: many small steps are cheap there
        advantage[t] += decay[t] * advantage[t + 1]
    return torch.from_numpy(advantage).to(delta.device)


def policy_loss(log_ratio, advantage, clip_coef):
    """(4): log w [B], advantage [B] -> scalar. For either sign of A the minimum is min(w A, A + clip_coef |A|)."""
    return -torch.minimum(log_ratio.exp() * advantage, advantage + clip_coef * advantage.abs()).mean()


def value_loss(value, target):
    """(5): value [B], target [B] -> scalar."""
    return 0.5 * (value - target).square().mean()


class Agent(nn.Module):
    """All that learns."""

    def __init__(self, args, obs_dim, act_dim, low, high, device):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, act_dim, low, high, args.hidden, args.activation, args.norm_obs)
        self.critic = mlp((obs_dim, *args.hidden, 1), args.activation, 1.0)
        self.returns = Normalizer(1)
        self.columns = (obs_dim, 1 if low is None else act_dim, 1, 1, 1)  # of a batch
        rate = torch.tensor(args.learning_rate, device=device)  # which a CUDA graph sees fall
        self.optimizer = Adam(self.parameters(), rate, eps=1e-5)
        self.to(device)

    def value(self, obs):
        """obs [..., O], normalised -> V(s) [...]."""
        return self.critic(obs).squeeze(-1)

    def log_prob(self, policy, action):
        """log pi(a | s) [...]; that of a Gaussian written out, in fewer operations than the library's."""
        if self.actor.discrete:
            return policy.log_prob(action[..., 0])
        z = (action - policy.base_dist.loc) / policy.base_dist.scale
        return -0.5 * z.square().sum(-1) - self.actor.log_std.sum() - 0.5 * math.log(2 * math.pi) * action.shape[-1]

    @torch.no_grad()
    def prepare(self, obs, action, reward, terminated, ended, next_obs):
        """A rollout, [T, N] or [T, N, .] each -> rows (s, a, log pi(a | s), A, R) [T, N, O + A + 3]."""
        obs, next_obs = self.actor.normalize(obs), self.actor.normalize(next_obs)
        value = self.value(obs)
        reward = reward / self.returns.std if self.args.norm_reward else reward
        next_value, (gamma, gae_lambda) = self.value(next_obs), (self.args.gamma, self.args.gae_lambda)
        advantage = gae(reward, value, next_value, terminated, ended, gamma, gae_lambda)
        log_prob = self.log_prob(self.actor(obs), action)
        weight = standardize(advantage) if self.args.norm_adv else advantage
        return torch.cat((obs, action, torch.stack((log_prob, weight, advantage + value), -1)), -1)

    def losses(self, batch):
        """Of rows (s, a, log pi(a | s), A, R) [B, O + A + 3]: (4), (5), log w [B], V(s) [B] and the policy there."""
        obs, action, *rest = batch.split(self.columns, -1)
        old_log_prob, advantage, target = (x[:, 0] for x in rest)
        policy, value = self.actor(obs), self.value(obs)
        log_ratio = self.log_prob(policy, action) - old_log_prob  # (3)
        loss_pi = policy_loss(log_ratio, advantage, self.args.clip_coef)
        return loss_pi, value_loss(value, target), log_ratio, value, policy

    def update(self, batch):
        """A gradient step of everything on a minibatch of rows, as `losses` takes them."""
        loss_pi, loss_v, _, _, policy = self.losses(batch)
        loss = loss_pi + self.args.vf_coef * loss_v
        if self.args.ent_coef:
            loss = loss - self.args.ent_coef * policy.entropy().mean()
        descend(self.optimizer, loss, self.args.max_grad_norm)  # (6)

    @torch.no_grad()
    def measure(self, rows):
        """What there is to log of a rollout of rows, as `losses` takes them: scalar tensors."""
        loss_pi, loss_v, log_ratio, value, policy = self.losses(rows)
        metrics = {"loss/policy": loss_pi, "loss/value": loss_v, "value/mean": value.mean()}
        metrics["policy/entropy"] = policy.entropy().mean()
        metrics["policy/kl"] = (log_ratio.expm1() - log_ratio).mean()
        metrics["policy/clip_frac"] = (log_ratio.expm1().abs() > self.args.clip_coef).float().mean()
        return {name: mean_over_ranks(x) for name, x in metrics.items()}


# ==== plumbing: the same text in every file ===========================================================================
def start(args, above_0, at_least_0, at_most_1):
    """Check the flags, those that are numbers given by name, set threads and seed, and return the device."""
    above_0 += " total_timesteps num_envs threads eval_episodes"
    at_least_0 += " seed eval_every checkpoint_every"
    others = {float: float | int, float | None: float | int | None, tuple[int, ...]: tuple | list}
    for name, kind in type(args).__annotations__.items():  # to which a command line is held, but no notebook
        value, fits = getattr(args, name), others.get(kind, kind)
        odd = {*map(type, value)} - {int} if isinstance(value, tuple | list) else isinstance(value, np.generic)
        if odd or not (value in get_args(kind) if get_origin(kind) is Literal else isinstance(value, fits)):
            sys.exit(f"error: {name} is {value!r}, and must be of {kind}")
    rules = (above_0, 1e-99, 1e18, "above 0, to 1e18"), (at_least_0, 0, 1e18, "0 to 1e18"), (at_most_1, 0, 1, "0 to 1")
    for names, least, most, rule in rules:
        values = {n: np.atleast_1d(getattr(args, n)) for n in names.split() if getattr(args, n) is not None}
        if bad := [n for n, x in values.items() if not all((least <= x) & (x <= most))]:
            sys.exit(f"error: --{bad[0].replace('_', '-')} is {getattr(args, bad[0])}, and must be {rule}")
    if args.resume and not args.run_dir:
        sys.exit("error: --resume needs --run-dir, the folder of the run to go on with")
    if getattr(args, "learning_starts", 0) >= args.total_timesteps:
        print("warning: nothing is learnt: --learning-starts is not below --total-timesteps", file=sys.stderr)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: --device {device}: {str(error).splitlines()[0]}")
    device.type == "cuda" and torch.cuda.set_device(device)  # whose stream a graph is captured on
    torch.set_num_threads(args.threads)
    torch.set_flush_denormal(True)  # Adam's moments of a dead unit fade into numbers that a CPU is slow with
    torch.manual_seed(args.seed)
    return device


def make_env(args, film=None):
    """One environment that observes a vector [O]; where `film` is a folder, its evaluations are filmed into it."""
    warnings.filterwarnings("ignore", ".*is out of date", DeprecationWarning)
    sys.path += [os.getcwd()] * (os.getcwd() not in sys.path)  # the module of module:Name-v0 may lie there
    film and sys.platform == "linux" and not os.environ.get("DISPLAY") and os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        env = gym.make(args.env_id, **({"render_mode": "rgb_array"} if film else {}))
        film and env.reset() and env.render()  # which would fail at the first evaluation
    except Exception as error:  # of which each library that draws has its own
        film and sys.exit(f"error: cannot film {args.env_id}: {error!r}: leave out --capture-video, or set MUJOCO_GL")
        raise
    if not isinstance(env.observation_space, gym.spaces.Box) or len(env.observation_space.shape) != 1:
        sys.exit(f"error: {args.env_id} observes {env.observation_space}: wrap it to give a Box of one dimension")
    env = env if env.spec.max_episode_steps else gym.wrappers.TimeLimit(env, 27_000)  # Atari's: an evaluation must end
    env = gym.wrappers.RecordVideo(env, str(film), lambda episode: True) if film else env
    env = gym.wrappers.TransformObservation(env, np.copy, None)  # some write every observation into one array
    env = gym.wrappers.TransformReward(env, lambda reward: np.asarray(reward).item())  # some give an array of one
    space = env.action_space
    if isinstance(space, gym.spaces.Box) and space.dtype != np.float32:  # out of whose bounds a float32 may be rounded
        env = gym.wrappers.TransformAction(env, lambda a: a.astype(space.dtype).clip(space.low, space.high), None)
    return gym.wrappers.RecordEpisodeStatistics(env, stats_key=ALGO)  # its own key, episode, may be taken


class Run:
    """A run folder: one writer, metrics.jsonl as the source of truth, checkpoints that outlive a kill at any moment."""

    def __init__(self, args, actor, parts):
        """`parts` is what a checkpoint holds: memories [capacity, ...], a row a step, and what has a state_dict."""
        if int(os.environ.get("RANK", 0)) > 0:  # where work is shared among ranks, this one has a Follower
            sys.exit(f"error: {ALGO} is for one process: leave out torchrun, which ppo, trpo and vpg alone can use")
        name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
        self.dir = Path(args.run_dir or "runs/" + name.replace("/", "-").replace(":", "-"))
        while not args.run_dir and self.dir.exists():  # begun in the same second
            self.dir = self.dir.with_name(f"{self.dir.name}-2")
        self.args, self.actor, self.parts, self.total = args, actor, parts, args.total_timesteps
        self.dir.mkdir(parents=True, exist_ok=True)
        self.metrics = open(self.dir / "metrics.jsonl", "ab", buffering=0)
        try:
            importlib.import_module("fcntl").flock(self.metrics, 2 | 4)  # LOCK_EX | LOCK_NB
        except BlockingIOError:
            sys.exit(f"error: another process writes to {self.dir}: wait for it, or choose another --run-dir")
        except (OSError, ImportError) as error:  # some file systems cannot lock, and Windows has no fcntl
            print(f"warning: {self.dir} cannot be locked ({error}): let no second process write to it", file=sys.stderr)
        try:
            self.begin(args)
        except BaseException:
            self.metrics.close()  # and so the lock is gone, whatever a notebook keeps of this run
            raise

    def begin(self, args):
        """Take up what the folder holds, if that is the same run, and make ready to log and to evaluate."""
        flags, path = json.loads(json.dumps({"algo": ALGO} | asdict(args))), self.dir / "config.json"
        if not args.resume and (path.exists() or self.metrics.seek(0, os.SEEK_END)):
            sys.exit(f"error: {self.dir} holds a run: add --resume to go on with it, or choose another --run-dir")
        saved = json.loads(path.read_text()) if path.exists() else {"algo": ALGO, "args": flags}
        token = saved.get("id") or os.urandom(4).hex()  # since a folder elsewhere may have the same name
        saved, fixed = saved["args"] | {"algo": saved["algo"]}, [*flags][: [*flags].index("device")]
        if changed := [f"{k} {saved.get(k)}" for k in fixed if flags[k] != saved.get(k) and k != "total_timesteps"]:
            sys.exit(f"error: {self.dir} was begun with {', '.join(changed)}: leave it so, or choose another --run-dir")
        self.restore()
        versions = {m: getattr(sys.modules.get(m), "__version__", None) for m in ("torch", "gymnasium", "mujoco")}
        versions["python"] = sys.version.split()[0]
        status, commit = subprocess.getstatusoutput(f'git -C "{Path(__file__).resolve().parent}" rev-parse HEAD')
        config = {"algo": flags.pop("algo"), "args": flags, "command": sys.argv, "commit": None if status else commit}
        films = args.eval_every and args.capture_video and self.dir / "videos", *[None] * (args.eval_episodes - 1)
        self.eval_envs = [make_env(args, film) for film in (films if args.eval_every else films[:1])]
        if 0 < args.checkpoint_every < 10 * args.num_envs * self.eval_envs[0].spec.max_episode_steps:
            print("warning: --checkpoint-every is under 10 episodes of each environment: it cuts them", file=sys.stderr)
        self.mirror = lambda row: None
        if args.track == "tensorboard":
            board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(self.dir, purge_step=self.step + 1)
            self.mirror = lambda row: [board.add_scalar(name, value, self.step) for name, value in row.items()]
        elif args.track != "none":
            name = f"{self.dir.name}-{token}"  # a resumed run is the same run there
            own = {"id": name, "reinit": "finish_previous"} if args.track == "wandb" else {}
            tracker = importlib.import_module(args.track)
            tracker.init(project="onefile", name=name, config=flags, resume="allow", **own)
            self.mirror = lambda row: tracker.log(row, step=self.step)
        (self.dir / "result.json").unlink(missing_ok=True)
        if self.step < self.total:  # a run that is over keeps the flags, the command and the commit that made it
            self.write("config.json", config | {"id": token, "versions": versions})

    def restore(self):
        """Take up the newest sound checkpoint, if there is any, and drop the metrics that came after it."""
        self.step, seconds, self.last, size = 0, 0.0, {}, 0
        paths = [path for name in ("checkpoint.pt", "checkpoint.prev.pt") if (path := self.dir / name).exists()]
        for path in paths:
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
                self.step, seconds, self.last, size = state["run"]
                for name, part in self.parts.items():
                    (part[: self.step].copy_ if torch.is_tensor(part) else part.load_state_dict)(state[name])
                for set_rng_state, rng in zip((torch.set_rng_state, torch.cuda.set_rng_state), state["rng"]):
                    set_rng_state(rng)
            except Exception as error:  # whatever a damaged file leads to
                if isinstance(error, OSError | MemoryError) or "allocate" in str(error):  # for want of memory
                    sys.exit(f"error: cannot read {path}, which may be whole: {error}")
                print(f"warning: {path} is damaged ({type(error).__name__}: {error})", file=sys.stderr)
                continue
            if path != paths[0]:  # or the next checkpoint would keep a damaged file and drop this one
                os.replace(paths[0], self.dir / "checkpoint.damaged.pt")
            print(f"{self.dir}: {self.step} of {self.total} steps are done", file=sys.stderr)
            break
        else:
            if paths:
                sys.exit(f"error: no checkpoint in {self.dir} can be read: move them away, or use an older {ALGO}.py")
        self.began = time.monotonic() - seconds
        self.metrics.truncate(min(size, self.metrics.seek(0, os.SEEK_END)))

    def write(self, name, content, old=None):
        """Put JSON or what torch.save makes under another name, sync, rename; the file before it becomes `old`."""
        new = self.dir / f"{name}.new"
        try:
            with open(new, "wb") as f:
                torch.save(content, f) if name.endswith(".pt") else f.write(json.dumps(content, indent=1).encode())
                os.fsync(f.fileno())
        except (OSError, RuntimeError) as error:
            new.unlink(missing_ok=True)
            sys.exit(f"error: cannot write {new}: {error}; what was saved before is whole: make room, then --resume")
        if old and (self.dir / name).exists():
            os.replace(self.dir / name, self.dir / old)
        os.replace(new, self.dir / name)

    def save(self):
        """checkpoint.pt, whose predecessor stays as checkpoint.prev.pt, and policy.pt; a box may have no bounds."""
        state = {k: v[: self.step].clone() if torch.is_tensor(v) else v.state_dict() for k, v in self.parts.items()}
        if not all(x.isfinite().all() for name, x in state["agent"].items() if name not in ("actor.low", "actor.high")):
            sys.exit(f"error: a weight is not finite at step {self.step}: begin again with lower learning rates")
        os.fsync(self.metrics.fileno())
        self.write("policy.pt", {"args": asdict(self.args), "init": self.actor.init, "actor": self.actor.state_dict()})
        run = [self.step, time.monotonic() - self.began, self.last, os.fstat(self.metrics.fileno()).st_size]
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
        self.write("checkpoint.pt", state | {"run": run, "rng": rng}, old="checkpoint.prev.pt")
        if self.interrupted and self.step < self.total:
            command = shlex.join(["python", sys.argv[0], "--resume", "--run-dir", str(self.dir)])
            sys.exit(f"step {self.step}: {command} goes on, but differs")

    def steps(self, stride):
        """Count the steps, `stride` a round; Ctrl-C makes the round under way the last one."""
        self.stride, self.interrupted, tty = stride, False, sys.stderr.isatty()
        catch = signal.signal if threading.current_thread() is threading.main_thread() else lambda *_: None
        before = catch(signal.SIGINT, lambda *_: setattr(self, "interrupted", True))
        bar = tqdm(total=self.total, initial=self.step, unit=" steps", file=None if tty else open(os.devnull, "w"))
        try:
            for self.step in range(self.step + stride, self.total + stride, stride):
                yield self.step
                bar.set_postfix_str(f"return {self.last.get('episode/return', math.nan):.1f}", refresh=False)
                bar.update(stride)
                if not tty and self.due(10_000):
                    print(bar, flush=True)
        finally:
            catch(signal.SIGINT, before)
            self.metrics.close()
            [env.close() for env in self.eval_envs]

    def due(self, every):
        """Whether this round reached a multiple of `every`, or is the last."""
        return self.step >= self.total or (every > 0 and self.step % every < self.stride)

    def log(self, row):
        """Append a row to metrics.jsonl and mirror it; a number that is not finite ends the run."""
        row = {name: float(value) for name, value in row.items()}
        if bad := [name for name, value in row.items() if not math.isfinite(value)]:
            sys.exit(f"error: {', '.join(bad)} not finite at step {self.step}: lower the learning rates")
        self.mirror(row)
        row = {"step": self.step, "wall": round(time.monotonic() - self.began, 3), **row}
        self.metrics.write(json.dumps(row).encode() + b"\n")
        self.last |= row

    def reset(self, envs, seeds):
        """Begin an episode in each environment -> observations [N, O]."""
        return self.finite(np.stack([env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]))

    def finite(self, obs, *others):
        """obs [N, O], if it and the others [N, .] are finite."""
        if not np.isfinite(np.column_stack((obs, *others)).astype(np.float32)).all():
            sys.exit(f"error: reward or observation not finite at step {self.step}: mend them, or lower learning rates")
        return obs

    def interact(self, envs, actions):
        """Step all -> observations to act on [N, O], rewards, terminated, ended [N], true next observations [N, O]."""
        steps = [env.step(action.copy())[:4] for env, action in zip(envs, actions)]  # some scale an action in place
        true_obs, reward, terminated, truncated = (np.array(x) for x in zip(*steps))
        ended = np.logical_or(terminated, truncated)
        obs = np.array([env.reset()[0] if over else o for env, o, over in zip(envs, true_obs, ended)])
        self.finite(obs, true_obs, reward)
        for i in np.flatnonzero(ended):
            self.log({"episode/return": envs[i].return_queue[-1], "episode/length": envs[i].length_queue[-1]})
        return obs, reward, terminated, ended, true_obs

    def seeds(self, n, stream=0):
        """n seeds made of (seed, step, stream), where a sum of these would collide between runs."""
        return np.random.SeedSequence([self.args.seed, self.step, stream]).generate_state(n).tolist()


RANK, RANKS = (int(os.environ.get(n, d)) if "RANK" in os.environ else d for n, d in (("RANK", 0), ("WORLD_SIZE", 1)))


def collective(operation, x):
    """What all ranks take part in, or one sentence where they are no longer all there."""
    try:
        operation(x)
    except RuntimeError as error:
        sys.exit(f"error: rank {RANK} has lost another one ({error}): see what ended that, then --resume")


def mean_over_ranks(x):
    """The average of a tensor over all ranks, in place."""
    if RANKS > 1:
        collective(distributed.all_reduce, x)
        x /= RANKS
    return x


class Follower(Run):
    """The Run of a rank above 0: it writes nothing, and `join` brings it where rank 0 is."""

    def __init__(self, args, actor, parts):
        self.args, self.actor, self.parts, self.total = args, actor, parts, args.total_timesteps
        self.step, self.last, self.began, self.interrupted = 0, {}, time.monotonic(), False

    def steps(self, stride):
        self.stride = stride
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 says when to stop
        for self.step in range(self.step + stride, self.total + stride, stride):
            yield self.step

    def save(self):
        if self.interrupted and self.step < self.total:
            os._exit(0)  # as no failure, for which rank 0 would be killed while it writes

    def log(self, *_):
        pass

    write = log


def join(run):
    """Send what rank 0 restored to the others, which must have its flags."""
    flags = asdict(run.args)
    state = [run.step, torch.get_rng_state(), flags]
    collective(distributed.broadcast_object_list, state)
    run.step, rng, theirs = state
    if other := [name for name in [*flags][: [*flags].index("device")] if flags[name] != theirs[name]]:
        sys.exit(f"error: rank {RANK} has another {other[0]} than rank 0: type all flags, or share --run-dir")
    torch.set_rng_state(rng)
    for tensor in run.parts["agent"].state_dict().values():
        collective(partial(distributed.broadcast, src=0), tensor)


class Adam(nn.Module):
    """Adam, https://arxiv.org/abs/1412.6980: a fused kernel, or in an update that is compiled the same in parts."""

    def __init__(self, parameters, lr, eps=1e-8):
        super().__init__()
        self.weights, self.lr, self.eps, self.betas = [*parameters], lr, eps, (0.9, 0.999)
        self.register_buffer("steps", torch.zeros((), dtype=torch.float32))  # as which CUDA's kernel reads it
        for i, weight in enumerate(self.weights):
            self.register_buffer(f"mean_{i}", torch.zeros_like(weight))
            self.register_buffer(f"square_{i}", torch.zeros_like(weight))

    @torch.no_grad()
    def step(self, gradients):
        """Move the weights, of whose loss these are the gradients."""
        (steps, *moments), (beta1, beta2) = self.buffers(), self.betas
        lists = self.weights, [x.contiguous() for x in gradients], moments[::2], moments[1::2]
        steps += 1
        if not torch.compiler.is_compiling():
            options = {"lr": self.lr, "eps": self.eps, "weight_decay": 0.0, "amsgrad": False, "maximize": False}
            torch._fused_adam_(*lists, [], [steps] * len(gradients), beta1=beta1, beta2=beta2, **options)
            self.held = lists[1]  # memory given back and taken anew at every step is a tenth of SAC's time
            return
        scale, spread = (1 - beta ** steps.double() for beta in self.betas)  # float32 would cancel
        for weight, gradient, mean, square in zip(*lists):
            mean.lerp_(gradient, 1 - beta1)
            square.lerp_(gradient.square(), 1 - beta2)
            weight.sub_(self.lr / scale * mean / ((square / spread).sqrt() + self.eps))


def compiled(update):
    """`update` as one graph, gradients and optimizers included, which draws the random numbers of the plain one."""
    inductor = importlib.import_module("torch._inductor.compile_fx")
    torch._dynamo.config.trace_autograd_ops, torch._dynamo.config.recompile_limit = True, 256  # networks of a notebook
    parts = torch._decomp.get_decompositions([torch.ops.aten.addmm, torch.ops.aten.baddbmm])

    def backend(graph, inputs):
        with mock.patch.dict(torch._inductor.decomposition.decompositions, parts):  # a bias fuses with what follows it
            return inductor.compile_fx(graph, inputs, config_patches={"fallback_random": True})

    graph = torch.compile(update, backend=backend, fullgraph=True)

    def call(batch):
        try:
            return graph(batch)
        except torch._dynamo.exc.TorchDynamoException as error:
            sys.exit(f"{error}\nerror: the update cannot be compiled, for the reason above: leave out --compile")

    return call


class CudaGraph:
    """`update`: called as it is three times, since capture wants it warm; then captured, and replayed."""

    def __init__(self, update):
        self.update, self.calls, self.graph = update, 0, torch.cuda.CUDAGraph()

    def __call__(self, batch):
        self.calls += 1
        if self.calls <= 3:
            return self.update(batch)
        if self.calls == 4:
            self.batch = batch.clone()
            try:
                with torch.cuda.graph(self.graph):
                    self.metrics = self.update(self.batch)
            except RuntimeError as error:
                sys.exit(f"{error}\nerror: the update cannot be captured, for the reason above: add --no-cuda-graph")
        self.batch.copy_(batch)
        self.graph.replay()
        return self.metrics


# ==== end of plumbing =================================================================================================
def evaluate(run):
    """--eval-episodes deterministic episodes side by side, in environments and from seeds of their own."""
    run.args.capture_video and run.eval_envs[0].set_wrapper_attr("name_prefix", f"step-{run.step}")
    obs = {env: env.reset(seed=seed)[0] for env, seed in zip(run.eval_envs, run.seeds(len(run.eval_envs), stream=1))}
    while obs:  # those under way
        for env, action in zip([*obs], run.actor.act(np.stack([*obs.values()]))):
            obs[env], _, terminated, truncated, _ = env.step(action)
            (terminated or truncated) and obs.pop(env)
    try:
        run.args.capture_video and run.eval_envs[0].get_wrapper_attr("stop_recording")()
    except OSError:
        if not run.interrupted:  # by Ctrl-C, of which ffmpeg hears too
            raise
    episodes = [(env.return_queue[-1], env.length_queue[-1]) for env in run.eval_envs]
    (mean, length), (std, _) = np.mean(episodes, 0).tolist(), np.std(episodes, 0).tolist()
    best = max(mean, run.last.get("eval/best", mean))
    run.log({"eval/return": mean, "eval/return_std": std, "eval/length": length, "eval/best": best})
    tqdm.write(f"step {run.step} of {run.total}: return {mean:.1f} +- {std:.1f}, the best so far {best:.1f}")


def load_policy(run_dir, deterministic=True):
    """What a run left in its policy.pt: a function obs [..., O] -> action [...] or [..., A], in numpy."""
    saved = torch.load(Path(run_dir) / "policy.pt", map_location="cpu", weights_only=True)
    actor = Actor(**saved["init"])
    actor.load_state_dict(saved["actor"])
    return partial(actor.act, deterministic=deterministic)


def train(args):
    """Run PPO as `args` say; returns what result.json holds. Bad flags raise SystemExit, which says what to do."""
    above_0 = "num_steps update_epochs num_minibatches learning_rate clip_coef max_grad_norm target_kl hidden"
    if RANKS > 1 and args.compile:
        sys.exit("error: --compile is for one process, since it cannot compile what ranks exchange: leave it out")
    fits = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", RANKS))  # a GPU for each rank
    place = "cpu" if RANKS > 1 and args.device == "auto" and not fits else args.device
    if RANKS > 1 and place in ("auto", "cuda") and torch.cuda.is_available():
        place = f"cuda:{os.environ['LOCAL_RANK']}"
    if RANKS > 1 and not distributed.is_initialized():
        backend = "nccl" if place.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, timeout=timedelta(days=1))  # an evaluation takes what it takes
    device = start(replace(args, device=place), above_0, "ent_coef vf_coef", "gamma gae_lambda")
    if args.num_envs % RANKS:
        sys.exit(f"error: --num-envs {args.num_envs} cannot be shared by {RANKS} ranks: choose a multiple of {RANKS}")
    if args.num_steps % args.num_minibatches:
        fits = [m for m in range(1, args.num_steps + 1) if args.num_steps % m == 0]
        sys.exit(f"error: --num-minibatches {args.num_minibatches} must divide --num-steps {args.num_steps}: {fits} do")
    stride, n = args.num_steps * args.num_envs, args.num_envs // RANKS
    if args.norm_adv and stride == 1:
        sys.exit("error: a rollout of one step has nothing to normalise by: more --num-steps, or --no-norm-adv")
    args = replace(args, total_timesteps=math.ceil(args.total_timesteps / stride) * stride)
    envs = [make_env(args) for _ in range(n)]
    space, mine = envs[0].action_space, slice(RANK * n, RANK * n + n)
    if isinstance(space, gym.spaces.Discrete) and space.start == 0:
        box = int(space.n), None, None
    elif isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f":
        box = space.shape[0], space.low.tolist(), space.high.tolist()
    else:
        sys.exit(f"error: {ALGO} needs actions Discrete(n) from 0 on, or in a flat Box of floats, not {space}")
    agent = Agent(args, envs[0].observation_space.shape[0], *box, device)
    run = (Run if RANK == 0 else Follower)(args, agent.actor, {"agent": agent})
    RANKS > 1 and join(run)
    update = compiled(agent.update) if args.compile else agent.update
    update = CudaGraph(update) if args.cuda_graph and device.type == "cuda" and RANKS == 1 else update

    obs, returns = run.reset(envs, run.seeds(args.num_envs)[mine]), np.zeros(n)
    for step in run.steps(stride):
        # Collect a rollout: rows (s, a, r, d, whether the episode ended, its discounted rewards so far, s').
        rows, noise = [], agent.actor.noise(args.num_steps, args.num_envs)[:, mine]
        choose = agent.actor.in_numpy()
        for t, run.step in enumerate(range(step - stride + args.num_envs, step + 1, args.num_envs)):
            action, to_env = choose(obs, noise[t])
            next_obs, reward, terminated, ended, true_obs = run.interact(envs, to_env)  # of which true_obs is s'
            returns = args.gamma * returns + reward
            rows.append(np.column_stack((obs, action, reward, terminated, ended, returns, true_obs)))
            obs, returns = next_obs, returns * ~ended
        rollout = torch.as_tensor(np.stack(rows), dtype=torch.float32, device=device)  # [T, N, .]
        obs_dim, act_dim = agent.columns[:2]
        s, a, r, d, e, g, next_s = rollout.split((obs_dim, act_dim, 1, 1, 1, 1, obs_dim), -1)
        agent.returns.update(g)

        # Learn from it, in minibatches that have as many steps of one environment as of another.
        rows = agent.prepare(s, a, r[..., 0], d[..., 0], e[..., 0], next_s).flatten(0, 1)
        rate = args.learning_rate * (1 - args.anneal_lr * (step - stride) / run.total)
        agent.optimizer.lr.fill_(rate)
        for _ in range(args.update_epochs):
            order = torch.rand(args.num_steps, args.num_envs).argsort(0)[:, mine] * n + torch.arange(n)
            for batch in rows[order.flatten().to(device)].chunk(args.num_minibatches):
                update(batch)
            if args.target_kl and agent.measure(rows)["policy/kl"] > args.target_kl:
                break
        metrics = agent.measure(rows)
        args.norm_obs and agent.actor.normalize.update(s)

        # Report, and make it safe.
        run.log(metrics | {"speed/sps": step / (time.monotonic() - run.began)})
        if args.eval_every and run.due(args.eval_every) and RANK == 0:
            evaluate(run)
        run.interrupted = bool(mean_over_ranks(torch.tensor(float(run.interrupted), device=device)))
        if run.interrupted or run.due(args.checkpoint_every):
            run.save()
            obs, returns = run.reset(envs, run.seeds(args.num_envs)[mine]), np.zeros(n)
    run.write("result.json", run.last)
    return run.last


def main():
    """train() with the flags typed; under --resume the others are the run's own."""
    args = tyro.cli(Args)
    try:
        if args.resume and args.run_dir and (config := Path(args.run_dir, "config.json")).exists():
            saved = {k: v for k, v in json.loads(config.read_text())["args"].items() if hasattr(args, k)}
            args = tyro.cli(Args, default=Args(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}))
        train(args)
        RANK and os._exit(0)  # in the usual end of a process a thread of gloo's aborts it now and then
    except (OSError, RuntimeError, MemoryError, ImportError, json.JSONDecodeError, gym.error.Error) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # memory, of which there may be too little
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
