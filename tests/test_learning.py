"""Learning curves on real environments, against the thresholds of curves.json.

A case takes a minute or two on one thread; results/ holds longer curves. Each has its calibration beside it, the best
deterministic evaluations of seeds 101 to 110, which is made, where it is missing, by

    python tests/test_learning.py
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from conftest import ROOT, load

CURVES = ROOT / "tests" / "curves.json"
CASES = json.loads(CURVES.read_text())


def best(case, seed, run_dir):
    """The best deterministic evaluation of one run."""
    module = load(ROOT / "algos" / f"{case['algo']}.py")
    flags = {name: tuple(value) if isinstance(value, list) else value for name, value in case["flags"].items()}
    args = module.Args(env_id=case["env_id"], seed=seed, threads=1, device="cpu", run_dir=str(run_dir), **flags)
    return module.train(args)["eval/best"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['algo']}-{case['env_id']}")
def test_it_learns(case, tmp_path):
    reached = {}
    for seed in range(1, case["seeds"] + 1):
        reached[seed] = best(case, seed, tmp_path / str(seed))
    passed = [seed for seed in reached if reached[seed] >= case["threshold"]]
    assert len(passed) >= case["at_least"], f"needs {case['threshold']} from {case['at_least']} seeds: {reached}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['algo']}-{case['env_id']}")
def test_the_threshold_is_calibrated(case):
    """Ten seeds or more, nearly all of which pass: a failure is then news."""
    passed = [value >= case["threshold"] for value in case["calibration"]]
    assert len(passed) >= 10 and sum(passed) >= 0.9 * len(passed)


def calibrate():
    """Write the calibration of every case that has none into curves.json, two runs at a time."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for case in [case for case in CASES if "calibration" not in case]:
            name = f"{case['algo']}-{case['env_id']}"
            jobs = [pool.submit(best, case, seed, Path(folder, name, str(seed))) for seed in range(101, 111)]
            case["calibration"] = [round(job.result(), 1) for job in jobs]
            print(case["algo"], case["env_id"], case["calibration"], flush=True)
            CURVES.write_text(json.dumps(CASES, indent=2) + "\n")


if __name__ == "__main__":
    calibrate()
