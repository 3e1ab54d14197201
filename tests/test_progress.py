"""What is shown while something runs: on a terminal of 80 columns, without one, and quietly."""

import io
import re
import sys
import time

from pskd_timm import train
from pskd_timm.progress import Display, Row, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def plain(text):
    """`text` as it is read: no control sequences, each redrawn line a line."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n")


def fake_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    return sys.stdout


def test_a_terminal_shows_where_the_run_is_and_a_table_that_grows_by_a_row_an_epoch(tiny, monkeypatch):
    terminal = fake_terminal(monkeypatch)
    display = Display()
    drawn = []
    draw = display.bars.update
    display.bars.update = lambda task, **told: (drawn.append((told, display.bars.below)), draw(task, **told))
    result = train(tiny(data__holdout_fraction=0.2), display=display)
    shown = plain(terminal.getvalue())

    rows = [line for line in shown.splitlines() if "│" in line]
    assert " ".join(rows[0].split()) == "epoch loss error % α │ holdout top-1 error NLL ECE AURC │ images/s"
    assert len(rows) == 3 and all(len(row) <= 80 for row in rows)
    for row, line in zip(rows[1:], result.history, strict=True):
        cells = row.replace("│", " ").replace(",", "").split()
        decimals = {"epoch": 0, "train_loss": 3, "train_error": 2, "alpha": 2, "top1_error": 2, "nll": 3, "ece": 2}
        decimals |= {"aurc": 2, "images_per_second": 0}
        assert cells == [f"{line[name]:.{places}f}" for name, places in decimals.items()]

    told, below = drawn[[told["description"] for told, _ in drawn].index("pskd seed 0, epoch 2/2")]
    assert re.fullmatch(r"step 1/4 \d+:\d\d left", told["count"]) and (told["completed"], told["total"]) == (5, 8)
    assert re.fullmatch(r"loss \d\.\d{3}  error \d+\.\d %  α 0\.80  lr 0\.005  [\d,]+ images/s", below)
    assert {"pskd seed 0, epoch 1/2", "evaluating"} < {told["description"] for told, _ in drawn}
    assert (
        shown.count("\n") and terminal.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in terminal.getvalue()
    )


def test_without_a_terminal_an_epoch_is_a_line_with_the_same_facts(tiny, capsys):
    result = train(tiny(seed=3))
    lines = [line for line in capsys.readouterr().out.splitlines() if "epoch" in line]
    assert len(lines) == 2
    last = result.history[-1]
    for fact in (
        "pskd seed 3  epoch 2/2  loss ",
        f"  error {last['train_error']:.2f} %  alpha 0.800  test: top-1 error {last['top1_error']:.2f} %  NLL ",
        f"  ECE {last['ece']:.2f} %  AURC {last['aurc']:.2f} ×10³  {last['images_per_second']:,.0f} images/s  0:00 left",
    ):
        assert fact in lines[-1]


def test_quiet_says_nothing_at_all_and_neither_does_wandb(tiny, monkeypatch, capsys):
    terminal = fake_terminal(monkeypatch)
    result = train(tiny(seed=4, tracking__wandb="offline"), display=Display(quiet=True))
    assert terminal.getvalue() == capsys.readouterr().err == ""
    assert list(result.run_dir.glob("wandb/offline-run-*"))


def test_what_is_to_be_said_later_is_said_before_the_next_line_or_bar(capsys):
    display = Display()
    display.later("one")
    assert capsys.readouterr().out == ""
    display.say("two")
    display.later("three")
    display.advance("reading", 1, 2)
    assert capsys.readouterr().out.splitlines() == ["one", "two", "three"]


def test_the_time_left_is_that_of_the_pace_so_far(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("pskd_timm.progress.time.monotonic", lambda: now[0])
    display = Display()
    display.begin("a run", epochs=10, steps=10, done=20, metrics=[], counts="images")  # continued after two epochs
    now[0] += 30
    assert display.left("a run", 30, 100) == "3:30 left"
    assert display.left("evaluating", 1, 5) == ""
    now[0] += 2
    assert display.left("evaluating", 3, 5) == "0:02 left"
    assert display.left("evaluating", 1, 5) == ""  # begun again
    assert [duration(s) for s in (5, 754.2, 12345)] == ["0:05", "12:34", "3:25:45"]


def test_without_a_terminal_slow_work_is_a_line_every_ten_seconds(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr("pskd_timm.progress.time.monotonic", lambda: now[0])
    display = Display()
    for done in range(30):
        display.advance("decoding train", done, 30)
        now[0] += 1
    assert capsys.readouterr().out.splitlines() == [
        "decoding train: 11/30 0:19 left",
        "decoding train: 22/30 0:08 left",
    ]


def test_compare_shows_every_run_and_what_is_left(tiny, tmp_path):
    from pskd_timm.comparison import Job, _show

    jobs = [Job(tiny(method=method, seed=seed, epochs=4)) for method in ("baseline", "cskd", "pskd") for seed in (0, 1)]
    for job in jobs[1:3]:
        job.recipe.run_dir.mkdir(parents=True)
        (job.recipe.run_dir / "steps.jsonl").write_text('{"step": 7, "loss": 2.25}\n{"step": 8, "lo')
    (jobs[1].recipe.run_dir / "metrics.jsonl").write_text(
        '{"epoch": 2, "top1_error": 50, "nll": 2}\n{"epoch": 3, "top1_error": 33.33, "nll": 1.5}\n'
    )
    shown = []
    display = Display()
    display.show = lambda *told: shown.append(told)
    _show(jobs, jobs[1:3], jobs[3:], 9, display)  # three of nine had finished, one has since
    expected = [
        Row("all", 4 + 3, 24, "4 of 9 runs"),
        Row("baseline seed 1", 3, 4, "epoch 3/4  top-1 error 33.33 %  NLL 1.500"),
        Row("cskd seed 0", 0, 4, "epoch 0/4  loss 2.250"),
    ]
    waiting = "waiting: cskd 1, pskd 0 1"
    assert shown == [(expected, f"4 of 9 runs: baseline seed 1 epoch 3/4, cskd seed 0 epoch 0/4; {waiting}", waiting)]

    (jobs[1].recipe.run_dir / "metrics.jsonl").write_text('{"epoch": 4, "top1_error": 33.33, "nll": 1.5}\n')
    jobs[0].recipe = jobs[1].recipe.model_copy(update={"resume": "never"})
    (jobs[0].recipe.run_dir / "recipe.yaml").touch()
    jobs[0].started = time.time() + 60  # what lies there is a former run's
    assert jobs[0].where() == (0, "")
    jobs[0].started = 0.0
    assert jobs[0].where()[0] == 4
    shown.clear()
    _show(jobs[:2], jobs[1:2], [], 2, display)
    assert shown[0][1:] == ("1 of 2 runs: baseline seed 1 trained, being scored", "")
    assert [row.count for row in shown[0][0]] == [
        "1 of 2 runs",
        "trained, being scored  top-1 error 33.33 %  NLL 1.500",
    ]
