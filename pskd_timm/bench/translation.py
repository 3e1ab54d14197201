"""What PS-KD adds to a step over tokens, and this package's run beside transformers' own trainer."""

import random
import string
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from ..methods.build import METHODS
from ..optim import make_optimizer
from ..progress import Display, readable
from ..recipe import Recipe
from ..recipe_files import load_recipe
from ..run.result import read_lines
from ..store import store_bytes
from ..tasks import open_task
from ..training import train
from .rounds import peak, ratio, rounds, timed, wait

TITLE = "a step over target tokens (transformer_tiny, 10,000 pieces, 4,096 tokens), a run beside Seq2SeqTrainer, beam search"
OPTIONS = ("text",)
PAIRS, WORDS = 1_500, 9_000  # of the made-up corpus
TAUGHT = {
    "pskd top-20": {"store_topk": 20},
    "pskd snapshot": {"teacher": "snapshot"},
}
SECONDS, TURNS, SENTENCES, LENGTH = 30.0, 2, 1000, 14


def measure(say: Callable[[str], None], text: str | None = None) -> list[dict]:
    """Rows of seconds and ratios; `text` is a folder of pairs (`de` and `en`), by default random words of such lengths."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        say("  not measured: it needs pip install 'pskd_timm[translation]'")
        return []
    with tempfile.TemporaryDirectory() as folder:
        recipe = bench_recipe(text or made_up(Path(folder) / "text"), Path(folder) / "runs")
        task = open_task(recipe)
        size = store_bytes(task.num_rows, task.num_classes, "float16", 1, 20)
        say(f"  prediction store: {task.num_rows:,} tokens × {task.num_classes:,} pieces, top-20: {readable(size)}")
        rows = [{"step": "store", "num_rows": task.num_rows, "num_classes": task.num_classes, "bytes": size}]
        return rows + measure_steps(task, say) + measure_runs(recipe, task, Path(folder), say) + measure_beam(task, say)


def bench_recipe(text: str, output: Path) -> Recipe:
    """A recipe of one epoch over the pairs in a folder."""
    settings = {
        "data.path": text,
        "data.holdout_fraction": 0.01,
        "data.test": False,
        "data.limit_train": PAIRS,
        "translation.vocab_size": 10_000,
        "translation.batch_tokens": 4096,
        "translation.beam_size": 1,
        "translation.max_length": 64,
        "model.kwargs": {"dropout": 0.3},
        "method": "baseline",
        "epochs": 1,
        "threads": torch.get_num_threads(),
        "output_dir": str(output),
        "tracking.log_every": 1000,
    }
    return load_recipe("translation/multi30k_de_en", settings)


def measure_steps(task, say) -> list[dict]:
    """Forward, backward and update: cross-entropy alone, and with PS-KD's two teachers, on the same batches."""
    network = task.network().train()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network.to(device)
    optimizer = make_optimizer(network, task.recipe.optim)
    loader = task.loader(network, device, 0, 1, False)
    ids = loader.rank_batches(0)
    batches = [batch for (batch,) in loader.batches(ids[:4], 0, 1)]

    def step_of(loss_of):
        turn = iter(range(10**9))

        def step():
            loss_of(batches[next(turn) % len(batches)]).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"plain": step_of(lambda batch: F.cross_entropy(network(batch.inputs), batch.labels))}
    for name, settings in TAUGHT.items():
        method = METHODS["pskd"](**settings)
        sizes = {"num_samples": task.num_rows, "num_classes": task.num_classes, "num_epochs": 2}
        method.setup(**sizes, device=device, model=network, labels=task.labels.to(device))
        if method.snapshot:
            method.snapshot.take()
        method.begin_epoch(0, loader.rows(ids))
        steps[name] = step_of(lambda batch, method=method: method.loss(network, batch)[0])
    found, rows = rounds(steps, SECONDS), []
    for name, step in steps.items():
        rows.append({"step": name, **ratio(found, name, "plain"), "peak_bytes": peak(step)})
        row = rows[-1]
        say(
            f"  {name:<16} {1e3 * row['seconds']:9.1f} ms   {row['ratio']:.3f} × plain "
            f"({row['low']:.3f} … {row['high']:.3f}, {row['rounds']} rounds)   peak {readable(row['peak_bytes'])}"
        )
    return rows


def measure_runs(recipe: Recipe, task, folder: Path, say) -> list[dict]:
    """Target tokens a second of an epoch: `train` and transformers' Seq2SeqTrainer, one after the other, in turns."""
    rates = {"train": [], "Seq2SeqTrainer": []}
    for turn in range(TURNS):
        here = recipe.model_copy(update={"output_dir": str(folder / f"run{turn}")})
        result = train(here, display=Display(quiet=True))
        rates["train"].append(read_lines(result.run_dir / "metrics.jsonl")[0]["tokens_per_second"])
        rates["Seq2SeqTrainer"].append(trainer_rate(task, folder / f"trainer{turn}"))
    ratios = [one / other for one, other in zip(*rates.values(), strict=True)]
    row = {
        "step": "run",
        **{f"tokens_per_second {name}": median(each) for name, each in rates.items()},
        "ratios": ratios,
    }
    say(
        f"  train with plain cross-entropy {median(rates['train']):,.0f} tokens/s, Seq2SeqTrainer "
        f"{median(rates['Seq2SeqTrainer']):,.0f}: {' and '.join(f'{each:.2f}' for each in ratios)} × it"
    )
    return [row]


def trainer_rate(task, folder: Path) -> float:
    """Target tokens a second of transformers' trainer: as many sentences a batch as hold as many tokens on average."""
    from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments

    sources, targets = task.train.sources, task.train.targets
    sides = zip(*(side.tokens.split(side.lengths.tolist()) for side in (sources, targets)), strict=True)
    rows = [{"input_ids": source.tolist(), "labels": target.tolist()} for source, target in sides]
    network = task.network().transformer
    arguments = Seq2SeqTrainingArguments(
        str(folder),
        per_device_train_batch_size=round(task.recipe.translation.batch_tokens * len(rows) / task.num_rows),
        num_train_epochs=1,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    collator = DataCollatorForSeq2Seq(task.tokenizer, model=network)
    trainer = Seq2SeqTrainer(network, arguments, train_dataset=rows, data_collator=collator)
    return task.num_rows / timed(trainer.train)


def measure_beam(task, say) -> list[dict]:
    """Seconds that beam search with five hypotheses takes for a thousand sentences, each made to have as many pieces."""
    network = task.network().eval()
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.arange(min(SENTENCES, len(task.train.sources)))
    lengths = {"num_beams": 5, "min_new_tokens": LENGTH, "max_new_tokens": LENGTH, "do_sample": False}

    def search():
        for rows in chosen[task.train.sources.lengths[chosen].argsort()].split(64):
            source = task.train.sources.padded(rows, network.pad)[0].to(network.device)
            network.transformer.generate(input_ids=source, attention_mask=(source != network.pad).long(), **lengths)
        wait()

    seconds = timed(search)
    say(f"  beam search, 5 hypotheses, {len(chosen):,} sentences of {LENGTH} pieces: {seconds:.1f} s")
    return [{"step": "beam", "sentences": len(chosen), "length": LENGTH, "seconds": seconds}]


def made_up(folder: Path) -> str:
    """Plain files of random words, as frequent and sentences as long as in captions."""
    draw = random.Random(0)
    words = ["".join(draw.choices(string.ascii_lowercase, k=draw.randint(2, 9))) for _ in range(WORDS)]
    often = [1.0 / rank for rank in range(1, WORDS + 1)]  # Zipf's law
    folder.mkdir(parents=True)
    for lang in ("de", "en"):
        lengths = [max(3, round(draw.gauss(12, 4))) for _ in range(PAIRS)]
        lines = [" ".join(draw.choices(words, often, k=length)) + "\n" for length in lengths]
        (folder / f"train.{lang}").write_text("".join(lines), encoding="utf-8")
    return str(folder)
