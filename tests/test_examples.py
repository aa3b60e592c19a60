"""Examples that the suite runs itself: what they claim is checked, not only that they end."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from processes import free_port

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

FSDP = """
    import collections, re, sys
    sys.path.insert(0, sys.argv[1])
    import jax, numpy as np
    from flax import nnx
    import finetuning, fsdp_finetune, tiny_llama
    from paged_optax import paged_adamw8bit

    result = fsdp_finetune.main(["--devices=8", "--pretrain-steps=10", "--steps=10"])
    assert result.after < result.before < 5.0
    assert len(result.state_bytes) == 8

    args = fsdp_finetune.parse_args(["--devices=8"])
    with jax.set_mesh(fsdp_finetune.make_mesh(args)):
        model = fsdp_finetune.make_model(0)
        optimizer = nnx.Optimizer(model, paged_adamw8bit(1e-3), wrt=nnx.Param)
        ids = finetuning.windows(np.zeros(256, np.uint8), np.zeros((2, 8), int), 128)
        lowered = tiny_llama.train_step.lower(model, optimizer, ids, "bfloat16")
    program = lowered.compile().as_text()
    (call,) = (line for line in program.splitlines() if '="paged_optax_update' in line)
    shapes = re.findall(r"f32.([0-9,]+)", call.split("operand_layout_constraints=")[1])
    operands = [tuple(map(int, shape.split(","))) for shape in shapes]
    parameters = jax.tree.leaves(nnx.state(model))
    shards = [x.addressable_shards[0].data.shape for x in parameters]
    assert not collections.Counter(shards) - collections.Counter(operands), (shards, operands)
    assert not {x.shape for x in parameters} & set(operands), operands
    # A gradient is reduced and scattered at once, so that it is whole on no device.
    assert len(re.findall(r" reduce-scatter\\(", program)) == len(parameters)
"""


@pytest.mark.endurance
def test_fsdp_keeps_gradients_in_shards(tmp_path):
    for module in "matplotlib", "psutil", "tqdm":
        pytest.importorskip(module)
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FSDP), str(EXAMPLES)],
        cwd=tmp_path,  # not a checkout, whose source folder would be imported; takes the plot
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert process.returncode == 0, process.stderr
    assert "1/8 of them" in process.stdout
    assert (tmp_path / "fsdp_finetune.png").exists()


RESUMED = """
    import json, sys
    sys.path.insert(0, sys.argv[1])
    import importlib
    result = importlib.import_module(sys.argv[2]).main(sys.argv[3:])
    losses = [loss for _, loss, _, _ in result.history]
    print("losses", json.dumps([result.before, *losses, result.after]))
"""


def start_example(name, folder, *options):
    # Programs are compiled once for all runs.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    command = [sys.executable, "-c", textwrap.dedent(RESUMED), str(EXAMPLES), name]
    small = ["--steps=9", "--pretrain-steps=2", "--seq-len=32", "--accumulate=1", "--save-every=2"]
    return subprocess.Popen(
        [*command, *small, f"--text={folder / 'text.py'}", *options],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"} | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def losses_of(process):
    out, err = process.communicate(timeout=1800)
    assert process.returncode == 0, err
    (line,) = [line for line in out.splitlines() if line.startswith("losses")]
    return json.loads(line.removeprefix("losses"))


@pytest.mark.endurance
@pytest.mark.parametrize("name", ["lora_finetune", "fsdp_finetune"])
def test_example_resumes_after_a_kill(name, tmp_path):
    """The losses are those of a run that never stopped, in every digit."""
    for module in ["matplotlib", "psutil", "tqdm"] + ["qwix"] * (name == "lora_finetune"):
        pytest.importorskip(module)
    (tmp_path / "text.py").write_text("import this\n" * 1000)
    whole = losses_of(start_example(name, tmp_path))
    folder = tmp_path / "run"
    with start_example(name, tmp_path, f"--checkpoint-dir={folder}") as process:
        while process.poll() is None and not list(folder.glob("[0-9]*")):
            time.sleep(0.01)
        process.kill()
    assert losses_of(start_example(name, tmp_path, f"--checkpoint-dir={folder}")) == whole


@pytest.mark.endurance
def test_fsdp_in_two_processes(tmp_path):
    """Each has four of the eight devices; the first one alone reports."""
    for module in "matplotlib", "psutil", "tqdm":
        pytest.importorskip(module)
    job = ["--distributed", f"localhost:{free_port()}", "2"]
    children = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLES / "fsdp_finetune.py"), *job, str(index)]
            + ["--steps=2", "--pretrain-steps=2", f"--out={index}.png"],
            cwd=tmp_path,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        texts = [child.communicate(timeout=900)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(texts)
    assert "1/8 of them" in texts[0] and "elsewhere" in texts[0]
    assert "held-out" not in texts[1]
    assert [path.name for path in tmp_path.glob("*.png")] == ["0.png"]


def run_before_and_after(tmp_path, *arguments):
    for module in "matplotlib", "psutil", "pynvml", "tqdm":
        pytest.importorskip(module)
    return subprocess.run(
        [sys.executable, str(EXAMPLES / "memory_before_after.py"), *arguments],
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=1800,
    )


@pytest.mark.slow
def test_training_that_is_watched(tmp_path):
    text = tmp_path / "text.py"
    text.write_text("import this\n" * 1000)
    options = "--optimizer=paged_adamw8bit", "--layers=1", "--steps=2", f"--text={text}"
    process = run_before_and_after(tmp_path, *options)
    assert process.returncode == 0, process.stderr
    assert "blocks (9)" in process.stdout  # the optimizer's own account, by branch of the model


@pytest.mark.slow
def test_without_a_gpu_there_is_nothing_to_watch(tmp_path):
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is a GPU")
    process = run_before_and_after(tmp_path)
    assert process.returncode == 1
    assert "this needs an NVIDIA GPU" in process.stdout
    assert os.listdir(tmp_path) == []
