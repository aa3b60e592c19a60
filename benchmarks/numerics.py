"""Which 8-bit format of Adam's moments follows float32 best? The study behind docs/numerics.md.

    python benchmarks/numerics.py            # synthetic gradients, and the model of the examples
    python benchmarks/numerics.py --gpt      # a GPT of 33M parameters instead; wants a GPU
    python benchmarks/numerics.py --only idle     # idle elements, at several decay rates

Every format of `moment_formats.py` is carried along. Its moments take the gradients that the
float32 moments take, and go through the format after each step. Its updates are compared with those
of float32. The gradients are random, or come from a model that float32 moments train. With `--gpt`
(or `--seeds N`) the model is then trained again from three seeds, with float32 moments,
bitsandbytes' format and the chosen one. The study needs nothing of the package. `--json` keeps all
numbers.
"""

import argparse
import functools
import json
import re
import sys
import sysconfig
import time
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from moment_formats import BASELINE, FLOAT32, FORMATS, SMALL_FORMATS, WINNER, Format

BLOCK = 256
B1, B2, EPS = np.float32(0.9), np.float32(0.999), np.float32(1e-8)
MIN_SIZE = 4096  # smaller leaves keep float32 moments, as in the package
WEIGHT_DECAY = 0.01

# ------------------------------------------------------------------------------- one step of Adam


def advance(m, v, grads):
    """Returns the moments after one more gradient."""
    return B1 * m + (1 - B1) * grads, B2 * v + (1 - B2) * grads * grads


def update_of(m, v, step):
    """Returns Adam's update from the moments after step `step`; the first step is 0."""
    t = jnp.asarray(step + 1, jnp.float32)
    return (m / (1 - B1**t)) / (jnp.sqrt(v / (1 - B2**t)) + EPS)


@functools.partial(jax.jit, static_argnames="fmt", donate_argnames=("m", "v"))
def carry(fmt: Format, m, v, grads, first_step):
    """Takes steps with moments that are stored in `fmt` between the steps.

    Args:
      fmt: the format.
      m: first moments (blocks, 256).
      v: second moments (blocks, 256).
      grads: (steps, blocks, 256).
      first_step: number of steps already taken.

    Returns:
      The moments, and the updates of all steps in the shape of `grads`.
    """

    def one_step(moments, inputs):
        grads, step = inputs
        m, v = moments
        m, v = advance(m, v, grads)
        update = update_of(m, v, step)
        return fmt.store(m, v, step), update

    steps = first_step + jnp.arange(grads.shape[0])
    (m, v), updates = jax.lax.scan(one_step, (m, v), (grads, steps))
    return m, v, updates


def nmse(updates, expected):
    """Returns the squared error divided by the squared update."""
    return jnp.sum((updates - expected) ** 2) / jnp.sum(expected**2)


# -------------------------------------------------------------------------------- idle elements

# The first is for comparison; from the fourth on, b1^2 > b2.
DECAY_RATES = ((0.9, 0.999), (0.9, 0.95), (0.95, 0.98), (0.97, 0.9), (0.99, 0.97), (0.99, 0.95))
IDLE_STEPS = 3_000


def bound(m, v):
    """Returns first moments as the rule leaves them to a format that stores ratios."""
    return jnp.where((m * m > 2 * v) & (B1 * B1 > B2), 0, m)


@functools.partial(jax.jit, static_argnums=(0, 1))
def idle_errors(fmt, bounded):
    """Returns the NMSE of the elements that are not idle, by kind of idle element (4,)."""
    place = jnp.arange(BLOCK)
    idle = jnp.stack([place < 0, place == 0, place % 16 == 0, place % 4 == 0])[:, None, :]

    def one_step(moments, step):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step))
        grads = jax.random.normal(keys[0], (4, 8, BLOCK))
        some = jax.random.uniform(keys[1], grads.shape[1:]) < 0.02
        active = jnp.stack([step >= 0, step < 10, step < 500, step < 0])[:, None, None]
        active = active | ~idle | (some & (jnp.arange(4) == 3)[:, None, None])
        grads = jnp.where(active, grads, 0).reshape(-1, BLOCK)
        (m, v), (exact_m, exact_v) = (advance(m, v, grads) for m, v in moments)
        expected = update_of(exact_m, exact_v, step)
        error = update_of(m, v, step) - expected
        stored = fmt.store(bound(m, v) if bounded else m, v, step)
        sums = [
            jnp.sum(jnp.where(idle, 0, (x**2).reshape(4, 8, BLOCK)), (1, 2))
            for x in (error, expected)
        ]
        return (stored, (exact_m, exact_v)), jnp.stack(sums)

    zeros = jnp.zeros((32, BLOCK))
    start = ((zeros, zeros), (zeros, zeros))
    error, energy = jnp.sum(jax.lax.scan(one_step, start, jnp.arange(IDLE_STEPS))[1], 0)
    return error / energy


def idle_study() -> list[dict]:
    """Prints and returns the errors next to idle elements, at several decay rates."""
    global B1, B2  # traced functions read them
    before = B1, B2
    kinds = ("none", "one", "sixteenth", "sparse")
    print(f"{'b1':>5}{'b2':>7}  {'format':<24}" + "".join(f"{kind:>11}" for kind in kinds))
    rows = []
    for rates in DECAY_RATES:
        B1, B2 = map(np.float32, rates)
        jax.clear_caches()
        cases = [(WINNER, True, WINNER.name), (BASELINE, False, BASELINE.name)]
        if B1 * B1 > B2:
            cases.insert(1, (WINNER, False, f"{WINNER.name}, not bounded"))
        for fmt, bounded, name in cases:
            row = dict(zip(kinds, idle_errors(fmt, bounded).tolist(), strict=True))
            rows.append({"b1": rates[0], "b2": rates[1], "format": name, **row})
            text = "".join(f"{row[kind]:>11.1e}" for kind in kinds)
            print(f"{rates[0]:>5}{rates[1]:>7}  {name:<24}{text}", flush=True)
    B1, B2 = before
    jax.clear_caches()
    return rows


# ----------------------------------------------------------------------------- synthetic gradients

UNDERFLOW = (1.0, 1e-1, 1e-2, 1e-3, 3e-4, 1e-4, 1e-5, 1e-6)
TINY = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4)
CYCLE = 89  # steps after which a data set in a fixed order starts again
CHANGE = 500  # the step at which gradients shrink or stop
STEPS, WINDOW, CHUNK = 5_000, 500, 50  # the last steps are measured


class Synthetic:
    """Blocks of random gradients, a few for each question.

    Attributes:
      sections: name of a question -> boolean mask (blocks, 256) of the elements that answer it.
    """

    def __init__(self):
        place = np.arange(BLOCK)
        scales, self.sections, self._masks = [], {}, {}

        def add(name, blocks, scale: np.ndarray | float = 1.0, watch=True, **masks):
            start = sum(len(part) for part in scales)
            scales.append(np.broadcast_to(np.asarray(scale, float), (blocks, BLOCK)))
            self._pending.append((name, start, blocks, watch, masks))

        self._pending = []
        varied = np.exp(0.7 * np.random.default_rng(0).normal(size=(8, BLOCK)))
        add("varied", 8, varied)
        add("underflow", 8, np.array(UNDERFLOW)[place % len(UNDERFLOW)])
        few = place % 16 == 15
        add("decay of few", 4, watch=few, shrink=few)
        add("decay of all", 4, shrink=True)
        add("tiny", len(TINY), np.array(TINY)[:, None])
        add("sparse rows", 8, row_sparse=True)
        add("sparse elements", 4, sparse=True)
        add("outliers", 4, np.where(place % 128 == 127, 1e3, 1.0))
        add("spikes", 4, spike=True)
        add("dead neighbours", 4, varied[:4], watch=~few, stop=few)
        fourth = place % 4 == 0
        wide = np.exp(np.random.default_rng(1).normal(size=(8, BLOCK)))
        add("sparse neighbours", 8, wide, watch=~fourth, sparse=fourth)
        add("cycle", 8, varied, cycle=True)
        self.scale = np.concatenate(scales).astype(np.float32)
        shape = self.scale.shape
        kinds = ("shrink", "row_sparse", "sparse", "spike", "stop", "cycle")
        self._masks = {kind: np.zeros(shape, bool) for kind in kinds}
        self.sections["stopped"] = np.broadcast_to(few, shape).copy()
        for name, start, blocks, watch, masks in self._pending:
            self.sections[name] = np.zeros(shape, bool)
            self.sections[name][start : start + blocks] = watch
            for kind, mask in masks.items():
                self._masks[kind][start : start + blocks] = mask
        self.sections["stopped"] &= self._masks["stop"]

    @functools.partial(jax.jit, static_argnums=0)
    def grads(self, step):
        """Returns the gradients of step `step`, of shape (blocks, 256)."""
        keys = jax.random.split(jax.random.fold_in(jax.random.key(1), step), 4)
        shape, masks = self.scale.shape, self._masks
        scale = jnp.asarray(self.scale)
        scale = jnp.where(masks["shrink"] & (step >= CHANGE), 0.1 * scale, scale)
        scale = jnp.where(masks["stop"] & (step >= CHANGE), 0.0, scale)
        row = jax.random.uniform(keys[0], (shape[0], 1)) < 0.02
        scale = jnp.where(masks["row_sparse"] & ~row, 0.0, scale)
        some = jax.random.uniform(keys[1], shape) < 0.02
        scale = jnp.where(masks["sparse"] & ~some, 0.0, scale)
        rare = jax.random.uniform(keys[2], shape) < 1e-4
        scale = jnp.where(masks["spike"] & rare, 100 * scale, scale)
        again = jax.random.fold_in(jax.random.key(2), step % CYCLE)
        normal = jax.random.normal(keys[3], shape)
        return scale * jnp.where(masks["cycle"], jax.random.normal(again, shape), normal)


def synthetic_study(formats) -> dict[str, dict]:
    """Returns the answers of each format, by the format's name."""
    stream = Synthetic()
    shape = stream.scale.shape
    energy, error, first = {}, {}, {}
    carried = {fmt: (jnp.zeros(shape), jnp.zeros(shape)) for fmt in (FLOAT32, *formats)}
    make = jax.jit(jax.vmap(stream.grads))
    for start in range(0, STEPS, CHUNK):
        grads = make(start + jnp.arange(CHUNK))
        expected = jnp.zeros(0)
        for fmt, (m, v) in carried.items():
            m, v, updates = carry(fmt, m, v, grads, start)
            carried[fmt] = m, v
            expected = updates if fmt is FLOAT32 else expected
            if start == 0:
                head = slice(0, 10)
                first[fmt] = nmse(updates[head, :8], expected[head, :8])
            if start >= STEPS - WINDOW:
                energy[fmt] = energy.get(fmt, 0.0) + jnp.sum(updates**2, 0)
                error[fmt] = error.get(fmt, 0.0) + jnp.sum((updates - expected) ** 2, 0)
    energy = {fmt: np.asarray(x, np.float64) for fmt, x in energy.items()}
    error = {fmt: np.asarray(x, np.float64) for fmt, x in error.items()}

    def ratio(fmt, mask):
        return float(np.sqrt(energy[fmt][mask].sum() / energy[FLOAT32][mask].sum()))

    def relative_error(fmt, mask):
        return float(error[fmt][mask].sum() / energy[FLOAT32][mask].sum())

    results = {}
    place = np.arange(BLOCK) % len(UNDERFLOW)
    for fmt in formats:
        parts = stream.sections
        underflow = {
            f"{scale:g}": ratio(fmt, parts["underflow"] & (place == i))
            for i, scale in enumerate(UNDERFLOW)
        }
        rows = np.flatnonzero(parts["tiny"].any(1))
        tiny = {
            f"{scale:g}": relative_error(
                fmt, parts["tiny"] & (np.arange(len(stream.scale)) == row)[:, None]
            )
            for scale, row in zip(TINY, rows, strict=True)
        }
        results[fmt.name] = {
            "underflow": underflow,
            "decay of few": ratio(fmt, parts["decay of few"]),
            "decay of all": ratio(fmt, parts["decay of all"]),
            "tiny": tiny,
            "first 10 steps": float(first[fmt]),
            "stopped": float(np.sqrt(energy[fmt][parts["stopped"]].mean() / WINDOW)),
            **{
                name: relative_error(fmt, parts[name])
                for name in (
                    "varied",
                    "sparse rows",
                    "sparse elements",
                    "outliers",
                    "spikes",
                    "dead neighbours",
                    "sparse neighbours",
                    "cycle",
                )
            },
        }
    return results


def print_synthetic(results):
    print("\nsynthetic gradients, 5,000 steps; the last 500 are measured")
    print("underflow, decay: RMS of the update divided by float32's")
    print("stopped: RMS of the update of elements that had no gradients for 4,000 steps")
    print("all others: NMSE of the update")
    columns = (
        "underflow from .. to",
        "decay few",
        "all",
        "varied",
        "tiny",
        "sp. rows",
        "sp. elem.",
        "outliers",
        "spikes",
        "dead",
        "sparse n.",
        "cycle",
        "first 10",
        "stopped",
    )
    print(f"{'format':<38}{columns[0]:>21}" + "".join(f"{c:>10}" for c in columns[1:]))
    for name, r in results.items():
        low, high = min(r["underflow"].values()), max(r["underflow"].values())
        print(
            f"{name:<38}{low:>10.2g} ..{high:>8.3g}{r['decay of few']:>10.3f}"
            f"{r['decay of all']:>10.3f}{r['varied']:>10.1e}{max(r['tiny'].values()):>10.1e}"
            + "".join(
                f"{r[c]:>10.1e}"
                for c in (
                    "sparse rows",
                    "sparse elements",
                    "outliers",
                    "spikes",
                    "dead neighbours",
                    "sparse neighbours",
                    "cycle",
                    "first 10 steps",
                    "stopped",
                )
            )
        )


# ------------------------------------------------------------------------------------------ models


def library_text() -> bytes:
    """Returns the source of Python's standard library, a text that every machine has."""
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(f for f in root.rglob("*.py") if "site-packages" not in f.parts)
    return b"".join(f.read_bytes() for f in files)


class Layout:
    """Turns the leaves of a tree into one array (blocks, 256), small leaves last, and back."""

    def __init__(self, tree):
        leaves, self._treedef = jax.tree.flatten(tree)
        self._shapes = [x.shape for x in leaves]
        order = sorted(range(len(leaves)), key=lambda i: leaves[i].size < MIN_SIZE)
        self._order, start, self._starts = order, 0, {}
        self.num_stored = 0  # blocks whose moments are stored in a format
        for i in order:
            self._starts[i] = start
            start += -(-leaves[i].size // BLOCK)
            if leaves[i].size >= MIN_SIZE:
                self.num_stored = start
        self.num_parameters = sum(x.size for x in leaves)

    def flatten(self, tree):
        leaves = jax.tree.leaves(tree)
        padded = [jnp.pad(leaves[i].ravel(), (0, -leaves[i].size % BLOCK)) for i in self._order]
        return jnp.concatenate(padded).reshape(-1, BLOCK)

    def unflatten(self, blocks):
        flat, leaves = blocks.ravel(), []
        for i, shape in enumerate(self._shapes):
            start, size = self._starts[i] * BLOCK, int(np.prod(shape))
            leaves.append(jax.lax.slice(flat, (start,), (start + size,)).reshape(shape))
        return jax.tree.unflatten(self._treedef, leaves)


class Gpt:
    """A GPT on words of program text: 12 layers of width 448, 4,096 words, 256 in a sequence."""

    layers, width, heads, vocabulary, time_steps, batch = 12, 448, 7, 4096, 256, 32
    peak = 1e-3

    def __init__(self):
        words = re.findall(rb"\w+|[^\w\s]|\n[ \t]*|[^\S\n]+", library_text())
        known = [word for word, _ in Counter(words).most_common(self.vocabulary - 1)]
        number = {word: i + 1 for i, word in enumerate(known)}  # 0: any other word
        ids = np.array([number.get(word, 0) for word in words], np.int32)
        self.learn, self.held_out = ids[: len(ids) * 19 // 20], ids[len(ids) * 19 // 20 :]

    def init(self, seed):
        keys = iter(jax.random.split(jax.random.key(seed), 16))
        n, d = self.layers, self.width

        def normal(*shape, scale=0.02):
            return scale * jax.random.normal(next(keys), shape)

        deep = 0.02 / np.sqrt(2 * n)
        return {
            "words": normal(self.vocabulary, d),
            "places": normal(self.time_steps, d),
            "blocks": {
                "norm1": jnp.ones((n, d)),
                "qkv": normal(n, d, 3 * d),
                "mix": normal(n, d, d, scale=deep),
                "norm2": jnp.ones((n, d)),
                "up": normal(n, d, 4 * d),
                "down": normal(n, 4 * d, d, scale=deep),
            },
            "norm": jnp.ones(d),
            "head": normal(d, self.vocabulary),
        }

    def loss(self, params, ids):
        def norm(x, scale):
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + 1e-6)
            return (y * scale).astype(x.dtype)

        def block(x, w):
            q, k, v = jnp.split(norm(x, w["norm1"]) @ w["qkv"], 3, -1)
            split = (*x.shape[:2], self.heads, -1)
            mixed = jax.nn.dot_product_attention(
                q.reshape(split), k.reshape(split), v.reshape(split), is_causal=True
            )
            x = x + mixed.reshape(x.shape) @ w["mix"]
            return x + jax.nn.gelu(norm(x, w["norm2"]) @ w["up"]) @ w["down"], None

        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        x = params["words"][ids[:, :-1]] + params["places"][: ids.shape[1] - 1]
        x, _ = jax.lax.scan(block, x, params["blocks"])
        logits = (norm(x, params["norm"]) @ params["head"]).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, ids[:, 1:, None], -1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, -1) - picked)


class ExampleModel:
    """The byte-level model of examples/tiny_llama.py; needs Flax."""

    time_steps, batch, peak = 128, 8, 2e-3

    def __init__(self):
        sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
        import tiny_llama  # pyright: ignore[reportMissingImports]
        from flax import nnx

        self._nnx, self._llama = nnx, tiny_llama
        ids = np.frombuffer(library_text(), np.uint8).astype(np.int32)
        self.learn, self.held_out = ids[: len(ids) * 19 // 20], ids[len(ids) * 19 // 20 :]
        self._graphdef = nnx.split(tiny_llama.Llama(nnx.Rngs(0)))[0]

    def init(self, seed):
        return self._nnx.split(self._llama.Llama(self._nnx.Rngs(seed)))[1]

    def loss(self, params, ids):
        return self._llama.loss_fn(self._nnx.merge(self._graphdef, params), ids, "float32")


def windows(ids, starts, time_steps):
    return jnp.asarray(ids[starts[:, None] + np.arange(time_steps + 1)])


class Training:
    """Trains a model with AdamW, clipped gradients, warm-up and cosine decay."""

    def __init__(self, model, steps):
        self.model, self.steps = model, steps
        self.layout = Layout(jax.eval_shape(lambda: model.init(0)))

    def rate(self, step):
        """Returns the learning rate. It rises for a tenth of the steps, then falls to peak / 10."""
        warmup = max(1, self.steps // 10)
        down = jnp.clip((step - warmup) / max(1, self.steps - warmup), 0, 1)
        cosine = 0.55 + 0.45 * jnp.cos(jnp.pi * down)
        return self.model.peak * jnp.where(step < warmup, (step + 1) / warmup, cosine)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(2, 3, 4))
    def step(self, fmt, params, m, v, ids, step):
        """Steps on arrays (blocks, 256). Returns params, m, v, loss, gradients and updates."""
        loss, grads = jax.value_and_grad(
            lambda blocks: self.model.loss(self.layout.unflatten(blocks), ids)
        )(params)
        grads = grads * jnp.minimum(1, 1 / (jnp.sqrt(jnp.sum(grads**2)) + 1e-12))
        m, v = advance(m, v, grads)
        updates = update_of(m, v, step)
        params = params - self.rate(step) * (updates + WEIGHT_DECAY * params)
        n = self.layout.num_stored
        stored_m, stored_v = fmt.store(m[:n], v[:n], step)
        m, v = jnp.concatenate([stored_m, m[n:]]), jnp.concatenate([stored_v, v[n:]])
        return params, m, v, loss, grads, updates

    def start(self, seed):
        """Returns parameters, moments and the generator of batches."""
        params = jax.jit(lambda: self.layout.flatten(self.model.init(seed)))()
        return params, jnp.zeros_like(params), jnp.zeros_like(params), np.random.default_rng(seed)

    def batch(self, rng):
        model = self.model
        starts = rng.integers(len(model.learn) - model.time_steps - 1, size=model.batch)
        return windows(model.learn, starts, model.time_steps)

    @functools.partial(jax.jit, static_argnums=0)
    def _loss(self, params, ids):
        return self.model.loss(self.layout.unflatten(params), ids)

    def held_out_loss(self, params, batches=16):
        model = self.model
        last = len(model.held_out) - model.time_steps - 1
        starts = np.linspace(0, last, batches * model.batch).astype(int).reshape(batches, -1)
        ids = [windows(model.held_out, s, model.time_steps) for s in starts]
        return float(np.mean([self._loss(params, x) for x in ids]))

    def run(self, fmt, seed):
        """Trains, and returns the losses of all steps and the held-out loss."""
        params, m, v, rng = self.start(seed)
        losses = []
        for step in range(self.steps):
            params, m, v, loss, _, _ = self.step(
                fmt, params, m, v, self.batch(rng), jnp.int32(step)
            )
            losses.append(loss)
        return [float(x) for x in losses], self.held_out_loss(params)


@jax.jit
def errors(updates, expected):
    """Returns the NMSE, and its median over blocks that move at all."""
    squared = jnp.sum((updates - expected) ** 2, 1)
    energy = jnp.sum(expected**2, 1)
    by_block = jnp.where(energy > 0, squared / energy, jnp.nan)
    return jnp.array([jnp.sum(squared) / jnp.sum(energy), jnp.nanmedian(by_block)])


@jax.jit
def worst(updates, expected):
    """Returns the error in RMS updates that 0.01 % of elements of every fourth block exceed."""
    error = jnp.sort(jnp.abs(updates - expected)[::4].ravel())
    return error[-1 - error.size // 10_000] / jnp.sqrt(jnp.mean(expected**2))


@functools.partial(jax.jit, static_argnums=0)
def store_once(fmt, m, v, step):
    """Returns the update after float32 moments went through the format once."""
    m, v = fmt.store(m, v, step)
    return update_of(m, v, step)


def octaves(v):
    """Returns the octaves from a block's smallest v above 0 to its largest.

    They are percentiles 10, 50, 90 and 99 over blocks.
    """
    smallest = jnp.min(jnp.where(v > 0, v, jnp.inf), 1)
    spread = np.asarray(jnp.log2(jnp.max(v, 1) / smallest))
    return np.percentile(spread[np.isfinite(spread)], [10, 50, 90, 99]).tolist()


def model_study(training, formats, num_blocks, every=10, rarely=100):
    """Returns the errors of each format on the gradients of one training in float32.

    Args:
      training: the training.
      formats: the formats.
      num_blocks: how many blocks to carry along, spread over the model; None for all.
      every: steps between two measurements of the error.
      rarely: steps between two measurements of the one-shot error and the worst errors.
    """
    params, m, v, rng = training.start(0)
    stored = training.layout.num_stored
    picked = np.linspace(0, stored - 1, min(num_blocks or stored, stored)).astype(int)
    shape = (len(picked), BLOCK)
    carried = {fmt: (jnp.zeros(shape), jnp.zeros(shape)) for fmt in formats}
    pick = jax.jit(lambda *arrays: tuple(x[picked] for x in arrays))
    rows = {fmt.name: {"steps": [], "errors": [], "at": [], "worst": [], "one-shot": []}
            for fmt in formats}  # fmt: skip
    for step in range(training.steps):
        now = jnp.int32(step)
        params, m, v, _, grads, updates = training.step(
            FLOAT32, params, m, v, training.batch(rng), now
        )
        grads, expected, exact_m, exact_v = pick(grads, updates, m, v)
        is_last = step == training.steps - 1
        for fmt in formats:
            m_fmt, v_fmt, mine = carry(fmt, *carried[fmt], grads[None], now)
            carried[fmt] = m_fmt, v_fmt
            row = rows[fmt.name]
            if step < 10 or step % every == every - 1 or is_last:
                row["steps"].append(step + 1)
                row["errors"].append(errors(mine[0], expected))
            if step % rarely == rarely - 1 or is_last:
                once = store_once(fmt, exact_m, exact_v, now)
                row["at"].append(step + 1)
                row["worst"].append((worst(mine[0], expected), worst(once, expected)))
                row["one-shot"].append(errors(once, expected)[0])
    rows = {
        name: {column: np.asarray(x).tolist() for column, x in row.items()}
        for name, row in rows.items()
    }
    return rows, octaves(pick(v)[0])


def summary(row, steps):
    """Returns early and carried NMSE, median, one-shot NMSE, worst carried and one-shot error."""
    at, error = np.array(row["steps"]), np.array(row["errors"])
    late = at > steps // 2
    worst_carried, worst_once = np.array(row["worst"]).T
    return {
        "first 10": float(error[at <= 10, 0].mean()),
        "to half": float(error[(at > 10) & ~late, 0].mean()),
        "carried": float(error[late, 0].mean()),
        "median": float(error[late, 1].mean()),
        "one-shot": float(np.mean(row["one-shot"])),
        "worst": float(worst_carried.max()),
        "worst 1-shot": float(worst_once.max()),
    }


def print_model(rows, steps, spread):
    print(
        "octaves from a block's largest v to its smallest: "
        + ", ".join(f"{x:.1f} ({p} %)" for x, p in zip(spread, (10, 50, 90, 99), strict=True))
    )
    table = {name: summary(row, steps) for name, row in rows.items()}
    columns = list(next(iter(table.values())))
    print(f"{'format':<38}{'bytes':>7}" + "".join(f"{c:>13}" for c in columns) + f"{'gain':>8}")
    size = {fmt.name: fmt.bytes_per_parameter for fmt in [*FORMATS, *SMALL_FORMATS]}
    for name, row in table.items():
        gain = table[BASELINE.name]["carried"] / row["carried"] if BASELINE.name in table else 0
        print(
            f"{name:<38}{size[name]:>7.3f}"
            + "".join(f"{x:>13.1e}" for x in row.values())
            + f"{gain:>8.1f}",
            flush=True,
        )
    return table


def loss_study(training, seeds):
    """Returns held-out losses and loss curves with float32, bitsandbytes' format and the winner."""
    results = {}
    print(
        f"\nheld-out loss after {training.steps} steps, by seed; then the mean training loss of the"
        " last 50 steps"
    )
    for fmt in (FLOAT32, BASELINE, WINNER):
        runs = [training.run(fmt, seed) for seed in seeds]
        results[fmt.name] = {"held_out": [loss for _, loss in runs], "curves": [c for c, _ in runs]}
        last = [float(np.mean(c[-50:])) for c, _ in runs]
        print(
            f"{fmt.name:<38}"
            + "".join(f"{loss:>10.4f}" for _, loss in runs)
            + "   "
            + "".join(f"{x:>10.4f}" for x in last),
            flush=True,
        )
    return results


def main(argv=None) -> None:
    """Runs the study that the command line asks for."""
    global B1  # traced functions read it
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--gpt", action="store_true", help="a GPT of 33M parameters instead of the example's model")
    add("--steps", type=int, default=1000, help="steps of the model (default: 1000)")
    add("--blocks", type=int, help="blocks to carry along (default: 32,768; 1,024 on a CPU)")
    add("--seeds", type=int, help="trainings with each format (default: 3 with --gpt, else 0)")
    add("--only", choices=["synthetic", "model", "idle"], help="one part of the study")
    add("--formats", nargs="+", metavar="WORD", help="formats whose name has such a word")
    add("--b1", type=float, default=float(B1), help="decay rate of first moments (default: 0.9)")
    add("--json", type=Path, metavar="FILE", help="file for every number")
    args = parser.parse_args(argv)
    if args.steps < 40:
        parser.error(f"argument --steps: {args.steps} is below 40")
    B1 = np.float32(args.b1)
    formats = FORMATS
    if args.formats:
        known = [*FORMATS, *SMALL_FORMATS]
        formats = [fmt for fmt in known if any(word in fmt.name for word in args.formats)]
        if not formats:
            parser.error("argument --formats: no format has such a name")
    names = [fmt.name for fmt in formats]
    assert len(set(names)) == len(names)
    device = jax.local_devices()[0]
    print(f"jax {jax.__version__} on {device.device_kind}")
    results: dict = {"jax": jax.__version__, "device": device.device_kind}
    clock = time.perf_counter()

    def lap(what):
        nonlocal clock
        now = time.perf_counter()
        print(f"[{what}: {now - clock:.0f} s]", flush=True)
        clock = now

    if args.only == "idle":
        results["idle"] = idle_study()
        lap("idle elements")
    elif args.only != "model" and not args.gpt:
        results["synthetic"] = synthetic_study(formats)
        print_synthetic(results["synthetic"])
        lap("synthetic")
    if args.only not in ("synthetic", "idle"):
        training = Training(Gpt() if args.gpt else ExampleModel(), args.steps)
        layout = training.layout
        num_blocks = args.blocks or (1024 if device.platform == "cpu" else 32768)
        seeds = (3 if args.gpt else 0) if args.seeds is None else args.seeds
        print(
            f"\n{'GPT' if args.gpt else 'model of the examples'}: {layout.num_parameters:,} "
            f"parameters, {args.steps} steps; text of {len(training.model.learn):,} tokens"
        )
        lap("preparation")
        rows, spread = model_study(training, formats, num_blocks)
        results["model"] = {"spread": spread, "formats": rows}
        results["summary"] = print_model(rows, args.steps, spread)
        lap("formats carried along")
        if seeds:
            results["losses"] = loss_study(training, range(seeds))
            lap("loss curves")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
