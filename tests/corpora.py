"""Small made-up corpora: a language of number words and its mirror, which a network can learn in seconds."""

import json
import random
from pathlib import Path

WORDS = {"eins": "one", "zwei": "two", "drei": "three", "vier": "four", "fünf": "five", "Hund": "dog", "Ball": "ball"}


def pairs(count: int, seed: int = 0, longest: int = 9) -> list[tuple[str, str]]:
    """`count` pairs of sentences of 1 to `longest` words, a word each for a word."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = [draw.choice(list(WORDS)) for _ in range(draw.randint(1, longest))]
        found.append((" ".join(words) + ".", " ".join(WORDS[word] for word in words) + "."))
    return found


def write_plain(folder: Path, **sizes: int) -> Path:
    """Plain files of each split: split.de and split.en."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(sizes.items()):
        for side, lang in enumerate(("de", "en")):
            lines = [pair[side] + "\n" for pair in pairs(count, seed=number)]
            (folder / f"{split}.{lang}").write_text("".join(lines), encoding="utf-8")
    return folder


def small_recipe(folder: Path, **overrides):
    """A translation recipe of seconds over the corpus in a folder; overrides as on the command line."""
    from pskd_timm import load_recipe

    settings = {
        "data.path": str(folder),
        "translation.vocab_size": 300,
        "translation.batch_tokens": 150,
        "translation.beam_size": 2,
        "translation.max_length": 40,
        "model.kwargs": {"layers": 1, "d_model": 16, "ffn_dim": 32, "heads": 2, "dropout": 0.1, "norm_first": True},
        "optim.schedule": "inverse_sqrt",
        "optim.lr": 0.01,
        "optim.warmup_steps": 10,
        "epochs": 2,
        "threads": 1,
        "pskd.store_topk": 5,
        "pskd.store_dtype": "float32",
        "tracking.log_every": 1,
    }
    return load_recipe("translation/multi30k_de_en", settings | {k.replace("__", "."): v for k, v in overrides.items()})


def write_table(path: Path, rows: list[dict]):
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
