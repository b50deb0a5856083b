"""The receiving end of weight transfers, inside vLLM's own workers: vLLM's loading, plus a checksum and a report.

vLLM imports this module in its workers (`worker_extension_cls`); that registers the engines under the names below.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from rlkit.rollout.adapter import adapter_report
from rlkit.rollout.loaded import LoadedWeights, silence_vllm
from rlkit.rollout.shortcut import Shortcut, find_shortcut
from rlkit.weights import gloo
from rlkit.weights.bundle import TensorMeta, WeightDigest, buckets, unpack
from rlkit.weights.publication import Loaded

EXTENSION = "rlkit.rollout.receiver.Receiver"
BACKENDS = {"gloo": "rlkit_gloo", "nccl": "rlkit_nccl", "ipc": "rlkit_ipc"}
"""Name of a route in the configuration -> name of its engine in vLLM."""


class _Tap(LoadedWeights):
    """LoadedWeights with a checksum of what arrived."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.digest = WeightDigest()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        arrived = list(weights)
        for name, tensor in arrived:
            self.digest.add(name, tensor)
        return super().load_weights(arrived)


class _Counting:
    """Mixin for a vLLM transfer engine: `tap` covers all tensors since the last `start_weight_update`."""

    model: Any
    tap: _Tap

    def start_weight_update(self) -> None:
        self.tap = _Tap(self.model)
        super().start_weight_update()  # type: ignore[misc]

    def receive_weights(self, update_info: Any) -> None:
        model = self.model
        self.model = self.tap
        try:
            super().receive_weights(update_info)  # type: ignore[misc]
        finally:
            self.model = model

    def finish_weight_update(self) -> None:
        self.tap.complete()
        super().finish_weight_update()  # type: ignore[misc]


class CountingNCCL(_Counting, NCCLWeightTransferEngine): ...


class CountingIPC(_Counting, IPCWeightTransferEngine): ...


class Gloo(NCCLWeightTransferEngine):
    """NCCL's protocol between processes on CPUs, which vLLM 0.32 lacks: broadcasts of buckets over gloo."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.packed_buffer_size_bytes = init_info.packed_buffer_size_bytes
        assert init_info.master_address is not None and init_info.master_port is not None
        self.group = gloo.join(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + self.parallel_config.rank,
            init_info.world_size,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))  # there is no accelerator to wait for

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        metas = [
            TensorMeta(name, getattr(torch, dtype), tuple(shape))
            for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True)
        ]
        for bucket in buckets(metas, self.packed_buffer_size_bytes):
            buffer = torch.empty(sum(meta.bytes for meta in bucket), dtype=torch.uint8)
            gloo.broadcast(self.group, buffer)
            self.model.load_weights(unpack(buffer, bucket))

    def shutdown(self) -> None:
        if hasattr(self, "group"):
            gloo.leave(self.group)
            del self.group


class CountingGloo(_Counting, Gloo): ...


class Receiver:
    """Methods that are added to vLLM's workers."""

    weight_transfer_engine: Any
    arrivals: LoadedWeights | Loaded | None = None
    """What was loaded but not reported yet."""
    shortcut: Shortcut | None = None
    first = True
    """Whether nothing has been loaded yet; the first load looks for a shortcut."""

    def load_bundle(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Replace the weights."""
        worker: Any = self
        if self.shortcut is not None and self.shortcut.fits(weights):
            self.arrivals = LoadedWeights(worker.get_model(), self.shortcut)
            self.arrivals.load_weights(weights)
            return
        found = self.first and find_shortcut(worker, weights, self._reload)
        self.arrivals = arrivals = self._reload(weights)
        if found and not arrivals.unwritten:
            self.shortcut = found
        self.first = False

    def _reload(self, weights: Sequence[tuple[str, Tensor]]) -> LoadedWeights:
        """Reload weights as vLLM does."""
        worker: Any = self
        model = worker.get_model()
        arrivals = LoadedWeights(model)

        def load_weights(pairs: Iterable[tuple[str, Tensor]]) -> Any:
            del model.load_weights  # the model's own again
            result = arrivals.load_weights(pairs)
            arrivals.complete()
            return result

        model.load_weights = load_weights
        worker.reload_weights(weights_iterator=weights)
        return arrivals

    def adapter_came(self, arrived: int) -> None:
        """Report on an adapter that vLLM has loaded. `arrived`: the sum of its bits."""
        worker: Any = self
        self.arrivals = adapter_report(worker.model_runner.lora_manager._adapter_manager, arrived)

    def loaded_report(self) -> Loaded | None:
        """Return a report on what was loaded since the last report; None if nothing was."""
        arrivals, self.arrivals = self.arrivals, None
        return arrivals.report() if isinstance(arrivals, LoadedWeights) else arrivals

    def received_checksum(self) -> str:
        """Return the checksum of the last update's weights."""
        self.arrivals = self.weight_transfer_engine.tap
        checksum: str = self.weight_transfer_engine.tap.digest.hexdigest()
        return checksum


silence_vllm()
for _name, _engine in (("gloo", CountingGloo), ("nccl", CountingNCCL), ("ipc", CountingIPC)):
    WeightTransferEngineFactory.register_engine(BACKENDS[_name], _engine)
