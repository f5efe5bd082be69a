"""What crosses ranks: order, gradient, precision, refusals; and what a pool takes of memory."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from cluster.errors import UserError
from tests.gloo import run_gloo
from trainer.losses.base import LossSum
from trainer.pool import gather_order, gather_pool, global_mean
from trainer.pool_size import available_bytes, check_pool_fits, out_of_memory_told


def gather_rows(rank, world, sizes):
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        begin = sum(sizes[:rank])
        rows = torch.arange(begin, begin + sizes[rank], dtype=dtype)[:, None].repeat(1, 2).requires_grad_()
        pool = gather_pool(rows, torch.arange(begin, begin + sizes[rank]) * 10)
        # Rank r's loss gives pool row j the gradient (r + 1) * j: own rows must receive the sum over ranks.
        (pool.embeddings * torch.arange(sum(sizes))[:, None] * (rank + 1)).sum().backward()
        assert pool.embeddings.dtype == dtype
        results.append((pool.embeddings.detach(), pool.labels, pool.first, rows.grad))
    return results


@pytest.mark.parametrize("sizes", [(2, 2), (3, 1, 0)])
def test_pool_is_in_rank_order_and_its_gradient_is_summed_over_ranks(sizes):
    begin = 0
    for results, size in zip(run_gloo(gather_rows, len(sizes), sizes), sizes, strict=True):
        for rows, labels, first, grad in results:
            assert rows[:, 0].tolist() == list(range(sum(sizes)))
            assert labels.tolist() == [10 * i for i in range(sum(sizes))]
            assert first == begin
            ranks_sum = sum(range(1, len(sizes) + 1))
            assert grad[:, 1].tolist() == [ranks_sum * j for j in range(begin, begin + size)]
        begin += size


def bf16_sum(rank, world):
    rows = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    pool = gather_pool(rows, torch.zeros(1, dtype=torch.int64))
    # 256 + 1 + 1: bf16 has 8 bits, so 256 + 1 rounds back to 256 when the sum is made in bf16.
    (pool.embeddings * (256.0 if rank == 0 else 1.0)).sum().backward()
    return float(rows.grad)


def test_bf16_gradients_are_summed_over_ranks_in_float32():
    assert run_gloo(bf16_sum, 3) == [258.0] * 3


def ordered(rank, world):
    """The pool's labels, brought in order by keys that ranks hold in blocks or each W-th of."""
    keys, sizes = torch.arange(100, 112), (5, 0, 7) if world > 1 else (12,)
    labels = []
    for own in (keys.split(sizes)[rank], keys[rank::world], keys.flip(0)[rank::world]):
        pool = gather_pool(own[:, None].double(), own)
        labels.append(pool.labels.index_select(0, gather_order(own)).tolist())
    return labels


def test_order_of_the_pool_does_not_depend_on_how_ranks_share_the_batch():
    expected = [list(range(100, 112))] * 3
    assert run_gloo(ordered, 3) == [expected] * 3
    assert ordered(0, 1) == expected


def misfits(rank, world):
    """What two ranks that disagree are told, and that they are both told it."""
    told = []
    for rows, labels in (
        (torch.zeros(2, 3 + rank), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, dtype=torch.bfloat16 if rank else torch.float32), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3), torch.zeros(2 + rank, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="rank 1") as error:
            gather_pool(rows, labels)
        told.append(str(error.value))
    return told


def test_ranks_whose_embeddings_do_not_fit_together_are_all_told():
    same = "; every rank must run the same model in the same precision"
    expected = [
        f"rank 1 has embeddings of 4 x torch.float32 and rank 0 of 3 x torch.float32{same}",
        f"rank 1 has embeddings of 3 x torch.bfloat16 and rank 0 of 3 x torch.float32{same}",
        "rank 1 has 2 embeddings and 3 labels; each embedding needs one label",
    ]
    assert run_gloo(misfits, 2) == [expected] * 2


def test_one_process_needs_no_process_group():
    rows, labels = torch.randn(3, 2, requires_grad=True), torch.tensor([0, 1, 0])
    pool = gather_pool(rows, labels)
    assert pool.embeddings is rows and pool.labels is labels and pool.first == 0
    total = rows.sum()
    assert float(global_mean(LossSum(total, 4, labels[:0]), 4).detach()) == pytest.approx(float(total.detach()) / 4)
    with pytest.raises(ValueError, match="rank 0 has 3 embeddings and 2 labels"):
        gather_pool(rows, labels[:2])


def test_a_pool_larger_than_memory_is_refused_before_it_is_allocated():
    check_pool_fits(1000, 128, torch.float32, "cpu")
    rows = 2**40
    with pytest.raises(ValueError) as error:
        check_pool_fits(rows, 128, torch.float32, "cpu")
    assert f"a pool of {rows:,} rows x 128 needs 1,572,864.0 GiB of cpu memory and " in str(error.value)
    assert str(error.value).endswith(" GiB are free; lower stage_one.memory.rows or stage_one.batch_size")


def test_free_memory_is_the_kernels_or_what_the_containers_limit_leaves(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert available_bytes("cpu", tmp_path) == 500 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("max\n")
    assert available_bytes("cpu", tmp_path) == 500 * 1024
    (group / "memory.max").write_text("300000\n")
    (group / "memory.current").write_text("100000\n")
    assert available_bytes("cpu", tmp_path) == 200_000


def failing(rank, world, dies):
    if rank == 1:
        if dies:
            os._exit(1)
        raise KeyError("the reason")
    dist.barrier()


def test_a_failing_rank_fails_the_call_with_its_traceback():
    with pytest.raises(AssertionError, match=r"rank 1 failed:\n(.|\n)*KeyError: 'the reason'"):
        run_gloo(failing, 2, False)
    with pytest.raises(AssertionError, match=r"rank 1 failed:\nit died without a word"):
        run_gloo(failing, 2, True)


def test_a_gpu_that_runs_out_of_memory_is_told_with_what_to_set():
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 22.05 GiB of which ..."
    told = r"GPU's memory \(CUDA out of memory. Tried to allocate 2.00 GiB\); set stage_one.micro_batch_size "
    with pytest.raises(UserError, match=told), out_of_memory_told():
        raise torch.OutOfMemoryError(said)
