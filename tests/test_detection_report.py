"""Reports of detectors' runs: figures over seeds, differences by a bootstrap over photographs, mistakes with their pictures."""

import html
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import yaml
from detection_data import make_devkit, small_settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image, ImageColor

from pskd_timm import InputError, report
from pskd_timm.cli import main
from pskd_timm.detection.data import Objects, Part, open_data
from pskd_timm.detection.drawing import DETECTED, TRUE, Box, drawn
from pskd_timm.detection.metrics import METRICS, Table, hundred_and_one_points, objects_table, per_class, score
from pskd_timm.detection.mistakes import write_mistakes
from pskd_timm.detection.outcomes import Found, read_found, write_found
from pskd_timm.detection.recipes import load_detection_recipe
from pskd_timm.detection.training import train_detector
from pskd_timm.methods import METHOD_SECTIONS
from pskd_timm.metrics import ece
from pskd_timm.reports import plots
from pskd_timm.reports.detection_page import why_wrong
from pskd_timm.reports.detection_plots import ap_by_class, class_curves
from pskd_timm.reports.detection_runs import find_detectors
from pskd_timm.reports.detection_significance import FIGURES, Layout, against, resampled


def made_up(seed, pictures=12, classes=3, objects=4, guesses=15):
    """Objects of which every fourth is difficult, and detections near some of them."""
    generator = np.random.default_rng(seed)

    def boxes(count):
        corner = generator.uniform(0, 60, (count, 2))
        return np.concatenate([corner, corner + generator.uniform(10, 40, (count, 2))], axis=1)

    numbers = np.repeat(np.arange(pictures), objects)
    truths = Table(
        numbers,
        generator.integers(classes, size=len(numbers)),
        boxes(len(numbers)),
        (generator.random(len(numbers)) < 0.25).astype(float),
    )
    near = generator.integers(len(numbers), size=pictures * guesses)
    box = np.where(
        generator.random((len(near), 1)) < 0.6,
        truths.box[near] + generator.normal(0, 4, (len(near), 4)),
        boxes(len(near)),
    )
    detections = Table(truths.image[near], truths.label[near], box, generator.permutation(len(near)) / len(near) + 1e-3)
    order = np.lexsort((-detections.value, detections.image))
    return Table(*(values[order] for values in detections)), truths


def found_of(detections, truths, pictures=12, classes=3):
    scores = score(detections, truths, classes)
    return Found(detections, scores.matches, scores.iou, truths, [f"VOC2007/{i}" for i in range(pictures)])


def written_out(table, counts):
    """A table of the pictures, each as often as `counts` says and every copy a picture of its own."""
    parts, number = [], 0
    for picture, count in enumerate(counts):
        for _ in range(count):
            mine = table.image == picture
            parts.append(Table(np.full(mine.sum(), number), *(values[mine] for values in table[1:])))
            number += 1
    return Table(*(np.concatenate(values) for values in zip(*parts, strict=True)))


@pytest.mark.parametrize("seed", range(3))
def test_a_draws_figures_are_those_of_the_photographs_written_out(seed):
    detections, truths = made_up(seed)
    counts = np.random.default_rng(seed).multinomial(12, np.full(12, 1 / 12), size=4)
    layout = Layout(found_of(detections, truths))
    figures = layout.figures(np.concatenate([np.ones((1, 12)), counts]).T)
    for row, times in zip(figures, [np.ones(12, int), *counts], strict=True):
        wanted = score(written_out(detections, times), written_out(truths, times), 3).figures
        np.testing.assert_allclose(row, [wanted[name] for name in FIGURES], atol=1e-9)


def test_draws_are_the_same_for_every_run_and_a_run_differs_from_itself_by_nothing():
    first, second = (found_of(*made_up(0)), found_of(*made_up(0)))
    draws = resampled([first, second], resamples=50)
    assert draws.shape == (2, 51, 6) and np.array_equal(draws[0], draws[1]) and draws[0, 1:, 0].std() > 1


def test_a_class_that_was_not_drawn_is_left_out_of_the_mean():
    detections, truths = made_up(0)
    only_first = Table(truths.image, np.where(truths.image == 0, 2, truths.label % 2), *truths[2:])
    counts = np.r_[0, np.full(11, 1)][None]
    figures = Layout(found_of(detections, only_first)).figures(counts.T)
    wanted = score(written_out(detections, counts[0]), written_out(only_first, counts[0]), 3).figures
    np.testing.assert_allclose(figures[0], [wanted[name] for name in FIGURES], atol=1e-9)


def test_a_clear_difference_is_told_from_none():
    detections, truths = made_up(1)
    perfect = Table(*truths[:3], np.linspace(0.99, 0.9, len(truths.label)))
    metrics = [metric for metric in METRICS if metric.name == "map"]
    runs = {name: [found_of(each, truths)] for name, each in (("a", detections), ("b", perfect), ("c", detections))}
    rows = against("a", runs, metrics).set_index("method")
    assert rows.p["b"] < 0.05 and rows.better["b"] and rows.low["b"] > 0
    first, second = (score(each, truths, 3).figures["map"] for each in (detections, perfect))
    assert rows.difference["b"] == pytest.approx(second - first)
    assert rows.p["c"] == 1 and rows.difference["c"] == rows.low["c"] == rows.high["c"] == 0


@pytest.mark.filterwarnings("error")
def test_draws_of_photographs_without_any_object_are_left_out():
    detections, truths = made_up(1)
    first = truths.image == 0
    runs = {name: [found_of(detections, Table(*(values[first] for values in truths)))] for name in ("a", "b")}
    rows = against("a", runs, METRICS)
    assert rows.p.eq(1).all() and rows.difference.eq(0).all() and len(rows) == 6


def test_a_curves_mean_at_a_hundred_and_one_points_is_cocos_ap():
    detections, truths = made_up(2)
    no_difficult = truths._replace(value=np.zeros(len(truths.value)))
    found = found_of(detections, no_difficult)
    wanted = per_class(detections, no_difficult, found.matches, 3, hundred_and_one_points)
    np.testing.assert_allclose(class_curves(found, 3).mean(axis=1), wanted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    devkit = make_devkit(tmp_path_factory.mktemp("voc") / "VOCdevkit", pictures=16)
    settings = small_settings(devkit, tmp_path_factory.mktemp("run"), model__label="baseline", evaluate_every=2)
    return train_detector(load_detection_recipe("detection/voc_small", settings)).run_dir


@pytest.fixture(scope="module")
def runs(trained, tmp_path_factory):
    """Two backbones with two seeds each: one real run, and copies of it that have found something else."""
    folder = tmp_path_factory.mktemp("detectors")
    recipe = load_detection_recipe(trained / "recipe.yaml")
    data = open_data(recipe.data)
    truths = objects_table(data.test.objects)
    for label, share in (("baseline", 0.5), ("pskd", 0.8)):
        for seed in (0, 1):
            copy = folder / label / f"seed{seed}"
            shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
            change_recipe(copy, seed=seed, label=label)
            generator = np.random.default_rng(seed)
            hits = generator.random(len(truths.label)) < share
            order = np.argsort(truths.image[hits], kind="stable")
            detections = Table(*(values[hits][order] for values in truths[:3]), generator.uniform(0.3, 1, hits.sum()))
            wrong = Table(truths.image[:3], 18 - truths.label[:3], truths.box[:3] + 3, np.array([0.9, 0.8, 0.7]))
            detections = Table(*(np.concatenate(each) for each in zip(detections, wrong, strict=True)))
            scores = score(detections, truths, 20)
            write_found(copy, data.test.names, detections, truths, scores)
            write_mistakes(copy, data.test, detections, truths, scores)
            values = json.loads((copy / "result.json").read_text())
            values |= {"method": label, "seed": seed, "last": {"epoch": 2, **scores.figures}}
            (copy / "result.json").write_text(json.dumps(values))
    return folder


def change_recipe(run, seed=None, label=None, **settings):
    tree = yaml.safe_load((run / "recipe.yaml").read_text())
    tree["seed"] = tree["seed"] if seed is None else seed
    tree["model"]["label"] = label or tree["model"]["label"]
    for key, value in settings.items():
        section, _, name = key.partition("__")
        tree[section][name] = value
    (run / "recipe.yaml").write_text(yaml.safe_dump(tree))


@pytest.fixture
def copied(runs, tmp_path):
    return shutil.copytree(runs, tmp_path / "detectors")


def page(folder):
    return (folder / "report.html").read_text()


def test_a_run_keeps_what_it_found_and_its_mistakes(trained):
    values = json.loads((trained / "result.json").read_text())
    found = read_found(trained, values["num_test"], values["num_classes"])
    again = score(found.detections, found.truths, values["num_classes"])
    assert again.figures["map"] == pytest.approx(values["last"]["map"], abs=1e-6)
    assert found.pictures[0] == "VOC2007/000008" and len(found.pictures) == 8
    assert {"picture", "label", "iou", "other", "image"} <= set(pd.read_parquet(trained / "mistakes.parquet"))


def test_a_detector_that_found_nothing_has_a_report(trained, tmp_path):
    copy = tmp_path / "runs" / "baseline" / "seed0"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("checkpoints", "*.safetensors"))
    data = open_data(load_detection_recipe(copy / "recipe.yaml").data)
    truths = objects_table(data.test.objects)
    nothing = Table(*(values[:0] for values in truths[:3]), np.empty(0))
    scores = score(nothing, truths, 20)
    write_found(copy, data.test.names, nothing, truths, scores)
    write_mistakes(copy, data.test, nothing, truths, scores)
    values = json.loads((copy / "result.json").read_text())
    (copy / "result.json").write_text(json.dumps(values | {"last": {"epoch": 2, **scores.figures}}))
    comparison = report(tmp_path / "runs", tmp_path)
    assert comparison.rows["map"].tolist() == [0.0] and "finished" in set(comparison.rows.status)


def test_a_report_has_mean_and_deviation_over_seeds_of_every_figure(runs, tmp_path):
    comparison = report(runs, tmp_path)
    for method in ("baseline", "pskd"):
        each = [json.loads((runs / method / f"seed{s}" / "result.json").read_text())["last"] for s in (0, 1)]
        for name in FIGURES:
            numbers = [one[name] for one in each]
            assert comparison.frame[name][method] == pytest.approx(np.mean(numbers))
            assert comparison.frame[f"{name}_std"][method] == pytest.approx(np.std(numbers, ddof=1))
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"comparison.{kind}" for kind in ("csv", "md", "tex", "png")),
        "report.html",
        "significance.csv",
    }
    text = html.unescape(page(tmp_path))
    for words in (
        "AP .50:.95",
        "Precision and recall",
        "Difference to Baseline",
        "PS-KD",
        "it is a dog",
        "if calibrated",
    ):
        assert words in text
    assert "McNemar" not in text and "top-1" not in text.lower()
    shown = re.sub(r"<(style|script).*?</\1>|<[^>]*>", " ", text, flags=re.S)
    assert "backbone" in shown and "method" not in shown.lower()
    assert text.count("data:image/jpeg;base64,") == 6


def test_tables_for_the_terminal_markdown_latex_and_notebooks_are_headed_backbone(runs, tmp_path, capsys):
    comparison = report(runs, tmp_path)
    for kind, head in (("md", "| backbone | runs |"), ("tex", "backbone & runs &")):
        text = (tmp_path / f"comparison.{kind}").read_text()
        assert head in text and "method" not in text
    assert "<th>backbone</th>" in comparison._repr_html_()
    assert main(["report", str(runs), "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "backbone" in printed and "method" not in printed


def test_one_run_a_backbone_is_said_to_be_one_a_backbone(runs, tmp_path):
    report([runs / "baseline" / "seed0", runs / "pskd" / "seed0"], tmp_path)
    for kind in ("md", "tex"):
        text = (tmp_path / f"comparison.{kind}").read_text()
        assert "one run a backbone (n = 1)" in text and "method" not in text


def test_the_page_says_how_many_of_the_classes_have_objects(runs, tmp_path):
    report(runs, tmp_path)
    assert "8 pictures, 2 of 20 classes with objects" in html.unescape(page(tmp_path))


def test_the_verdict_is_of_the_bootstrap_over_photographs(runs, tmp_path):
    comparison = report(runs, tmp_path)
    found = {run.method: [] for run in find_detectors([runs])}
    for run in find_detectors([runs]):
        found[run.method].append(run.found)
    row = against("baseline", found, comparison.metrics).set_index("metric").loc["map"]
    difference = comparison.frame["map"]["pskd"] - comparison.frame["map"]["baseline"]
    assert row.difference == pytest.approx(difference) and f"{row.difference:+.2f}" in page(tmp_path)


def test_the_floor_of_the_ece_is_of_the_detections_that_are_not_ignored(runs, tmp_path):
    comparison = report(runs, tmp_path)
    run = find_detectors([runs])[0]
    assert comparison.rows.ece[0] == pytest.approx(
        100 * ece(run.outcomes.confidence.to_numpy(), run.outcomes.correct.to_numpy()), abs=1e-4
    )
    assert comparison.rows.ece_if_calibrated.notna().all()


def test_a_report_of_detectors_imports_neither_torch_nor_timm(copied):
    code = (
        f"import sys; from pskd_timm import report; report({str(copied)!r}); "
        "print(sorted({'torch', 'timm', 'datasets', 'torchvision', 'accelerate', 'sklearn'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]" and (copied / "report.html").is_file()


def test_detectors_and_classifiers_in_one_report_are_refused_in_a_line(copied, capsys):
    classifier = copied / "cifar" / "seed0"
    classifier.mkdir(parents=True)
    (classifier / "recipe.yaml").write_text("epochs: 1\ndata: {source: digits}\n")
    assert main(["report", str(copied)]) == 2
    said = capsys.readouterr().err
    assert "is a detector's run" in said and "is not: give each kind a report of its own" in said
    assert said.count("\n") == 1 and not (copied / "report.html").exists()


def test_runs_on_other_pictures_or_objects_are_refused(copied):
    path = copied / "pskd" / "seed1" / "objects.parquet"
    objects = pd.read_parquet(path)
    objects.assign(left=objects.left + 1).to_parquet(path)
    with pytest.raises(InputError, match="were tested on different pictures"):
        report(copied)


def test_two_runs_of_one_label_and_seed_are_refused_and_networks_of_other_sizes_named_apart(copied):
    path = copied / "pskd" / "seed1" / "result.json"
    change_recipe(copied / "pskd" / "seed1", seed=0)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 0}))
    with pytest.raises(InputError, match="are both called pskd, seed 0.*--model.label"):
        report(copied)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_parameters": 7}))
    assert "pskd parameters=7" in [run.method for run in find_detectors([copied])]


def test_settings_that_differ_stand_after_the_label_and_the_backbones_folder_does_not(copied):
    for seed in (0, 1):
        change_recipe(copied / "pskd" / f"seed{seed}", model__backbone=f"runs/pskd/seed{seed}", data__path="elsewhere")
    assert {run.method for run in find_detectors([copied])} == {"baseline", "pskd"}
    change_recipe(copied / "pskd" / "seed1", optim__lr=0.5)
    assert {"baseline optim.lr=0.01", "pskd optim.lr=0.5"} <= {run.method for run in find_detectors([copied])}


@pytest.mark.parametrize(
    "name, content, says",
    [
        ("detections.parquet", b"PAR1", "detections.parquet cannot be read"),
        ("result.json", b"{", "damaged: result.json is not whole"),
        ("metrics.jsonl", b"", "metrics.jsonl is empty or missing"),
        ("recipe.yaml", b"task: detection\nepochs: none\n", "damaged: "),
        ("result.json", None, "unfinished: 1 of 2 epochs"),
        ("detections.parquet", None, "finished"),
    ],
)
def test_a_run_that_is_damaged_unfinished_or_kept_less_is_named_and_the_others_reported(copied, name, content, says):
    path = copied / "pskd" / "seed1" / name
    path.write_bytes(content) if content is not None else path.unlink()
    rows = report(copied).rows
    assert says in rows[(rows.method == "pskd") & (rows.seed == 1)].status.item()
    assert (rows[rows.seed == 0].status == "finished").all()


def test_a_column_that_is_missing_or_a_picture_that_is_none_damages_a_run(copied):
    path = copied / "pskd" / "seed0" / "detections.parquet"
    table = pd.read_parquet(path)
    table.drop(columns="iou").to_parquet(path)
    assert report(copied).rows.status.str.contains("has no column 'iou'").any()
    table.assign(index=99).to_parquet(path)
    assert report(copied).rows.status.str.contains("has other pictures or classes").any()


def test_a_report_without_any_finished_run_or_kept_detections_is_written(copied):
    for path in copied.rglob("detections.parquet"):
        path.unlink()
    report(copied)
    assert "have no detections.parquet and objects.parquet any more" in page(copied)
    for path in copied.rglob("result.json"):
        path.unlink()
    assert report(copied).failed == 4 and "No run has finished yet" in page(copied)


NAMES = ["baseline", "pskd", "resnet50", "mobilenetv3_small_050-untrained", "efficientnet_b0", "convnext_atto"]


def test_backbones_that_no_method_trained_have_colours_of_their_own_whichever_stand_beside_them():
    found = plots.looks(NAMES)
    assert (
        len({look.colour for look in found.values()}) == len({(look.dash, look.marker) for look in found.values()}) == 6
    )
    every = {look.colour for look in plots.looks([*METHOD_SECTIONS, plots.SCALED]).values()}
    assert not every & {found[name].colour for name in NAMES[2:]}
    assert plots.looks(NAMES[2:]) == {name: found[name] for name in NAMES[2:]}


def test_a_figure_that_is_0_throughout_is_drawn_on_an_axis_from_0():
    history = pd.DataFrame([{"method": m, "seed": 0, "epoch": e, "ap75": 0.0} for m in NAMES[:2] for e in (1, 2)])
    assert plots.curves(history, "ap75", higher_is_better=True).axes[0].get_ylim() == (0, 1)
    assert ap_by_class({name: [{"cat": 0.0, "dog": 0.0}] for name in NAMES[:2]}).axes[0].get_xlim() == (0, 1)
    history.loc[0, "ap75"] = 2.0
    assert plots.curves(history, "ap75", higher_is_better=True).axes[0].get_ylim()[0] == 0


def test_a_long_backbones_name_stands_whole_above_its_histogram():
    table = pd.DataFrame({"confidence": [0.05, 0.5, 0.9], "correct": [True, False, True]})
    for name in ("short", NAMES[3]):
        figure = plots.confidence_histogram([table], plots.looks([name])[name])
        (drawn,) = [text for text in figure.findobj(Text) if text.get_text() == name]
        FigureCanvasAgg(figure).draw()
        assert drawn.get_window_extent().x1 <= figure.bbox.x1
    figure = plots.confidence_histogram([table], plots.looks(["x" * 99])["x" * 99])
    assert figure.axes[0].get_title(loc="left").endswith("…")


@pytest.mark.parametrize(
    "iou, other_iou, says",
    [
        (0.7, 0.9, "a second box on a cat that a surer one has found"),
        (0.3, 0.6, "it is a dog (overlap 0.60)"),
        (0.3, 0.2, "overlaps a cat by 0.30 only"),
        (0.0, 0.2, "no cat; overlaps a dog by 0.20"),
        (0.0, 0.0, "no cat there"),
    ],
)
def test_a_mistake_is_said_in_words(iou, other_iou, says):
    row = {"label": 0, "iou": iou, "other": 1, "other_iou": other_iou}
    assert why_wrong(row, ["cat", "dog"]) == says


def test_a_kept_mistake_shows_the_detection_over_the_objects_of_its_picture(tmp_path):
    part = Part(
        ["a", "b"], [Objects.of([]), Objects.of([([10, 10, 60, 60], 1, False)])], lambda i: Image.new("RGB", (120, 90))
    )
    truths = objects_table(part.objects)
    detections = Table(
        np.array([1, 0]), np.array([0, 0]), np.array([[50.0, 20, 100, 80], [0, 0, 9, 9]]), np.array([0.9, 0.4])
    )
    write_mistakes(tmp_path, part, detections, truths, score(detections, truths, 2))
    kept = pd.read_parquet(tmp_path / "mistakes.parquet")
    assert kept.picture.tolist() == ["b", "a"] and kept.other.tolist() == [1, -1]
    assert kept.other_iou[0] == pytest.approx(10 * 40 / (50 * 50 + 50 * 60 - 10 * 40))
    pixels = np.asarray(Image.open(io.BytesIO(kept.image[0])).convert("RGB")).astype(int)
    for colour, column, row in ((DETECTED, 98, 50), (TRUE, 12, 40)):
        near = pixels[row - 3 : row + 4, column - 3 : column + 4].reshape(-1, 3)
        assert np.abs(near - ImageColor.getrgb(colour)).sum(axis=1).min() < 120


def test_boxes_are_drawn_inside_the_picture_whatever_their_size():
    picture = Image.new("RGB", (40, 30))
    boxes = [
        Box((0, 0, 40, 30), TRUE),
        Box((39.9, 29.9, 40, 30), DETECTED, "cat 50 %"),
        Box((-5, 3, 90, 3.2), TRUE, "x"),
    ]
    copy = drawn(picture, boxes)
    assert copy.size == picture.size and copy.tobytes() != picture.tobytes() and not any(picture.tobytes())
