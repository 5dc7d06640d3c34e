"""Several ranks answer as one, read only their share, and none outlives a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wemm import LLM, SamplingParams
from wemm.errors import CheckpointError, EngineError, ParameterError, RankError

MODEL = dict(dtype="float32", device="cpu", max_model_len=400)
PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2)
SAMPLED = SamplingParams(max_tokens=10, ignore_eos=True, temperature=1.0, seed=4, n=2)


def _alive():
    """Processes of this one."""
    ids = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    alive = []
    for pid in ids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                alive.append(int(pid))
        except FileNotFoundError:
            pass
    return alive


@pytest.fixture
def children():
    """Processes that were started since, and are alive: other tests may have servers up."""
    before = set(_alive())
    return lambda: [pid for pid in _alive() if pid not in before]


def _ids(outputs):
    return [[answer.token_ids for answer in output.outputs] for output in outputs]


@pytest.fixture
def work(ask, golden_images):
    return [
        (ask("What?", golden_images / "300x200.png"), PARAMS),
        (ask("为什么大海是蓝色的？"), SAMPLED),
        (ask("?", golden_images / "33x21.png", golden_images / "1x1.png"), SAMPLED),
    ]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, {}),
        (2, {"async_scheduling": True, "num_speculative_tokens": 0}),  # ranks are sent the tokens of the first
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(8, {}, marks=pytest.mark.slow),
    ],
)
def test_ranks_together_answer_as_one(llm, work, size, options, children):
    """float32, the golden checkpoint's 8 KV heads; the tower's 3 heads are shared by none, its MLP by all."""
    messages, params = zip(*work, strict=True)
    expected = llm.chat(list(messages), list(params))
    with LLM("tiny", tensor_parallel_size=size, **MODEL, **options) as together:
        assert len(children()) == size - 1
        outputs = together.chat(list(messages), list(params))
        assert _ids(outputs) == _ids(expected)
        assert outputs[0].outputs[0].cumulative_logprob == pytest.approx(
            expected[0].outputs[0].cumulative_logprob, abs=1e-3
        )
        weight = together._open.engine._runner._runner._model.language_model.output.weight
        assert weight.shape[0] == 640 // size
    assert children() == []


def test_a_killed_rank_is_an_error_within_seconds_and_nothing_is_left(ask, children):
    """SIGKILL in the middle of an answer."""
    llm = LLM("tiny", tensor_parallel_size=2, **MODEL)
    stream = llm.stream_chat(ask("hi"), SamplingParams(max_tokens=350, ignore_eos=True, repetition_guard=False))
    next(stream)
    [child] = children()
    os.kill(child, signal.SIGKILL)
    killed = time.monotonic()
    with pytest.raises(RankError, match="rank 1 of the tensor-parallel group was killed by signal 9"):
        list(stream)
    assert time.monotonic() - killed < 10
    with pytest.raises(RankError):
        llm.chat(ask("hi"), PARAMS)
    llm.close()
    assert children() == []
    with pytest.raises(EngineError, match="closed"):
        llm.chat(ask("hi"))


def test_followers_do_not_outlive_a_killed_leader():
    code = (
        "import os, sys; from wemm import LLM\n"
        "llm = LLM('tiny', device='cpu', tensor_parallel_size=2)\n"
        "children = open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read()\n"
        "print(children, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, text=True) as leader:
        follower = int(leader.stdout.readline())
        leader.kill()
        leader.wait()
        deadline = time.monotonic() + 10
        while Path(f"/proc/{follower}").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not Path(f"/proc/{follower}").exists()


def test_a_leader_that_cannot_load_leaves_nobody(monkeypatch, children):
    def fail(*arguments):
        raise CheckpointError("the disk is gone")

    monkeypatch.setattr("wemm.engine.build._load_model", fail)
    with pytest.raises(CheckpointError, match="the disk is gone"):
        LLM("tiny", tensor_parallel_size=2, **MODEL)
    assert children() == []


def test_more_ranks_than_heads(children):
    with pytest.raises(ParameterError, match="tensor_parallel_size 8 must divide num_key_value_heads 4"):
        LLM("nano", tensor_parallel_size=8, **MODEL)
    assert children() == []


@pytest.mark.slow
def test_torchrun(ask):
    """The same script on both ranks; rank 0 answers, rank 1 ends when it closes."""
    code = (
        "from wemm import LLM, SamplingParams\n"
        "with LLM('tiny', device='cpu', dtype='float32', tensor_parallel_size=2) as llm:\n"
        "    [output] = llm.generate([[1, 5, 6]], SamplingParams(max_tokens=5, ignore_eos=True))\n"
        "    print('ids', list(output.outputs[0].token_ids), flush=True)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python"]
    result = subprocess.run([*command, sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    with LLM("tiny", **MODEL) as llm:
        [expected] = llm.generate([[1, 5, 6]], SamplingParams(max_tokens=5, ignore_eos=True))
    assert result.stdout.strip() == f"ids {list(expected.outputs[0].token_ids)}"


def test_torchrun_with_another_number_of_processes(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ParameterError, match="torchrun started 4 processes, but tensor_parallel_size is 2"):
        LLM("tiny", tensor_parallel_size=2, **MODEL)
