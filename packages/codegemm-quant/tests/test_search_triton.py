"""The GPU's inner loops against the torch ones: on a GPU as they are, elsewhere through Triton's interpreter."""

import os
import subprocess
import sys

import torch

COMPARE = """
import torch
from codegemm_kernels import CodebookScheme
from codegemm_quant import search, search_triton
from codegemm_quant.fit import Curvature
from codegemm_quant.kmeans import initialise

device = "cuda" if torch.cuda.is_available() else "cpu"
generator = torch.Generator().manual_seed(0)
for scheme, rows, width in SCHEMES:
    mix = torch.eye(width) + torch.randn(width, 6, generator=generator) @ torch.randn(6, width, generator=generator) / 4
    inputs = torch.randn(8 * width, width, generator=generator) @ mix
    hessian = (inputs.t() @ inputs / len(inputs)).to(device)
    weight = torch.randn(rows, width, generator=generator).to(device)
    start = initialise(weight, hessian.diagonal(), CodebookScheme.parse(scheme), generator)
    start.codebooks = torch.randn(start.codebooks.shape, generator=generator).to(device)
    v = start.codebooks.shape[2]
    scales = start.vector_scales()
    for name in ("sweep", "feedback"):
        if name == "sweep":
            norms = search._norms(start.codebooks, search._diagonal_blocks(hessian, v))
            leading = ((weight - start.dequantize()) @ hessian, hessian)
        else:
            upper = Curvature.of(hessian, 1e-4, "test").upper
            inverses = torch.linalg.inv(search._diagonal_blocks(upper, v))
            metrics = inverses @ inverses.transpose(1, 2)
            norms = search._norms(start.codebooks, metrics)
            leading = (weight.clone(), upper, inverses, metrics)
        results = []
        for module, function in ((search, f"_{name}_block"), (search_triton, f"{name}_block")):
            codes = start.codes.clone()
            first = leading[0].clone()
            moved = getattr(module, function)(first, *leading[1:], scales, norms, codes, start.codebooks)
            results.append((codes, moved))
        (codes, moved), (fast_codes, fast_moved) = results
        same = (codes == fast_codes).all(-1).all(-1)
        assert same.float().mean() > 0.95, (scheme, name, same.float().mean())
        assert torch.allclose(moved[same], fast_moved[same], rtol=1e-3, atol=1e-4), (scheme, name)
print("equal")
"""


def test_a_block_of_decisions_is_the_same():
    schemes = [("m1v4g16", 11, 64), ("m2v8g-1", 9, 64), ("m3v4g32", 8, 32)]
    environment = dict(os.environ) | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    script = COMPARE.replace("SCHEMES", repr(schemes))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "equal"
