"""One record per algorithm: what the tests need to know about a file of algos/.

To add an algorithm, add its file to algos/ and a record here. Every test that runs over all
algorithms, or over all of one family, then runs over the new one too.
"""

from typing import Literal, NamedTuple

# Flags that make a run of 600 steps take about a second after the imports.
SMALL_REPLAY = "--learning-starts 200 --hidden 16 16 --batch-size 16 --buffer-size 5000"
SMALL_ROLLOUT = "--num-steps 50 --num-minibatches 2 --update-epochs 2 --hidden 16 16"

# Arguments with which a probe (tests/probes.py) is learned in a few seconds.
PROBE_REPLAY = {
    "hidden": (32, 32),
    "batch_size": 64,
    "tau": 0.05,
    "learning_starts": 200,
    "buffer_size": 2000,
}
PROBE_ACTOR_CRITIC = PROBE_REPLAY | {"policy_lr": 3e-3, "q_lr": 3e-3}
PROBE_ROLLOUT = {
    "hidden": (32, 32),
    "num_steps": 100,
    "num_minibatches": 4,
    "norm_obs": False,
    "norm_reward": False,
}


class Algo(NamedTuple):
    """What the tests need to know about one algorithm."""

    family: Literal["replay", "rollout"]
    actions: Literal["box", "discrete", "both"]
    env_id: str  # environment of small runs; its learning cases are in curves.json
    probe_args: dict  # arguments with which a probe is learned
    learning_rate_flag: str  # a learning rate that makes the loss diverge if it is huge
    probe_steps: int = 1  # multiple of the usual number of steps that a probe takes
    resume_envs: tuple = ("Hopper-v4",)  # environments in which a run is killed and resumed
    export_flags: tuple = ()  # flags of the run whose policy is exported
    updates: int = 1  # functions that `train` passes to `accelerate`
    flags_need: dict = {}  # flag -> arguments without which it changes nothing in a short run


ALGOS = {
    "ddpg": Algo(
        family="replay",
        actions="box",
        env_id="Pendulum-v1",
        probe_args=PROBE_ACTOR_CRITIC,
        learning_rate_flag="--q-lr",
        export_flags=("--activation", "elu"),
    ),
    "dqn": Algo(
        family="replay",
        actions="discrete",
        env_id="CartPole-v1",
        probe_args=PROBE_REPLAY
        | {
            "learning_rate": 3e-3,
            "train_frequency": 1,
            "target_network_frequency": 1,
            "end_e": 0.2,
        },
        learning_rate_flag="--learning-rate",
        resume_envs=("CartPole-v1",),
        export_flags=("--dueling",),
        flags_need={"tau": {"target_network_frequency": 10}},
    ),
    "ppo": Algo(
        family="rollout",
        actions="both",
        env_id="Pendulum-v1",
        probe_args=PROBE_ROLLOUT | {"learning_rate": 3e-3, "anneal_lr": False},
        learning_rate_flag="--learning-rate",
        probe_steps=3,
        export_flags=("--env-id", "probe/Wide-v0"),
        flags_need={"clip_coef": {"learning_rate": 0.01, "update_epochs": 4}},
    ),
    "sac": Algo(
        family="replay",
        actions="box",
        env_id="Pendulum-v1",
        probe_args=PROBE_ACTOR_CRITIC | {"alpha": 1e-3, "autotune": False},
        learning_rate_flag="--q-lr",
        resume_envs=("Pendulum-v1", "InvertedPendulum-v4", "Hopper-v4"),
        # With these widths, ONNX could move the weights into a file of their own.
        export_flags=("--env-id", "probe/Wide-v0", "--hidden", 64, 64),
        flags_need={"alpha": {"autotune": False}},
    ),
    "td3": Algo(
        family="replay",
        actions="box",
        env_id="Pendulum-v1",
        probe_args=PROBE_ACTOR_CRITIC,
        learning_rate_flag="--q-lr",
        export_flags=("--activation", "silu"),
        updates=2,
    ),
    "trpo": Algo(
        family="rollout",
        actions="both",
        env_id="Pendulum-v1",
        probe_args=PROBE_ROLLOUT | {"vf_lr": 3e-3, "target_kl": 0.05},
        learning_rate_flag="--vf-lr",
        probe_steps=5,
        # A long step makes the search shorten it.
        flags_need={
            "natural_gradient": {"target_kl": 0.3, "damping": 1e-5},
            "search_steps": {"target_kl": 0.3, "damping": 1e-5},
        },
    ),
    "vpg": Algo(
        family="rollout",
        actions="both",
        env_id="CartPole-v1",
        probe_args=PROBE_ROLLOUT | {"vf_lr": 3e-3, "policy_lr": 3e-2},
        learning_rate_flag="--vf-lr",
        probe_steps=8,
        resume_envs=("CartPole-v1",),
        export_flags=("--activation", "elu"),
    ),
}
