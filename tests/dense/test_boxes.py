import pytest
import torch

from vpt_peft.dense.boxes import area, centres, corners, generalised_iou, pairwise_iou, suppress


def random_boxes(count, seed=0):
    draws = torch.rand(count, 4, generator=torch.Generator().manual_seed(seed))
    return torch.cat([draws[:, :2], draws[:, :2] + draws[:, 2:] / 3 + 0.01], -1)


def test_corners_and_centres():
    boxes = torch.tensor([[10.0, 20.0, 30.0, 60.0]])
    assert centres(boxes).tolist() == [[20.0, 40.0, 20.0, 40.0]]
    assert corners(centres(boxes)).tolist() == boxes.tolist()
    assert area(boxes).tolist() == [800.0]
    assert area(torch.tensor([5.0, 5.0, 4.0, 6.0])) == 0


def test_overlap_by_hand():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [2.0, 0.0, 4.0, 2.0], [4.0, 0.0, 6.0, 2.0]])
    torch.testing.assert_close(pairwise_iou(a, b), torch.tensor([[1 / 3, 0.0, 0.0]]))
    torch.testing.assert_close(generalised_iou(a, b), torch.tensor([1 / 3, 0.0, -1 / 3]))


def test_generalised_iou_is_that_of_transformers():
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    a, b = random_boxes(20), random_boxes(20, seed=1)
    torch.testing.assert_close(generalised_iou(a, b), generalized_box_iou(a, b).diagonal())


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_the_greedy_one(threshold):
    boxes, scores = random_boxes(200), torch.rand(200, generator=torch.Generator().manual_seed(2))
    classes = torch.arange(200) % 3
    kept = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [k for k in kept if classes[k] == classes[index]]
        if not rivals or pairwise_iou(boxes[[index]], boxes[rivals]).max() <= threshold:
            kept.append(index)
    assert suppress(boxes, scores, classes, threshold).tolist() == kept
    assert 3 < len(kept) < 200


def test_nothing_to_suppress():
    none = torch.zeros(0)
    assert suppress(torch.zeros(0, 4), none, none.long(), 0.5).tolist() == []
