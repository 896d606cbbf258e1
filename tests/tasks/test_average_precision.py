import pytest

from vpt_peft.tasks.average_precision import METRICS, AveragePrecision


def thing(kind, x, size=20, **more):
    return {"category_id": kind, "bbox": [x, 10, size, size], "area": size * size, "iscrowd": 0, **more}


def find(kind, x, score, size=20):
    return {"category_id": kind, "bbox": [x, 10, size, size], "score": score}


def test_by_hand():
    precision = AveragePrecision()
    precision.add((200, 200), [thing(0, 10), thing(0, 60)], [find(0, 10, 0.9), find(0, 100, 0.8), find(0, 60, 0.7)])
    precision.add((200, 200), [thing(1, 10, 100)], [find(1, 20, 0.9, 100)])
    found = precision.result()
    # First class: one of 3 findings is false. Recall up to 1/2 has precision 1 (51 of 101 points), the rest 2/3
    first = (51 + 50 * 2 / 3) / 101
    assert found["map_class_0"] == pytest.approx(first)
    # Second: IoU 90 / 110 = 0.818 counts at 7 of the 10 thresholds
    assert found["map_class_1"] == pytest.approx(0.7)
    assert found["map"] == pytest.approx((first + 0.7) / 2)
    assert found["map_50"] == found["map_75"] == pytest.approx((first + 1) / 2)
    assert found["map_small"] == pytest.approx(first) and found["map_large"] == pytest.approx(0.7)
    assert found["mar_100"] == pytest.approx(0.85)
    # There is no object of medium size to find
    assert set(found) == {m.name for m in METRICS} - {"map_medium"} | {"map_class_0", "map_class_1"}


def test_nothing_found_scores_nothing():
    precision = AveragePrecision()
    precision.add((100, 100), [thing(0, 10)], [])
    assert precision.result()["map"] == 0
    precision.reset()
    precision.add((100, 100), [thing(0, 10)], [find(0, 10, 0.1)])
    assert precision.result()["map"] == pytest.approx(1)


def test_pictures_without_objects_count_false_findings():
    precision = AveragePrecision()
    precision.add((100, 100), [], [find(0, 10, 0.9)])
    precision.add((100, 100), [thing(0, 10)], [find(0, 10, 0.8)])
    assert precision.result()["map"] == pytest.approx(0.5)


def test_findings_in_crowds_do_not_count():
    precision = AveragePrecision()
    crowd = thing(0, 60, iscrowd=1)
    precision.add((100, 100), [thing(0, 10), crowd], [find(0, 10, 0.8), find(0, 60, 0.9), find(0, 62, 0.9, 10)])
    assert precision.result()["map"] == pytest.approx(1)
