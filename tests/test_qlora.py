"""The QLoRA example: which tokens count, how they are packed, and a whole run that is resumed."""

import json
import types
from collections import Counter

import jax
import numpy as np
import pytest
import text_data
from text_data import Document, Rows

WORDS = "<end> <user> <assistant> yes no why because the sky is blue red green".split()


class Tokenizer:
    """Words are tokens; has what the example uses of a tokenizer of transformers."""

    eos_token_id = 0
    chat_template = "yes"

    def __call__(self, text, add_special_tokens=True, return_offsets_mapping=False):
        ids, offsets, place = [], [], 0
        for word in text.split():
            place = text.index(word, place)
            ids.append(WORDS.index(word))
            offsets.append((place, place + len(word)))
            place += len(word)
        return {"input_ids": ids, "offset_mapping": offsets}

    def apply_chat_template(self, messages, tokenize=False, add_generation_prompt=False):
        turns = [f"<{m['role']}> {m['content']} <end> " for m in messages]
        return "".join(turns) + "<assistant> " * add_generation_prompt

    def decode(self, ids, skip_special_tokens=True):
        return " ".join(WORDS[i % len(WORDS)] for i in ids)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def test_only_answers_count():
    document = text_data.from_messages(
        chat("why is the sky blue", "because", "is the sky red", "no no"), Tokenizer()
    )
    counted = [WORDS[i] for i, w in zip(document.ids, document.weights, strict=True) if w]
    assert counted == "because <end> no no <end>".split()
    assert len(document.ids) == 20


def test_template_that_changes_earlier_turns():
    class Last(Tokenizer):
        def apply_chat_template(self, messages, **options):
            return super().apply_chat_template(messages[-2:], **options)

    with pytest.raises(ValueError, match="give conversations with one answer"):
        text_data.from_messages(chat("why", "because", "why", "yes"), Last())


def test_files(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"messages": chat("why", "because")}) + "\n\n" + '{"text": "the sky"}\n'
    )
    conversation, text = text_data.read_documents(tmp_path / "a.jsonl", Tokenizer())
    assert conversation.weights.sum() == 2
    assert text.ids.tolist() == [7, 8, 0] and text.weights.all()
    (tmp_path / "b.txt").write_text("sky is\nblue")
    (plain,) = text_data.read_documents(tmp_path / "b.txt", Tokenizer())
    assert plain.ids.tolist() == [8, 9, 10, 0]
    for line in "{", "3", '{"words": 1}', '{"messages": [{"role": "user"}]}':
        (tmp_path / "a.jsonl").write_text('{"text": "sky"}\n' + line)
        with pytest.raises(ValueError, match=r"a.jsonl:2 is not \{\"text\""):
            list(text_data.read_documents(tmp_path / "a.jsonl", Tokenizer()))


@pytest.mark.parametrize("size", [2, 10, 11, 12, 37])
def test_each_token_is_a_label_once(size):
    ids = np.arange(1, size + 1, dtype=np.int32)
    weights = (ids % 3 == 0).astype(np.float32)
    documents = [
        Document(x, w)
        for x, w in zip(np.array_split(ids, 2), np.array_split(weights, 2), strict=True)
    ]
    rows = text_data.pack(documents, 5)
    assert rows.ids.shape[1] == 6 and rows.weights.shape[1] == 5
    assert rows.weights.any(axis=1).all()
    labels = rows.ids[:, 1:][rows.weights > 0]
    np.testing.assert_array_equal(labels, ids[1:][weights[1:] > 0])
    np.testing.assert_array_equal(rows.ids[:, :-1][rows.weights > 0] + 1, labels)


def test_held_out_documents_and_ends():
    many = [Document(np.full(3, i), np.ones(3, np.float32)) for i in range(25)]
    learn, hold_out = text_data.split(many)
    assert [d.ids[0] for d in hold_out] == [9, 19] and len(learn) == 23
    few = [Document(np.arange(20), np.ones(20, np.float32))]
    (learn,), (hold_out,) = text_data.split(few)
    assert hold_out.ids.tolist() == [18, 19] and len(learn.ids) == 18


def test_all_rows_come_before_any_comes_again():
    rows = Rows(np.arange(14)[:, None], np.arange(14)[:, None] * 10)
    everything = list(text_data.batches(rows, (2, 3), steps=7, seed=0))
    drawn = np.concatenate([ids.reshape(-1) for ids, _ in everything])
    for epoch in np.split(drawn, 3):
        assert Counter(epoch) == Counter(range(14))
    assert all((weights == 10 * ids).all() for ids, weights in everything)
    resumed = list(text_data.batches(rows, (2, 3), steps=7, seed=0, first=4))
    for (ids, _), (again, _) in zip(everything[4:], resumed, strict=True):
        np.testing.assert_array_equal(ids, again)


def test_questions_on_python():
    conversations = text_data.python_questions()
    answers = Counter(answer["content"] for _, answer in conversations)
    assert len(conversations) > 500 and set(answers.values()) == {1}
    assert conversations == text_data.python_questions()


# -------------------------------------------------------------------------------- the whole run


@pytest.fixture
def example(tmp_path, monkeypatch):
    """The example's modules, a tiny checkpoint and texts, in a folder of their own."""
    for module in "matplotlib", "orbax.checkpoint", "psutil", "safetensors", "tqdm":
        pytest.importorskip(module)
    import qlora

    from test_hf_checkpoint import write

    write(tmp_path / "model")
    lines = [json.dumps({"messages": chat("why is the sky blue", "because the sky is")})] * 40
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qlora, "load_tokenizer", lambda folder: Tokenizer())
    arguments = "model --text chats.jsonl --steps 6 --warmup 1 --seq-len 16 --batch 2"
    arguments += " --rank 4 --lr 0.02 --log-every 1 --answer-tokens 3 --prompt why"
    arguments += " --dtype float32 --save-every 2 --devices 1"
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules need it
        yield types.SimpleNamespace(qlora=qlora, arguments=arguments.split(), folder=tmp_path)


@pytest.mark.endurance
@pytest.mark.parametrize("optimizer", ["paged_adamw8bit", "adamw"])
def test_a_run_that_was_killed_goes_on(example, optimizer, capsys, monkeypatch):
    qlora, save = example.qlora, example.qlora.Checkpoints.save
    arguments = [*example.arguments, "--optimizer", optimizer]
    whole = qlora.main([*arguments, "--adapter", "whole"])
    assert whole.after < whole.before
    printed = capsys.readouterr().out
    assert "before: " in printed and "after: " in printed
    assert ("cpu:0" in printed) == optimizer.startswith("paged")
    assert (example.folder / "qlora.png").exists()

    def killed(self, step, state, history):
        save(self, step, state, history)
        if step == 5:
            raise KeyboardInterrupt

    resumed = [*arguments, "--adapter", "resumed", "--checkpoint-dir", "run"]
    monkeypatch.setattr(qlora.Checkpoints, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        qlora.main(resumed)
    monkeypatch.setattr(qlora.Checkpoints, "save", save)
    result = qlora.main(resumed)
    assert [row[1] for row in result.history] == [row[1] for row in whole.history]
    assert result.after == whole.after
    file = "adapter_model.safetensors"
    assert (example.folder / "whole" / file).read_bytes() == (
        example.folder / "resumed" / file
    ).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "paged_lion8bit"])
def test_other_optimizers_and_targets(example, optimizer):
    changed = f"--optimizer {optimizer} --targets q_proj up_proj --base nf4-double --lr 0.003"
    result = example.qlora.main([*example.arguments, *changed.split()])
    assert result.after < result.before
    parameters = 2 * 4 * (64 + 64 + 64 + 128)
    assert result.parameters == parameters
    per_parameter = sum(result.state_bytes.values()) / parameters
    assert per_parameter > 8 if optimizer == "adamw" else per_parameter <= 4.1  # small leaves


def test_arguments_that_make_no_sense(example, capsys):
    for arguments, message in (
        ([], "give the folder of a checkpoint, or --smollm2"),
        (["model", "--smollm2"], "give the folder of a checkpoint, or --smollm2"),
        (["model", "--rank", "0"], "--rank: 0 is below 1"),
        (["model", "--text", "none.txt"], "there is no file 'none.txt'"),
        (["model", "--out", "no/x.png"], "no folder 'no'; create it first"),
    ):
        with pytest.raises(SystemExit):
            example.qlora.parse_args(arguments)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="there is no config.json"):
        example.qlora.main(["nothing", "--text", "chats.jsonl", "--prompt", "why"])


def test_every_optimizer_has_its_arguments(example):
    params = {"w": np.ones((2, 8), np.float32)}
    assert len(example.qlora.OPTIMIZERS) > 10
    for name in example.qlora.OPTIMIZERS:
        args = example.qlora.parse_args(["model", "--optimizer", name])
        example.qlora.make_optimizer(args).init(params)
