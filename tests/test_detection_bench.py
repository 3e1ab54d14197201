"""What the bench compares: equal work on the same pictures and detections."""

import pytest
import torch
from torchmetrics.detection import MeanAveragePrecision

from pskd_timm.bench import detection
from pskd_timm.detection.data import open_data
from pskd_timm.detection.evaluation import detections_table
from pskd_timm.detection.metrics import COCO_IOUS, RECALLS, objects_table, score


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(detection, "PICTURES", 4)
    monkeypatch.setattr(detection, "TURNS", 2)
    monkeypatch.setattr(detection, "TESTED", 50)
    monkeypatch.setattr(detection, "SECONDS", 0.0)


def test_both_loops_read_the_same_pictures_and_objects(small, tmp_path):
    devkit = detection.make_devkit(tmp_path / "VOCdevkit")
    data = open_data(detection.bench_recipe(devkit, tmp_path).data)
    theirs = detection.Photographs(devkit)
    assert len(theirs) == len(data.train) == 4
    for i in range(4):
        image, target = theirs[i]
        assert image.shape == (3, 375, 500) and (target["labels"] - 1).tolist() == data.train.objects[i].labels.tolist()


def test_both_scores_agree_on_what_the_bench_scores(small):
    objects, found = detection.made_up_detections()
    ours = score(detections_table(found), objects_table(objects), 20).figures
    # torchmetrics' own thresholds are rounded to float32, which moves recalls such as 3 of 10 to the other side.
    metric = MeanAveragePrecision(iou_thresholds=list(COCO_IOUS), rec_thresholds=RECALLS.tolist())
    metric.update(
        [dict(zip(("boxes", "labels", "scores"), map(torch.from_numpy, each[1:]), strict=True)) for each in found],
        [{"boxes": torch.from_numpy(each.boxes), "labels": torch.from_numpy(each.labels)} for each in objects],
    )
    theirs = metric.compute()
    for mine, name in (("ap", "map"), ("ap50", "map_50"), ("ap75", "map_75")):
        assert ours[mine] == pytest.approx(100 * theirs[name].item(), abs=1e-3)


def test_the_part_gives_a_row_for_training_and_one_for_scoring(small, tmp_path):
    said = []
    training = detection.measure_training(tmp_path, said.append)
    (scoring,) = detection.measure_scoring(said.append)
    assert training["rounds"] == 1 and training["images_per_second"].keys() == {"train", "reference"}
    assert scoring["pictures"] == 50 and scoring["ratio"] > 0 and len(said) == 2
