"""benchmarks/step.py: what it times was checked before, and what it measures is drawn."""

from pathlib import Path

import pytest

from helpers import run_python

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not BENCHMARKS.exists(), reason="tests without the source tree"),
]


def test_every_optimizer_is_checked_before_it_is_timed(tmp_path):
    """Those of JAX pass. One with another learning rate is refused, and not timed."""
    run_python(
        """
        import sys, time; sys.path.insert(0, sys.argv[1])
        import optax, peers, step

        peers._is_installed = lambda module: False
        shapes, repeats = [(5000,), (3,)], 1
        for dtype in ("float32", "bfloat16"):
            for peer in peers.peers(dtype, "ratio"):
                times = step.time_peer(peer, shapes, dtype, repeats, step.WAYS)
                assert times[1] > 0 and (times[0] is None or times[0] > 0), peer.name
        for peer in peers.clipping_peers("ratio"):
            for clock in time.perf_counter, time.process_time:
                step.time_peer(peer, shapes, "float32", repeats, ["loop"], clock=clock)

        optax.adamw = lambda rate, **options: optax.sgd(rate)
        wrong = peers.Peer("wrong", peers._optax())
        step.time_ms = None  # so that timing it would be another error
        try:
            step.time_peer(wrong, shapes, "float32", repeats, step.WAYS)
        except AssertionError as error:
            assert "Not equal to tolerance" in str(error)
        else:
            raise SystemExit("a wrong step was not noticed")
        """,
        tmp_path,
        BENCHMARKS,
    )


def test_times_by_size_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    run_python(
        """
        import json, sys; sys.path.insert(0, sys.argv[1])
        import step

        names = ["optax.adamw", "paged, update and apply", "paged, in place"]
        found = {"device": "a CPU", "sizes": [10000, 30000], "ms": {n: [1, 2] for n in names}}
        with open("times.json", "w") as file:
            json.dump(found, file)
        step.plot("times.json", "times.png")
        with open("times.png", "rb") as file:
            assert file.read(8) == b"\\x89PNG\\r\\n\\x1a\\n"
        """,
        tmp_path,
        BENCHMARKS,
        MPLBACKEND="agg",
    )
