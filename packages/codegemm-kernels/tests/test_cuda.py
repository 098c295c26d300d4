"""What only a CUDA device can show. Collected, and empty of tests, where there is none."""

import torch

from codegemm_kernels import BadInput, ops, reference

if torch.cuda.is_available():
    import pytest

    def test_capture_and_replay(make_weight):
        weight = make_weight("m2v8g128", 256, 512, torch.float16, "cuda")
        for rows in (1, 4, 200):
            x = torch.randn(rows, 512, dtype=torch.float16, device="cuda")
            ops.gemm(x, *weight)  # first call outside the capture
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = ops.gemm(x, *weight)
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert reference.gemm_error(y, x, *weight) < 2e-3

    def test_runs_on_the_current_stream(make_weight):
        weight = make_weight("m1v4g128", 4096, 4096, torch.float16, "cuda")
        x = torch.randn(1, 4096, dtype=torch.float16, device="cuda")
        expected = ops.gemm(2 * x, *weight)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            x.mul_(2)
            y = ops.gemm(x, *weight)
        stream.synchronize()
        assert torch.equal(y, expected)

    def test_tensors_on_two_devices_are_refused(make_weight):
        weight = make_weight("m2v8g32", 10, 64, torch.float32)
        with pytest.raises(BadInput, match="move"):
            ops.gemm(torch.randn(1, 64, device="cuda"), *weight)
