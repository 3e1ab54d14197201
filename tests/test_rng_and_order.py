import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pskd_timm import order, rng


def splitmix64_finaliser(z):
    """Written from Steele, Lea and Flood (2014) with Python's integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**62), min_size=1, max_size=5))
def test_bits_are_the_finaliser_twice_over_a_weyl_sequence(key, counters):
    found = rng.bits(key, torch.tensor(counters)).tolist()
    for counter, value in zip(counters, found, strict=True):
        inner = splitmix64_finaliser((counter * 0x9E3779B97F4A7C15 + splitmix64_finaliser(key)) % 2**64)
        assert value % 2**64 == splitmix64_finaliser(inner)


def test_uniform_integers_and_normal_draws_have_their_distributions():
    counters = torch.arange(100_000)
    assert stats.kstest(rng.uniform(1, counters).numpy(), "uniform").pvalue > 0.01
    assert stats.kstest(rng.normal(2, counters).numpy(), "norm").pvalue > 0.01
    counts = torch.bincount(rng.integers(3, counters, 7), minlength=7).numpy()
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 0.01


def test_draws_of_neighbouring_seeds_epochs_and_samples_are_uncorrelated():
    counters = torch.arange(50_000)
    base = rng.uniform(rng.derive_key(0, 0), counters)
    for other in (
        rng.uniform(rng.derive_key(0, 1), counters),
        rng.uniform(rng.derive_key(1, 0), counters),
        rng.uniform(rng.derive_key(0, 0), counters + 1),
    ):
        assert abs(np.corrcoef(base, other)[0, 1]) < 0.02
    assert rng.derive_key(1, 0) != rng.derive_key(0, 1)


def test_an_epochs_order_is_a_permutation_and_differs_between_epochs_and_seeds():
    orders = [tuple(order.epoch_order(100, seed, epoch).tolist()) for seed in range(3) for epoch in range(3)]
    assert all(sorted(ids) == list(range(100)) for ids in orders)
    assert len(set(orders)) == len(orders)
    assert torch.equal(order.epoch_order(100, 1, 2), order.epoch_order(100, 1, 2))


@given(st.integers(1, 200), st.integers(1, 64), st.integers(1, 5), st.integers(0, 3))
def test_ranks_split_each_global_batch_and_miss_only_a_tail_smaller_than_the_ranks(n, batch_size, world_size, epoch):
    batch_size = max(batch_size, world_size)
    ids = order.epoch_order(n, 0, epoch)
    alone = order.rank_batches(ids, batch_size, 0, 1)
    parts_of_ranks = [order.rank_batches(ids, batch_size, rank, world_size) for rank in range(world_size)]
    missing = n % batch_size if n % batch_size < world_size else 0
    assert len({len(part) for part in parts_of_ranks}) == 1
    for parts, whole in zip(zip(*parts_of_ranks, strict=True), alone, strict=False):
        assert torch.equal(torch.cat(parts), whole)
        lengths = [len(part) for part in parts]
        # Pairs stay together, so an even number may be one more or less than the fair one.
        assert min(lengths) >= 1 and max(lengths) - min(lengths) <= 2
        assert len(whole) < 2 * world_size or all(length % 2 == 0 for length in lengths[:-1])
    visited = torch.cat([torch.cat(part) for part in parts_of_ranks if part]) if parts_of_ranks[0] else torch.empty(0)
    assert len(visited) == len(visited.unique()) == n - missing


def test_partners_are_uniform_over_the_anchors_class_and_a_function_of_the_anchor():
    labels = torch.tensor([0, 1, 1, 2, 2, 2, 0, 2])
    partners = order.Partners(labels, 3)
    index = torch.arange(8)
    drawn = torch.stack([partners.draw(index, 0, epoch) for epoch in range(4000)])
    assert torch.equal(labels[drawn], labels.expand(4000, -1))
    for anchor in range(8):
        members = (labels == labels[anchor]).nonzero().squeeze(1)
        counts = torch.bincount(drawn[:, anchor], minlength=8)[members].numpy()
        assert counts.sum() == 4000
        assert len(members) == 1 or stats.chisquare(counts).pvalue > 0.001
    assert torch.equal(partners.draw(index[[5, 2]], 7, 3), partners.draw(index, 7, 3)[[5, 2]])


@pytest.mark.parametrize("parts", [1, 3, 4])
def test_even_slices_are_numpys_array_split(parts):
    for length in range(12):
        expected = [list(part) for part in np.array_split(np.arange(length), parts)]
        assert [list(range(length))[order.even_slice(length, part, parts)] for part in range(parts)] == expected
