from collections import defaultdict

import numpy as np
import pytest

from cluster.errors import UserError
from data_pipeline.config import SplitConfig
from data_pipeline.splits import assign_splits, complete_splits, join_near_duplicates, long_tail, near_pairs

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


def long_tailed(seed=0):
    """Labels and groups of five classes, groups of 1 to 5 samples."""
    rng = np.random.default_rng(seed)
    labels, groups = [], []
    for label, num_groups in enumerate([300, 90, 30, 10, 3]):
        for group in range(num_groups):
            size = rng.integers(1, 6)
            labels += [label] * size
            groups += [f"{label}-{group}"] * size
    return np.array(labels), np.array(groups, dtype=object)


def test_no_group_is_cut_and_every_class_is_in_every_split():
    labels, groups = long_tailed()
    splits = assign_splits(labels, groups, SplitConfig(), 0, list("abcde"))
    of_group = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        of_group[group].add(split)
    assert all(len(found) == 1 for found in of_group.values())
    for label in range(5):
        assert set(splits[labels == label]) == set(SHARES)


@pytest.mark.parametrize("seed", range(5))
def test_shares_hold_class_by_class_to_half_of_the_largest_group(seed):
    labels, groups = long_tailed(seed)
    splits = assign_splits(labels, groups, SplitConfig(), seed, list("abcde"))
    for label in range(3):
        ours = splits[labels == label]
        for split, share in SHARES.items():
            assert abs((ours == split).sum() - share * len(ours)) <= 2.5


def test_the_order_of_the_samples_does_not_matter_and_the_seed_does():
    labels, groups = long_tailed()
    first = assign_splits(labels, groups, SplitConfig(), 3, list("abcde"))
    order = np.random.default_rng(1).permutation(len(labels))
    again = assign_splits(labels[order], groups[order], SplitConfig(), 3, list("abcde"))
    np.testing.assert_array_equal(again, first[order])
    other = assign_splits(labels, groups, SplitConfig(), 4, list("abcde"))
    assert (other != first).any()


def test_a_group_of_several_classes_stays_whole_and_counts_for_each():
    labels, groups = long_tailed()
    extra = np.array([0, 0, 3, 4])
    labels, groups = np.append(labels, extra), np.append(groups, ["mixed"] * 4)
    splits = assign_splits(labels, groups, SplitConfig(), 0, list("abcde"))
    assert len(set(splits[groups == "mixed"])) == 1
    for label in range(5):
        assert set(splits[labels == label]) == set(SHARES)


def test_three_groups_are_one_a_split_with_the_largest_in_training():
    labels = np.array([0] * 12 + [1] * 3)
    groups = np.array(["p"] * 10 + ["q", "r"] + ["s", "t", "u"], dtype=object)
    splits = assign_splits(labels, groups, SplitConfig(), 0, ["a", "b"])
    assert splits[0] == "train" and {splits[10], splits[11]} == {"val", "test"}


def test_too_few_groups_are_all_named():
    labels = np.array([0] * 9 + [1] * 4 + [2])
    groups = np.array([f"g{i}" for i in range(9)] + ["p", "p", "q", "q"] + ["r"], dtype=object)
    with pytest.raises(UserError) as error:
        assign_splits(labels, groups, SplitConfig(), 0, ["nv", "df", "vasc"])
    assert str(error.value) == (
        "too few groups (patients or lesions, near-duplicates joined) to split: class 'df' has 2, class 'vasc' has 1, "
        "and each of train, val and test needs one; add images of other patients or lesions, or leave the class out "
        "(data.split.near_duplicate_bits=-1 joins no near-duplicates)"
    )


def test_a_class_whose_groups_all_went_elsewhere_is_named():
    # Three groups, each with four classes: one of the classes' cut serves the others too, so all are fine ...
    labels = np.tile(np.arange(4), 3)
    groups = np.repeat(["p", "q", "r"], 4).astype(object)
    splits = assign_splits(labels, groups, SplitConfig(), 0, list("abcd"))
    assert {tuple(splits[groups == group]) for group in "pqr"} == {(s,) * 4 for s in SHARES}
    # ... and here 'z' has a group in common with the training part of each of three other classes, and no other.
    labels, groups = [], []
    for label, name in enumerate("abc"):
        labels += [label] * 40 + [label, label] + [3]
        groups += [f"{name}-big"] * 40 + [f"{name}-1", f"{name}-2"] + [f"{name}-big"]
    with pytest.raises(UserError, match=r"class 'z' has no group left for val: its groups are other classes' too; add"):
        assign_splits(np.array(labels), np.array(groups, dtype=object), SplitConfig(), 0, ["a", "b", "c", "z"])


@pytest.mark.parametrize("lacking", [["val"], ["test"], ["val", "test"]])
def test_splits_that_are_not_given_are_cut_out_of_training(lacking):
    labels, groups = long_tailed()
    given = assign_splits(labels, groups, SplitConfig(), 0, list("abcde"))
    given[np.isin(given, lacking)] = "train"
    splits = complete_splits(given, labels, groups, SplitConfig(near_duplicate_bits=-1), 1, list("abcde"))
    kept = given != "train"
    np.testing.assert_array_equal(splits[kept], given[kept])
    of_group = defaultdict(set)
    for group, split in zip(groups, splits, strict=True):
        of_group[group].add(split)
    assert all(len(found) == 1 for found in of_group.values())
    parts = SHARES["train"] + sum(SHARES[split] for split in lacking)
    for label in range(3):
        ours = splits[(labels == label) & ~kept]
        for split in lacking:
            assert abs((ours == split).sum() - SHARES[split] / parts * len(ours)) <= 2.5


def test_given_splits_that_leak_are_left_alone():
    labels, groups = np.array([0, 1, 0, 1, 0, 1]), np.array(["p", "q", "p", "q", "p", "q"], dtype=object)
    given = np.array(["train", "train", "val", "val", "test", "test"], dtype=object)
    np.testing.assert_array_equal(complete_splits(given, labels, groups, SplitConfig(), 0, ["a", "b"]), given)


def test_a_class_that_the_given_training_set_lacks_is_named():
    labels, groups = np.array([0, 1, 0, 1, 2, 2]), np.arange(6).astype(str)
    given = np.array(["train", "train", "val", "test", "val", "test"], dtype=object)
    with pytest.raises(UserError) as error:
        complete_splits(given, labels, groups, SplitConfig(), 0, ["a", "b", "c"])
    assert str(error.value) == (
        "class 'c' is in the given test and val and not in train, where it would have to be learnt; give train some of "
        "it, or leave the class out"
    )


def test_too_few_training_groups_for_the_split_that_lacks():
    labels = np.array([0, 0, 0, 1, 1, 0, 1])
    groups = np.array(["p", "q", "r", "s", "s", "t", "u"], dtype=object)
    given = np.array(["train"] * 5 + ["test"] * 2, dtype=object)
    with pytest.raises(UserError, match=r"too few groups .* class 'b' has 1, and each of train and val needs one; add"):
        complete_splits(given, labels, groups, SplitConfig(), 0, ["a", "b"])


def near_hashes(count, seed=0):
    """Random hashes, some of them with a few bits turned from another one."""
    rng = np.random.default_rng(seed)
    values = rng.integers(1, 2**63, count, dtype=np.uint64)
    for i in range(0, count, 4):
        for bit in rng.choice(64, rng.integers(0, 6), replace=False):
            values[i] = values[i - 1] ^ (np.uint64(1) << np.uint64(bit)) if bit % 2 else values[i]
    return values


@pytest.mark.parametrize("max_bits", [0, 1, 2, 5, 16])
def test_pairs_are_those_of_comparing_each_with_each(max_bits):
    values = np.unique(np.append(near_hashes(400), np.array([0, 1, 3, 2**64 - 1], dtype=np.uint64)))
    found = {tuple(sorted(pair)) for pairs in near_pairs(values, max_bits) for pair in pairs.tolist()}
    distance = np.bitwise_count(values[:, None] ^ values[None])
    expected = {
        (i, j) for i, j in np.argwhere(distance <= max_bits).tolist() if i < j and values[i] != 0 and values[j] != 0
    }
    assert found == expected and (max_bits < 2 or len(expected) > 10)


@pytest.mark.parametrize("max_bits", [-1, 0, 2, 4])
def test_joined_groups_are_the_connected_components(max_bits):
    hashes = np.append(near_hashes(200), np.array([0, 0, 7, 7], dtype=np.uint64))
    groups = np.array([f"g{i // 2:03d}" for i in range(len(hashes))], dtype=object)
    joined = join_near_duplicates(groups, hashes, max_bits)
    component = {group: {group} for group in set(groups)}
    for i in range(len(hashes)):
        for j in range(i):
            near = hashes[i] and hashes[j] and int(hashes[i] ^ hashes[j]).bit_count() <= max_bits
            if near and component[groups[i]] is not component[groups[j]]:
                both = component[groups[i]] | component[groups[j]]
                for group in both:
                    component[group] = both
    assert joined.tolist() == [min(component[group]) for group in groups]
    order = np.random.default_rng(0).permutation(len(hashes))
    assert join_near_duplicates(groups[order], hashes[order], max_bits).tolist() == joined[order].tolist()


def test_images_without_a_hash_join_nothing():
    groups = np.array(["a", "b", "c"], dtype=object)
    assert join_near_duplicates(groups, np.zeros(3, np.uint64), 16).tolist() == ["a", "b", "c"]


def test_a_hundred_thousand_hashes_are_not_compared_each_with_each():
    hashes = near_hashes(100_000)
    compared = sum(len(pairs) for pairs in near_pairs(np.unique(hashes), 2))
    assert 0 < compared < 1_000_000


def a_set(counts, per_group=3):
    """Labels, groups and keys of `counts` samples a class, `per_group` a patient."""
    labels = np.repeat(np.arange(len(counts)), counts)
    groups = np.array([f"{c}-{i // per_group}" for c, n in enumerate(counts) for i in range(n)], dtype=object)
    return labels, groups, np.array([f"k{i:04d}" for i in range(len(labels))], dtype=object)


def test_a_long_tail_falls_by_one_factor_from_the_commonest_class_to_the_rarest():
    labels, groups, keys = a_set([300, 500, 400, 320])
    stays = long_tail(labels, groups, keys, imbalance=50, seed=0)
    # By rank of the class: 500, 500 / 50^(1/3), 500 / 50^(2/3), 500 / 50; classes 1, 2, 3, 0.
    assert np.bincount(labels[stays]).tolist() == [10, 500, 136, 37]


def test_a_class_with_less_than_its_place_in_the_tail_keeps_all_and_none_is_emptied():
    labels, groups, keys = a_set([20, 4, 3])
    assert np.bincount(labels[long_tail(labels, groups, keys, 2, 0)]).tolist() == [20, 4, 3]
    assert np.bincount(labels[long_tail(labels, groups, keys, 1000, 0)]).tolist() == [20, 1, 1]


def test_a_long_tail_takes_whole_patients_but_the_last():
    labels, groups, keys = a_set([300, 200, 100], per_group=7)
    stays = long_tail(labels, groups, keys, imbalance=10, seed=0)
    for c in range(3):
        kept = np.array([stays[groups == name].sum() for name in np.unique(groups[labels == c])])
        whole = np.array([(groups == name).sum() for name in np.unique(groups[labels == c])])
        assert ((kept > 0) & (kept < whole)).sum() <= 1


def test_a_long_tail_follows_from_the_seed_and_not_from_the_order():
    labels, groups, keys = a_set([90, 60, 30])
    first = long_tail(labels, groups, keys, 10, 3)
    order = np.random.default_rng(1).permutation(len(labels))
    np.testing.assert_array_equal(long_tail(labels[order], groups[order], keys[order], 10, 3), first[order])
    assert (long_tail(labels, groups, keys, 10, 4) != first).any()
