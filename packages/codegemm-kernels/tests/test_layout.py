import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegemm_kernels import BadInput, pack_codes, unpack_codes


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31))
def test_unpacking_undoes_packing(rows, words, num_codebooks, seed):
    codes = torch.randint(0, 256, (rows, 4 * words, num_codebooks), generator=torch.Generator().manual_seed(seed))
    packed = pack_codes(codes)
    assert packed.shape == (num_codebooks, words, rows)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert torch.equal(unpack_codes(packed), codes.to(torch.uint8))


def test_byte_r_of_a_word_is_the_code_of_vector_4w_plus_r():
    codes = torch.zeros(2, 8, 1, dtype=torch.int64)
    codes[1, 4:, 0] = torch.tensor([0x01, 0x23, 0x45, 0xEF])
    packed = pack_codes(codes)
    assert packed[0, 1, 1].item() & 0xFFFFFFFF == 0xEF452301
    assert packed.count_nonzero() == 1


def test_unpacks_a_strided_view():
    codes = torch.randint(0, 256, (6, 8, 2))
    wide = torch.zeros(2, 2, 12, dtype=torch.int32)
    wide[:, :, ::2] = pack_codes(codes)
    assert torch.equal(unpack_codes(wide[:, :, ::2]), codes.to(torch.uint8))


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(2, 6, 1), "multiple of 4"),
        (torch.zeros(2, 8), "must be"),
        (torch.full((2, 4, 1), 256), "8 bits"),
        (torch.full((2, 4, 1), -1), "8 bits"),
    ],
)
def test_refuses_codes_that_do_not_fit(codes, message):
    with pytest.raises(BadInput, match=message):
        pack_codes(codes)


def test_refuses_words_of_another_type():
    with pytest.raises(BadInput, match="int32"):
        unpack_codes(torch.zeros(1, 2, 3, dtype=torch.int64))
