"""Export the policy of a run, as a torch.export program and as ONNX, for where nothing of this repository is.

    python scripts/export.py runs/...                            policy.pt2 and policy.onnx, into the run folder
    python scripts/export.py runs/... --output-dir robot         into another one

Both compute what load_policy() of the run's algorithm does, on a CPU: deterministic actions as the environment takes
them, from observations as it gives them. Normalisation and the bounds of the actions are inside. float32 [B, O] ->
float32 [B, A], or where actions are discrete int64 [B], for any B. To use one:

    policy = torch.export.load("policy.pt2").module()
    action = policy(torch.from_numpy(obs)).numpy()

    policy = onnxruntime.InferenceSession("policy.onnx")
    [action] = policy.run(["action"], {"obs": obs})

Both are read back and compared with load_policy() on 1000 observations, one at a time and all at once. They are kept if
all actions are within 1e-5, times the largest action and, since float32 rounds in proportion, times the size of the
observation, where these are above 1. Discrete actions must be equal. By such rounding load_policy() itself gives an
observation one action alone and another among 1000 (4.3e-5 apart at most in 49 runs): either of them is right.
"""

import importlib.util
import io
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
from torch import nn
from watch import load

TOLERANCE = 1e-5


@dataclass
class Args:
    """Export the policy of a run, as a torch.export program and as ONNX."""

    run_dir: tyro.conf.Positional[Path]  # the folder of a run
    output_dir: Path | None = None  # where policy.pt2 and policy.onnx go; None is RUN_DIR


class Policy(nn.Module):
    """What load_policy() returns, as a module: obs [B, O] -> action [B] or [B, A]."""

    def __init__(self, act):
        super().__init__()
        self.act, self.actor = act, act.func.__self__.requires_grad_(False)

    def forward(self, obs):
        return torch.as_tensor(self.act(obs.numpy()))  # under strict=True torch traces numpy as well


def write(policy, folder):
    """policy.pt2 and policy.onnx."""
    module, shapes = Policy(policy), ({0: torch.export.Dim("batch")},)
    example = torch.zeros(2, module.actor.init["obs_dim"])  # of 1, the batch would become a constant
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        program = torch.export.export(module, (example,), dynamic_shapes=shapes, strict=True)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, data := io.BytesIO())  # into a file, a full disk would abort the process
        (folder / "policy.pt2").write_bytes(data.getvalue())
        for name, number in program.constants.items():  # ONNX compares no float with an integer of numpy's
            program.constants[name] = number.float()
        options = {"output_names": ["action"], "dynamic_shapes": shapes, "external_data": False, "verbose": False}
        torch.onnx.export(program, (), folder / "policy.onnx", **options)


def read(folder):
    """The two files as functions in numpy, by name."""
    import onnxruntime  # here, so that what is missing can be told

    module = torch.export.load(folder / "policy.pt2").module()
    session = onnxruntime.InferenceSession(folder / "policy.onnx", providers=["CPUExecutionProvider"])
    return {
        "policy.pt2": lambda obs: module(torch.from_numpy(obs)).numpy(),
        "policy.onnx": lambda obs: session.run(["action"], {"obs": obs})[0],
    }


def observations(actor, n):
    """n of them [n, O], as large as `size` [n] says, 0.1 to 10 in units of the normaliser where there is one."""
    state, rng = actor.state_dict(), np.random.default_rng(0)
    mean, std = (np.asarray(state.get(f"normalize.{name}", value)) for name, value in (("mean", 0), ("std", 1)))
    size = 10 ** rng.uniform(-1, 1, n)
    return (mean + std * size[:, None] * rng.normal(size=(n, actor.init["obs_dim"]))).astype(np.float32), size


def difference(policy, exported, obs, size):
    """How far the actions for obs [n, O] are apart at most, in units of the largest and of `size` where above 1."""
    (together, alone), got = ways(policy, obs), ways(exported, obs)
    apart = np.minimum(np.abs(got - together), np.abs(got - alone)).max(0).reshape(len(obs), -1)  # [n, A]
    return (apart / np.maximum(1, size[:, None])).max() / max(1, np.abs(together).max())


def ways(policy, obs):
    """The actions for obs [n, O] all at once, and one at a time: [2, n, ...]."""
    return np.stack((policy(obs), np.concatenate([policy(row[None]) for row in obs])))


def main(args):
    """Export and compare; returns the largest difference of each file. Bad input raises SystemExit."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(name)]:
        sys.exit(f"error: ONNX needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    torch.set_num_threads(1)  # for small networks more are slower
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of packages that other models would need
    _, policy = load(args.run_dir, deterministic=True)
    obs, size = observations(policy.func.__self__, 1000)
    output_dir, found = args.output_dir or args.run_dir, {}
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output_dir) as folder:  # where they stay if they are wrong
        write(policy, Path(folder))
        for name, exported in read(Path(folder)).items():
            found[name] = difference(policy, exported, obs, size)
            if not found[name] <= TOLERANCE:
                apart = f"by {found[name]:.1e}, more than {TOLERANCE}"
                sys.exit(f"error: {name} differs from the policy {apart}: it was not kept, nor the other one")
        for name in found:
            os.replace(Path(folder) / name, output_dir / name)
            length = (output_dir / name).stat().st_size
            print(f"{output_dir / name}: {length:,} bytes, within {found[name]:.1e} on {len(obs)} observations")
    return found


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, config=(tyro.conf.FlagCreatePairsOff,)))
    except OSError as error:
        sys.exit(f"error: {error}")
