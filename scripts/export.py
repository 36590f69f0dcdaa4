"""Export the policy of a run as a torch.export program and as ONNX, to use it elsewhere.

    python scripts/export.py runs/...                       writes policy.pt2 and policy.onnx there
    python scripts/export.py runs/... --output-dir robot    writes them into another folder

Both files compute what load_policy of the run's algorithm returns: deterministic actions in the
units of the environment, from raw observations. They contain the normalisation of observations and
the bounds of actions, and need nothing from this repository. Input is float32 [B, O]. Output is
float32 [B, A], or int64 [B] if actions are discrete. B is any batch size, and the device is the
CPU. To use them:

    policy = torch.export.load("policy.pt2").module()
    action = policy(torch.from_numpy(obs)).numpy()

    policy = onnxruntime.InferenceSession("policy.onnx")
    (action,) = policy.run(["action"], {"obs": obs})

Both files are read back and compared with load_policy on 1000 observations, one by one and as one
batch. They are kept only if discrete actions are equal and others differ by at most 1e-5. This
tolerance grows with the largest action and with the size of the observation where these exceed 1,
because float32 rounds in proportion. Rounding also makes load_policy itself return slightly
different actions for one observation alone and in a batch: by up to 4.3e-5 in 49 runs. The exported
action must be close to either of them.
"""

import importlib.util
import io
import json
import logging
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import tyro
from common import load_algo, load_run_policy
from torch import nn

TOLERANCE = 1e-5
OBSERVATIONS = 1000


@dataclass
class Args:
    """Export the policy of a run as a torch.export program and as ONNX."""

    run_dir: tyro.conf.Positional[Path]  # the folder of a run
    output_dir: Path | None = None  # folder for policy.pt2 and policy.onnx; default: RUN_DIR


class Policy(nn.Module):
    """The deterministic policy of a run: observations [B, O] -> actions [B, A] or [B]."""

    def __init__(self, actor, spaces):
        super().__init__()
        self.actor = actor.requires_grad_(False)
        self.scale = nn.Identity()
        if spaces.low is not None:
            self.scale = ActionScaler(spaces.low, spaces.high)

    def forward(self, obs):
        action = self.actor.act(obs.numpy(), deterministic=True)  # torch.export traces numpy too
        return self.scale(torch.as_tensor(action))


class ActionScaler(nn.Module):
    """Scales actions [B, A] from half widths of their box to its units, as load_policy does."""

    def __init__(self, low, high):
        super().__init__()
        low = torch.tensor(low)
        high = torch.tensor(high)
        bounded = low.isfinite() & high.isfinite()
        # A dimension without two finite bounds keeps its units, from the point nearest to 0.
        nearest_to_zero = torch.zeros_like(low).clamp(low, high)
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("center", torch.where(bounded, low / 2 + high / 2, nearest_to_zero))
        self.register_buffer("half_width", torch.where(bounded, high / 2 - low / 2, 1.0))

    def forward(self, action):
        return (self.center + self.half_width * action).clamp(self.low, self.high)


def load_module(run_dir):
    """The policy of a run as a module, and the size of its observations."""
    config = json.loads((run_dir / "config.json").read_text())
    algo = load_algo(config["algo"])
    saved = torch.load(run_dir / "policy.pt", map_location="cpu", weights_only=True)
    spaces = algo.Spaces(*saved["spaces"])
    actor = algo.Agent(algo.Args(**saved["args"]), spaces).actor
    actor.load_state_dict(saved["actor"])
    return Policy(actor, spaces), spaces.obs_dim


def write_files(module, obs_dim, folder):
    """Write policy.pt2 and policy.onnx."""
    batch_sizes = ({0: torch.export.Dim("batch")},)
    example = torch.zeros(2, obs_dim)  # with a batch of 1, the size would become a constant
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(module, (example,), dynamic_shapes=batch_sizes, strict=True)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it contains paths of this machine

        # torch.export.save into a file aborts the process if the disk is full.
        content = io.BytesIO()
        torch.export.save(program, content)
        (folder / "policy.pt2").write_bytes(content.getvalue())

        # numpy's integer constants stay integers, which ONNX cannot combine with floats.
        for name, constant in program.constants.items():
            program.constants[name] = constant.float()
        torch.onnx.export(
            program,
            (),
            folder / "policy.onnx",
            output_names=["action"],
            dynamic_shapes=batch_sizes,
            external_data=False,
            verbose=False,
        )


def read_files(folder):
    """The two files as functions of numpy arrays: {file name: policy}."""
    import onnxruntime  # imported late, so that `export` can report a missing package

    program = torch.export.load(folder / "policy.pt2").module()
    session = onnxruntime.InferenceSession(
        folder / "policy.onnx", providers=["CPUExecutionProvider"]
    )

    def run_program(obs):
        return program(torch.from_numpy(obs)).numpy()

    def run_onnx(obs):
        return session.run(["action"], {"obs": obs})[0]

    return {"policy.pt2": run_program, "policy.onnx": run_onnx}


def random_observations(actor_state, obs_dim, n):
    """Random observations [n, O] and their sizes [n], which range from 0.1 to 10.

    The unit of size is the standard deviation of the policy's normaliser, or 1 without one.
    """
    mean = np.asarray(actor_state.get("normalize.mean", 0))
    std = np.asarray(actor_state.get("normalize.std", 1))
    rng = np.random.default_rng(0)
    size = 10 ** rng.uniform(-1, 1, n)
    obs = mean + std * size[:, None] * rng.normal(size=(n, obs_dim))
    return obs.astype(np.float32), size


def largest_difference(policy, exported, obs, size):
    """The largest difference between two policies' actions for obs [n, O], relative to its scale.

    The scale is the largest action times the size of the observation, both at least 1.
    """
    in_batch = policy(obs)
    alone = actions_one_by_one(policy, obs)
    difference = np.zeros(len(obs))
    for actions in (exported(obs), actions_one_by_one(exported, obs)):
        nearest = np.minimum(np.abs(actions - in_batch), np.abs(actions - alone))
        # np.maximum keeps NaN, so a NaN in any action is found.
        difference = np.maximum(difference, nearest.reshape(len(obs), -1).max(1))
    return (difference / np.maximum(1, size)).max() / max(1, np.abs(in_batch).max())


def actions_one_by_one(policy, obs):
    """The actions [n, ...] for obs [n, O], each computed in a batch of 1."""
    return np.concatenate([policy(row[None]) for row in obs])


def export(args):
    """Export the policy and check both files; returns {file name: largest difference}.

    Raises ValueError if input is bad, or if a file differs from the policy.
    """
    packages = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"ONNX needs missing packages: pip install {' '.join(missing)}")
    torch.set_num_threads(1)  # faster for small networks
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about unneeded packages

    _, policy = load_run_policy(args.run_dir)
    module, obs_dim = load_module(args.run_dir)
    obs, size = random_observations(module.actor.state_dict(), obs_dim, OBSERVATIONS)
    output_dir = args.output_dir or args.run_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    differences = {}
    # Files that differ from the policy vanish with the temporary folder.
    with TemporaryDirectory(dir=output_dir) as folder:
        folder = Path(folder)
        write_files(module, obs_dim, folder)
        for name, exported in read_files(folder).items():
            differences[name] = largest_difference(policy, exported, obs, size)
            if not differences[name] <= TOLERANCE:  # true for NaN
                raise ValueError(
                    f"{name} differs from the policy by {differences[name]:.1e}, more than "
                    f"{TOLERANCE}: neither file was kept"
                )
        for name, difference in differences.items():
            path = output_dir / name
            os.replace(folder / name, path)
            size_in_bytes = path.stat().st_size
            print(
                f"{path}: {size_in_bytes:,} bytes, "
                f"within {difference:.1e} on {OBSERVATIONS} observations"
            )
    return differences


def main():
    """Export with the flags of the command line. Exit status 2 is bad input."""
    args = tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,))
    try:
        export(args)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
