"""What the fine-tuning examples share: texts, the two trainings, the output, the options."""

import argparse
import dataclasses
import sysconfig
import time
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np
import optax
import psutil
from checkpointing import Checkpoints, Trained
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from matplotlib.figure import Figure
from tiny_llama import eval_step, train_step
from tqdm import tqdm

from paged_optax import memory_report, release

EVAL_WINDOWS = 64
EVAL_BATCH = 8
LOG_EVERY = 5  # steps; reading a loss waits for the device, so not at every step


# --------------------------------------------------------------------------------------------- text


def split(files: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens to learn from and tokens to hold out: the last tenth of every file."""
    ends = [len(text) * 9 // 10 for text in files]
    learn = b"".join(text[:end] for text, end in zip(files, ends, strict=True))
    hold_out = b"".join(text[end:] for text, end in zip(files, ends, strict=True))
    return np.frombuffer(learn, np.uint8), np.frombuffer(hold_out, np.uint8)


def windows(text: np.ndarray, starts: np.ndarray, seq_len: int) -> jax.Array:
    """Returns token ids (*starts.shape, seq_len + 1): inputs and, shifted by one, labels.

    `starts` has shape (batches, sequences). If a mesh is set, its devices share the sequences.
    """
    ids = text[starts[..., None] + np.arange(seq_len + 1)].astype(np.int32)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(ids)
    sharding = NamedSharding(mesh, P(None, mesh.axis_names))
    return jax.make_array_from_callback(ids.shape, sharding, ids.__getitem__)


# -------------------------------------------------------------------------------- the two trainings


@dataclasses.dataclass
class Result:
    """The outcome of a fine-tuning: losses in nats per token, sizes in bytes."""

    before: float  # held-out loss of the base model
    after: float
    tokens_per_second: float  # without the first step, which compiles
    parameters: int  # trained ones
    state_bytes: dict[str, int]  # of the optimizer state, by device
    report: str  # the optimizer's own account of its memory
    # columns: seconds, training loss, memory in use, memory of the optimizer state
    history: list[tuple[float, float, int, int]]
    token: str = "byte"


def held_out_loss(model: nnx.Module, text: np.ndarray, args: argparse.Namespace) -> float:
    """Returns the mean loss over windows that spread evenly over `text`, the same at every call."""
    starts = np.linspace(0, len(text) - args.seq_len - 1, EVAL_WINDOWS, dtype=np.int64)
    ids = windows(text, starts.reshape(-1, EVAL_BATCH), args.seq_len)
    # By index: an iterator over `ids` would put every batch on one device.
    return float(np.mean([eval_step(model, ids[i], args.dtype) for i in range(len(ids))]))


def train(model, optimizer, text, args, steps, accumulate, title, done=0, on_step=lambda n: None):
    """Updates `model` on random windows; yields (seconds, loss) every few steps.

    `done` of the `steps` were made before. After each, it calls `on_step` with their number.
    """
    rng = np.random.default_rng(args.seed)
    start = time.perf_counter()
    silent = jax.process_index() > 0
    with tqdm(total=steps, desc=title, unit="step", initial=done, disable=silent) as bar:
        for step in range(steps):
            starts = rng.integers(len(text) - args.seq_len, size=(accumulate, args.batch))
            if step < done:
                continue
            loss = train_step(model, optimizer, windows(text, starts, args.seq_len), args.dtype)
            bar.update()
            if step % LOG_EVERY == 0 or step == steps - 1:
                bar.set_postfix(loss=f"{float(loss):.3f}")
                yield time.perf_counter() - start, float(loss)
            on_step(step + 1)


def optimizer_with(adamw, peak: float, steps: int) -> optax.GradientTransformation:
    """Clips, then applies `adamw` with a learning rate that warms up to `peak` and decays to 0."""
    warmup = max(1, steps // 10)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    return optax.chain(optax.clip_by_global_norm(1.0), adamw(schedule, weight_decay=0.01))


def pretrain(model: nnx.Module, args: argparse.Namespace) -> None:
    """Trains all of a new model with float32 AdamW. The same arguments give the same model."""
    learn, _ = split(args.base_text)
    tx = optimizer_with(optax.adamw, 2e-3, args.pretrain_steps)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in train(model, optimizer, learn, args, args.pretrain_steps, 1, "pre-train"):
        pass


def memory_in_use() -> int:
    """Returns the bytes that XLA holds on the GPU. On a CPU it returns those of the process."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["bytes_in_use"] if stats else psutil.Process().memory_info().rss


def bytes_by_device(arrays) -> dict[str, int]:
    """Returns how many bytes of a tree of arrays each device holds."""
    held = Counter()
    for shard in (shard for x in jax.tree.leaves(arrays) for shard in x.addressable_shards):
        held[f"{shard.device.platform}:{shard.device.id}"] += shard.data.nbytes
    return dict(held)


def finetune(model: nnx.Module, optimizer: nnx.Optimizer, args: argparse.Namespace) -> Result:
    """Trains the variables that `optimizer` was made for on the target text."""
    learn, hold_out = split(args.text)
    paged = args.optimizer == "paged_adamw8bit"

    def state_bytes():
        if paged:  # the moments are not JAX arrays, so JAX cannot tell
            return {memory.device: memory.total for memory in memory_report(optimizer).devices}
        return bytes_by_device(nnx.state(optimizer, nnx.OptState))

    before = held_out_loss(model, hold_out, args)
    trained = Trained(model, optimizer)
    with Checkpoints(args.checkpoint_dir, args.save_every) as checkpoints:

        def save(step: int) -> None:
            if checkpoints.is_due(step):
                checkpoints.save(step, trained.read(), history)

        done, arrays, history = checkpoints.restore(trained.read())
        if done > 0:
            trained.write(arrays)
        earlier = history[-1][0] if history else 0.0  # seconds
        for seconds, loss in train(
            *(model, optimizer, learn, args, args.steps, args.accumulate, "fine-tune"),
            done=done,
            on_step=save,
        ):
            held = jax.process_count() * sum(state_bytes().values())
            history.append((earlier + seconds, loss, memory_in_use(), held))
    after = held_out_loss(model, hold_out, args)

    tokens = (args.steps - 1) * args.accumulate * args.batch * args.seq_len
    speed = tokens / max(history[-1][0] - history[0][0], 1e-9)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, optimizer.wrt)))
    held, report = state_bytes(), ""
    if paged:
        report = str(memory_report(optimizer))
        release(optimizer)  # training is over, so give the memory of the moments back
    return Result(before, after, speed, parameters, held, report, history)


# --------------------------------------------------------------------------------------- the output


def summary(result: Result, args: argparse.Namespace) -> str:
    """Describes quality and speed, and compares the optimizer's memory with float32 AdamW's."""
    rows = {args.optimizer: result.history[-1][3], "float32 AdamW": 8 * result.parameters}
    return "\n".join(
        [
            f"held-out loss {result.before:.4f} before, {result.after:.4f} after"
            f" (nats per {result.token})",
            f"{result.tokens_per_second:,.0f} tokens per second",
            f"\n{'optimizer memory':<18}{'bytes':>12}{'per parameter':>16}",
            *(f"{k:<18}{size:>12,}{size / result.parameters:>16.2f}" for k, size in rows.items()),
            f"\n{result.report}".rstrip(),
        ]
    )


def plot(result: Result, args: argparse.Namespace, title: str) -> None:
    """Saves loss and memory over time as `--out`."""
    seconds, losses, in_use, state = np.array(result.history).T
    figure = Figure(figsize=(8, 8), layout="constrained")  # without pyplot: needs no display
    top, middle, bottom = figure.subplots(3, sharex=True, height_ratios=(2, 1, 1))
    top.plot(seconds, losses, label="training")
    top.plot([0, seconds[-1]], [result.before, result.after], "o", label="held out")
    top.set(title=f"{title}, {args.optimizer}", ylabel=f"loss (nats per {result.token})")
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
    """Returns the bytes of a file, for argparse."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot read {path!r} ({error.strerror}); check the path"
        ) from None


def options(description: str, out: str, what: str, **defaults) -> argparse.ArgumentParser:
    """Returns the options of every example. `what` is trained, and `defaults` overrides."""
    parser = argparse.ArgumentParser(
        description=description,
        usage="%(prog)s [options]",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=["paged_adamw8bit", "adamw"], default="paged_adamw8bit")
    add("--steps", type=int, default=120, help=f"updates of the {what}")
    add("--batch", type=int, default=8, help="sequences in a micro-batch")
    add("--accumulate", type=int, default=2, help="micro-batches in an update")
    add("--seq-len", type=int, default=128, help="bytes in a sequence")
    add("--lr", type=float, default=2e-3, help=f"peak learning rate of the {what}")
    files = {"type": contents, "nargs": "+", "metavar": "FILE", "default": argparse.SUPPRESS}
    add("--text", **files, help="text to fine-tune on (default: the standard library's source)")
    add("--base-text", **files, help="text for the base model (default: the help topics of pydoc)")
    add("--pretrain-steps", type=int, default=200, help="updates of the base model")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute dtype")
    add("--seed", type=int, default=0, help="seed of the weights and the text's order")
    add("--out", type=Path, default=Path(out), help="where to save the plot")
    add("--checkpoint-dir", type=Path, help="save there, and go on from what is there")
    add("--save-every", type=int, default=20, help="updates between two checkpoints")
    parser.set_defaults(**defaults)
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Returns the options, checked and with the default texts filled in."""
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = int(name not in ("pretrain_steps", "seed"))
        if isinstance(value, int) and value < least:
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
