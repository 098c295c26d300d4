"""What happens when memory runs out inside a kernel, on a thread that is not the caller's."""

from __future__ import annotations

import os
import subprocess
import sys

# The limit leaves room for y and not for the sums of 8 rows that each of two threads keeps. What follows the refusals
# shows that nothing is left broken.
PROGRAM = """
import resource, torch
from codegemm_kernels import ops

torch.set_num_threads(2)
N = 1 << 18
codes = torch.zeros((1, 16, N), dtype=torch.uint8)
codebooks, scales, x = torch.ones((1, 256, 4)), torch.ones((1, N)), torch.ones((16, 64))
ops.gemm(x, codes[:, :, :1024].contiguous(), codebooks, scales[:, :1024].contiguous())
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 16 * N * 4 + (4 << 20), resource.RLIM_INFINITY))
for _ in range(8):
    try:
        ops.gemm(x, codes, codebooks, scales)
    except MemoryError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(ops.gemm(x, codes, codebooks, scales).unique().tolist())
"""


def test_memory_that_runs_out_on_a_thread_is_an_error_of_the_call() -> None:
    # A large buffer is a mapping of its own, also for a thread that still has room in its heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    *refused, y = done.stdout.splitlines()
    assert len(refused) == 8
    assert all(line.startswith("there is not enough memory for what CPU kernels keep") for line in refused)
    assert y == "[64.0]"
