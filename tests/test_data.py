from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures
from scipy import stats

from pskd_timm import InputError, load_recipe, rng
from pskd_timm.data import Loader, eval_batches
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
    color_jitter,
    crop,
    cutout,
    lighting,
    random_erasing,
)
from pskd_timm.data.decode import open_image
from pskd_timm.data.loader import ANCHOR
from pskd_timm.data.split import Split, class_balanced, flip_labels
from pskd_timm.data.streaming import _Pictures, resized_crop_box
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
    with pytest.raises(InputError, match="labelled 0 … 1"):
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
    import os

    root = image_folder(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 1}})
    before = load_data(section(path=root)).train.images
    picture(value=200).save(tmp_path / "train" / "a" / "0.png")
    os.utime(tmp_path / "train" / "a" / "0.png", (1, 1))
    assert not torch.equal(load_data(section(path=root)).train.images, before)


def test_sixteen_bit_pictures_are_scaled_and_turned_ones_are_turned(tmp_path):
    deep = np.array([[0, 257 * 100], [257 * 200, 65535]], dtype=np.uint16)
    Pictures.fromarray(deep).save(tmp_path / "deep.png")
    found = np.asarray(open_image({"path": str(tmp_path / "deep.png"), "bytes": None}, 0)[0])
    assert found[..., 0].tolist() == [[0, 100], [200, 255]]
    wide, exif = picture((8, 6)), Pictures.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    wide.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image({"path": str(tmp_path / "turned.jpg"), "bytes": None}, 0)[0].size == (6, 8)


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


@pytest.mark.parametrize("labels", [[0.0, 1.0], [None, 1], [[0], [1]]])
def test_labels_that_are_neither_numbers_nor_words_are_refused(tmp_path, labels):
    root = str(tmp_path / "d")
    table = Dataset.from_dict({"image": [picture(), picture()], "label": labels}).cast_column("image", Image())
    DatasetDict(train=table, test=table).save_to_disk(root)
    with pytest.raises(InputError, match="data.label_column: label should hold a number or a word a sample"):
        load_data(section(path=root))


def test_show_does_not_count_damaged_images_as_usable_ones():
    said = {damaged: cost_lines(load_recipe("digits", {"data.damaged": damaged}))[0] for damaged in ("fail", "skip")}
    assert said["fail"].endswith("10 classes")
    assert said["skip"] == said["fail"] + ", less training images that turn out damaged"


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="has no folders of images: it should hold one for each class"):
        load_data(section(path=str(tmp_path)))


def test_digits_are_scikit_learns_and_are_decoded_once(monkeypatch):
    from sklearn.datasets import load_digits

    data = load_data(section(source="digits"))
    assert (len(data.train), len(data.test), data.num_classes) == (1200, 597, 10)
    ours = torch.cat([data.train.images, data.test.images])[:, 0].double().mul(16 / 255).round()
    theirs = torch.tensor(load_digits().images)
    assert sorted(ours.flatten(1).tolist()) == sorted(theirs.flatten(1).tolist())
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
    told = capsys.readouterr().err.splitlines()
    assert told[0].endswith("data.test_fraction: left alone, since they have one image each: one")
    assert told[1].endswith("data.holdout_fraction: left alone, since they have one image each: one, two")
    again = load_data(section(path=root, test_fraction=0.2, holdout_fraction=0.2))
    assert torch.equal(again.test.images, data.test.images)
    other = load_data(section(path=root, test_fraction=0.2, seed=1))
    assert not torch.equal(other.test.images, data.test.images)
    root = image_folder(tmp_path / "singles", {".": {"a": 1, "b": 1}})
    with pytest.raises(InputError, match=r"data.test_fraction 0.5 has nothing to take: no class has two images"):
        load_data(section(path=root, test_fraction=0.5))


def test_a_class_balanced_part_takes_all_of_a_small_class():
    labels = torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    assert labels[class_balanced(labels, 12, 0)].bincount().tolist() == [5, 2, 5]


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


MEAN, STD = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])


def random_images(count=16, height=10, width=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def test_crop_flip_and_normalise_equal_torchvisions_on_each_image():
    images, index, key = random_images(), torch.arange(100, 116), 7
    found = augment(images, index, key, Augment(crop_padding=2, hflip=0.5), MEAN, STD)
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
    split = Split(images, torch.zeros(64, dtype=torch.int64), torch.arange(64), scale)
    found = next(split.stream([(index, [(torch.arange(64), key), (torch.arange(64), None)])]))[1]
    assert torch.equal(found[1], images)
    draws = rng.uniform(rng.derive_key(key, RESIZED_CROP), index[:, None] * 40 + torch.arange(40)).view(-1, 10, 4)
    boxes = [resized_crop_box(width, height, scale, one) for one in draws.tolist()]
    assert len(set(boxes)) > 5
    for image, box, cropped in zip(images, boxes, found[0], strict=True):
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
    found = color_jitter(images, factors, torch.full((4,), turn))
    adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)
    for i in range(4):
        expected = images[i] / 255
        for step in ORDERS[turn]:
            expected = adjust[step](expected, float(factors[i, step]))
        # torchvision's grey has 0.2989 for red.
        torch.testing.assert_close(found[i] / 255, expected, rtol=0, atol=3e-4)


def test_lighting_moves_every_pixel_along_imagenets_principal_colours():
    images, alpha = random_images(2).float(), torch.tensor([[0.1, 0.0, 0.0], [0.0, 0.2, -0.1]])
    moved = (lighting(images, alpha) - images) / 255
    first = 0.1 * 0.2175 * np.array([-0.5675, -0.5808, -0.5836])
    second = 0.2 * 0.0188 * np.array([0.7192, -0.0045, -0.6948]) - 0.1 * 0.0045 * np.array([0.4009, -0.8140, 0.4203])
    for i, shift in enumerate((first, second)):
        assert moved[i].mean(dim=(1, 2)).numpy() == pytest.approx(shift, abs=1e-5)
        assert moved[i].std(dim=(1, 2)).max() < 1e-4


def test_jitter_and_lighting_are_drawn_for_each_sample_from_their_ranges():
    index = torch.arange(4000)
    images = torch.full((4000, 3, 2, 2), 100, dtype=torch.uint8)
    zero, one = torch.zeros(3), torch.ones(3)
    jittered = 255 * augment(images, index, 5, Augment(color_jitter=0.4), zero, one)[:, 0, 0, 0]
    assert (jittered.min(), jittered.max()) == (pytest.approx(60, abs=0.2), pytest.approx(140, abs=0.2))
    lit = (255 * augment(images, index, 5, Augment(lighting=0.1), zero, one)[:, :, 0, 0] - 100) / 255
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


def streamed_views(data, rank=0, world_size=1, workers=0, epochs=(0, 1), first_batch=0, partners=True):
    """Sample → (image, partner) for each epoch."""
    split = replace(data.train, workers=workers)
    one = Loader(split, 2, 2, 5, STREAMED, [0.5] * 3, [0.5] * 3, 3, rank, world_size, partners)
    found = {}
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
            found = _Pictures(data.train)._crop(
                {"path": str(tmp_path / "train" / "a" / "3.jpg"), "bytes": None}, 3, row
            )
            assert np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).mean() < 2


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


def test_a_large_jpeg_decoded_at_a_reduced_scale_shows_the_same_crop(tmp_path):
    photographs(tmp_path, count=1, size=(640, 480))
    path = str(tmp_path / "train" / "a" / "0.jpg")
    box = (100, 50, 500, 450)
    small, scaled = open_image({"path": path, "bytes": None}, 0, lambda size: (box, 50))
    assert small.size == (80, 60)  # an eighth: 400 pixels of box for 50
    found = np.asarray(small.resize((50, 50), Pictures.Resampling.BILINEAR, box=scaled), dtype=float)
    with Pictures.open(path) as whole:
        expected = np.asarray(whole.resize((50, 50), Pictures.Resampling.BILINEAR, box=box), dtype=float)
    assert np.abs(found - expected).mean() < 2


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
    one = Loader(data.train, 2, 2, 5, Augment(), [0.5] * 3, [0.5] * 3, 3, 0, 1, partners=False)
    for (batch,) in one.batches(one.rank_batches(0), 0):
        assert len(batch.inputs) == len(batch.labels) == len(batch.index)
        seen += data.train.source_id[batch.index].tolist()
    assert sorted(seen) == [*range(13), 14, 15]
    assert capfd.readouterr().err.count("5.jpg) cannot be decoded") == 1
    (tmp_path / "test" / "a" / "2.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"^data: image 2 .*2\.jpg\) cannot be decoded"):
        test = load_data(streamed).test
        list(eval_batches(test, 5, [0] * 3, [1] * 3, slice(0, 16)))


def test_a_policy_of_timms_is_drawn_for_each_sample_on_any_number_of_workers(tmp_path):
    import random

    from timm.data.auto_augment import rand_augment_transform

    named = Augment(auto_augment="rand-m9-n3-mstd0.5")
    data = load_data(photographs(tmp_path), named)
    plain = load_data(photographs(tmp_path / "again"))

    def epoch(split, workers=0):
        one = Loader(replace(split, workers=workers), 2, 2, 5, Augment(), [0] * 3, [1 / 255] * 3, 3, 0, 1, False)
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
    cut = cutout(images, index, key, 4)
    draws = [rng.integers(rng.derive_key(key, d), index, n).tolist() for d, n in ((CUT_DOWN, 10), (CUT_ACROSS, 14))]
    for found, down, across in zip(cut, *draws, strict=True):
        expected = torch.ones(3, 10, 14)
        expected[:, max(down - 2, 0) : down + 2, max(across - 2, 0) : across + 2] = 0
        assert torch.equal(found, expected)
    erased = random_erasing(images, index, key, 0.4)[:, 0] == 0
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
        moved = crop(images, torch.tensor([top]), torch.tensor([0]), 2)
        assert moved[0, 0].nonzero().tolist() == [[6 - top, 6]]


def loader(world_size=1, rank=0, partners=True, batch_size=32):
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
