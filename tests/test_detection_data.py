"""VOC's files and HF data sets: each rule of reading, and flips with boxes."""

import numpy as np
import pytest
from detection_data import annotation, make_devkit, xml_object
from PIL import Image

from pskd_timm import InputError
from pskd_timm.detection.data import Rules, examples, mirrored, open_data, read_annotation
from pskd_timm.detection.settings import VOC_CLASSES, Data


@pytest.fixture
def devkit(tmp_path):
    return make_devkit(make_devkit(tmp_path / "VOCdevkit"), "VOC2012", seed=1)


def read(tmp_path, *objects, size=(100, 80), rule="fail"):
    path = tmp_path / "000001.xml"
    path.write_text(annotation(objects, *size))
    return read_annotation(path, size, Rules(rule, VOC_CLASSES))


def test_boxes_count_from_one_and_include_their_last_pixel(tmp_path):
    found = read(tmp_path, xml_object("cat", (1, 1, 100, 80)), xml_object("dog", (11, 21, 11, 21)))
    assert found.boxes.tolist() == [[0, 0, 100, 80], [10, 20, 11, 21]]  # the whole picture, and one pixel
    assert found.labels.tolist() == [VOC_CLASSES.index("cat"), VOC_CLASSES.index("dog")]


def test_coordinates_may_be_fractions_and_are_cut_at_the_edges(tmp_path):
    found = read(tmp_path, xml_object("cat", (10.5, 20.25, 30, 40.75)), xml_object("cat", (0, -3, 200, 81)))
    assert found.boxes.tolist() == [[9.5, 19.25, 30, 40.75], [0, 0, 100, 80]]


def test_boxes_of_parts_inside_an_object_are_no_objects_nor_its_box(tmp_path):
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    found = read(tmp_path, xml_object("person", (11, 21, 30, 40), more=part))
    assert found.boxes.tolist() == [[10, 20, 30, 40]]


def test_difficult_is_kept_and_may_be_missing(tmp_path):
    without = xml_object("cat", (1, 1, 9, 9)).replace("<difficult>0</difficult>", "")
    assert read(tmp_path, xml_object("cat", (1, 1, 9, 9), difficult=1), without).difficult.tolist() == [True, False]


def test_a_picture_without_objects_is_one_without_objects(tmp_path):
    assert read(tmp_path).boxes.shape == (0, 4)


@pytest.mark.parametrize(
    "objects, line",
    [
        ("<object><name>cat</name></object>", "object 1 (cat) has no bndbox"),
        (xml_object("cat", (1, 1, 9, 9), more="<bndbox/>"), "has 2 bndboxes"),
        (xml_object("", (1, 1, 9, 9)), "object 1 has no name"),
        (xml_object("cat", (1, "x", 9, 9)), "ymin should be a number, it is 'x'"),
        (xml_object("cat", (1, "nan", 9, 9)), "ymin should be a number"),
        (xml_object("cat", (9, 1, 5, 9)), "has no area"),
        (xml_object("cat", (101, 1, 120, 9)), "lies outside the 100×80 picture"),
        (xml_object("cat", (1, 1, 9, 9), difficult=2), "difficult should be 0 or 1, it is '2'"),
        (xml_object("catt", (1, 1, 9, 9)), "'catt', which is none of the classes: did you mean cat"),
        ("<object>", "cannot be read"),
    ],
)
def test_what_cannot_be_understood_is_named_with_its_file(tmp_path, objects, line):
    with pytest.raises(InputError) as caught:
        read(tmp_path, objects)
    assert str(caught.value).startswith(str(tmp_path / "000001.xml")) and line in str(caught.value)


def test_objects_of_other_names_are_left_out_where_one_asks_for_it_and_counted(devkit, capsys):
    section = Data(
        path=str(devkit), train=["VOC2007/train"], test=["VOC2012/val"], class_names=["cat"], other_names="skip"
    )
    data = open_data(section)
    kept = sum(len(objects.labels) for part in (data.train, data.test) for objects in part.objects)
    line = capsys.readouterr().err
    assert f"{16 - kept} objects of other names are left out: {16 - kept} dog" in line


def change_annotation(devkit, name, old, new):
    path = devkit / "VOC2007/Annotations" / f"{name}.xml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return path


def voc(devkit):
    return open_data(Data(path=str(devkit), train=["VOC2007/train"], test=["VOC2007/val"]))


def test_boxes_that_reach_beyond_their_pictures_are_counted_in_one_line_with_the_first_ones_file(devkit, capsys):
    first = change_annotation(devkit, "000001", "<xmin>", "<xmin>-")
    change_annotation(devkit, "000002", "</ymax>", "9</ymax>")
    voc(devkit)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "data: 2 boxes reach beyond the picture and are cut at its edges" in line
    assert f"{first}: object 1 (" in line and "is the first" in line


def test_annotations_of_another_size_than_their_picture_are_counted_in_one_line_with_the_first_file(devkit, capsys):
    first = change_annotation(devkit, "000001", "<width>96", "<width>500")
    change_annotation(devkit, "000003", "<height>64", "<height>x")
    data = voc(devkit)
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "data: 2 annotations give a size that is not the picture's" in line
    assert f"{first} (500×64, the picture is 96×64) is the first" in line and data.train.size(1) == (96, 64)


def test_sound_data_and_annotations_without_a_size_are_read_without_a_word(devkit, capsys):
    path = change_annotation(devkit, "000001", "<size>", "<other>")
    path.write_text(path.read_text().replace("</size>", "</other>"))
    voc(devkit)
    assert capsys.readouterr().err == ""


def test_a_box_that_leaves_its_picture_by_a_rounding_error_is_not_counted():
    rules = Rules("skip", ["cat"])
    assert rules.inside([0, -1e-5, 100.001, 80], (100, 80), "here") == [0, 0, 100, 80] and not rules.cut
    rules.inside([0, 0, 100.5, 80], (100, 80), "here")
    assert rules.cut == ["here"]


def test_objects_that_are_left_out_are_not_counted_among_the_cut_boxes_too(tmp_path):
    rules = Rules("skip", ["cat"])
    path = tmp_path / "a.xml"
    path.write_text(annotation([xml_object("dog", (1, 1, 999, 9)), xml_object("cat", (1, 1, 9, 9))], 100, 80))
    assert len(read_annotation(path, (100, 80), rules).labels) == 1 and not rules.cut and rules.left_out == {"dog": 1}


def test_an_image_set_that_is_missing_is_answered_with_those_there_are_and_no_guess_at_one(devkit):
    main = devkit / "VOC2007/ImageSets/Main"
    (main / "train.txt").rename(main / "test.txt")
    with pytest.raises(InputError) as caught:
        open_data(Data(path=str(devkit), train=["VOC2007/trainval"], test=["VOC2007/test"]))
    there = "VOC2007/test, VOC2007/val, VOC2012/train, VOC2012/val"
    assert str(caught.value) == f"data.train: no image set 'VOC2007/trainval' in {devkit}, which has {there}"


def test_several_years_are_one_part_in_the_order_they_are_named_in(devkit):
    data = open_data(Data(path=str(devkit), train=["VOC2007/train", "VOC2012/train"], test=["VOC2012/val"]))
    assert data.train.names == [f"{year}/{i:06d}" for year in ("VOC2007", "VOC2012") for i in range(4)]
    assert data.class_names == VOC_CLASSES and len(data.test) == 4
    assert data.train.picture(5).size == (96, 64)


def test_difficult_objects_are_trained_on_only_where_one_asks_for_it_and_always_tested_on(devkit):
    for part in ("train", "val"):
        first = (devkit / f"VOC2007/ImageSets/Main/{part}.txt").read_text().split()[0]
        path = devkit / f"VOC2007/Annotations/{first}.xml"
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1", 1))
    names = {"path": str(devkit), "train": ["VOC2007/train"], "test": ["VOC2007/val"]}
    without, with_them = open_data(Data(**names)), open_data(Data(**names, train_difficult=True))
    assert [len(each.train.objects[0].labels) for each in (without, with_them)] == [1, 2]
    assert without.test.objects[0].difficult.tolist() == [True, False]
    for path in (devkit / "VOC2007/Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("<difficult>0", "<difficult>1"))
    with pytest.raises(InputError, match="data.test: its 4 pictures have no object that is not difficult"):
        open_data(Data(**names, train_difficult=True))


@pytest.mark.parametrize(
    "train, line",
    [
        (["VOC2007/trian"], "data.train: no image set 'VOC2007/trian' in"),
        (["train"], "data.train: no image set 'train' in"),
        (["VOC2007/train", "VOC2007/train"], "is in VOC2007/train and in VOC2007/train"),
        (["VOC2007/cat_train"], "has a second column"),
        (["VOC2007/empty"], "names no picture"),
        (["VOC2007/lost"], "000099.jpg: the picture is missing"),
        (["VOC2007/twice"], "names 000001 twice"),
    ],
)
def test_image_sets_that_cannot_be_used_are_named(devkit, train, line):
    main = devkit / "VOC2007/ImageSets/Main"
    for name, text in (
        ("cat_train", "000001 -1\n"),
        ("empty", "\n"),
        ("lost", "000099"),
        ("twice", "000001\n000001\n"),
    ):
        (main / f"{name}.txt").write_text(text)
    with pytest.raises(InputError) as caught:
        open_data(Data(path=str(devkit), train=train, test=["VOC2007/val"]))
    assert line.replace("names 000001", "names VOC2007/000001") in str(caught.value)


def test_a_folder_without_vocs_years_and_a_damaged_picture_are_named(tmp_path, devkit):
    with pytest.raises(InputError, match="holds no VOC2007/ImageSets/Main"):
        open_data(Data(path=str(devkit / "VOC2007")))
    (devkit / "VOC2007/JPEGImages/000002.jpg").write_bytes(b"no picture")
    with pytest.raises(InputError, match="the picture VOC2007/000002 cannot be decoded"):
        open_data(Data(path=str(devkit), train=["VOC2007/train"], test=["VOC2007/val"]))


def test_a_flip_moves_boxes_with_the_pixels_and_twice_is_none():
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[4:9, 3:11] = 255
    left, top, right, bottom = mirrored(np.array([[3.0, 4, 11, 9]]), 30)[0].astype(int)
    flipped = pixels[:, ::-1]
    assert flipped[top:bottom, left:right].min() == 255 and flipped.sum() == flipped[top:bottom, left:right].sum()
    boxes = np.random.default_rng(0).random((5, 4)) * 30
    assert np.allclose(mirrored(mirrored(boxes, 30), 30), boxes)


def test_flips_depend_on_seed_epoch_and_picture_alone_and_half_of_them_happen(devkit):
    part = open_data(Data(path=str(devkit), train=["VOC2007/train"], test=["VOC2007/val"])).train

    def boxes(batches, epoch, workers=0):
        found = {}
        for batch, pictures in zip(batches, examples(part, batches, epoch, workers, 0.5, seed=3), strict=True):
            found |= {index: each.boxes.tolist() for index, each in zip(batch, pictures, strict=True)}
        return found

    assert boxes([[0, 1], [2, 3]], 1) == boxes([[3], [1, 2, 0]], 1) == boxes([[0, 1, 2, 3]], 1, workers=1)
    straight = {i: objects.boxes.tolist() for i, objects in enumerate(part.objects)}
    flipped = [boxes([[i]], epoch)[i] != straight[i] for epoch in range(20) for i in range(4)]
    assert 20 < sum(flipped) < 60
    assert list(examples(part, [], 0, 2)) == []  # as a rank may have it
    assert next(iter(examples(part, [[0]], 0, 0)))[0].labels.tolist() == (part.objects[0].labels + 1).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_picture_is_named_in_a_line_whichever_process_decodes_it(devkit, workers):
    path = devkit / "VOC2007/JPEGImages/000001.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    part = open_data(Data(path=str(devkit), train=["VOC2007/train"], test=["VOC2007/val"])).train
    with pytest.raises(InputError) as caught:
        list(examples(part, [[0], [1]], 0, workers))
    assert "the picture VOC2007/000001 cannot be decoded" in str(caught.value) and "\n" not in str(caught.value)


def hf_dataset(tmp_path, listed: bool, box=(5.0, 6.0, 10.0, 20.0)):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
    from datasets import Image as ImageFeature

    picture = tmp_path / "a.png"
    Image.new("RGB", (50, 40)).save(picture)
    objects = {"bbox": [list(box)], "category": [1]}
    inner = {"bbox": Sequence(Value("float32")), "category": ClassLabel(names=["x", "y"])}
    if listed:
        feature, objects = [inner], [{"bbox": list(box), "category": 1}]
    else:
        feature = {"bbox": Sequence(Sequence(Value("float32"))), "category": Sequence(inner["category"])}
    features = Features({"image": ImageFeature(), "objects": feature})
    table = Dataset.from_dict(
        {"image": [str(picture)] * 2, "objects": [objects, [] if listed else {"bbox": [], "category": []}]}, features
    )
    DatasetDict({"train": table, "test": table}).save_to_disk(str(tmp_path / "hf"))
    return {"path": str(tmp_path / "hf"), "train": ["train"], "test": ["test"]}


@pytest.mark.parametrize("listed", [False, True])
def test_an_hf_data_set_with_boxes_is_read_whichever_way_it_stores_its_objects(tmp_path, listed):
    section = hf_dataset(tmp_path, listed)
    data = open_data(Data(**section))
    assert data.class_names == ["x", "y"] and data.train.objects[0].labels.tolist() == [1]
    assert data.train.objects[0].boxes.tolist() == [[5, 6, 15, 26]] and not len(data.train.objects[1].labels)
    assert data.train.picture(0).size == (50, 40)
    assert open_data(Data(**section, box_format="xyxy")).train.objects[0].boxes.tolist() == [[5, 6, 10, 20]]


@pytest.mark.parametrize(
    "more, line",
    [
        ({"train": ["trian"]}, "data.train: no split 'trian' in the data, which has train, test"),
        ({"test": ["dev"]}, "data.test: no split 'dev' in the data, which has train, test"),
        ({"objects_column": "things"}, "no column 'things' in the data, it has image, objects"),
        ({"class_names": ["x"]}, "'y', which is none of the classes"),
    ],
)
def test_what_an_hf_data_set_lacks_is_named(tmp_path, more, line):
    with pytest.raises(InputError, match=line):
        open_data(Data(**hf_dataset(tmp_path, False) | more))


def test_boxes_of_an_hf_data_set_that_reach_beyond_their_pictures_are_counted_too(tmp_path, capsys):
    section = hf_dataset(tmp_path, False, box=[45.0, 6.0, 10.0, 20.0])
    assert open_data(Data(**section)).train.objects[0].boxes.tolist() == [[45, 6, 50, 26]]
    line = capsys.readouterr().err
    assert "data: 2 boxes reach beyond the picture and are cut at its edges: picture train/0, object 1 is" in line


def test_an_hf_picture_with_more_boxes_than_categories_is_named(tmp_path):
    from pskd_timm.detection.hf_data import _objects

    with pytest.raises(InputError, match="picture train/0: has 2 bbox, 1 category and 2 difficult: one an object"):
        columns = {"bbox": [[0, 0, 5, 5]] * 2, "category": [0]}
        _objects(columns, (50, 40), Data(path="x"), ["x"], Rules("fail", ["x"]), "data: picture train/0")


def test_a_changed_box_changes_the_fingerprint(devkit):
    section = Data(path=str(devkit), train=["VOC2007/train"], test=["VOC2007/val"])
    before = open_data(section).fingerprint
    path = devkit / "VOC2007/Annotations/000000.xml"
    path.write_text(path.read_text().replace("</xmax>", ".5</xmax>", 1))
    after = open_data(section).fingerprint
    assert before["samples"] == after["samples"] and before["labels"] != after["labels"]
