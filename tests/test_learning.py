"""Learning curves on real environments, against the thresholds of curves.json.

A case takes a minute or two on one thread. results/ holds longer curves. Every case has its
calibration beside it: the best deterministic evaluations of seeds 101 to 110. This command makes
those that are missing:

    python tests/test_learning.py
"""

import json
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
from common import load_algo
from conftest import PATHS, ROOT

from algos import ALGOS

CURVES = ROOT / "tests" / "curves.json"
CASES = json.loads(CURVES.read_text())
CALIBRATION_SEEDS = range(101, 111)


def case_name(case):
    """Algorithm and environment."""
    return f"{case['algo']}-{case['env_id']}"


def best_evaluation(case, seed, run_dir):
    """The best deterministic evaluation of one run."""
    module = load_algo(case["algo"])
    flags = {}
    for name, value in case["flags"].items():
        flags[name] = tuple(value) if isinstance(value, list) else value
    args = module.Args(
        env_id=case["env_id"], seed=seed, threads=1, device="cpu", run_dir=str(run_dir), **flags
    )
    return module.train(args)["eval/best"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_it_learns(case, tmp_path):
    reached = {}
    for seed in range(1, case["seeds"] + 1):
        reached[seed] = best_evaluation(case, seed, tmp_path / str(seed))
    passed = [seed for seed, value in reached.items() if value >= case["threshold"]]
    needed = f"needs {case['threshold']} from {case['at_least']} seeds: {reached}"
    assert len(passed) >= case["at_least"], needed


@pytest.mark.parametrize("case", CASES, ids=case_name)
def test_the_threshold_is_calibrated(case):
    """Nearly all of at least ten seeds pass, so a failure is news."""
    passed = [value >= case["threshold"] for value in case["calibration"]]
    assert len(passed) >= 10
    assert sum(passed) >= 0.9 * len(passed)


def test_every_algorithm_has_a_learning_case():
    assert {case["algo"] for case in CASES} == {path.stem for path in PATHS} == set(ALGOS)


def calibrate():
    """Add the missing calibrations to curves.json, two runs at a time."""
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(2, get_context("spawn")) as pool,
    ):
        for case in CASES:
            if "calibration" in case:
                continue
            jobs = []
            for seed in CALIBRATION_SEEDS:
                run_dir = Path(folder, case_name(case), str(seed))
                jobs.append(pool.submit(best_evaluation, case, seed, run_dir))
            case["calibration"] = [round(job.result(), 1) for job in jobs]
            print(case_name(case), case["calibration"], flush=True)
            CURVES.write_text(json.dumps(CASES, indent=2) + "\n")


if __name__ == "__main__":
    calibrate()
