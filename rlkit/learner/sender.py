"""The sending end of a direct weight transfer: vLLM's trainer side, driven by the learner's ranks.

Rank 0 sends; the others take part in gathering (ZeRO-3) and, with CUDA IPC, offer their own GPU's buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo, worker_init_payload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine

from rlkit.config.plan import WeightRoute
from rlkit.learner.policy import PolicyLearner
from rlkit.weights import gloo
from rlkit.weights.bundle import TensorMeta, WeightDigest, buckets, pack


class Source(WeightSource):
    """The policy's weights as vLLM's senders expect them; `digest` is that of the last pass."""

    def __init__(self, learner: PolicyLearner, bucket_bytes: int) -> None:
        self.learner, self.bucket_bytes = learner, bucket_bytes
        self.digest = WeightDigest()

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(meta.name, meta.dtype, meta.shape) for meta in self.learner.weight_metas()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        self.digest, partitioned = WeightDigest(), self.learner.config.zero_stage == 3
        for name, tensor in self.learner.named_weights(self.bucket_bytes):
            if self.learner.rank == 0:
                self.digest.add(name, tensor)
            yield name, tensor.clone() if partitioned else tensor  # packed later, after ZeRO-3 has freed it


class Workers:
    """vLLM's "inference engine": calls every rollout worker and waits."""

    def __init__(self, workers: Sequence[Any], gpus_per_engine: int, seconds: float) -> None:
        """`seconds`: deadline of each call, after which `ray.exceptions.GetTimeoutError` is raised."""
        self.workers, self.gpus_per_engine, self.seconds = workers, gpus_per_engine, seconds
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Give each engine its own rank in the group, after the learner's; vLLM would give all of them the same one."""
        self._ask("shutdown_weight_transfer_engine", {})
        places = (
            {"rank_offset": init_info["rank_offset"] + i * self.gpus_per_engine} if "rank_offset" in init_info else {}
            for i in range(len(self.workers))
        )
        self._ask("init_weight_transfer_engine", *({"init_info": {**init_info, **place}} for place in places))

    def start_weight_update(self) -> None:
        self._ask("start_weight_update", {})

    def update_weights(self, update_info: Any) -> None:
        """Return once all workers have received the weights."""
        self._ask("update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update", {})

    def _ask(self, step: str, *arguments: Mapping[str, Any]) -> None:
        each = arguments * len(self.workers) if len(arguments) == 1 else arguments
        calls = [
            worker.transfer.remote(step, dict(own), self.version)
            for worker, own in zip(self.workers, each, strict=True)
        ]
        ray.get(calls, timeout=self.seconds)


class GlooSender(NCCLTrainerWeightTransferEngine):
    """NCCL's protocol between CPUs: the same messages, with broadcasts over gloo (`rlkit/rollout/receiver.py`)."""

    group: Any = None

    @classmethod
    def trainer_init(cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: WeightSource | None = None) -> Self:
        assert source is not None
        size = init_info.packed_buffer_size_bytes
        sender = cls(client=client, source=source, is_sender=init_info.is_sender, packed_buffer_size_bytes=size)
        if sender.is_sender:
            address, port, world = init_info.master_address, init_info.master_port, init_info.world_size
            for_workers = NCCLWeightTransferInitInfo(
                master_address=address, master_port=port, rank_offset=1, world_size=world, packed_buffer_size_bytes=size
            )
            with ThreadPoolExecutor(max_workers=1) as beside:  # they join while this process does
                joining = beside.submit(client.init_weight_transfer_engine, worker_init_payload(for_workers))
                sender.group = gloo.join(address, port, 0, world)
                joining.result()
        return sender

    def _broadcast(self, source: WeightSource, meta: list[ParamMeta]) -> None:
        if not self.is_sender:
            for _ in source:
                pass  # ZeRO-3 gathers on all ranks
            return
        metas = [TensorMeta(each.name, each.dtype, each.shape) for each in meta]
        pairs = self._checked_iter(source, meta)
        for bucket in buckets(metas, self.packed_buffer_size_bytes):
            gloo.broadcast(self.group, pack([next(pairs)[1] for _ in bucket]))
        assert next(pairs, None) is None

    def shutdown(self) -> None:
        if self.group is not None:
            gloo.leave(self.group)
            self.group = None


class WeightSender:
    """One rank's part in sending weights; every rank creates one and makes the same calls."""

    def __init__(
        self,
        learner: PolicyLearner,
        route: WeightRoute,
        bucket_bytes: int,
        gpus_per_engine: int,
        seconds: float,
        address: Callable[[], tuple[str, int]],
    ) -> None:
        """`address`: returns a host and a free port where rank 0 can be reached."""
        self.learner, self.route, self.bucket_bytes = learner, route, bucket_bytes
        self.gpus_per_engine, self.seconds, self.address = gpus_per_engine, seconds, address
        self.source = Source(learner, bucket_bytes)
        self._met: list[Any] = []
        self._engine: Any = None

    def send(self, workers: Sequence[Any], version: int) -> str:
        """Send the current weights to ready workers; return their checksum (on rank 0)."""
        met = [worker._actor_id for worker in workers]
        if self._engine is None or met != self._met:  # the first time, and after a worker was replaced
            if self._engine is not None:
                self._engine.shutdown()
            self._engine, self._met = self._meet(workers), met
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # vLLM packs on its own streams, which do not wait for the optimizer's
        self._engine.client.version = version
        self._engine.send_weights()
        return self.source.digest.hexdigest() if self.learner.rank == 0 else ""

    def _meet(self, workers: Sequence[Any]) -> Any:
        client = Workers(workers, self.gpus_per_engine, self.seconds)
        rank = self.learner.rank
        if self.route == "ipc":
            # One buffer is reused for everything, and vLLM refuses a tensor that does not fit into it.
            size = max(self.bucket_bytes, *(meta.bytes for meta in self.learner.weight_metas()))
            shared = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=size, rank=rank)
            return IPCTrainerWeightTransferEngine.trainer_init(shared, client=client, source=self.source)
        host, port = self.address() if rank == 0 else ("", 0)
        world = 1 + len(workers) * self.gpus_per_engine
        joint = NCCLTrainerInitInfo(host, port, world, packed_buffer_size_bytes=self.bucket_bytes, rank=rank)
        kind = GlooSender if self.route == "gloo" else NCCLTrainerWeightTransferEngine
        return kind.trainer_init(joint, client=client, source=self.source)
