import os
import signal

import pytest
import torch

from w2s.bench.call_cost import cost, in_fresh_process
from w2s.errors import W2SError


def peak_of_two_in_turn() -> float:
    def call() -> None:
        for _ in range(2):
            torch.ones(200, 2**18)  # 200 MiB of float32

    return cost(call).mib


def test_the_peak_is_what_was_there_at_a_time() -> None:
    # The kernel counts in batches of pages, the libraries keep a little: 10 MiB.
    assert abs(in_fresh_process(peak_of_two_in_turn) - 200) < 10


def test_the_process_is_another_one_each_time() -> None:
    assert len({os.getpid(), in_fresh_process(os.getpid), in_fresh_process(os.getpid)}) == 3


def test_a_process_that_is_killed_is_told_of() -> None:
    with pytest.raises(W2SError, match=r"kill_self\(\) ended without a result: killed, out of memory\?"):
        in_fresh_process(kill_self)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
