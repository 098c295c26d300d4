import pytest

from codegemm_kernels import BadInput, CodebookScheme


@pytest.mark.parametrize("text", ["m1v4g128", "m2v8g-1", "m4v16g32", "m3v8g24"])
def test_prints_what_it_parses(text):
    assert str(CodebookScheme.parse(text)) == text


def test_eight_bits_are_implied():
    assert CodebookScheme.parse("m2v8b8g128") == CodebookScheme(2, 8, 128)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2bit", "write m<codebooks>v<vector length>g<group size>"),
        ("m1v4", "unknown scheme"),
        ("m1v4b4g128", "only 8-bit codes"),
        ("m0v4g128", "number of codebooks"),
        ("m5v4g128", "number of codebooks"),
        ("m1v5g128", "vector length"),
        ("m1v8g12", "multiple of 8"),
        ("m1v8g0", "multiple of 8"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(BadInput, match=message):
        CodebookScheme.parse(text)


# Linears of a Llama-3.1-8B block and the average bits of the published table for them.
LLAMA_8B = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("m1v4g128", 2.1255),
        ("m1v4g32", 2.5005),
        ("m2v8g128", 2.1271),
        ("m2v8g-1", 2.0053),
        ("m1v8g128", 1.1261),
        ("m3v8g128", 3.1282),
        ("m2v4g128", 4.126),
        ("m4v8g128", 4.129),
    ],
)
def test_bits_per_weight_of_a_llama_block(text, bits):
    scheme = CodebookScheme.parse(text)
    weights = sum(n * k for n, k in LLAMA_8B)
    average = sum(scheme.bits_per_weight(n, k) * n * k for n, k in LLAMA_8B) / weights
    assert average == pytest.approx(bits, abs=5e-4)


def test_shapes():
    assert CodebookScheme.parse("m2v8g128").shapes(96, 256) == {
        "codes": (2, 8, 96),
        "codebooks": (2, 256, 8),
        "scales": (2, 96),
    }
    assert CodebookScheme.parse("m1v4g-1").shapes(3, 48)["scales"] == (1, 3)


@pytest.mark.parametrize(
    ("shape", "message"), [((8, 40), "multiple of 32"), ((8, 192), "group size"), ((0, 64), "empty")]
)
def test_names_the_matrix_it_cannot_store(shape, message):
    with pytest.raises(BadInput, match=f"layer.q_proj.*{message}"):
        CodebookScheme.parse("m1v8g128").check_matrix(*shape, name="layer.q_proj")
