"""Texts and conversations as rows of tokens, for fine-tuning.

A file that ends in `.jsonl` has an object with `text` or `messages` in each line; any other file is
one text. Conversations go through the tokenizer's chat template, and only what the assistant says
counts for the loss. Documents are packed: they follow each other, and every row is full.
"""

import dataclasses
import importlib
import inspect
import json
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HELD_OUT = 10  # every tenth document, or the last tenth of a text


@dataclasses.dataclass
class Document:
    """Tokens, and the weight of each in the loss."""

    ids: np.ndarray
    weights: np.ndarray


@dataclasses.dataclass
class Rows:
    """Packed tokens (rows, time + 1), and the weights (rows, time) of all but the first column."""

    ids: np.ndarray
    weights: np.ndarray


# ------------------------------------------------------------------------------------ documents


def from_text(text: str, tokenizer) -> Document:
    """Returns a text with the end-of-text token after it; every token counts."""
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return Document(np.array(ids, np.int32), np.ones(len(ids), np.float32))


def from_messages(messages: list[dict[str, Any]], tokenizer) -> Document:
    """Returns a conversation in which only answers count, each with the mark of its end."""
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in encoded["offset_mapping"]])
    weights = np.zeros(len(starts), np.float32)
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
        answered = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not (answered.startswith(asked) and text.startswith(answered)):
            raise ValueError(
                "this tokenizer's chat template changes earlier turns, so answers cannot be found"
                " in the text; give conversations with one answer, or plain texts"
            )
        weights[(starts >= len(asked)) & (starts < len(answered))] = 1
    return Document(np.array(encoded["input_ids"], np.int32), weights)


def read_documents(path: Path, tokenizer) -> Iterator[Document]:
    """Yields the documents of a file; an error names the line."""
    if path.suffix != ".jsonl":
        yield from_text(path.read_text(encoding="utf-8"), tokenizer)
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if "messages" in record:
                    yield from_messages(record["messages"], tokenizer)
                else:
                    yield from_text(record["text"], tokenizer)
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(
                    f'{path}:{number} is not {{"text": ...}} or {{"messages": [{{"role": ...,'
                    f' "content": ...}}, ...]}} ({error})'
                ) from None


# ------------------------------------------------------------------------------------------ rows


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Returns documents to learn from and to hold out."""
    if len(documents) >= HELD_OUT:
        held_out = documents[HELD_OUT - 1 :: HELD_OUT]
        return [d for i, d in enumerate(documents, 1) if i % HELD_OUT], held_out
    learn, hold_out = [], []
    for document in documents:
        end = len(document.ids) - len(document.ids) // HELD_OUT
        learn.append(Document(document.ids[:end], document.weights[:end]))
        hold_out.append(Document(document.ids[end:], document.weights[end:]))
    return learn, hold_out


def pack(documents: list[Document], time: int) -> Rows:
    """Returns rows of `time` inputs and as many labels.

    The last row is filled up with tokens that do not count. Rows in which none counts are left out.
    """
    ids = np.concatenate([d.ids for d in documents])
    weights = np.concatenate([d.weights for d in documents])
    rows = max(1, -(-(len(ids) - 1) // time))
    pad = rows * time + 1 - len(ids)
    ids, weights = np.pad(ids, (0, pad)), np.pad(weights, (0, pad))[1:].reshape(rows, time)
    ids = ids[np.arange(rows)[:, None] * time + np.arange(time + 1)]
    counts = weights.any(axis=1)
    return Rows(ids[counts], weights[counts])


def batches(rows: Rows, shape: tuple[int, ...], steps: int, seed: int, first: int = 0):
    """Yields (ids, weights) of `shape` rows for each step from `first` on.

    All rows come once, in random order, before any comes again.
    """
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape))
    epochs = -(-steps * size // len(rows.ids))
    order = np.concatenate([rng.permutation(len(rows.ids)) for _ in range(epochs)])
    for step in range(first, steps):
        chosen = order[step * size : (step + 1) * size].reshape(shape)
        yield rows.ids[chosen], rows.weights[chosen]


# ------------------------------------------------------- a data set that every Python ships


def python_questions() -> list[list[dict[str, str]]]:
    """Returns conversations on functions of the standard library; answers are their docstrings."""
    names = "argparse ast base64 bisect calendar collections colorsys configparser contextlib copy"
    names += (
        " csv datetime dis email fileinput fnmatch fractions ftplib functools gettext glob gzip"
    )
    names += " heapq html inspect io ipaddress itertools json keyword linecache locale logging"
    names += (
        " lzma mailbox math mimetypes operator os os.path pathlib pickle platform plistlib pprint"
    )
    names += " queue random re sched secrets selectors shelve shlex shutil signal smtplib socket"
    names += " sqlite3 ssl stat statistics string struct subprocess sys tarfile tempfile textwrap"
    names += (
        " threading time timeit token tokenize trace traceback types typing unicodedata unittest"
    )
    names += " urllib.parse urllib.request uuid warnings wave weakref webbrowser zipfile zlib"
    answers = {}  # each once, so that no answer is learnt from and held out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some functions are deprecated
        for name in names.split():
            for function, value in sorted(vars(importlib.import_module(name)).items()):
                lines = (inspect.getdoc(value) or "").partition("\n\n")[0].split("\n")
                answer = " ".join(lines).strip()
                if callable(value) and not function.startswith("_") and 20 < len(answer) < 300:
                    answers.setdefault(answer, f"What does {name}.{function} do in Python?")
    conversations = [
        [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        for answer, question in answers.items()
    ]
    random.Random(0).shuffle(conversations)
    return conversations
