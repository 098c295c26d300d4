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

class Step:
    """A decode step as a list of operations on fixed addresses, see csrc/cpu/step.h.

    A norm is its weight's address (0 for none), eps and offset; rows are the address of the first and the elements from
    one to the next.
    """

    def __init__(self, *, threads: int) -> None: ...
    def embed(self, *, table: int, tokens: int, y: int, rows: int, width: int, vocabulary: int, dtype: int) -> None: ...
    def add_norm(
        self,
        *,
        residual: int,
        branch: int,
        branch_norm: tuple[int, float, float],
        norm: tuple[int, float, float],
        y: int,
        rows: int,
        width: int,
        dtype: int,
    ) -> None: ...
    def products(
        self,
        *,
        codes: list[int],
        codebooks: list[int],
        scales: list[int],
        biases: list[int],
        ys: list[int],
        num_codebooks: list[int],
        vector_length: list[int],
        num_groups: list[int],
        out_features: list[int],
        tiled: list[bool],
        in_features: int,
        dtype: int,
        x: tuple[int, int],
        rows: int,
    ) -> None: ...
    def dense(
        self,
        *,
        weight: int,
        x: tuple[int, int],
        bias: int,
        y: int,
        rows: int,
        out_features: int,
        in_features: int,
        dtype: int,
    ) -> None: ...
    def attend(
        self,
        *,
        q: tuple[int, int],
        k: tuple[int, int],
        v: tuple[int, int],
        y: int,
        q_norm: tuple[int, float, float],
        k_norm: tuple[int, float, float],
        cos: int,
        sin: int,
        keys: int,
        values: int,
        key_scales: int,
        value_scales: int,
        lengths: int,
        slots: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        pairs: int,
        capacity: int,
        window: int,
        scale: float,
        softcap: float,
        dtype: int,
    ) -> None: ...
    def gate(
        self,
        *,
        gate: tuple[int, int],
        up: tuple[int, int],
        y: int,
        rows: int,
        width: int,
        activation: int,
        dtype: int,
    ) -> None: ...
    def soft_cap(self, *, x: int, rows: int, width: int, softcap: float, dtype: int) -> None: ...
    def choose(self, *, scores: int, tokens: int, rows: int, width: int, dtype: int) -> None: ...
    def prepare(self) -> None:
        """Read the codebooks again: before the first run, and after they have changed."""

    def run(self, *, threads: int) -> None:
        """Run everything. Raises IndexError for a token beyond the vocabulary."""
