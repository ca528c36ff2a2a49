from __future__ import annotations

import torch

from paring.modifiers.precision import fast_float32


def test_products_stay_fp32_and_the_setting_is_put_back():
    torch.manual_seed(0)
    a, b = torch.randn(128, 300), torch.randn(300, 200)
    expected = a.double() @ b.double()
    before = torch.backends.mkldnn.matmul.fp32_precision
    with fast_float32():
        product = a @ b
        linear = torch.nn.functional.linear(a, b.T)
        with fast_float32():
            pass
        again = a @ b
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    for found in (product, linear, again):
        assert float((found - expected).norm() / expected.norm()) < 4e-6
