# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11", "numpy>=2", "gymnasium[mujoco]>=1.4,<2", "mujoco<5", "tyro>=1,<2", "tqdm>=4.66"]
# ///
"""Deep Deterministic Policy Gradient (DDPG): Q-learning for actions that are numbers.

No maximum over actions can be tabulated where they are continuous, so a policy is trained to find it: it climbs the
critic's own gradient. What is learned is off-policy: any transition will do, so all of them are kept and used again.

Lillicrap et al. 2016, "Continuous control with deep reinforcement learning", https://arxiv.org/abs/1509.02971

    policy mu, critic Q, their targets mu' and Q', replay memory D; h = (high - low) / 2
    for each environment step:
        a = clip(mu(s) + exploration_noise h noise, low, high),   noise ~ N(0, 1)                                (1)
            but uniform in the action box for the first `learning_starts` steps
        step the environment and store (s, a, r, d, s') in D: d is 1 where it terminated, 0 where time cut it short
        after these, `utd` times, on a batch of D:
            y = r + gamma (1 - d) Q'(s', mu'(s'))                                                                (2)
            Q descends                    mean 1/2 (Q(s, a) - y)^2                                               (3)
            mu descends                   mean -Q(s, mu(s))                                                      (4)
            Q' and mu' move to            Q' + tau (Q - Q')  and  mu' + tau (mu - mu')                           (5)

    python algos/ddpg.py --env-id Hopper-v4            or, in Python:   from ddpg import Args, load_policy, train
    python algos/ddpg.py --resume --run-dir runs/...   takes up a run, whose own flags are the defaults

Final at 100k steps, mean (range) of 3 seeds: HalfCheetah-v4 4144 (3054 to 5006), Hopper-v4 380 (261 to 548); at 20k,
10 seeds (95 %): Pendulum-v1 -153 +- 13. Hopper-v4 with --compile at 395 steps/s, SB3 195, SBX 416.

Metrics: loss/critic (3), loss/actor (4); value/mean, Q of the last batch; episode/*, training episodes as they end;
eval/*, deterministic episodes; speed/sps, environment steps a second since the run began, everything included.

What matters beyond the equations:
 1. A time limit is not an end: there d is 0, and s' the last observation, not the first one of the next episode.
 2. Noise is in half widths of the box, per dimension, drawn for each environment; the critic sees actions in them as
    well: so a policy is learnt alike in any units of actions. Rewards and observations are
    taken as they are, and should be of the order of 1.
 3. What noise moves is clipped to the bounds of its own dimension.
 4. Noise is white and Gaussian: the correlated noise of the paper brings nothing on today's tasks.
 5. `descend` takes gradients for one network, so (4) does not teach the critic.
 6. A step is one step of one environment: `num_envs` changes neither the x-axis nor the gradient steps per step.
 7. Checkpoints begin new episodes, seeded by (seed, step), in every run: killed and resumed, it is bit-equal on a CPU.
"""

# Shapes: B batch, N environments, O observation, A action.

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn
from tqdm import tqdm

ALGO = "ddpg"


@dataclass
class Args:
    """Deep Deterministic Policy Gradient. A step is one step of one environment."""

    learning_starts: int = 5_000  # steps of uniformly random actions before learning begins
    buffer_size: int = 1_000_000  # transitions in the replay memory
    batch_size: int = 256  # transitions in a gradient step
    utd: float = 1.0  # gradient steps per environment step
    gamma: float = 0.99  # discount
    tau: float = 0.005  # how far the targets move at each gradient step
    policy_lr: float = 1e-3  # learning rate of the policy
    q_lr: float = 1e-3  # learning rate of the critic
    exploration_noise: float = 0.1  # standard deviation of the noise on actions, in half widths of the action box
    hidden: tuple[int, ...] = (256, 256)  # widths of the hidden layers
    activation: Literal["relu", "tanh", "elu", "silu"] = "relu"  # non-linearity between layers

    env_id: str = "Hopper-v4"  # gymnasium id; module:Name-v0 imports the module first
    exp_name: str = ALGO  # part of the run folder's name
    seed: int = 1  # of everything random
    total_timesteps: int = 1_000_000  # environment steps, all environments together
    num_envs: int = 1  # environments side by side
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one
    threads: int = 2  # CPU threads of torch; take 1 where other runs share the machine
    run_dir: str | None = None  # None is runs/{env_id}__{exp_name}__{seed}__{time}
    resume: bool = False  # go on from the last checkpoint in --run-dir
    eval_every: int = 10_000  # steps between evaluations; 0 for none, not even at the end
    eval_episodes: int = 10  # episodes in an evaluation
    checkpoint_every: int = 50_000  # steps between checkpoints; 0 for one at the end alone
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # where to mirror metrics.jsonl
    capture_video: bool = False  # film an episode of every evaluation into videos/
    compile: bool = False  # compile the update, gradients and optimizers included
    cuda_graph: bool = True  # on CUDA, capture the update as a graph


ACTIVATIONS = {"relu": nn.ReLU(inplace=True), "tanh": nn.Tanh(), "elu": nn.ELU(inplace=True), "silu": nn.SiLU()}


def mlp(sizes, activation, layer=nn.Linear):
    """Layers of `sizes` with `activation` between them: [..., sizes[0]] -> [..., sizes[-1]]."""
    layers = [module for i, o in zip(sizes, sizes[1:]) for module in (layer(i, o), ACTIVATIONS[activation])]
    return nn.Sequential(*layers[:-1])


def q_values(critic, obs, action, low, high):
    """Action values: obs [B, O], action [B, A] in the box [A] -> [B]."""
    in_half_widths = (action - (low + high) / 2) / ((high - low) / 2)
    return critic(torch.cat((obs, in_half_widths), -1)).squeeze(-1)


class Actor(nn.Module):
    """The policy: obs [..., O] -> action [..., A] in the box, exploring where it is not deterministic."""

    def __init__(self, obs_dim, low, high, hidden, activation, exploration_noise):
        super().__init__()
        self.init = {"obs_dim": obs_dim, "low": low, "high": high, "hidden": hidden, "activation": activation}
        self.init["exploration_noise"] = self.exploration_noise = exploration_noise
        self.net = mlp((obs_dim, *hidden, len(low)), activation)
        self.register_buffer("low", torch.tensor(low))
        self.register_buffer("high", torch.tensor(high))

    def forward(self, obs, deterministic=True):
        action = torch.lerp(self.low, self.high, (1 + self.net(obs).tanh()) / 2)
        if deterministic:
            return action
        return perturb(action, self.exploration_noise * torch.randn_like(action), self.low, self.high)  # (1)

    @torch.no_grad()
    def act(self, obs, deterministic=True):
        """The same in numpy: obs [..., O] -> action [..., A]."""
        return self(torch.as_tensor(obs, dtype=torch.float32, device=self.low.device), deterministic).cpu().numpy()


def perturb(action, noise, low, high):
    """(1): action [..., A], noise [..., A] in half widths of the box [A] -> action in the box [..., A]."""
    return (action + noise * (high - low) / 2).clamp(low, high)


def q_target(reward, terminated, next_q, gamma):
    """(2): all of them [B] -> y [B]."""
    return reward + gamma * (1 - terminated) * next_q


def critic_loss(q, y):
    """(3): q [B], y [B] -> scalar."""
    return 0.5 * (q - y).square().mean()


def actor_loss(q):
    """(4): q [B] -> scalar."""
    return -q.mean()


def descend(optimizer, loss):
    """One step of `optimizer`; what else the loss depends on gets no gradient."""
    optimizer.step(torch.autograd.grad(loss, optimizer.weights))


class Agent(nn.Module):
    """All that learns."""

    def __init__(self, args, obs_dim, low, high, device):
        super().__init__()
        self.args, self.columns = args, (obs_dim, len(low), 1, 1, obs_dim)  # of a batch
        actor = partial(Actor, obs_dim, low, high, args.hidden, args.activation, args.exploration_noise)
        self.actor, self.target_actor = actor(), actor().requires_grad_(False)
        critic = partial(mlp, (obs_dim + len(low), *args.hidden, 1), args.activation)
        self.critic, self.target = critic(), critic().requires_grad_(False)
        self.target_actor.load_state_dict(self.actor.state_dict())
        self.target.load_state_dict(self.critic.state_dict())
        self.actor_optimizer = Adam(self.actor.parameters(), args.policy_lr)
        self.critic_optimizer = Adam(self.critic.parameters(), args.q_lr)
        self.to(device)

    def update(self, batch):
        """A gradient step of everything, on rows (s, a, r, d, s') [B, 2 O + A + 2]; returns scalar tensors to log."""
        obs, action, reward, terminated, next_obs = batch.split(self.columns, -1)
        box = self.actor.low, self.actor.high
        with torch.no_grad():
            next_q = q_values(self.target, next_obs, self.target_actor(next_obs), *box)  # [B]
            y = q_target(reward[:, 0], terminated[:, 0], next_q, self.args.gamma)  # (2)
        q = q_values(self.critic, obs, action, *box)  # [B]
        loss_q = critic_loss(q, y)
        descend(self.critic_optimizer, loss_q)  # (3)
        metrics = {"loss/critic": loss_q, "value/mean": q.detach().mean()}

        metrics["loss/actor"] = actor_loss(q_values(self.critic, obs, self.actor(obs), *box))
        descend(self.actor_optimizer, metrics["loss/actor"])  # (4)
        with torch.no_grad():
            for target, source in ((self.target, self.critic), (self.target_actor, self.actor)):
                torch._foreach_lerp_([*target.parameters()], [*source.parameters()], self.args.tau)  # (5)
        return {name: value.detach() for name, value in metrics.items()}


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


def by_onednn(update):
    """`update`, its products by oneDNN: where this is an AMD, which MKL is slow on, and they are exact.

    Torch goes to oneDNN only where it may round float32 to bfloat16, as it does on processors made for that."""
    matmul = torch.backends.mkldnn.matmul
    if "AMD" not in torch.cpu.get_capabilities().get("cpu_name", "") or matmul.fp32_precision != "none":
        return update

    def call(function, *args):
        matmul.fp32_precision = "bf16"
        try:
            return function(*args)
        finally:
            matmul.fp32_precision = "none"

    x = torch.full((256, 256), 1 + 2**-20)  # 1 in bfloat16
    return partial(call, update) if call(torch.mm, x, torch.eye(256)).equal(x) else update


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
    """What a run left in its policy.pt: a function obs [..., O] -> action [..., A], in numpy. Needs no environment."""
    saved = torch.load(Path(run_dir) / "policy.pt", map_location="cpu", weights_only=True)
    actor = Actor(**saved["init"])
    actor.load_state_dict(saved["actor"])
    return partial(actor.act, deterministic=deterministic)


def train(args):
    """Run DDPG as `args` say; returns what result.json holds. Bad flags raise SystemExit, which says what to do."""
    above_0 = "buffer_size batch_size utd policy_lr q_lr tau hidden"
    device = start(args, above_0, "learning_starts exploration_noise", "gamma tau")
    envs = [make_env(args) for _ in range(args.num_envs)]
    space, n = envs[0].action_space, args.num_envs
    flat = isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.dtype.kind == "f"
    if not flat or not all(0 < width < math.inf for width in space.high - space.low):
        others = "ppo, trpo and vpg take one without bounds, and, as dqn does, Discrete(n) from 0 on"
        sys.exit(f"error: {ALGO} needs a flat Box of floats with two bounds to act in, not {space}; {others}")
    agent = Agent(args, *envs[0].observation_space.shape, space.low.tolist(), space.high.tolist(), device)
    size = math.ceil(args.buffer_size / n) * n, sum(agent.columns)  # whole rounds: none is split at the end
    memory = torch.from_numpy(np.empty(size, np.float32)).to(device)
    run = Run(args, agent.actor, {"agent": agent, "memory": memory})
    update = compiled(agent.update) if args.compile else agent.update
    update = CudaGraph(update) if args.cuda_graph and device.type == "cuda" else update
    update = by_onednn(update) if device.type == "cpu" and min(args.hidden, default=0) >= 256 else update

    obs, metrics = run.reset(envs, run.seeds(n)), {}
    for step in run.steps(n):
        # Act. Step t has row t mod capacity, so the memory needs no counters.
        if step <= args.learning_starts:
            action = torch.lerp(agent.actor.low.cpu(), agent.actor.high.cpu(), torch.rand(n, *space.shape)).numpy()
        else:
            action = agent.actor.act(obs, deterministic=False)
        next_obs, reward, terminated, _, true_obs = run.interact(envs, action)  # of which true_obs is s'
        rows = np.column_stack((obs, action, reward, terminated, true_obs)).astype(np.float32)
        memory.narrow(0, (step - n) % len(memory), n).copy_(torch.from_numpy(rows))
        obs = next_obs

        # Learn: `utd` gradient steps for each step after the random ones.
        updates = [int(args.utd * max(0, t - args.learning_starts)) for t in (step - n, step)]
        for _ in range(*updates):
            index = torch.randint(min(step, len(memory)), (args.batch_size,), device=device)
            metrics = update(memory.index_select(0, index))

        # Report, and make it safe.
        if run.due(1000):
            run.log(metrics | {"speed/sps": step / (time.monotonic() - run.began)})
        if args.eval_every and run.due(args.eval_every):
            evaluate(run)
        if run.interrupted or run.due(args.checkpoint_every):
            run.save()
            obs, metrics = run.reset(envs, run.seeds(n)), {}
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
    except (OSError, RuntimeError, MemoryError, ImportError, json.JSONDecodeError, gym.error.Error) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):  # memory, of which there may be too little
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
