"""The Triton path against the PyTorch path, which of them is taken, and what is multiplied in bfloat16 on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.nn import functional

from tests.pairs import random_rows, with_gradients
from trainer import pairwise_blocks, pairwise_choice
from trainer.pairwise import (
    all_triplet_sums,
    contrastive_total,
    hardest_rows,
    multi_similarity_sums,
    pool_logsumexp,
    semi_hard_rows,
)

LABELS = torch.arange(600) % 7


@pytest.fixture(scope="module")
def errors():
    """Largest relative errors of the Triton path, on the GPU or, without one, in Triton's interpreter."""
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.triton_check"]
    done = subprocess.run(command, env=os.environ | interpret, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["logsumexp", "contrastive"])
@pytest.mark.parametrize("part", ["value", "anchors", "pool"])
def test_triton_equals_pytorch(errors, name, part):
    found = {key: error for key, error in errors.items() if key.startswith(f"{name}-{part}-")}
    assert len(found) == 8
    for key, error in found.items():
        # A similarity of 100 (T = 0.01) has 7 digits, so its exp has 5. The weights of a bfloat16 gradient have 2, and
        # the interpreter cuts them off where a GPU rounds.
        assert error < (1e-5 if "float32" in key or part == "value" else 2**-6), key


@pytest.mark.parametrize("kind", ["positive", "negative"])
def test_triton_finds_the_hardest_rows(errors, kind):
    found = {key: error for key, error in errors.items() if key.startswith(kind)}
    assert len(found) == 8 and max(found.values()) < 1e-6


def test_the_cpu_and_types_without_kernels_take_pytorch(monkeypatch):
    def fail(*_):
        raise AssertionError("no timing is wanted here")

    monkeypatch.setattr(pairwise_choice, "is_faster", fail)
    pool = random_rows(8, 4, dtype=torch.float32)
    assert not pairwise_choice.use_triton("x", pool, pool, fail, fail)
    with monkeypatch.context() as patch:  # a rank without a sample
        patch.setattr(pairwise_choice, "is_supported", lambda pool: True)
        assert not pairwise_choice.use_triton("x", pool[:0], pool, fail, fail)
    for other in (torch.empty(8, 4, dtype=torch.float64), torch.empty(8, 4, dtype=torch.float16), torch.empty(8, 257)):
        monkeypatch.setattr(torch.Tensor, "is_cuda", True)
        assert not pairwise_choice.is_supported(other)
    assert pairwise_choice.is_supported(pool)


def test_the_faster_path_is_taken_and_remembered(monkeypatch):
    monkeypatch.setattr(pairwise_choice, "is_supported", lambda pool: True)
    monkeypatch.setattr(pairwise_choice, "_chosen", {})
    calls = []

    def path(name, seconds):
        def run(anchors, pool):
            calls.append((name, anchors.requires_grad))
            time.sleep(seconds)
            return (anchors @ pool.T).sum(1)

        return run

    quick, slow = path("quick", 0.0), path("slow", 0.02)
    anchors, pool = random_rows(4, 3).requires_grad_(), random_rows(9, 3)
    assert pairwise_choice.use_triton("f", anchors, pool, slow, quick)
    assert not pairwise_choice.use_triton("g", anchors, pool, quick, slow)
    assert ("quick", True) in calls and anchors.grad is None  # gradients are part of the timing, and stay in it
    assert [path.rsplit(": ")[1] for path in pairwise_choice.chosen_paths()] == ["Triton", "PyTorch"]
    del calls[:]
    assert pairwise_choice.use_triton("f", anchors, random_rows(15, 3), slow, quick)
    assert not calls  # about the same size: not timed again
    assert pairwise_choice.use_triton("f", anchors, random_rows(16, 3), slow, quick) and calls


@pytest.mark.parametrize(("triton", "pytorch", "taken"), [(1.0, 1.2, True), (1.0, 1.02, False), (1.0, 0.9, False)])
def test_triton_is_taken_only_when_it_is_faster_by_more_than_timings_differ(monkeypatch, triton, pytorch, taken):
    monkeypatch.setattr(pairwise_choice, "_seconds", lambda function: function())
    assert pairwise_choice.is_faster(lambda: triton, lambda: pytorch) is taken


def test_tf32_is_the_users_choice():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for choice in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = choice
            assert pairwise_choice.tf32_allowed() == (choice == "tf32")
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_kernels_that_fail_are_warned_of(monkeypatch):
    def broken():
        raise RuntimeError("no compiler")

    with pytest.warns(UserWarning, match="the Triton kernels do not run here, PyTorch's path is taken: no compiler"):
        assert not pairwise_choice.is_faster(broken, lambda: None)


@pytest.fixture
def narrow(monkeypatch):
    """As on a GPU: factors of products stay bfloat16; it is PyTorch's CPU that has to widen them to sum in float32."""
    monkeypatch.setattr(pairwise_blocks, "NARROW_DEVICES", {"cpu"})
    monkeypatch.setitem(pairwise_blocks.BLOCK_BYTES, "cpu", 4 * 32 * 100)
    assert pairwise_blocks.factor_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16


@pytest.mark.parametrize("temperature", [0.1, 0.01])
def test_bfloat16_products_on_a_gpu_keep_float32_sums(temperature, narrow):
    rows = functional.normalize(random_rows(600, 32)).to(torch.bfloat16)
    own, weights = LABELS[50:82], random_rows(32, seed=1)
    functions = {
        "logsumexp": lambda a, p: pool_logsumexp(a, p, temperature, 50),
        "contrastive": lambda a, p: contrastive_total(a, own, p, LABELS, temperature, 50)[0].expand(32),
        "multi_similarity": lambda a, p: multi_similarity_sums(a, own, p, LABELS, 50, (2.0, 50.0), 0.5, 0.1)[1],
    }
    for name, function in functions.items():
        ours = with_gradients(function, rows[50:82], rows, weights)
        exact = with_gradients(function, rows[50:82].double(), rows.double(), weights)
        assert [x.dtype for x in ours] == [torch.float32, torch.bfloat16, torch.bfloat16], name
        torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=0, msg=name)
        for x, y in zip(ours[1:], exact[1:], strict=True):
            # Weights rounded to 2^-9 of each, then the gradient itself.
            torch.testing.assert_close(x.double(), y, rtol=2**-7, atol=2**-8 * float(y.abs().max()), msg=name)


def test_rows_found_with_bfloat16_products(narrow):
    rows = functional.normalize(random_rows(600, 32)).to(torch.bfloat16)
    exact = hardest_rows(rows.double(), LABELS, rows.double(), LABELS, 0)
    found = hardest_rows(rows, LABELS, rows, LABELS, 0)
    distances = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(
            distances.gather(1, one[:, None]), distances.gather(1, other[:, None]), rtol=1e-5, atol=1e-5
        )
    semi = semi_hard_rows(rows, LABELS, rows, LABELS, exact[1].clone(), 0)
    farther = distances.gather(1, semi.clamp(min=0)[:, None]) > distances.gather(1, exact[1][:, None])
    assert farther[semi >= 0].all()


def test_autocast_changes_nothing():
    rows = functional.normalize(random_rows(600, 32)).float()
    own, weights = LABELS[50:82], random_rows(32, seed=1)
    functions = [
        lambda a, p: pool_logsumexp(a, p, 0.1, 50),
        lambda a, p: contrastive_total(a, own, p, LABELS, 0.1, 50)[0].expand(32),
        lambda a, p: multi_similarity_sums(a, own, p, LABELS, 50, (2.0, 50.0), 0.5, 0.1)[1],
        lambda a, p: all_triplet_sums(a, own, p, LABELS, 50, 0.2)[0],
    ]
    for function in functions:
        plain = with_gradients(function, rows[50:82], rows, weights)
        with torch.autocast("cpu", torch.bfloat16):
            for x, y in zip(with_gradients(function, rows[50:82], rows, weights), plain, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert hardest_rows(rows, LABELS, rows, LABELS, 0)[0].min() >= 0
