"""What a replay memory and its checkpoint cost."""

import time

import pytest
import torch

TRANSITIONS, ROW = 1_000_000, 11 + 3 + 1 + 1 + 11  # of Hopper


def resident():
    """Bytes of this process that are in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
def test_a_million_transitions_of_hopper(sac, tmp_path):
    """They take their float32 content and no more, as they are stored; a checkpoint of them takes two seconds."""
    args = sac.Args(total_timesteps=TRANSITIONS, run_dir=str(tmp_path / "run"), threads=1)
    agent = sac.Agent(args, 11, [-1.0] * 3, [1.0] * 3, torch.device("cpu"))
    content, before = TRANSITIONS * ROW * 4, resident()
    memory = torch.empty(args.buffer_size, ROW)  # as in train
    assert resident() - before < 0.1 * content
    memory.normal_()
    assert resident() - before < 1.1 * content

    run = sac.Run(args, agent.actor, {"agent": agent, "memory": memory})
    run.step, run.interrupted = TRANSITIONS, False
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        run.save()
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 2, seconds
    assert (run.dir / "checkpoint.pt").stat().st_size < 1.1 * content

    again = torch.empty(args.buffer_size, ROW)
    run.metrics.close()
    args.resume = True
    sac.Run(args, agent.actor, {"agent": agent, "memory": again})
    assert torch.equal(again, memory)
