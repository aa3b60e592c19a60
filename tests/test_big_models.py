"""The rows of benchmarks/big_models.py, and the checkpoints of benchmarks/qlora_checkpoint.py."""

import dataclasses
import importlib
from pathlib import Path

import jax
import llama
import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
GIB = 2**30
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="tests without the source tree")


def load(name, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module(name)


@pytest.fixture
def big(monkeypatch):
    return load("big_models", monkeypatch)


@pytest.mark.parametrize("optimizer", ["paged", "adamw"])
@pytest.mark.parametrize("sizes", [{"length": None}, {"length": 512, "batch": None}], ids=str)
def test_the_largest_that_the_planner_has_room_for(big, sizes, optimizer):
    row = big.Row("13b", "qlora", optimizer, 16, **sizes)
    limit = 15 * GIB
    count = big.largest(row, limit)
    most, more = big.sized(row, count), big.sized(row, count + 1)
    assert big.pool_bytes(most) <= limit < big.pool_bytes(more)
    assert big.largest(row, GIB) == 1  # and the run says that it does not fit
    assert big.largest(row, 1000 * GIB) * big.sized(row, 1).length * most.batch // count <= 16_384


def test_paged_moments_leave_room_for_more(big):
    for sizes in {"length": None}, {"length": 512, "batch": None}:
        row = big.Row("13b", "qlora", "paged", 16, **sizes)
        other = dataclasses.replace(row, optimizer="adamw")
        assert big.largest(row, 15 * GIB) > 1.3 * big.largest(other, 15 * GIB)


def test_every_row_has_a_name_of_its_own_and_a_shape(big):
    assert len(set(big.ROWS)) == len(big.ROWS)
    for row in big.ROWS:
        assert row.shape in llama.SHAPES
        assert row.length is not None or row.batch is not None
    for wanted in ("65b/48", "33b/24", "13b/16", "24b:full", "32b:full"):
        assert {r.optimizer for r in big.ROWS if wanted in r.selectors} == {"paged", "adamw"}


def test_a_row_that_fits_and_one_that_does_not(big):
    row = big.Row("13b", "qlora", "paged", 16, None)
    figures = dict.fromkeys(("seconds", "tokens_per_second", "pool_peak"), 2.0)
    figures |= dict.fromkeys(("resident", "on_host", "gpu_peak", "process"), GIB)
    line = big.line(row, figures | {"batch": 3, "length": 2048})
    assert line.startswith("13b/16 qlora") and "3 x 2,048" in line and "1,024" in line
    assert len(line) == len(big.header())
    failed = {"failure": "RESOURCE_EXHAUSTED", "batch": 1, "length": 128}
    assert "1 x 128  RESOURCE_EXHAUSTED" in big.line(row, failed)
    assert big.has_learned({"losses": [3.0, 4.0, 2.0]}) and big.has_learned(failed)
    assert not big.has_learned({"losses": [3.0, 3.0]})


def test_checkpoints_that_are_made_up(monkeypatch, tmp_path):
    for module in "matplotlib", "orbax.checkpoint", "psutil", "safetensors", "tqdm":
        pytest.importorskip(module)
    import hf_checkpoint

    written = load("qlora_checkpoint", monkeypatch)
    monkeypatch.setattr(written, "SHARD", 2**17)  # so that there are several files
    monkeypatch.setattr(written, "POOL", 65_537)
    monkeypatch.setattr(written, "write_tokenizer", lambda folder, vocab: None)
    config = llama.SHAPES["tiny"]
    written.write(tmp_path, config)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    read, base = hf_checkpoint.load(tmp_path, "plain", "float32", show_progress=False)
    assert read == config
    expected = jax.eval_shape(lambda: llama.random_base(jax.random.key(0), config, False))
    assert jax.tree.map(np.shape, base) == jax.tree.map(lambda x: x.shape, expected)
    gate, up = base["layers"]["gate_proj"], base["layers"]["up_proj"]
    assert np.std(gate) == pytest.approx(config.dim**-0.5, rel=0.05)
    assert not np.array_equal(gate[0], gate[1]) and not np.array_equal(gate, up)
