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


def sorted_boxes(seed):
    boxes, scores = random_boxes(200, seed), torch.rand(200, generator=torch.Generator().manual_seed(seed + 9))
    return boxes[scores.argsort(descending=True)]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_suppression_is_the_greedy_one(threshold):
    batch, classes = torch.stack([sorted_boxes(0), sorted_boxes(1)]), (torch.arange(200) % 3).expand(2, -1)
    found = suppress(batch, classes, threshold)
    for boxes, keeps in zip(batch, found, strict=True):
        kept: list[int] = []
        for index in range(200):
            rivals = [k for k in kept if classes[0, k] == classes[0, index]]
            if not rivals or pairwise_iou(boxes[[index]], boxes[rivals]).max() <= threshold:
                kept.append(index)
        assert torch.where(keeps)[0].tolist() == kept
        assert 3 < len(kept) < 200


def test_a_chain_of_boxes_settles():
    # Each overlaps the next one alone: every second one stays
    left = torch.arange(40.0)[:, None] * 6
    boxes = torch.cat([left, torch.zeros_like(left), left + 10, torch.ones_like(left)], -1)
    assert suppress(boxes[None], torch.zeros(1, 40, dtype=torch.long), 0.2)[0].tolist() == [True, False] * 20


def test_nothing_to_suppress():
    assert suppress(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.long), 0.5).shape == (2, 0)
