"""QLoRA fine-tuning of a small Llama-style model with 8-bit AdamW moments outside XLA's memory.

What happens, in the order of `main`:

1. A small base model is pre-trained briefly on English text that every CPython ships (the help
   topics of `pydoc`). It stands in for the checkpoint that you would load instead.
2. Its weights are quantized to NF4 and get LoRA adapters (qwix; the model's code is not touched).
3. The adapters learn another kind of text, the source code of the standard library, with
   `optax.chain(clip, paged_adamw8bit(schedule))`; what the model makes of text that it has not
   seen is measured before and after.
4. The optimizer's memory is printed beside that of float32 AdamW, and a plot is saved.

Nothing is downloaded. Tokens are bytes, losses are in nats per byte. Try::

    python examples/lora_finetune.py --optimizer adamw
    python examples/lora_finetune.py --text my_notes/*.md --rank 32 --steps 300
"""

import argparse
import dataclasses
import functools
import sysconfig
import time
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
import qwix
from flax import nnx
from matplotlib.figure import Figure
from tqdm import tqdm

from paged_optax import memory_report, paged_adamw8bit, release

VOCAB = 256  # one token per byte value
DIM, LAYERS, HEADS, KV_HEADS, HIDDEN = 256, 2, 8, 4, 704
NF4_TILE = 64  # weights that share one scale, as in the QLoRA paper; divides DIM and HIDDEN
EVAL_WINDOWS = 64
LOG_EVERY = 5  # steps; reading a loss waits for the device, so not at every step


# ---------------------------------------------------------------------------------------- the model


def rope(x: jax.Array) -> jax.Array:
    """Rotates the two halves of every head of `x` (batch, time, heads, head_dim) by position."""
    time_steps, head_dim = x.shape[1], x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, head_dim, 2) / head_dim)
    angle = jnp.arange(time_steps)[:, None, None] * frequency  # (time, 1, head_dim / 2)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; `KV_HEADS` key/value heads serve `HEADS` query heads."""

    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.q_proj = linear(DIM, DIM)
        self.k_proj = linear(DIM, DIM // HEADS * KV_HEADS)
        self.v_proj = linear(DIM, DIM // HEADS * KV_HEADS)
        self.o_proj = linear(DIM, DIM)

    def __call__(self, x):
        q, k, v = (
            project(x).reshape(*x.shape[:2], -1, DIM // HEADS)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = jax.nn.dot_product_attention(rope(q), rope(k), v, is_causal=True)
        return self.o_proj(mixed.reshape(x.shape))


class SwiGLU(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gate_proj = linear(DIM, HIDDEN)
        self.up_proj = linear(DIM, HIDDEN)
        self.down_proj = linear(HIDDEN, DIM)

    def __call__(self, x):
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention_norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.attention = Attention(rngs)
        self.mlp_norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.mlp = SwiGLU(rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    """Byte-level decoder: token ids (batch, time) to logits (batch, time, VOCAB)."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(VOCAB, DIM, rngs=rngs)
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(DIM, rngs=rngs)
        self.head = nnx.Linear(DIM, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


# -------------------------------------------------------------------------------- loss and one step


def loss_fn(model: nnx.Module, ids: jax.Array, dtype: str) -> jax.Array:
    """Mean next-byte cross-entropy of `ids` (batch, time + 1), computed in `dtype`.

    The stored parameters stay float32: a bfloat16 adapter would round small updates away.
    """

    def cast(x):  # leaves the uint4 codes of NF4 weights alone
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    graphdef, state = nnx.split(model)
    logits = nnx.merge(graphdef, jax.tree.map(cast, state))(ids[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


eval_step = nnx.jit(loss_fn, static_argnames="dtype")


@nnx.jit(static_argnames="dtype", donate_argnames=("model", "optimizer"))
def train_step(model: nnx.Module, optimizer: nnx.Optimizer, ids: jax.Array, dtype: str):
    """One update from the mean gradient over the micro-batches `ids` (micro, batch, time + 1).

    Gradients are averaged first and the optimizer runs once. (`optax.MultiSteps` would run it on
    every micro-batch and throw results away, which moments that are updated in place forbid.)
    """
    value_and_grad = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, optimizer.wrt))

    def add_micro_batch(total, ids):
        step = value_and_grad(nnx.clone(model), ids, dtype)  # a copy of this trace level
        return jax.tree.map(jnp.add, total, step), None

    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, optimizer.wrt))
    total, _ = jax.lax.scan(add_micro_batch, (jnp.zeros(()), zeros), ids)
    loss, grads = jax.tree.map(lambda x: x / len(ids), total)
    optimizer.update(model, grads)
    return loss


# ----------------------------------------------------------------------- text and the two trainings


@dataclasses.dataclass
class Result:
    """Outcome of a fine-tuning: losses in nats per byte, sizes in bytes."""

    before: float  # held-out loss of the NF4 model, adapters still without effect
    after: float
    tokens_per_second: float  # without the first step, which compiles
    parameters: int  # trained ones
    report: str  # the optimizer's own account of its memory
    # columns: seconds, training loss, memory in use, memory of the optimizer state
    history: list[tuple[float, float, int, int]]


def split(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens to learn from and tokens to hold out: the last tenth of every file."""
    ends = [len(text) * 9 // 10 for text in files]
    learn = b"".join(text[:end] for text, end in zip(files, ends, strict=True))
    hold_out = b"".join(text[end:] for text, end in zip(files, ends, strict=True))
    return np.frombuffer(learn, np.uint8), np.frombuffer(hold_out, np.uint8)


def windows(text: np.ndarray, starts: np.ndarray, seq_len: int) -> jax.Array:
    """Token ids (*starts.shape, seq_len + 1): inputs and, shifted by one, labels."""
    return jnp.asarray(text[starts[..., None] + np.arange(seq_len + 1)], jnp.int32)


def held_out_loss(model: nnx.Module, text: np.ndarray, args: argparse.Namespace) -> float:
    """Mean loss over windows spread evenly over `text`: the same ones at every call."""
    starts = np.linspace(0, len(text) - args.seq_len - 1, EVAL_WINDOWS, dtype=np.int64)
    ids = windows(text, starts.reshape(-1, 8), args.seq_len)
    return float(np.mean([eval_step(model, batch, args.dtype) for batch in ids]))


def train(model, optimizer, text, args, steps, accumulate, title):
    """Updates `model` `steps` times on random windows; yields (seconds, loss) every few steps."""
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    with tqdm(total=steps, desc=title, unit="step") as bar:
        for step in range(steps):
            starts = rng.integers(len(text) - args.seq_len, size=(accumulate, args.batch))
            loss = train_step(model, optimizer, windows(text, starts, args.seq_len), args.dtype)
            bar.update()
            if step % LOG_EVERY == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(loss):.3f}")
                yield time.perf_counter() - start, float(loss)


def optimizer_with(adamw, peak: float, steps: int) -> optax.GradientTransformation:
    """Clipping, then `adamw` under a learning rate that warms up to `peak` and decays to 0."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), adamw(schedule, weight_decay=0.01))


def pretrain(args: argparse.Namespace) -> Llama:
    """The base model, all of it trained in float32 AdamW; same arguments, same model."""
    learn, _ = split(args.base_text)
    model = Llama(nnx.Rngs(args.seed))
    tx = optimizer_with(optax.adamw, 2e-3, args.pretrain_steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in train(model, optimizer, learn, args, args.pretrain_steps, 1, "pre-train"):
        pass
    return model


def add_adapters(base: Llama, args: argparse.Namespace) -> nnx.Module:
    """A copy of `base` with its projections in NF4, each with a LoRA adapter in float32."""
    quantized = {"weight_qtype": "nf4", "tile_size": NF4_TILE}
    provider = qwix.LoraProvider(
        module_path=r".*_proj", rank=args.rank, alpha=2 * args.rank, **quantized
    )
    ids = jnp.zeros((1, args.seq_len), jnp.int32)  # qwix finds the weights by running the model
    model = qwix.apply_lora_to_model(base, provider, ids, rngs=nnx.Rngs(args.seed))
    assert isinstance(model, nnx.Module)
    # The arrays that were not quantized are still those of `base`, which donation would destroy.
    nnx.update(model, jax.tree.map(jnp.copy, nnx.state(model)))
    return model


def memory_in_use() -> int:
    """Bytes that XLA holds on the GPU; on a CPU, where XLA does not count, of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def finetune(base: Llama, args: argparse.Namespace) -> Result:
    """Trains adapters on the target text over a quantized copy of `base`."""
    learn, hold_out = split(args.text)
    model = add_adapters(base, args)
    paged = args.optimizer == "paged_adamw8bit"
    tx = optimizer_with(paged_adamw8bit if paged else optax.adamw, args.lr, args.steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    def state_bytes():
        if paged:  # the moments are not JAX arrays, so JAX cannot tell
            return memory_report(optimizer.opt_state).total
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.OptState)))

    before = held_out_loss(model, hold_out, args)
    steps = train(model, optimizer, learn, args, args.steps, args.accumulate, "fine-tune")
    history = [(*seconds_loss, memory_in_use(), state_bytes()) for seconds_loss in steps]
    after = held_out_loss(model, hold_out, args)

    tokens = (args.steps - 1) * args.accumulate * args.batch * args.seq_len
    speed = tokens / max(history[-1][0] - history[0][0], 1e-9)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))
    report = ""
    if paged:
        report = str(memory_report(optimizer.opt_state))
        release(optimizer.opt_state)  # training is over: give the moments back now
    return Result(before, after, speed, parameters, report, history)


# ------------------------------------------------------------------------------------ what is shown


def summary(result: Result, args: argparse.Namespace) -> str:
    """Quality, speed, and the optimizer's memory beside that of float32 AdamW."""
    rows = {args.optimizer: result.history[-1][3], "float32 AdamW": 8 * result.parameters}
    return "\n".join(
        [
            f"held-out loss {result.before:.4f} before, {result.after:.4f} after (nats per byte)",
            f"{result.tokens_per_second:,.0f} tokens per second",
            f"\n{'optimizer memory':<18}{'bytes':>12}{'per parameter':>16}",
            *(f"{k:<18}{size:>12,}{size / result.parameters:>16.2f}" for k, size in rows.items()),
            f"\n{result.report}".rstrip(),
        ]
    )


def plot(result: Result, args: argparse.Namespace) -> None:
    """Saves loss and memory over time as `--out`."""
    seconds, losses, in_use, state = np.array(result.history).T
    figure = Figure(figsize=(8, 8), layout="constrained")  # without pyplot: needs no display
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(2, 1, 1))
    top.plot(seconds, losses, label="training")
    top.plot([0, seconds[-1]], [result.before, result.after], "o", label="held out")
    top.set(title=f"LoRA, rank {args.rank}, {args.optimizer}", ylabel="loss (nats per byte)")
    top.legend()
    middle.plot(seconds, in_use / 2**20)
    whose = "process" if jax.default_backend() == "cpu" else "held by XLA"
    middle.set(ylabel=f"{whose} (MiB)", ylim=(0, 1.2 * max(in_use) / 2**20))
    bottom.plot(seconds, state / 2**20, label=args.optimizer)
    float32 = 8 * result.parameters / 2**20
    bottom.axhline(float32, color="gray", ls="--", label="float32 AdamW")
    bottom.set(xlabel="seconds", ylabel="optimizer (MiB)", ylim=(0, 1.2 * float32))
    bottom.legend(loc="center right")
    figure.savefig(args.out, dpi=120)


# --------------------------------------------------------------------------------- the command line


def contents(path: str) -> bytes:
    """An argparse type: the bytes of a file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot read {path!r} ({error.strerror}); check the path"
        ) from None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked, with the default texts filled in."""
    parser = argparse.ArgumentParser(
        description="QLoRA fine-tuning of a small language model with paged_adamw8bit.",
        usage="%(prog)s [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=["paged_adamw8bit", "adamw"], default="paged_adamw8bit")
    add("--rank", type=int, default=32, help="rank of the adapters")
    add("--steps", type=int, default=120, help="updates of the adapters")
    add("--batch", type=int, default=8, help="sequences in a micro-batch")
    add("--accumulate", type=int, default=2, help="micro-batches in an update")
    add("--seq-len", type=int, default=128, help="bytes in a sequence")
    add("--lr", type=float, default=2e-3, help="peak learning rate of the adapters")
    files = {"type": contents, "nargs": "+", "metavar": "FILE", "default": argparse.SUPPRESS}
    add("--text", **files, help="for the adapters (default: the standard library's source)")
    add("--base-text", **files, help="for the base model (default: the help topics of pydoc)")
    add("--pretrain-steps", type=int, default=200, help="updates of the base model")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation")
    add("--seed", type=int, default=0, help="of the weights and the order of the text")
    add("--out", type=Path, default=Path("lora_finetune.png"), help="the plot")
    args = parser.parse_args(argv)

    for name in "rank", "steps", "batch", "accumulate", "seq_len", "pretrain_steps", "seed":
        value, least = getattr(args, name), int(name not in ("pretrain_steps", "seed"))
        if value < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is below {least}")
    if not args.lr > 0:
        parser.error(f"argument --lr: {args.lr} is not a learning rate; give one above 0")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"argument --out: no folder '{args.out.parent}'; create it first")
    if args.out.is_dir():
        parser.error(f"argument --out: '{args.out}' is a folder; give the name of a PNG file")
    if "base_text" not in args:
        args.base_text = [topic.encode() for topic in topics.values()]
    if "text" not in args:
        stdlib = Path(sysconfig.get_path("stdlib"))
        args.text = [path.read_bytes() for path in sorted(stdlib.glob("*.py"))]
    for option, files in ("--text", args.text), ("--base-text", args.base_text):
        learn, hold_out = split(files)
        if len(hold_out) <= args.seq_len:
            parser.error(
                f"argument {option}: {len(learn) + len(hold_out)} bytes are too few for sequences "
                f"of {args.seq_len} (a tenth is held out); give about {10 * (args.seq_len + 1)} "
                "bytes or a smaller --seq-len"
            )
    return args


def main(argv: list[str] | None = None) -> Result:
    """Pre-trains, fine-tunes, and shows what came of it."""
    args = parse_args(argv)
    result = finetune(pretrain(args), args)
    print(summary(result, args))
    plot(result, args)
    print(f"plot saved as {args.out}")
    return result


if __name__ == "__main__":
    main()
