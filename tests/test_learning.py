"""Learning curves on real environments, against thresholds that curves.json says how they were calibrated.

The networks and batches are smaller than by default, so that the seeds of a case take minutes on one thread; results/
holds the curves of the defaults.
"""

import json

import pytest
from conftest import ROOT, load

CURVES = json.loads((ROOT / "tests" / "curves.json").read_text())


def best(algo, env_id, flags, seed, run_dir):
    """The best deterministic evaluation of one run."""
    module = load(ROOT / "algos" / f"{algo}.py")
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in flags.items()}
    args = module.Args(env_id=env_id, seed=seed, threads=1, device="cpu", run_dir=str(run_dir), **flags)
    return module.train(args)["eval/best"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CURVES, ids=lambda case: f"{case['algo']}-{case['env_id']}")
def test_it_learns(case, tmp_path):
    seeds = range(1, case["seeds"] + 1)
    jobs = [(case["algo"], case["env_id"], case["flags"], seed, tmp_path / str(seed)) for seed in seeds]
    reached = {seed: best(*job) for seed, job in zip(seeds, jobs)}
    passed = [seed for seed in seeds if reached[seed] >= case["threshold"]]
    assert len(passed) >= case["at_least"], f"needs {case['threshold']} in {case['at_least']} seeds: {reached}"
