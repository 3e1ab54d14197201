import io
import multiprocessing
import os
import shutil
import struct
import zlib
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures
from PIL import ImageOps
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

from pskd_timm import InputError, load_recipe, rng
from pskd_timm.cpus import num_cpus
from pskd_timm.data import Loader, eval_batches, read_images
from pskd_timm.data import load_data as load
from pskd_timm.data.augmentation import (
    AUTO_AUGMENT,
    CUT_ACROSS,
    CUT_DOWN,
    FLIP,
    LEFT,
    ORDERS,
    PCA_VALUES,
    PCA_VECTORS,
    RESIZED_CROP,
    TOP,
    augment,
    color_jitter_,
    crop,
    draw,
    draw_cutout,
    draw_erasing,
    erase,
    jitter_weights,
    lighting,
    pixel_scale,
    window_start,
)
from pskd_timm.data.decode import open_box, open_image
from pskd_timm.data.loader import ANCHOR
from pskd_timm.data.split import Split, flip_labels
from pskd_timm.data.streaming import _Decoding, resized_crop_box
from pskd_timm.data.subsets import balanced_subset
from pskd_timm.fingerprint import changed
from pskd_timm.recipe import Augment
from pskd_timm.show import cost_lines


def picture(size=(8, 6), mode="RGB", value=100):
    bands = {"RGB": (value, 50, 200), "L": value, "RGBA": (value, 50, 200, 128)}
    return Pictures.new(mode, size, bands[mode])


def load_data(section, augment=None):
    return load(section, augment or Augment())


def section(**settings):
    return load_recipe(
        "digits", {f"data.{k}": v for k, v in ({"source": None, "gaussian_noise": 0} | settings).items()}
    ).data


def image_folder(root, counts, mode="RGB", size=(8, 6), suffix="png"):
    for split, classes in counts.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                picture(size, mode, value=i).save(folder / f"{i}.{suffix}")
    return str(root)


def test_an_image_folder_of_any_mode_becomes_rgb_tensors_with_class_names(tmp_path):
    for mode in ("RGB", "L", "RGBA"):
        root = image_folder(tmp_path / mode, {"train": {"cat": 3, "dog": 2}, "test": {"cat": 1, "dog": 1}}, mode)
        data = load_data(section(path=root))
        assert data.class_names == ["cat", "dog"]
        assert data.train.images.shape == (5, 3, 6, 8) and data.train.images.dtype == torch.uint8
        assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
        expected = np.asarray(picture((8, 6), mode, value=2).convert("RGB"))
        assert np.array_equal(data.train.images[2].permute(1, 2, 0).numpy(), expected)


def test_a_folder_of_classes_alone_is_split_by_test_fraction_or_refused(tmp_path):
    root = image_folder(tmp_path, {".": {"a": 6, "b": 6}})
    with pytest.raises(InputError, match=r"no test split among train.*data.test_fraction"):
        load_data(section(path=root))
    data = load_data(section(path=root, test_fraction=0.25))
    assert data.test.labels.bincount().tolist() == [2, 2] and data.train.labels.bincount().tolist() == [4, 4]


def test_images_of_different_sizes_need_a_size_and_are_resized_and_centre_cropped(tmp_path):
    root = image_folder(tmp_path, {"train": {"a": 2}, "test": {"a": 1}})
    picture((20, 10)).save(tmp_path / "train" / "a" / "9.png")
    (tmp_path / "train" / "b").mkdir()
    gradient = np.tile(np.arange(40, dtype=np.uint8) * 6, (20, 1))
    Pictures.fromarray(gradient).save(tmp_path / "train" / "b" / "0.png")
    with pytest.raises(InputError, match="differ in size.*data.image_size"):
        load_data(section(path=root))
    data = load_data(section(path=root, image_size=10))
    assert data.train.images.shape == (4, 3, 10, 10)
    middle = data.train.images[3, 0].float().mean().item()
    assert middle == pytest.approx(gradient[:, 10:30].mean(), abs=2)


def test_a_damaged_image_is_named(tmp_path):
    root = image_folder(tmp_path, {"train": {"a": 2, "b": 1}, "test": {"a": 1}})
    (tmp_path / "train" / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"image 1 .*1\.png\) cannot be decoded"):
        load_data(section(path=root))


def saved(folder, columns, features):
    table = Dataset.from_dict(columns, features=Features(features))
    DatasetDict(train=table, test=table).save_to_disk(str(folder))
    return str(folder)


def test_a_saved_data_set_with_other_columns_and_word_labels(tmp_path):
    root = saved(
        tmp_path / "d", {"pic": [picture(), picture()], "kind": ["z", "a"]}, {"pic": Image(), "kind": Value("string")}
    )
    with pytest.raises(InputError, match="data.image_column: no column 'image' in the data, it has pic, kind"):
        load_data(section(path=root))
    with pytest.raises(InputError, match="data.label_column: no column 'kin'.*did you mean kind"):
        load_data(section(path=root, image_column="pic", label_column="kin"))
    data = load_data(section(path=root, image_column="pic", label_column="kind"))
    assert data.class_names == ["a", "z"] and data.train.labels.tolist() == [1, 0]


def test_unlabelled_test_images_and_a_single_class_are_refused(tmp_path):
    pictures = [picture(), picture()]
    root = saved(
        tmp_path / "one", {"image": pictures, "label": [0, 0]}, {"image": Image(), "label": ClassLabel(names=["a"])}
    )
    with pytest.raises(InputError, match="two classes"):
        load_data(section(path=root))
    root = saved(
        tmp_path / "none",
        {"image": pictures, "label": [0, -1]},
        {"image": Image(), "label": ClassLabel(names=["a", "b"])},
    )
    with pytest.raises(InputError, match="1 of 2 samples of the train split have the label −1"):
        load_data(section(path=root))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"path": "nowhere"}, "data.path: nowhere is not there"),
        (
            {"source": "digits", "train_split": "trian"},
            "data.train_split: no split 'trian' in the data, it has train, test",
        ),
        ({"source": "cifra100"}, "did you mean cifar100"),
    ],
)
def test_data_that_is_not_there_is_refused_with_what_is(settings, says):
    with pytest.raises(InputError, match=says):
        load_data(section(**settings))


def test_classes_and_files_named_like_splits_are_classes_and_files(tmp_path):
    counts = {"cat": 2, "test": 3, "dev set": 1}
    data = load_data(section(path=image_folder(tmp_path / "split", {"train": counts, "test": counts})))
    assert data.class_names == ["cat", "dev set", "test"]
    assert data.train.labels.bincount().tolist() == data.test.labels.bincount().tolist() == [2, 1, 3]
    root = image_folder(tmp_path / "flat", {".": {"cat": 4, "train": 4}})
    picture().save(tmp_path / "flat" / "cat" / "test_9.png")
    data = load_data(section(path=root, test_fraction=0.3))
    assert data.class_names == ["cat", "train"] and (len(data.train), len(data.test)) == (6, 3)


def test_test_labels_go_by_the_classes_names_where_the_test_part_lacks_a_class(tmp_path):
    root = image_folder(tmp_path, {"train": {"ant": 1, "bee": 1, "cat": 1}, "test": {"ant": 1, "cat": 2}})
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = load_data(section(path=root))
    assert data.class_names == ["ant", "bee", "cat"] and data.test.labels.tolist() == [0, 2, 2]
    image_folder(tmp_path, {"test": {"dog": 1}})
    with pytest.raises(InputError, match="the test split has the label 'dog', which the training split has not"):
        load_data(section(path=root))


def test_a_changed_picture_is_decoded_anew(tmp_path):
    root = image_folder(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1}}, suffix="bmp")
    path = tmp_path / "train" / "a" / "0.bmp"
    before, status = load_data(section(path=root)).train.images, path.stat()
    picture(value=200).save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time, as rsync -t leaves it
    assert path.stat().st_size == status.st_size and path.stat().st_mtime_ns == status.st_mtime_ns
    assert not torch.equal(load_data(section(path=root)).train.images, before)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_sixteen_bit_files_are_scaled_by_the_bits_that_their_content_fills(tmp_path, suffix, bits):
    largest = 2**bits - 1
    deep = np.array([[0, round(largest * 0.4)], [round(largest * 0.8), largest]], dtype=np.uint16)
    Pictures.fromarray(deep).save(tmp_path / f"deep.{suffix}")
    found = np.asarray(open_image({"path": str(tmp_path / f"deep.{suffix}"), "bytes": None}, 0))
    assert np.abs(found[..., 0] - np.array([[0, 102], [204, 255]])).max() <= 1


def sixteen_bit_png(pixels, exif=b""):
    """A PNG file of uint16 `pixels` [H, W, 3 or 4], which Pillow cannot write (PNG specification, third edition, 5 and 11.2)."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    parts = (b"IHDR", header), (b"eXIf", exif), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def sixteen_bit_tiff(pixels, order):
    """A TIFF file of uint16 `pixels` [H, W, 3] in a byte order, `<` or `>` (TIFF 6.0, section 6)."""
    height, width, _ = pixels.shape
    data = pixels.astype(f"{order}u2").tobytes()
    end = 8 + len(data)
    entries = [(256, width), (257, height), (258, end + 114), (259, 1), (262, 2), (273, 8), (277, 3), (279, len(data))]
    entries.insert(7, (278, height))
    table = b"".join(
        struct.pack(f"{order}HHI", tag, 3 if tag == 258 else 4, 3 if tag == 258 else 1)
        + struct.pack(f"{order}I", value)
        for tag, value in entries
    )
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", end)
    return (
        head + data + struct.pack(f"{order}H", len(entries)) + table + bytes(4) + struct.pack(f"{order}HHH", 16, 16, 16)
    )


@pytest.mark.parametrize(
    "write", [sixteen_bit_png, lambda p: sixteen_bit_tiff(p, "<"), lambda p: sixteen_bit_tiff(p, ">")]
)
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_sixteen_bit_colour_files_are_scaled_by_the_bits_that_their_content_fills(write, bits):
    largest = 2**bits - 1
    pixels = np.random.default_rng(0).integers(0, largest + 1, (5, 7, 3))
    pixels[0, 0] = largest
    found = open_image({"bytes": write(pixels), "path": None}, 0)
    assert np.array_equal(np.asarray(found), pixels * 255 // largest)
    opaque = np.dstack([pixels, np.full((5, 7), 2**16 - 1)])
    boxed = open_box({"bytes": sixteen_bit_png(opaque), "path": None}, 0, lambda size: ((1, 2, 4, 5), 3))
    assert np.array_equal(boxed.permute(1, 2, 0), pixels[2:5, 1:4] * 255 // largest)
    exif = Pictures.Exif()
    exif[0x0112] = 3
    upside_down = open_image(sixteen_bit_png(pixels, exif.tobytes()[6:]), 0)
    assert np.array_equal(np.asarray(upside_down)[::-1, ::-1], pixels * 255 // largest)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_image_is_turned_as_pillow_turns_it(orientation):
    exif = Pictures.Exif()
    exif[0x0112] = orientation
    image = Pictures.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
    stored = encoded(image, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Pictures.open(io.BytesIO(stored)))
    assert np.array_equal(np.asarray(open_image(stored, 0)), np.asarray(expected))


def broken_exif():
    """EXIF blocks: cut off, of no header, of lengths and places beyond their end, of an orientation that is none."""
    exif = Pictures.Exif()
    exif[0x0112], exif[0x010F] = 6, "camera"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    whole = exif.tobytes()
    yield from (whole[:length] for length in range(6, len(whole), 5))
    yield from (
        b"Exif\0\0" + header for header in (b"", b"MM", b"MM\0\x2a", b"no header at all", b"II\x2a\0\xff\xff\xff\xff")
    )
    head = b"Exif\0\0II\x2a\0\x08\0\0\0"
    yield head + b"\xff\xff" + b"\x12\x01" * 20
    for kind in range(14):
        for count, value in ((0, 6), (1, 99), (2, 2**32 - 1), (2**31, 6)):
            yield head + struct.pack("<HHHLL", 1, 0x0112, kind, count, value)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "MPO"])
@pytest.mark.filterwarnings("ignore")  # Pillow's, of what it makes of such a block
def test_a_broken_exif_block_over_sound_pixels_never_costs_the_image(format):
    image = Pictures.effect_noise((16, 12), 60).convert("RGB")
    more = {"save_all": True, "append_images": [image]} if format == "MPO" else {}
    for block in broken_exif():
        stored = encoded(image, format, exif=block, **more)
        expected = np.asarray(Pictures.open(io.BytesIO(stored)).convert("RGB"))
        found = np.asarray(open_image(stored, 0))
        cropped = open_box(stored, 0, lambda size: ((0, 0, *size), size[0]))
        assert found.shape in ((12, 16, 3), (16, 12, 3)) and np.array_equal(
            np.sort(found, None), np.sort(expected, None)
        )
        assert np.array_equal(cropped.permute(1, 2, 0), found)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}], ids=str)
def test_a_box_of_a_jpeg_holds_pillows_pixels(mode, options):
    picture = Pictures.effect_noise((63, 49), 60).convert("RGB").convert(mode)
    stored = encoded(picture, "JPEG", **options)
    expected = np.asarray(Pictures.open(io.BytesIO(stored)).convert("RGB"))
    found = open_box({"bytes": stored, "path": None}, 0, lambda size: ((10, 5, size[0] - 3, size[1] - 1), 40))
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected[5:48, 10:60]).max() <= 1


def test_a_picture_cut_off_in_its_pixels_stays_damaged_whatever_its_exif_block_says():
    for format in ("PNG", "JPEG"):
        whole = encoded(Pictures.effect_noise((64, 64), 60).convert("RGB"), format, exif=b"Exif\0\0MM")
        half = whole[: len(whole) // 2]
        with pytest.raises(InputError, match="image 3 cannot be decoded"):
            open_image(half, 3)
        with pytest.raises(InputError, match="image 3 cannot be decoded"):
            open_box(half, 3, lambda size: ((0, 0, *size), size[0]))


@pytest.mark.parametrize(
    ("stored", "says"),
    [
        (None, "there is none"),
        (np.random.rand(4, 4, 3), "float64 values should be whole numbers from 0 to 255"),
        (np.full((4, 4), 300), "whole numbers from 0 to 255"),
        (np.zeros((3, 4, 5), dtype=np.uint8), r"shape \[3, 4, 5\] should be \[H, W\]"),
        (b"no picture", "cannot identify"),
    ],
    ids=["none", "floats", "too large", "channels first", "bytes"],
)
def test_what_is_no_picture_is_told_by_its_place(stored, says):
    with pytest.raises(InputError, match=f"data: image 7 cannot be decoded: .*{says}"):
        open_image(stored, 7)


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0.5, 1.0], r"holds decimal numbers \(0.5\), as for a regression"),
        ([1, None], "is empty for 1 of 2 samples, first for sample 1"),
        ([None, "a"], "is empty for 1 of 2 samples, first for sample 0"),
        ([float("nan"), 1.0], "is empty for 1 of 2 samples, first for sample 0"),
        ([[0], [1]], r"holds \[0\]: it should hold one class a sample"),
    ],
)
def test_labels_that_are_no_classes_are_refused_with_what_is_wrong_with_them(tmp_path, labels, says):
    root = str(tmp_path / "d")
    table = Dataset.from_dict({"image": [picture(), picture()], "label": labels}).cast_column("image", Image())
    DatasetDict(train=table, test=table).save_to_disk(root)
    with pytest.raises(InputError, match=f"data.label_column: label {says}"):
        load_data(section(path=root))


def test_show_does_not_count_damaged_images_as_usable_ones():
    said = {damaged: cost_lines(load_recipe("digits", {"data.damaged": damaged}))[0] for damaged in ("fail", "skip")}
    assert said["fail"].endswith("10 classes")
    assert said["skip"] == said["fail"] + ", less training images that turn out damaged"


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no folders of images: it should hold one for each class"):
        load_data(section(path=str(tmp_path)))


def test_what_programs_leave_behind_is_no_class_and_no_image_and_folders_without_images_are_named(tmp_path, capsys):
    root = image_folder(tmp_path, {"train": {"ant": 2, "bee": 2}, "test": {"ant": 1, "bee": 1}})
    clean = load_data(section(path=root))
    assert capsys.readouterr().err == ""
    for part in ("train", "test"):
        for name in (".Trash", "__MACOSX", "ant/.ipynb_checkpoints", "ant/__MACOSX", "bee/deep/.hidden"):
            (tmp_path / part / name).mkdir(parents=True)
            picture().save(tmp_path / part / name / "0.png")
        (tmp_path / part / "ant" / "._0.png").write_bytes(b"no picture")
        (tmp_path / part / "ant" / "folder.png").mkdir()
        (tmp_path / part / "none yet").mkdir()
    (tmp_path / ".notes.csv").write_text("hidden files are no tables")
    (tmp_path / "__MACOSX").mkdir()
    data = load_data(section(path=root))
    assert data.class_names == ["ant", "bee"] and data.train.paths == clean.train.paths
    assert data.train.paths == [f"train/{name}/{i}.png" for name in ("ant", "bee") for i in range(2)]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(line.endswith("which are no classes: none yet, __MACOSX") for line in said)


def test_broken_links_and_names_that_are_no_text_are_told_in_a_line(tmp_path):
    root = image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    (tmp_path / "train" / "a" / "2.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"image 2 \(.*2.png\) cannot be decoded: .*No such file.*damaged skip leaves"):
        load_data(section(path=root))
    data = load_data(section(path=root, damaged="skip"))
    assert data.train.paths == ["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png"]
    os.rename(tmp_path / "train" / "a" / "2.png", os.fsencode(tmp_path / "train" / "a") + b"/\xff.png")
    with pytest.raises(InputError, match="a/\N{REPLACEMENT CHARACTER}.png: its name is no UTF-8 text"):
        load_data(section(path=root))


def test_a_part_that_could_be_scored_and_is_not_is_named(tmp_path, capsys):
    root = image_folder(tmp_path, {part: {"a": 2, "b": 2} for part in ("train", "test", "val")})
    load_data(section(path=root))
    assert (
        capsys.readouterr().err
        == "pskd-timm: data: tests on test; val stays unused (data.test_split chooses another)\n"
    )
    load_data(section(path=root, test_fraction=0.5))
    assert (
        capsys.readouterr().err == "pskd-timm: data.test_fraction: the test part comes from train, test stays unused\n"
    )
    load_data(section(path=root, test_split="val"))
    load_data(section(path=root, test=False, holdout_fraction=0.5))
    assert capsys.readouterr().err == ""


def on_the_hub(monkeypatch, name, folder):
    """Let the data set in a folder be the one that the hub calls `name`, its files at URLs."""
    load, builder_of = datasets.load_dataset, datasets.load_dataset_builder

    def builder(asked):
        assert asked == name
        files = builder_of(str(folder)).config.data_files
        urls = {split: [f"file://{path}" for path in paths] for split, paths in files.items()}
        return SimpleNamespace(config=SimpleNamespace(data_files=urls))

    monkeypatch.setattr(datasets, "load_dataset", lambda asked: load(str(folder)) if asked == name else None)
    monkeypatch.setattr(datasets, "load_dataset_builder", builder)


@pytest.mark.parametrize("kind", ["parquet", "arrow", "saved", "hub"])
def test_parts_that_number_their_classes_differently_are_matched_by_the_classes_names(tmp_path, monkeypatch, kind):
    parts = {"train": (["a", "b"], [0, 1, 1]), "test": (["b", "a"], [0, 1, 1])}
    tables = {
        name: Dataset.from_dict(
            {"image": [picture(value=10 * label) for label in labels], "label": labels},
            features=Features({"image": Image(), "label": ClassLabel(names=names)}),
        )
        for name, (names, labels) in parts.items()
    }
    if kind == "saved":
        DatasetDict(tables).save_to_disk(str(tmp_path / "d"))
    else:
        for name, table in tables.items():
            (tmp_path / "d" / name).mkdir(parents=True)
            if kind in ("parquet", "hub"):
                table.to_parquet(str(tmp_path / "d" / name / f"{name}.parquet"))
            else:
                table.save_to_disk(str(tmp_path / "s" / name))
                shutil.copy(next((tmp_path / "s" / name).glob("*.arrow")), tmp_path / "d" / name / f"{name}.arrow")
    where = {"path": str(tmp_path / "d")}
    if kind == "hub":
        on_the_hub(monkeypatch, "me/mine", tmp_path / "d")
        where = {"path": None, "source": "me/mine"}
    data = load_data(section(**where))
    assert data.class_names == ["a", "b"]
    assert data.train.labels.tolist() == [0, 1, 1] and data.test.labels.tolist() == [1, 0, 0]
    if kind == "parquet":
        tables["test"].to_parquet(str(tmp_path / "d" / "train" / "more.parquet"))
        with pytest.raises(InputError, match="the files of the train split number its classes differently: .*more"):
            load_data(section(path=str(tmp_path / "d")))


def test_the_rows_and_files_of_every_part_are_the_sources_own(tmp_path):
    root = image_folder(tmp_path, {".": {"a": 6, "b": 6}})
    names = [f"{name}/{i}.png" for name in "ab" for i in range(6)]
    for loading in ("resident", "streaming"):
        data = load_data(
            section(path=root, test_fraction=0.3, holdout_fraction=0.25, limit_test=2, loading=loading, image_size=8)
        )
        parts = [data.train, data.holdout, data.test]
        rows = torch.cat([part.source_id for part in parts]).tolist()
        assert len(rows) == len(set(rows)) and [len(part) for part in parts] == [6, 2, 2]
        for part in parts:
            assert part.paths == [names[row] for row in part.source_id]
            assert [path[0] for path in part.paths] == [data.class_names[k] for k in part.labels]
            for row, image in zip(part.source_id, read_images(part, torch.arange(len(part))), strict=True):
                assert image[0].float().mean().round() == row % 6  # the red of the picture's number
    assert load_data(section(source="digits")).test.paths is None


def test_the_fingerprint_names_what_has_changed_of_the_data_and_nothing_where_they_were_only_moved(tmp_path):
    counts = {"train": {"cat": 3, "dog": 3}, "test": {"cat": 2, "dog": 2}}
    image_folder(tmp_path / "first", counts, suffix="bmp")

    def replaced(root):  # by another of the same size and time
        path = root / "test" / "dog" / "1.bmp"
        status = path.stat()
        picture(value=200).save(path)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    changes = {
        None: lambda root: [os.utime(path, (1, 1)) for path in root.rglob("*.bmp")],
        "class names, samples": lambda root: [(root / part / "dog").rename(root / part / "wolf") for part in counts],
        "samples": lambda root: (root / "train" / "cat" / "2.bmp").unlink(),
        "contents of the test images": replaced,
    }
    for loading in ("resident", "streaming"):
        settings = {"loading": loading, "image_size": 8}
        before = load_data(section(path=str(tmp_path / "first"), **settings)).fingerprint
        assert set(before) == {"class_names", "samples", "labels", "contents", "test_contents"}
        for number, (says, change) in enumerate(changes.items()):
            root = tmp_path / f"{loading}{number}"
            shutil.copytree(tmp_path / "first", root)
            change(root)
            now = load_data(section(path=str(root), **settings)).fingerprint
            line = changed(before, now)
            assert line is None if says is None else f"since the run began, other {says}" in line
    table = {"image": [picture(), picture(value=3)] * 2, "label": [0, 1, 0, 1]}
    features = {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    one = load_data(section(path=saved(tmp_path / "one", table, features))).fingerprint
    two = load_data(section(path=saved(tmp_path / "two", table | {"label": [0, 1, 1, 0]}, features))).fingerprint
    assert changed(one, two) == "the data have changed since the run began, other labels"
    assert changed({}, one) is None  # a checkpoint of an earlier version


def test_fingerprints_of_resident_and_streamed_data_agree_and_of_large_data_a_part_is_read(tmp_path, monkeypatch):
    root = image_folder(tmp_path, {"train": {"a": 40, "b": 40}, "test": {"a": 1, "b": 1}}, suffix="bmp")
    resident = load_data(section(path=root, image_size=8))
    streamed = section(path=root, image_size=8, loading="streaming")
    assert load_data(streamed).fingerprint == resident.fingerprint
    read = []
    whole = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or whole(path))
    monkeypatch.setattr("pskd_timm.data.decode.SAMPLED_BYTES", 10 * (tmp_path / "train" / "a" / "0.bmp").stat().st_size)
    large = load_data(streamed).fingerprint
    assert [path.parent.parent.name for path in read] == ["train"] * 10 + ["test"] * 2
    picture(size=(9, 6)).save(tmp_path / "train" / "b" / "20.bmp")  # larger, and not among those that are read
    assert changed(large, load_data(streamed).fingerprint).endswith("other contents of the training images")


def test_workers_are_as_many_as_the_cores_that_this_process_may_use(tmp_path):
    root = image_folder(tmp_path, {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    streamed = section(path=root, image_size=8, loading="streaming")
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert num_cpus() == 1 == load_data(streamed).train.workers
    finally:
        os.sched_setaffinity(0, allowed)


def test_digits_are_scikit_learns_drawn_by_its_stratified_split_and_are_decoded_once(monkeypatch):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_data(section(source="digits"))
    assert data.class_names == [str(digit) for digit in range(10)]
    images, labels = load_digits(return_X_y=True)
    theirs = train_test_split(images, labels, test_size=597, stratify=labels, random_state=0)
    for ours, images, labels in ((data.train, theirs[0], theirs[2]), (data.test, theirs[1], theirs[3])):
        levels = torch.tensor(images * 255 / 16).round().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        assert torch.equal(ours.images, levels.to(torch.uint8)) and ours.labels.tolist() == labels.tolist()
    monkeypatch.setattr("pskd_timm.data.decode._decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_data(section(source="digits")).train.images, data.train.images)


def test_limits_and_holdout_are_class_balanced_disjoint_and_fixed():
    data = load_data(section(source="digits", limit_train=200, limit_test=50, holdout_fraction=0.2))
    assert data.train.labels.bincount().tolist() == [16] * 10
    assert data.holdout.labels.bincount().tolist() == [4] * 10
    assert data.test.labels.bincount().tolist() == [5] * 10
    assert not set(data.train.source_id.tolist()) & set(data.holdout.source_id.tolist())
    again = load_data(section(source="digits", limit_train=200, limit_test=50, holdout_fraction=0.2))
    assert torch.equal(again.train.source_id, data.train.source_id)


def test_small_classes_are_in_every_part_and_a_single_image_is_told(tmp_path, capsys):
    counts = {"many": 40, "few": 3, "two": 2, "one": 1}
    root = image_folder(tmp_path, {".": counts})
    data = load_data(section(path=root, test_fraction=0.2, holdout_fraction=0.2))
    parts = {name: getattr(data, name).labels.bincount(minlength=4).tolist() for name in ("train", "holdout", "test")}
    # The classes by name: few, many, one, two. Two images are enough for two parts of three.
    assert parts == {"train": [1, 26, 1, 1], "holdout": [1, 6, 0, 0], "test": [1, 8, 0, 1]}
    said = [line.removeprefix("pskd-timm: data.") for line in capsys.readouterr().err.splitlines()]
    assert said == [
        "test_fraction 0.2 takes one image, which is more than its part, of: two (of 2)",
        "test_fraction: left alone, since they have one image each: one",
        "holdout_fraction 0.2 takes one image, which is more than its part, of: few (of 2)",
        "holdout_fraction: left alone, since they have one image each: one, two",
    ]
    again = load_data(section(path=root, test_fraction=0.2, holdout_fraction=0.2))
    assert torch.equal(again.test.images, data.test.images)
    other = load_data(section(path=root, test_fraction=0.2, seed=1))
    assert not torch.equal(other.test.images, data.test.images)
    root = image_folder(tmp_path / "singles", {".": {"a": 1, "b": 1}})
    with pytest.raises(InputError, match=r"data.test_fraction 0.5 has nothing to take: no class has two images"):
        load_data(section(path=root, test_fraction=0.5))


def test_a_balanced_subset_takes_all_of_a_small_class():
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    assert labels[balanced_subset(labels, 12, 0)].bincount().tolist() == [5, 2, 5]


def test_label_noise_flips_the_stated_share_to_other_classes_evenly():
    labels = torch.zeros(5000, dtype=torch.long)
    flipped = flip_labels(labels, 5, 0.3, seed=1)
    assert (flipped != labels).sum() == 1500
    assert flipped.bincount()[1:].float() == pytest.approx(torch.full((4,), 375.0), rel=0.2)
    assert torch.equal(flipped, flip_labels(labels, 5, 0.3, seed=1))
    assert not torch.equal(flipped, flip_labels(labels, 5, 0.3, seed=2))


def test_gaussian_noise_is_fixed_per_sample_has_its_deviation_and_spares_the_clean_copy(tmp_path):
    grey = [Pictures.new("RGB", (32, 32), (128, 128, 128))] * 20
    root = saved(
        tmp_path / "d", {"image": grey, "label": [0, 1] * 10}, {"image": Image(), "label": ClassLabel(names=["a", "b"])}
    )
    noisy = load_data(section(path=root, gaussian_noise=0.1))
    pixels = noisy.train.images.float()
    assert pixels.mean() == pytest.approx(128, abs=0.5) and pixels.std() == pytest.approx(25.5, rel=0.02)
    assert not torch.equal(noisy.train.images, noisy.test.images)
    part = load_data(section(path=root, gaussian_noise=0.1, limit_train=6))
    assert torch.equal(part.train.images, noisy.train.images[part.train.source_id])
    assert torch.equal(load_data(section(path=root)).train.images.unique(), torch.tensor([128], dtype=torch.uint8))


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]


def augmented(images, index, key, section, mean=MEAN, std=STD):
    draws = draw(section, index, key, tuple(images.shape[-2:]))
    return augment(images, draws, section.crop_padding, *pixel_scale(mean, std, "cpu"))


def random_images(count=16, height=10, width=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_crop_flip_and_normalise_equal_torchvisions_on_each_image():
    images, index, key = random_images(), torch.arange(100, 116), 7
    found = augmented(images, index, key, Augment(crop_padding=2, hflip=0.5))
    top, left = (rng.integers(rng.derive_key(key, draw), index, 5) for draw in (TOP, LEFT))
    mirrored = rng.uniform(rng.derive_key(key, FLIP), index) < 0.5
    assert {0, 4} <= set(top.tolist()) and mirrored.any() and not mirrored.all()
    for i in range(16):
        expected = tv.crop(tv.pad(images[i], [2]), int(top[i]), int(left[i]), 10, 12)
        expected = tv.normalize((tv.hflip(expected) if mirrored[i] else expected) / 255, MEAN, STD)
        torch.testing.assert_close(found[i], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(12, 10), (10, 40)], ids=["nearly square", "long"])
def test_a_resident_random_resized_crop_is_pils_of_the_box_that_streaming_draws(size):
    width, height = size
    images, index, key, scale = random_images(64, height, width), torch.arange(7, 71), 11, [0.3, 1.0]
    found = augmented(images, index, key, Augment(random_resized_crop=scale), [0] * 3, [1 / 255] * 3)
    draws = rng.uniform(rng.derive_key(key, RESIZED_CROP), index[:, None] * 40 + torch.arange(40)).view(-1, 10, 4)
    boxes = [resized_crop_box(width, height, scale, one) for one in draws.tolist()]
    assert len(set(boxes)) > 5
    for image, box, cropped in zip(images, boxes, found, strict=True):
        whole = Pictures.fromarray(image.permute(1, 2, 0).numpy())
        expected = np.asarray(whole.resize((width, height), Pictures.Resampling.BILINEAR, box=box))
        assert np.abs(cropped.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


@pytest.mark.parametrize("turn", range(6))
def test_colour_jitter_equals_torchvisions_adjustments_in_the_same_order(turn):
    # Factors below 1 stay inside the range of pixels, where torchvision does not clip.
    images, factors = (
        random_images(4).float(),
        torch.tensor([[0.7, 0.8, 0.9], [0.6, 1.0, 0.5], [1.0, 0.3, 1.0], [0.9, 0.9, 0.9]]),
    )
    found = color_jitter_(images.clone(), jitter_weights(factors, torch.full((4,), turn)))
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i in range(4):
        expected = images[i] / 255
        for step in ORDERS[turn]:
            expected = adjust[step](expected, float(factors[i, step]))
        # torchvision's grey has 0.2989 for red.
        torch.testing.assert_close(found[i] / 255, expected, rtol=0, atol=3e-4)


def test_lighting_moves_every_pixel_along_imagenets_principal_colours():
    moved = lighting(torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.2, -0.1]])) / 255
    first = 0.1 * 0.2175 * np.array([-0.5675, -0.5808, -0.5836])
    second = 0.2 * 0.0188 * np.array([0.7192, -0.0045, -0.6948]) - 0.1 * 0.0045 * np.array([0.4009, -0.8140, 0.4203])
    for i, shift in enumerate((first, second)):
        assert moved[i].numpy() == pytest.approx(shift, abs=1e-6)


def test_jitter_and_lighting_are_drawn_for_each_sample_from_their_ranges():
    index = torch.arange(4000)
    images = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    zero, one = [0.0] * 3, [1.0] * 3
    jittered = 255 * augmented(images, index, 5, Augment(color_jitter=0.4), zero, one)[:, 0, 0, 0]
    assert (jittered.min(), jittered.max()) == (pytest.approx(60, abs=0.2), pytest.approx(140, abs=0.2))
    lit = (255 * augmented(images, index, 5, Augment(lighting=0.1), zero, one)[:, :, 0, 0] - 100) / 255
    vectors, values = np.array(PCA_VECTORS), np.array(PCA_VALUES)
    covariance = vectors @ np.diag((0.1 * values) ** 2) @ vectors.T
    assert np.cov(lit.numpy().T) == pytest.approx(covariance, rel=0.1)


def photographs(root, count=8, size=(90, 70)):
    """A folder of smooth JPEG pictures of two classes, and the HF data set's section for it."""
    for split in ("train", "test"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                x, y = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
                pixels = np.stack([x, y, (x + y) / 2], axis=2) * (150 + 10 * i) + (30 if name == "a" else 0)
                Pictures.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg", quality=95)
    return section(path=str(root), image_size=32, loading="streaming", workers=0)


STREAMED = Augment(random_resized_crop=[0.2, 1.0], hflip=0.5)


def streamed_views(data, rank=0, world_size=1, workers=0, epochs=(0, 1), first_batch=0, partners="class"):
    """Sample → (image, partner) for each epoch."""
    split = replace(data.train, workers=workers)
    found = {}
    with closing(Loader(split, 2, 2, 5, STREAMED, [0.5] * 3, [0.5] * 3, 3, rank, world_size, partners)) as one:
        for epoch in epochs:
            ids = one.rank_batches(epoch)[first_batch:]
            first_batch = 0
            for batch in (b for micro in one.batches(ids, epoch, 2) for b in micro):
                for row, sample in enumerate(batch.index.tolist()):
                    assert (epoch, sample) not in found
                    found[epoch, sample] = torch.stack([batch.inputs[row], batch.partner_inputs[row]])
    return found


def test_a_streamed_view_depends_on_seed_epoch_and_sample_alone_not_on_workers_ranks_or_where_it_starts(tmp_path):
    data = load_data(photographs(tmp_path), STREAMED)
    alone = streamed_views(data)
    assert len(alone) == 2 * 16
    others = [streamed_views(data, workers=2), streamed_views(data, epochs=(1,)), streamed_views(data, first_batch=2)]
    others += [streamed_views(data, rank, 2, workers=rank) for rank in (0, 1)]
    assert [len(found) for found in others] == [32, 16, 22, 12, 18]  # two ranks leave out the last batch of one
    for found in others:
        assert all(torch.equal(view, alone[key]) for key, view in found.items())
    assert not torch.equal(alone[0, 3], alone[1, 3])


def test_a_random_resized_crop_is_torchvisions_of_the_same_box(tmp_path):
    data = load_data(photographs(tmp_path, size=(90, 70)), STREAMED)
    draws = np.random.default_rng(0).random((200, 10, 4)).tolist()
    with Pictures.open(tmp_path / "train" / "a" / "3.jpg") as original:
        for row in draws[:20]:
            left, top, right, bottom = resized_crop_box(90, 70, (0.2, 1.0), row)
            expected = tv.resized_crop(original, top, left, bottom - top, right - left, [32, 32])
            found = _Decoding(data.train)._crop(
                {"path": str(tmp_path / "train" / "a" / "3.jpg"), "bytes": None}, 3, row
            )
            difference = (found.int() - tv.pil_to_tensor(expected).int()).abs()
            reduced = min(right - left, bottom - top) >= 2 * 32  # decoded at half its size
            assert difference.float().mean() < 2 and (reduced or difference.max() <= 1)


def test_random_boxes_have_torchvisions_distribution_of_areas_ratios_and_places():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    picture = torch.zeros(3, 70, 90)
    theirs = np.array([RandomResizedCrop.get_params(picture, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(3000)])
    draws = np.random.default_rng(0).random((3000, 10, 4)).tolist()
    boxes = np.array([resized_crop_box(90, 70, (0.08, 1.0), row) for row in draws])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 0.001


def test_images_in_an_array_column_are_cropped_when_streamed_as_image_files_are(tmp_path):
    from datasets import Array3D

    pixels = random_images(8, 32, 32).permute(0, 2, 3, 1).numpy()
    columns = {"array": list(pixels), "file": [Pictures.fromarray(one) for one in pixels], "label": [0, 1] * 4}
    features = {"array": Array3D((32, 32, 3), "uint8"), "file": Image(), "label": ClassLabel(names=["a", "b"])}
    root = saved(tmp_path / "d", columns, features)
    settings = {"path": root, "image_size": 32, "loading": "streaming", "workers": 0}
    of_arrays, of_files = (
        streamed_views(load_data(section(image_column=column, **settings), STREAMED)) for column in ("array", "file")
    )
    assert len(of_arrays) == 16 and all(torch.equal(view, of_files[key]) for key, view in of_arrays.items())
    assert not torch.equal(of_arrays[0, 0], of_arrays[1, 0])


def test_a_large_jpeg_decoded_at_a_reduced_scale_shows_the_same_crop(tmp_path):
    photographs(tmp_path, count=1, size=(640, 480))
    path = str(tmp_path / "train" / "a" / "0.jpg")
    box = (100, 50, 500, 450)
    found = open_box({"path": path, "bytes": None}, 0, lambda size: (box, 50))
    assert found.shape == (3, 50, 50)  # an eighth: 400 pixels of box for 50
    with Pictures.open(path) as whole:
        expected = tv.pil_to_tensor(whole.resize((50, 50), Pictures.Resampling.BILINEAR, box=box))
    assert (found.float() - expected).abs().mean() < 3


def test_training_images_are_shrunk_once_and_show_nearly_the_same_crops(tmp_path):
    original = photographs(tmp_path / "d", size=(90, 70))
    small = original.model_copy(update={"shrink_to": 40, "cache_dir": str(tmp_path / "cache")})
    done = []
    data = load(small, STREAMED, lambda *now: done.append(now))
    assert done == [("shrinking train", 16, 16)]
    with Pictures.open(io.BytesIO(data.train.smaller[5]["image"]["bytes"])) as picture:
        assert picture.format == "JPEG" and picture.size == (51, 40)
    (file,) = (tmp_path / "cache").glob("*.arrow")
    written = file.stat().st_mtime_ns
    again = load(small, STREAMED)
    assert file.stat().st_mtime_ns == written and again.fingerprint == load(original, STREAMED).fingerprint
    views = [streamed_views(one) for one in (data, again, load(original, STREAMED))]
    assert all(torch.equal(view, views[1][key]) for key, view in views[0].items())
    differences = [255 * 0.5 * (view - views[2][key]).abs().mean() for key, view in views[0].items()]
    # Grey levels. Now and then a box fits into the one frame and, by a pixel, not into the other.
    assert 0 < np.median(differences) < 2
    # What is evaluated, test or held-out, is never the smaller copy.
    for part in (data.train, data.test):
        whole = replace(part, smaller=None)
        assert torch.equal(read_images(part, torch.arange(16)), read_images(whole, torch.arange(16)))


def test_shrinking_leaves_small_and_damaged_images_as_they_are(tmp_path):
    original = photographs(tmp_path / "d", size=(90, 70))
    (tmp_path / "d" / "train" / "b" / "2.jpg").write_bytes(b"no picture")
    picture(size=(30, 35)).save(tmp_path / "d" / "train" / "a" / "1.jpg")
    data = load(original.model_copy(update={"shrink_to": 40, "cache_dir": str(tmp_path / "cache")}), STREAMED)
    assert data.train.smaller[1]["image"] == data.train.table.encoded_images[1]["image"]
    with pytest.raises(InputError, match=r"image 10 \(.*2.jpg\) cannot be decoded"):
        streamed_views(data)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"shrink_to": 20}, "shrink_to 20 is less than image_size 32"),
        ({"shrink_to": 40, "loading": "resident"}, "shrink_to needs loading streaming"),
    ],
)
def test_a_shrink_to_that_makes_no_sense_is_refused(settings, says):
    with pytest.raises(ValueError, match=says):
        section(path="d", **{"image_size": 32, "loading": "streaming"} | settings)


def test_streamed_test_images_are_resized_and_centre_cropped_as_resident_ones(tmp_path):
    streamed = photographs(tmp_path).model_copy(update={"crop_pct": 0.8})
    data = load_data(streamed)
    resident = load_data(streamed.model_copy(update={"loading": "resident"}))
    pairs = zip(
        eval_batches(data.test, 5, [0] * 3, [1] * 3, slice(0, 16)),
        eval_batches(resident.test, 5, [0] * 3, [1] * 3, slice(0, 16)),
        strict=True,
    )
    for (images, labels), (expected, expected_labels) in pairs:
        assert torch.equal(images, expected) and torch.equal(labels, expected_labels)
    with Pictures.open(tmp_path / "test" / "a" / "0.jpg") as picture:  # 90×70: 40/70 of it, then the middle 32 pixels
        expected = tv.center_crop(picture.resize((51, 40), Pictures.Resampling.BICUBIC), [32, 32])
    first = (255 * next(eval_batches(data.test, 1, [0] * 3, [1] * 3, slice(0, 16)))[0][0]).round()
    assert (first - tv.pil_to_tensor(expected)).abs().mean() < 3


def test_held_out_images_are_cropped_as_test_images_however_they_are_loaded(tmp_path):
    streamed = photographs(tmp_path).model_copy(update={"crop_pct": 0.8, "holdout_fraction": 0.25})
    data = load_data(streamed)
    resident = load_data(streamed.model_copy(update={"loading": "resident"}))
    assert torch.equal(data.holdout.source_id, resident.holdout.source_id)
    for split, other in ((data.holdout, resident.holdout), (data.test, resident.test)):
        seen = zip(
            *(eval_batches(each, 4, [0] * 3, [1] * 3, slice(0, len(each))) for each in (split, other)), strict=True
        )
        assert all(torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) for one, two in seen)
    whole = load_data(streamed.model_copy(update={"loading": "resident", "crop_pct": 1.0}))
    assert torch.equal(resident.train.images, whole.train.images)
    assert not torch.equal(resident.holdout.images, whole.holdout.images)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_streamed_image_is_named_in_one_line(tmp_path, workers):
    data = load_data(photographs(tmp_path), STREAMED)
    (tmp_path / "train" / "b" / "5.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^data: image 13 \(.*5\.jpg\) cannot be decoded: .*$"):
        streamed_views(data, workers=workers)


@pytest.mark.parametrize("loading, workers", [("resident", None), ("streaming", 0), ("streaming", 2)])
def test_damaged_training_images_are_left_out_by_wish_and_named_and_damaged_test_images_never(
    tmp_path, capfd, loading, workers
):
    settings = {"loading": loading, "workers": workers, "damaged": "skip"}
    streamed = photographs(tmp_path).model_copy(update=settings)
    (tmp_path / "train" / "b" / "5.jpg").write_bytes(b"no picture")
    data = load_data(streamed)
    seen = []
    with closing(Loader(data.train, 2, 2, 5, Augment(), [0.5] * 3, [0.5] * 3, 3, 0, 1, partners=False)) as one:
        for (batch,) in one.batches(one.rank_batches(0), 0):
            assert len(batch.inputs) == len(batch.labels) == len(batch.index)
            seen += data.train.source_id[batch.index].tolist()
    assert sorted(seen) == [*range(13), 14, 15]
    assert capfd.readouterr().err.count("5.jpg) cannot be decoded") == 1
    (tmp_path / "test" / "a" / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^data: image 2 .*2\.jpg\) cannot be decoded"):
        test = load_data(streamed).test
        list(eval_batches(test, 5, [0] * 3, [1] * 3, slice(0, 16)))


@pytest.mark.parametrize("whole", [True, False])
def test_workers_are_forked_from_their_run_whatever_pythons_default_is_and_end_with_it(tmp_path, whole):
    # As in the runs of a comparison, and on Linux from Python 3.14 on.
    others = set(multiprocessing.active_children())
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        split = replace(load_data(photographs(tmp_path)).train, workers=2)
        loader = Loader(split, 2, 1, 5, Augment(), [0] * 3, [1 / 255] * 3, 3, 0, 1, False)
        batches = loader.batches(loader.rank_batches(0), 0)
        next(batches)
        started = set(multiprocessing.active_children()) - others
        parents = [Path(f"/proc/{each.pid}/stat").read_text().split()[3] for each in started]
        if whole:
            list(batches)  # of the only epoch
        else:
            loader.close()
        assert not started & set(multiprocessing.active_children())
    finally:
        multiprocessing.set_start_method(default, force=True)
    assert parents == [str(os.getpid())] * 2


def test_a_policy_of_timms_is_drawn_for_each_sample_on_any_number_of_workers(tmp_path):
    import random

    from timm.data.auto_augment import rand_augment_transform

    named = Augment(auto_augment="rand-m9-n3-mstd0.5")
    data = load_data(photographs(tmp_path), named)
    plain = load_data(photographs(tmp_path / "again"))

    def epoch(split, workers=0):
        split = replace(split, workers=workers)
        with closing(Loader(split, 2, 2, 5, Augment(), [0] * 3, [1 / 255] * 3, 3, 0, 1, False)) as one:
            batches = [micro[0] for micro in one.batches(one.rank_batches(0), 0)]
        return {int(i): image for batch in batches for i, image in zip(batch.index, batch.inputs, strict=True)}

    random.seed(0)
    before, changed, untouched = random.getstate(), epoch(data.train), epoch(plain.train)
    assert random.getstate() == before
    assert all(torch.equal(image, changed[i]) for i, image in epoch(data.train, workers=2).items())
    assert sum(not torch.equal(changed[i], untouched[i]) for i in changed) > 8
    # timm's own transform, seeded as a sample's is, on the image as it is without a policy.
    theirs = rand_augment_transform("rand-m9-n3-mstd0.5", {"translate_const": int(0.45 * 32)})
    for i, image in untouched.items():
        seed = int(rng.integers(rng.derive_key(rng.derive_key(3, 0, ANCHOR), AUTO_AUGMENT), torch.tensor([i]), 2**31))
        random.seed(seed)
        np.random.seed(seed)
        picture = Pictures.fromarray(image.permute(1, 2, 0).to(torch.uint8).numpy())
        assert np.array_equal(np.asarray(theirs(picture)), changed[i].permute(1, 2, 0).numpy())
    with pytest.raises(InputError, match="no policy 'rand-q9'"):
        load_data(photographs(tmp_path / "third"), Augment(auto_augment="rand-q9"))
    with pytest.raises(InputError, match="no policy 'rand-mX'"):
        load_data(photographs(tmp_path / "fourth"), Augment(auto_augment="rand-mX"))
    with pytest.raises(InputError, match="cutout 33 is larger than the images of 32×32"):
        load_data(photographs(tmp_path / "fifth"), Augment(cutout=33))


def test_cutout_and_random_erasing_set_their_boxes_to_zero_as_a_loop_over_the_samples_does():
    images, index, key = torch.ones(400, 3, 10, 14), torch.arange(7, 407), 5
    cut = erase(images, draw_cutout(index, key, 4, (10, 14)))
    draws = [rng.integers(rng.derive_key(key, d), index, n).tolist() for d, n in ((CUT_DOWN, 10), (CUT_ACROSS, 14))]
    for found, down, across in zip(cut, *draws, strict=True):
        expected = torch.ones(3, 10, 14)
        expected[:, max(down - 2, 0) : down + 2, max(across - 2, 0) : across + 2] = 0
        assert torch.equal(found, expected)
    erased = erase(images, draw_erasing(index, key, 0.4, (10, 14)))[:, 0] == 0
    area = erased.sum(dim=(1, 2))
    some = area > 0
    assert some.float().mean() == pytest.approx(0.4, abs=0.06)
    assert area[some].min() >= 0.01 * 140 and area[some].max() <= 0.4 * 140
    assert (area[some] / 140.0).mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    tall, wide = erased.any(dim=2).sum(dim=1), erased.any(dim=1).sum(dim=1)
    assert torch.equal(area, tall * wide)  # one whole box each
    ratio = (tall[some] / wide[some]).log()
    assert ratio.abs().max() < 1.7 and abs(ratio.mean()) < 0.15


def test_a_crop_moves_an_image_by_at_most_its_padding():
    images = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    images[0, 0, 4, 4] = 255
    for top in range(5):
        for mirrored in (0, 1):
            place = [torch.tensor([value]) for value in (top, 0, mirrored)]
            moved = crop(images, window_start(*place, 2, (9, 9)), 2)
            assert moved[0, 0].nonzero().tolist() == [[6 - top, 8 - 6 if mirrored else 6]]


def loader(world_size=1, rank=0, partners="class", batch_size=32):
    data = load_data(section(source="digits", limit_train=90))
    return Loader(
        data.train,
        10,
        6,
        batch_size,
        Augment(crop_padding=2, hflip=0.5),
        [0.5] * 3,
        [0.5] * 3,
        3,
        rank,
        world_size,
        partners,
    )


def test_a_samples_view_depends_on_seed_epoch_and_sample_alone():
    alone = {}
    for rank, world_size, accumulate in ((0, 1, 1), (0, 2, 3), (1, 2, 1)):
        one = loader(world_size, rank)
        for batch in (b for micro in one.batches(one.rank_batches(4), 4, accumulate) for b in micro):
            for row, sample in enumerate(batch.index.tolist()):
                view = (batch.inputs[row], batch.partner_inputs[row])
                expected = alone.setdefault(sample, view)
                assert torch.equal(view[0], expected[0]) and torch.equal(view[1], expected[1])
    assert len(alone) == 90
    one = loader()
    other_epoch = {
        int(i): image
        for micro in one.batches(one.rank_batches(5), 5)
        for b in micro
        for i, image in zip(b.index, b.inputs, strict=True)
    }
    assert any(not torch.equal(other_epoch[sample], alone[sample][0]) for sample in alone)


def test_only_methods_that_ask_for_partners_pay_for_them():
    one = loader(partners=False)
    assert next(one.batches(one.rank_batches(0), 0))[0].partner_inputs is None


EVERYTHING = Augment(
    random_resized_crop=[0.2, 1.0],
    crop_padding=2,
    hflip=0.5,
    color_jitter=0.4,
    lighting=0.1,
    cutout=3,
    random_erasing=0.5,
)


def test_numbers_drawn_for_an_epoch_at_once_are_those_drawn_for_each_batch_to_the_bit(monkeypatch):
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    whole = draw(EVERYTHING, index, 7, (10, 12))
    monkeypatch.setattr("pskd_timm.data.augmentation.DRAW_ROWS", 77)  # in parts, as of an epoch that is too large
    lengths = [64] * 15 + [40]
    for part, rows in zip(draw(EVERYTHING, index, 7, (10, 12)).split(lengths), index.split(64), strict=True):
        alone = draw(EVERYTHING, rows, 7, (10, 12))
        assert all(torch.equal(a, b) for a, b in zip(part, alone, strict=True))
    assert sum(column.nbytes for column in whole) <= 88 * 1000


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("augmentation", "at_most"),
    [
        (Augment(crop_padding=4, hflip=0.5), 20),
        (Augment(random_resized_crop=[0.08, 1.0], hflip=0.5, color_jitter=0.4, lighting=0.1), 40),
        (EVERYTHING, 70),
    ],
    ids=["crop and flip", "ImageNet", "everything"],
)
def test_a_resident_batch_takes_few_operations(augmentation, at_most):
    split = Split(random_images(96), torch.zeros(96, dtype=torch.int64), torch.arange(96))
    one = Loader(split, 2, 2, 32, augmentation, MEAN, STD, 0, 0, 1, partners=False)
    batches = one.batches(one.rank_batches(0), 0)
    next(batches)  # works out the epoch's numbers
    with CountOperations() as operations:
        next(batches)
    assert operations.count <= at_most
