"""What a step sends between workers, in bytes and seconds: a model, checked against gloo's real calls in the tests.

Ring algorithms in the alpha-beta model: a message of n bytes takes alpha + n / beta, alpha being the latency and beta
the bandwidth of the ring's slowest link. Over W workers, n being the whole array,

    all-gather, reduce-scatter   (W - 1) * (alpha + n / (W * beta)),   (W - 1) / W * n bytes sent by each worker
    all-reduce                   the one after the other: twice that

(Thakur, Rabenseifner and Gropp, Optimization of Collective Communication Operations in MPICH, IJHPCA 19 (1), 2005,
sections 4.1 and 4.5; bandwidth-optimal: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69, 2009.) NCCL goes over to
trees where alpha dominates, so that at hundreds of workers the latency told here is too high.
"""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import StageOneConfig

FLOAT_BYTES, INT64_BYTES, DOUBLE_BYTES = 4, 8, 8
SIZES_NUMBERS = 4
"""int64 numbers that each rank says of its rows before any are sent (`trainer/pool.py`)."""
SIGNALS = 3
"""Numbers beside the sums of the loss's terms in their message (`trainer/stage_checkpoint.py`)."""


@dataclass(frozen=True)
class Ring:
    """A ring of `world` workers: its slowest link."""

    world: int
    bytes_per_s: float
    latency_s: float

    def gather_bytes(self, array_bytes: float) -> float:
        """Sent by each worker in an all-gather or a reduce-scatter of an array of so many bytes."""
        return (self.world - 1) / self.world * array_bytes

    def gather_s(self, array_bytes: float) -> float:
        """Seconds of an all-gather or a reduce-scatter."""
        return (self.world - 1) * self.latency_s + self.gather_bytes(array_bytes) / self.bytes_per_s

    def all_reduce_bytes(self, array_bytes: float) -> float:
        """Sent by each worker in an all-reduce."""
        return 2 * self.gather_bytes(array_bytes)

    def all_reduce_s(self, array_bytes: float) -> float:
        """Seconds of an all-reduce."""
        return 2 * self.gather_s(array_bytes)


@dataclass(frozen=True)
class Messages:
    """Of one step: bytes sent by each worker, and seconds.

    Attributes:
        pool_forward_bytes: All-gather of embeddings and labels, with the sizes before it.
        pool_backward_bytes: Reduce-scatter of the embeddings' gradient.
        gradient_bytes: Reduction of the weights' gradient, and at ZeRO 1 to 3 what brings the weights back together.
        sums_bytes: The loss's sums, and the order of the rows where there is a cross-batch memory.
        pool_s: Forward and backward.
        gradient_s: Of the gradient; not hidden behind backward (as DeepSpeed does it at ZeRO 0 to 2).
        sums_s: Of the sums.
    """

    pool_forward_bytes: float
    pool_backward_bytes: float
    gradient_bytes: float
    sums_bytes: float
    pool_s: float
    gradient_s: float
    sums_s: float

    @property
    def step_s(self) -> float:
        """All of them, one after the other."""
        return self.pool_s + self.gradient_s + self.sums_s


def step_messages(stage: StageOneConfig, ring: Ring, longest: int, dim: int, parameters: int) -> Messages:
    """What a step sends.

    Args:
        stage: Stage one's configuration.
        ring: Of the workers.
        longest: Images of the worker that has most; shorter ones are padded to it.
        dim: D of what the metric loss compares.
        parameters: Trained numbers, all in float32.
    """
    compares = stage.loss.name != "none" and stage.loss.weight > 0
    rows = ring.world * longest * stage.views if compares else 0
    sizes = ring.world * SIZES_NUMBERS * INT64_BYTES if compares else 0
    embeddings, labels = rows * dim * FLOAT_BYTES, rows * INT64_BYTES
    sums = (2 * (1 + compares) + SIGNALS) * DOUBLE_BYTES
    order = (ring.world * INT64_BYTES, rows * INT64_BYTES) if stage.memory.rows else (0, 0)
    gradient = parameters * FLOAT_BYTES
    # ZeRO 3 gathers the weights for forward and again for backward: Rajbhandari et al., ZeRO, SC20, section 7.
    gathers = 3 if stage.zero_stage == 3 else 2
    return Messages(
        pool_forward_bytes=sum(map(ring.gather_bytes, (sizes, embeddings, labels))),
        pool_backward_bytes=ring.gather_bytes(embeddings),
        gradient_bytes=gathers * ring.gather_bytes(gradient),
        sums_bytes=ring.all_reduce_bytes(sums) + sum(map(ring.gather_bytes, order)),
        pool_s=sum(map(ring.gather_s, (sizes, embeddings, labels, embeddings))) if compares else 0.0,
        gradient_s=gathers * ring.gather_s(gradient),
        sums_s=ring.all_reduce_s(sums) + (sum(map(ring.gather_s, order)) if stage.memory.rows else 0.0),
    )
