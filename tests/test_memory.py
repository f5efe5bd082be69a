"""Cross-batch memory: what goes in, what goes out, the same on every rank and after a checkpoint."""

from __future__ import annotations

from collections import deque
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.gloo import run_gloo
from trainer.config import MemoryConfig, StageOneConfig
from trainer.losses.base import Pool
from trainer.losses.supervised_contrastive import supervised_contrastive
from trainer.memory import EVICTIONS, CrossBatchMemory, newest, newest_of_each_class
from trainer.pool import gather_order, gather_pool

SHARES = torch.tensor([0.78, 0.2, 0.02])  # of a long-tailed stream's classes


def memory_of(rows, dim=1, eviction="oldest", start_epoch=0.0, **kwargs):
    config = MemoryConfig(rows=rows, start_epoch=start_epoch, eviction=eviction)
    return CrossBatchMemory(config, dim, **{"dtype": torch.float64, **kwargs})


def pool_of(*numbers, labels=None):
    """A row a number, which is its embedding, and its label too unless labels are given."""
    labels = torch.tensor(numbers if labels is None else labels)
    return Pool(torch.tensor(numbers, dtype=torch.float64)[:, None], labels, 0)


def content(memory):
    return memory.state_dict()["embeddings"].flatten().tolist(), memory.state_dict()["labels"].tolist()


def evict_one_by_one(labels, size):
    """The definition, row by row: the oldest of the class that has most; of several, the oldest of these."""
    rows = list(range(len(labels)))
    while len(rows) > size:
        of_class = {label: [row for row in rows if labels[row] == label] for label in {labels[row] for row in rows}}
        most = max(len(members) for members in of_class.values())
        rows.remove(min(members[0] for members in of_class.values() if len(members) == most))
    return rows


# --- eviction


@pytest.mark.parametrize("seed", range(40))
def test_class_aware_eviction_is_its_definition_row_by_row(seed):
    generator = torch.Generator().manual_seed(seed)
    num_rows, num_classes = (int(torch.randint(1, n, (), generator=generator)) for n in (40, 9))
    labels = torch.randint(num_classes, (num_rows,), generator=generator)
    for size in range(num_rows + 2):
        assert newest_of_each_class(labels, size).tolist() == evict_one_by_one(labels.tolist(), size)


def test_oldest_rows_go_first():
    memory, queue = memory_of(7), deque(maxlen=7)
    for begin in range(0, 30, 3):
        batch = range(begin, begin + 3)
        memory.add(pool_of(*batch), 1.0)
        queue.extend(batch)
        assert content(memory) == (list(queue), list(queue))


def test_a_batch_larger_than_the_memory_leaves_its_newest_rows():
    memory = memory_of(3)
    memory.add(pool_of(*range(8)), 1.0)
    assert content(memory)[0] == [5, 6, 7]


def test_rows_that_fit_all_stay_in_their_order():
    labels = torch.tensor([2, 0, 0, 1])
    for evict in (newest, newest_of_each_class):
        for size in (4, 5, 100):
            assert evict(labels, size).tolist() == [0, 1, 2, 3]
        assert evict(labels[:0], 3).tolist() == []


def test_rare_classes_stay_longer():
    labels = torch.multinomial(SHARES, 6000, replacement=True, generator=torch.Generator().manual_seed(0))
    counts, ages = {}, {}
    for eviction in EVICTIONS:
        memory = memory_of(90, eviction=eviction)
        for begin in range(0, len(labels), 20):
            batch = range(begin, begin + 20)
            memory.add(pool_of(*batch, labels=labels[batch.start : batch.stop].tolist()), 1.0)
        numbers, kept = map(torch.tensor, content(memory))
        counts[eviction] = torch.bincount(kept, minlength=3).tolist()
        ages[eviction] = [float(len(labels) - numbers[kept == label].min()) for label in range(3)]
    assert counts["class_aware"] == [30, 30, 30]  # level
    assert counts["oldest"][2] < 6  # 2 % of 90
    assert ages["class_aware"][0] < ages["class_aware"][1] / 2 < ages["class_aware"][2] / 10
    assert max(ages["oldest"]) <= 90


def test_every_eviction_that_can_be_configured_exists():
    assert set(EVICTIONS) == set(get_args(MemoryConfig.model_fields["eviction"].annotation))


# --- a step


def test_pool_is_extended_behind_its_own_rows_and_gradient_stops_at_the_memory():
    memory = memory_of(4)
    first = pool_of(1, 2)
    first.embeddings.requires_grad_()
    memory.add(first, 1.0)
    own = torch.tensor([[5.0], [6.0], [7.0]], dtype=torch.float64, requires_grad=True)
    pool = memory.extend(Pool(own, torch.tensor([5, 6, 7]), 1))
    assert pool.embeddings.flatten().tolist() == [5, 6, 7, 1, 2]
    assert pool.labels.tolist() == [5, 6, 7, 1, 2]
    assert pool.first == 1
    (pool.embeddings * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    assert own.grad.flatten().tolist() == [1, 2, 3]
    assert first.embeddings.grad is None


def test_memory_in_another_precision_takes_the_pools():
    memory = memory_of(4, dtype=torch.float32)
    memory.add(pool_of(1, 2), 1.0)
    assert memory.extend(pool_of(3)).embeddings.dtype == torch.float64
    assert memory.state_dict()["embeddings"].dtype == torch.float32


def test_empty_memory_has_no_effect():
    pool = pool_of(1, 2)
    assert memory_of(4).extend(pool) is pool
    half_full = memory_of(4)
    half_full.add(pool_of(3), 1.0)
    assert len(half_full) == 1
    assert len(half_full.extend(pool).labels) == 3  # no row for the room that is left


def test_nothing_is_remembered_before_its_epoch():
    memory = memory_of(4, start_epoch=1.0)
    for epochs_done in (0.5, 1.0):  # 1.0: the last step of the first epoch
        memory.add(pool_of(1), epochs_done)
    assert len(memory) == 0
    memory.add(pool_of(2), 1.01)
    assert content(memory)[0] == [2]


def test_a_batch_meets_itself_once_and_past_batches_in_the_memory():
    generator = torch.Generator().manual_seed(0)
    batches = [torch.nn.functional.normalize(torch.randn(4, 3, generator=generator), dim=1).double() for _ in range(3)]
    labels = torch.tensor([0, 0, 1, 1])
    memory = memory_of(100, dim=3)
    for step, rows in enumerate(batches):
        gathered = Pool(rows, labels, 0)
        loss = supervised_contrastive(rows, labels, memory.extend(gathered), 0.1)
        past = torch.cat([rows, *batches[:step]])  # the plain pool
        expected = supervised_contrastive(rows, labels, Pool(past, labels.repeat(step + 1), 0), 0.1)
        torch.testing.assert_close(loss.total, expected.total, rtol=1e-12, atol=0)
        memory.add(gathered, 1.0)
    assert len(memory) == 12


def test_what_is_remembered_is_a_copy_and_graphs_survive_it():
    memory = memory_of(3)
    memory.add(pool_of(1, 2, 3), 1.0)
    own = pool_of(4, 5)
    own.embeddings.requires_grad_()
    total = memory.extend(own).embeddings.square().sum()
    memory.add(own, 1.0)  # evicts rows that the graph has saved
    total.backward()
    assert own.embeddings.grad.flatten().tolist() == [8, 10]
    with torch.no_grad():
        own.embeddings.zero_()
    assert content(memory)[0] == [3, 4, 5]
    assert not memory.state_dict()["embeddings"].requires_grad


# --- checkpoints


def test_a_saved_memory_goes_on_as_if_never_stopped(tmp_path):
    unbroken = memory_of(5, eviction="class_aware")
    unbroken.add(pool_of(*range(8), labels=[0, 1, 0, 0, 2, 0, 0, 1]), 1.0)
    save_file(unbroken.state_dict(), tmp_path / "memory.safetensors")
    resumed = memory_of(5, eviction="class_aware")
    resumed.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    for memory in (unbroken, resumed):
        memory.add(pool_of(8, 9, labels=[0, 3]), 2.0)
    assert content(resumed) == content(unbroken) == ([4, 6, 7, 8, 9], [2, 0, 1, 0, 3])


def test_an_empty_memory_can_be_saved(tmp_path):
    save_file(memory_of(5, dim=3).state_dict(), tmp_path / "memory.safetensors")
    memory = memory_of(5, dim=3)
    memory.load_state_dict(load_file(tmp_path / "memory.safetensors"))
    assert len(memory) == 0


def test_a_saved_memory_is_cut_to_the_room_there_is_and_is_no_alias():
    large, small = memory_of(6), memory_of(2, dtype=torch.float32)
    large.add(pool_of(*range(6)), 1.0)
    small.load_state_dict(large.state_dict())
    assert content(small) == ([4, 5], [4, 5])
    assert small.state_dict()["embeddings"].dtype == torch.float32
    same = memory_of(6)
    state = large.state_dict()
    same.load_state_dict(state)
    state["embeddings"].zero_()
    assert content(same)[0] == [0, 1, 2, 3, 4, 5]


def test_a_saved_memory_of_another_width_is_refused():
    wide = memory_of(3, dim=4)
    with pytest.raises(ValueError) as error:
        memory_of(3, dim=2).load_state_dict(wide.state_dict())
    assert str(error.value) == (
        "the checkpoint's memory holds embeddings of 4 dimensions and the model makes 2; set model.embedding_dim and "
        "stage_one.loss.compare as they were"
    )


# --- ranks


def global_batch(step, views=2):
    """16 samples in two views: keys say which, and are the embeddings."""
    labels = torch.multinomial(SHARES, 16, replacement=True, generator=torch.Generator().manual_seed(step))
    keys = torch.arange(16)[None] * views + torch.arange(views)[:, None] + 100 * step  # [V, B]
    return keys, labels.repeat(views, 1)


def remember(rank, world, steps, state, ordered):
    """Ranks take every W-th sample, view-major, as the loader hands them out."""
    memory = memory_of(37, eviction="class_aware")
    if state is not None:
        memory.load_state_dict(state)
    for step in steps:
        keys, labels = (x[:, rank::world].flatten() for x in global_batch(step))
        pool = gather_pool(keys[:, None].double().requires_grad_(), labels)
        memory.add(pool, step + 1, gather_order(keys) if ordered else None)
    return memory.state_dict()


def equal(state, other):
    return all(state[key].equal(other[key]) for key in ("embeddings", "labels"))


def test_every_rank_of_any_number_of_ranks_remembers_the_same():
    expected = remember(0, 1, range(6), None, True)
    for world in (2, 3):
        states = run_gloo(remember, world, range(6), None, True)
        assert all(equal(state, expected) for state in states)
    # Without an order of the rows, ranks agree with each other, but not with one that has the batch alone.
    states = run_gloo(remember, 3, range(6), None, False)
    assert all(equal(state, states[0]) for state in states)
    assert not equal(states[0], expected)


def test_a_memory_goes_on_with_another_number_of_ranks():
    of_two = run_gloo(remember, 2, range(3), None, True)[1]
    of_three = run_gloo(remember, 3, range(3, 6), of_two, True)
    assert all(equal(state, remember(0, 1, range(6), None, True)) for state in of_three)


# --- configuration


def test_a_memory_larger_than_the_machines_is_refused_before_it_is_allocated():
    with pytest.raises(ValueError, match=r"a pool of 1,099,511,627,776 rows x 128 needs 1,572,864.0 GiB of cpu memory"):
        memory_of(2**40, dim=128, dtype=torch.float32)


def test_a_memory_that_nothing_would_use_is_refused():
    with pytest.raises(ValueError, match=r"memory.rows = 8 serves a metric loss and loss.name is 'none'; set memory"):
        StageOneConfig.model_validate({"loss": {"name": "none"}, "memory": {"rows": 8}})
    with pytest.raises(ValueError, match=r"memory.start_epoch = 2 is not before the end of epochs = 2, and the memory"):
        StageOneConfig.model_validate({"epochs": 2, "memory": {"rows": 8, "start_epoch": 2}})
    assert StageOneConfig.model_validate({"epochs": 1}).memory.rows == 0  # off
