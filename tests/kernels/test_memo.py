"""Which results a call may be given on its short road; torch tensors on the CPU answer what those on a GPU do."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from shflnb.kernels.memo import takes_result  # noqa: E402


def test_a_result_like_a_new_one_is_taken() -> None:
    x = torch.zeros(8, 24, dtype=torch.float16)
    assert takes_result(torch.empty(8, 40, dtype=torch.float16), x, (8, 40))
    assert takes_result(torch.empty(2, 4, 40, dtype=torch.float16), x.view(2, 4, 24), (2, 4, 40))
    assert takes_result(torch.empty(40, dtype=torch.float16), x[0], (40,))


def test_others_take_the_long_road() -> None:
    x, flat = torch.zeros(8, 24, dtype=torch.float16), torch.zeros(8 * 40 + 1, dtype=torch.float16)
    good = torch.empty(8, 40, dtype=torch.float16)
    for name, out in {
        "dtype": good.bfloat16(), "shape": good[:7], "strides": torch.empty(40, 8, dtype=torch.float16).T,
        "pitch": torch.empty(8, 48, dtype=torch.float16)[:, :40], "address": flat[1:].view(8, 40),
        "gradient": torch.empty(8, 40, dtype=torch.float16, requires_grad=True), "kind": np.empty((8, 40), np.float16),
        "device": SimpleNamespace(dtype=x.dtype, shape=(8, 40), data_ptr=good.data_ptr, get_device=lambda: 1),
    }.items():  # fmt: skip
        assert not takes_result(out, x, (8, 40)), name


@pytest.mark.parametrize(("begin", "is_apart"), [(0, False), (192, False), (200, True), (256, True)])
def test_a_result_on_x_takes_the_long_road(begin: int, is_apart: bool) -> None:
    """x is 8 tokens, 25 values apart, of which the last ends at 199; or a result lies before it."""
    memory = torch.zeros(2048, dtype=torch.float16)
    x = memory[:200].view(8, 25)[:, :24]
    assert takes_result(memory[begin : begin + 320].view(8, 40), x, (8, 40)) == is_apart
    behind = memory[320 : 320 + 200].view(8, 25)[:, :24]
    assert takes_result(memory[:320].view(8, 40), behind, (8, 40))
    assert not takes_result(memory[8:328].view(8, 40), behind, (8, 40))
