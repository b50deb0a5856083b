"""Weights on their way through Ray's object store."""

from __future__ import annotations

import pytest
import ray
import torch
from ray_fixture import ray_session  # noqa: F401

from rlkit.weights.bundle import WeightBundle

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bundle_carries_every_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {
        "a": torch.randn(3, 5, generator=generator).to(dtype),
        "odd": torch.randn(7, generator=generator).to(dtype),
        "transposed": torch.randn(4, 2, generator=generator).to(dtype).T,
        "nan": torch.tensor([float("nan"), float("inf")], dtype=dtype),
    }
    bundle = WeightBundle.pack(5, weights.items())
    received: WeightBundle = ray.get(ray.put(bundle))
    assert received.version == 5
    assert received.received_checksum() == received.checksum == bundle.checksum
    assert not any(entry.data.flags.writeable for entry in received.entries)
    for name, tensor in received.tensors():
        assert tensor.dtype == dtype
        assert torch.equal(tensor.nan_to_num(3.5), weights.pop(name).nan_to_num(3.5))
    assert not weights
