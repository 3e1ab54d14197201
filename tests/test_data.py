import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tv
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pictures

from pskd_timm import InputError, load_recipe, rng
from pskd_timm.augment import FLIP, LEFT, TOP, augment, crop, normalize
from pskd_timm.data import ResidentLoader, load_data
from pskd_timm.data.split import class_balanced, flip_labels
from pskd_timm.recipe import Augment


def picture(size=(8, 6), mode="RGB", value=100):
    bands = {"RGB": (value, 50, 200), "L": value, "RGBA": (value, 50, 200, 128)}
    return Pictures.new(mode, size, bands[mode])


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
    assert (len(data.train), len(data.test)) == (9, 3)


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
        ({"path": "nowhere"}, "data.path: no folder nowhere"),
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


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read as images"):
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


def test_crop_flip_and_normalise_equal_torchvisions_on_each_image():
    images = torch.randint(0, 256, (16, 3, 10, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    index, key = torch.arange(100, 116), 7
    found = augment(images, index, key, padding=2, hflip=0.5)
    top, left = (rng.integers(rng.fold(key, draw), index, 5) for draw in (TOP, LEFT))
    mirrored = rng.uniform(rng.fold(key, FLIP), index) < 0.5
    assert {0, 4} <= set(top.tolist()) and mirrored.any() and not mirrored.all()
    for i in range(16):
        expected = tv.crop(tv.pad(images[i], [2]), int(top[i]), int(left[i]), 10, 12)
        assert torch.equal(found[i], tv.hflip(expected) if mirrored[i] else expected)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = tv.normalize(images / 255, mean, std)
    torch.testing.assert_close(normalize(images, mean, std), expected, rtol=1e-5, atol=1e-5)


def test_a_crop_moves_an_image_by_at_most_its_padding():
    images = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    images[0, 0, 4, 4] = 255
    for top in range(5):
        moved = crop(images, torch.tensor([top]), torch.tensor([0]), 2)
        assert moved[0, 0].nonzero().tolist() == [[6 - top, 6]]


def loader(world_size=1, rank=0, partners=True, batch_size=32):
    data = load_data(section(source="digits", limit_train=90))
    return ResidentLoader(
        data.train,
        10,
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
                view = (batch.images[row], batch.partner_images[row])
                expected = alone.setdefault(sample, view)
                assert torch.equal(view[0], expected[0]) and torch.equal(view[1], expected[1])
    assert len(alone) == 90
    one = loader()
    other_epoch = {
        int(i): image
        for micro in one.batches(one.rank_batches(5), 5)
        for b in micro
        for i, image in zip(b.index, b.images, strict=True)
    }
    assert any(not torch.equal(other_epoch[sample], alone[sample][0]) for sample in alone)


def test_only_methods_that_ask_for_partners_pay_for_them():
    assert loader(partners=False).batch(torch.arange(3), 0).partner_images is None
