"""The compiled module. Addresses are `Tensor.data_ptr()`; a bias address of 0 means no bias. See csrc/codegemm.h."""

has_cuda: bool
"""Whether the CUDA kernels were compiled in; `gemm_cuda` and `dequantize_cuda` exist only then."""

def cpu_features() -> str:
    """The instruction set whose kernels are used: `avx512vbmi`, `avx512`, `avx2`, `neon` or `portable`."""

def limit_cpu_features(*, name: str) -> bool:
    """Use a lesser instruction set, to test all kernels on one machine; false if it has none of this name."""

def max_gemm_rows() -> int:
    """Rows of x up to which `gemm_cpu` is faster than a dense product with dequantised weights."""

def tile(
    *,
    codes: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    y: int,
    threads: int,
) -> None: ...
def untile(
    *,
    codes: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    y: int,
    threads: int,
) -> None: ...
def gemm_cpu(
    *,
    codes: int,
    codebooks: int,
    scales: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    dtype: int,
    x: int,
    x_row_stride: int,
    bias: int,
    y: int,
    rows: int,
    tiled: bool,
    threads: int,
) -> None: ...
def dequantize_cpu(
    *,
    codes: int,
    codebooks: int,
    scales: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    dtype: int,
    y: int,
    first_row: int,
    rows: int,
    tiled: bool,
    threads: int,
) -> None: ...
def gemm_cuda(
    *,
    codes: int,
    codebooks: int,
    scales: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    dtype: int,
    x: int,
    x_row_stride: int,
    bias: int,
    y: int,
    rows: int,
    device: int,
    stream: int,
) -> None: ...
def dequantize_cuda(
    *,
    codes: int,
    codebooks: int,
    scales: int,
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    out_features: int,
    in_features: int,
    dtype: int,
    y: int,
    first_row: int,
    rows: int,
    device: int,
    stream: int,
) -> None: ...
def gemm_grouped_cpu(
    *,
    codes: list[int],
    codebooks: list[int],
    scales: list[int],
    biases: list[int],
    ys: list[int],
    out_features: list[int],
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    in_features: int,
    dtype: int,
    x: int,
    x_row_stride: int,
    rows: int,
    tiled: bool,
    threads: int,
) -> None: ...
def gemm_grouped_cuda(
    *,
    codes: list[int],
    codebooks: list[int],
    scales: list[int],
    biases: list[int],
    ys: list[int],
    out_features: list[int],
    num_codebooks: int,
    vector_length: int,
    num_groups: int,
    in_features: int,
    dtype: int,
    x: int,
    x_row_stride: int,
    rows: int,
    device: int,
    stream: int,
) -> None: ...
