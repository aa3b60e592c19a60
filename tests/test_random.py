"""Random bits for stochastic rounding: the C++ hash against NumPy's, and whether it looks random.

The statistical tests ask what rounding needs of the bits: each field uniform, and no relation
between neighbours, steps and leaves. All are of fixed data, so they pass or fail for good.
"""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from helpers import hooks, reference

pytestmark = pytest.mark.slow  # no version of jax changes these

SIZE = 2**18
# Of a chi-square or normal statistic, in standard deviations: a sound hash exceeds this with a
# probability of 6e-5, and the tests look at some dozens of them.
LIMIT = 4.0


@hypothesis.given(
    leaf_key=st.integers(-(2**63), 2**63 - 1),
    count=st.integers(0, 2**31 - 1),
    start=st.integers(0, 2**40) | st.integers(2**32 - 300, 2**32) | st.just(2**33 - 7),
    size=st.integers(0, 600),
)
def test_same_bits_as_the_reference(leaf_key, count, start, size):
    actual = hooks.random_bits(leaf_key, count, start, size)
    expected = reference.random_bits(leaf_key, count, start, size)
    assert expected.dtype == np.uint32
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.fast
def test_known_values():
    """So that a change of the specification, which changes the results of old runs, is noticed."""
    bits = reference.random_bits(0x0123456789ABCDEF, 7, 2**32 - 2, 4)
    assert bits.tolist() == [0xBBEF37AA, 0xA23D31A1, 0x0C0F7148, 0x8D32D178]
    parts = [reference.random_bits(5, 3, start, 100) for start in (0, 100, 200)]
    np.testing.assert_array_equal(np.concatenate(parts), reference.random_bits(5, 3, 0, 300))


# Sequences that must be random, each by itself: over elements, over steps of one element and
# over leaves. Keys of leaves are hashes, but small numbers must do.
SEQUENCES = {
    "elements": lambda: reference.random_bits(1, 0, 0, SIZE),
    "elements beyond 2^32": lambda: reference.random_bits(1, 0, 2**32 - SIZE // 2, SIZE),
    "every 256th element": lambda: reference.random_bits(3, 9, 0, 256 * 2**14)[::256],
    "steps": lambda: np.array([reference.random_bits(1, count, 5, 1)[0] for count in range(2**13)]),
    "leaves": lambda: np.array([reference.random_bits(key, 1, 5, 1)[0] for key in range(2**13)]),
    "leaves by the upper half": lambda: np.array(
        [reference.random_bits(key << 32, 1, 5, 1)[0] for key in range(2**13)]
    ),
}


@pytest.fixture(scope="module", params=SEQUENCES.values(), ids=SEQUENCES)
def sequence(request):
    return request.param()


@pytest.mark.parametrize("shift, width", [(0, 8), (8, 8), (16, 8), (24, 8), (20, 10), (4, 10)])
def test_fields_are_uniform(sequence, shift, width):
    counts = np.bincount(sequence >> shift & (2**width - 1), minlength=2**width)
    expected = sequence.size / 2**width
    chi_square = np.sum((counts - expected) ** 2 / expected)
    freedom = 2**width - 1
    # A permutation is more even than chance where it is seen as a whole: only excess is a fault.
    assert (chi_square - freedom) / np.sqrt(2 * freedom) < LIMIT


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 16, 32, 255, 256, 1024])
def test_neighbours_are_independent(sequence, distance):
    x = sequence / 2.0**32 - 0.5
    products = 12 * x[distance:] * x[:-distance]  # mean 0, variance 1 for independent ones
    assert abs(products.sum()) < LIMIT * np.sqrt(products.size)
    # Bit by bit: each pair of bits of the two agrees half the time.
    bits = (sequence[:, None] >> np.arange(32, dtype=np.uint32) & 1).astype(np.float32) * 2 - 1
    sums = np.abs(bits[distance:].T @ bits[:-distance])
    assert sums.max() < 5.5 * np.sqrt(products.size)  # the largest of 1,024


def test_no_relation_between_draws_of_one_element():
    """Consecutive steps, leaves, and fields of one word: all uncorrelated."""
    draws = [
        reference.random_bits(key, count, 0, SIZE)
        for key, count in itertools.product((1, 2, 1 << 32), (0, 1, 2, 3, 4, 5))
    ]
    fields = [bits >> shift & 0xFF for bits in draws for shift in (0, 8, 16, 24)]
    x = (np.array(fields) - 127.5) / np.sqrt((2**16 - 1) / 12)
    correlation = x @ x.T / np.sqrt(SIZE)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.0  # the largest of 2,556


@pytest.mark.parametrize("what", ["index", "step", "key"])
def test_every_input_bit_changes_half_of_the_output(what):
    rng = np.random.default_rng(5)
    width = {"index": 40, "step": 31, "key": 64}[what]
    trials = 32
    for bit in range(width):
        flips = np.zeros(32)
        for key, count, index in rng.integers(0, 2**31, (trials, 3)).tolist():
            before = reference.random_bits(key, count, index, 1)[0]
            key ^= (what == "key") << bit
            count ^= (what == "step") << bit
            index ^= (what == "index") << bit
            after = reference.random_bits(key, count, index, 1)[0]
            flips += (before ^ after) >> np.arange(32, dtype=np.uint32) & 1
        assert 0.4 < flips.mean() / trials < 0.6, bit
