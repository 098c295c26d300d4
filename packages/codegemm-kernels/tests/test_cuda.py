"""What only a CUDA device can show. Collected, and empty of tests, where there is none."""

import torch

from codegemm_kernels import BadInput, ops, reference

if torch.cuda.is_available():
    import pytest

    def test_capture_and_replay(make_weight):
        weight = make_weight("m2v8g128", 256, 512, torch.float16, "cuda")
        for rows in (1, 4, 200, 1100):
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

    @pytest.mark.parametrize("rows", [1, 5, 40, 300])
    def test_a_chain_in_a_graph_waits_for_its_inputs(make_weight, rows):
        """Kernels of a graph may start before the one whose result they read has ended (dependent launches)."""
        weights = [make_weight("m1v4g128", 1024, 1024, torch.float16, "cuda") for _ in range(8)]
        start = torch.randn(rows, 1024, dtype=torch.float16, device="cuda")

        def chain(after=lambda: None):
            results = [start]
            for weight in weights:
                results.append(ops.gemm(results[-1], *weight))
                after()
            return results

        chain()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain()
        for _ in range(20):
            start.copy_(torch.randn_like(start))
            graph.replay()
            for result, expected in zip(captured, chain(torch.cuda.synchronize), strict=True):
                assert torch.equal(result, expected)

    def test_codes_of_an_earlier_launch_are_not_looked_up(make_weight):
        """They may lie in shared memory where a K that 64 does not divide has none."""
        x = torch.randn(300, 128, dtype=torch.float16, device="cuda")
        codes, codebooks, scales = make_weight("m2v8g32", 256, 128, torch.float16, "cuda")
        ops.gemm(x, torch.full_like(codes, -1), codebooks, scales)  # code 255 everywhere
        x = x[:, :96].contiguous()
        codes, codebooks, scales = make_weight("m2v8g32", 256, 96, torch.float16, "cuda")
        codes, codebooks = codes & ~0x01010101, codebooks.clone()  # no code 255
        codebooks[:, 255] = torch.inf
        assert reference.gemm_error(ops.gemm(x, codes, codebooks, scales), x, codes, codebooks, scales) < 2e-3

    def test_tensors_on_two_devices_are_refused(make_weight):
        weight = make_weight("m2v8g32", 10, 64, torch.float32)
        with pytest.raises(BadInput, match="move"):
            ops.gemm(torch.randn(1, 64, device="cuda"), *weight)

    @pytest.mark.parametrize("rows", [1, 5, 40, 300])
    def test_the_last_device(make_weight, rows):
        """A product on a device that is not the current one; where there is one device, on that."""
        last = torch.device("cuda", torch.cuda.device_count() - 1)
        for scheme in ("m1v4g128", "m2v8g128"):
            weight = make_weight(scheme, 1024, 1024, torch.float16, "cuda:0")
            x = torch.randn(rows, 1024, dtype=torch.float16, device="cuda:0")
            there = [tensor.to(last) for tensor in (x, *weight)]
            assert torch.equal(ops.gemm(*there).to("cuda:0"), ops.gemm(x, *weight))
            assert torch.equal(ops.dequantize(*there[1:]).to("cuda:0"), ops.dequantize(*weight))
