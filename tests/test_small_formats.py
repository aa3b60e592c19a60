"""The formats of fewer than 8 bits that benchmarks/below8.py trains with, and its training."""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    with jax.numpy_dtype_promotion("standard"):  # as scripts run
        yield
    for name in ("below8", "gpt_quality", "moment_formats", "numerics"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("place", "bits"), [(0, 6), (1, 6), (2, 4)], ids=["6", "squares", "4"])
def test_values_fit_into_their_bits(benchmarks, place, bits):
    from moment_formats import SMALL_FORMATS, root_unit

    fmt = SMALL_FORMATS[place]
    rng = np.random.default_rng(0)
    scale = np.exp(rng.normal(size=4096))
    m, v = jnp.float32(0.1 * scale * rng.normal(size=4096)), jnp.float32(scale**2)
    assert fmt.m_block == fmt.v_block
    m, v = (np.asarray(x).reshape(-1, fmt.m_block) for x in jax.jit(fmt.store)(m, v, 0))
    ratios = m / np.asarray(jax.jit(root_unit)(v)[0])
    ratios = np.round(ratios / np.abs(ratios).max(1, keepdims=True), 5)  # units are rounded
    for block in range(len(m)):
        assert len(np.unique(ratios[block])) <= 2**bits - 1
        assert len(np.unique(v[block])) <= 2**bits - 1  # one code more is for 0


@pytest.mark.parametrize("place", [0, 1, 2], ids=["6", "squares", "4"])
def test_rounding_has_no_bias(benchmarks, place):
    from moment_formats import SMALL_FORMATS

    rng = np.random.default_rng(0)
    m = jnp.asarray(rng.normal(size=256), jnp.float32)
    v = jnp.asarray(rng.uniform(1.1, 1.9, 256), jnp.float32)  # an octave has evenly spaced floats
    store = jax.jit(jax.vmap(lambda step: SMALL_FORMATS[place].store(m, v, step)))
    ms, vs = (np.asarray(x, np.float64) for x in store(jnp.arange(1024)))
    np.testing.assert_allclose(ms.mean(0), m, atol=0.005 * np.abs(m).max())
    # What is less than a step above the lowest code of a block may be cut off.
    inside = v > 1.3
    np.testing.assert_allclose(vs.mean(0)[inside], v[inside], rtol=0.003)


def test_four_bits_of_torchao(benchmarks):
    """The maps as torchao has them, in its order: 16 signed values, and 16 without 0."""
    from moment_formats import SMALL_FORMATS, four_bit_levels

    positive = [0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875]
    expected = [*(-x for x in reversed(positive)), 0, *positive, 1]
    np.testing.assert_allclose(four_bit_levels(), expected, atol=1e-12)
    m = jnp.asarray(np.resize([1.0, 0.03, -0.9, 0.0], 128), jnp.float32)
    v = jnp.asarray(np.resize([1.0, 0.5, 1e-6, 0.26], 128), jnp.float32)
    m, v = jax.jit(SMALL_FORMATS[3].store)(m, v, 0)
    np.testing.assert_allclose(m[:4], [1.0, 0.0325, -0.8875, 0.0], rtol=1e-6)
    np.testing.assert_allclose(v[:4], [1.0, 0.5, 1 / 16, 0.25], rtol=1e-6)


@pytest.mark.slow
def test_training_continues_from_its_file(benchmarks, tmp_path, capsys):
    import below8

    file = tmp_path / "losses.json"
    command = ["--tiny", "--steps", "3", "--json", str(file)]
    below8.main([*command, "--seeds", "0"])
    first = json.loads(file.read_text())["runs"]
    assert set(first) == {fmt.name for fmt in below8.FORMATS}
    below8.main([*command, "--seeds", "0", "1"])
    second = json.loads(file.read_text())["runs"]
    for name, losses in first.items():
        assert second[name]["0"] == losses["0"]
        assert abs(second[name]["1"]["held_out"] - losses["0"]["held_out"]) < 1
    assert "the seeds of float32 are" in capsys.readouterr().out
