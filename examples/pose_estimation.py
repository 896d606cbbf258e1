"""Train prompts in ViTPose on COCO keypoints.

    python examples/pose_estimation.py --images people --annotations person_keypoints.json --output_dir out

Every annotated person is cut out by its box; the targets are a Gaussian around each visible keypoint.
"""

import argparse
import json
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, VitPoseForPoseEstimation, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="usyd-community/vitpose-base-simple")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--annotations", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def heatmaps(points: torch.Tensor, height: int, width: int, sigma: float = 2.0) -> torch.Tensor:
    """Return `(people, keypoints, height, width)`, 1 at each of the points `(people, keypoints, 2)`, x and y in 0..1."""
    x, y = points[..., 0, None] * (width - 1), points[..., 1, None] * (height - 1)
    columns = torch.exp(-((torch.arange(width) - x) ** 2) / (2 * sigma**2))
    rows = torch.exp(-((torch.arange(height) - y) ** 2) / (2 * sigma**2))
    return rows[..., :, None] * columns[..., None, :]


def main() -> None:
    args = parse_args()
    set_seed(0)
    content = json.loads(args.annotations.read_text())
    files = {image["id"]: args.images / image["file_name"] for image in content["images"]}
    people = [person for person in content["annotations"] if any(person["keypoints"][2::3])]
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    vitpose = VitPoseForPoseEstimation.from_pretrained(args.model_name_or_path)
    model = get_peft_model(vitpose, VPTConfig(num_virtual_tokens=args.num_virtual_tokens))
    model.print_trainable_parameters()

    def collate(batch: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        images = [Image.open(files[person["image_id"]]).convert("RGB") for person in batch]
        # The processor cuts out each box with a margin, in the shape that the model takes
        pixels = processor(images, boxes=[[person["bbox"]] for person in batch], return_tensors="pt")["pixel_values"]
        ratio, points, visible = pixels.shape[-1] / pixels.shape[-2], [], []
        for person in batch:
            left, top, width, height = person["bbox"]
            keypoints = torch.tensor(person["keypoints"], dtype=torch.float32).view(-1, 3)
            cut = torch.tensor([max(width, height * ratio), max(height, width / ratio)]) * 1.25
            centre = torch.tensor([left + width / 2, top + height / 2])
            points.append((keypoints[:, :2] - centre) / cut + 0.5)
            visible.append(keypoints[:, 2] > 0)
        return pixels, torch.stack(points), torch.stack(visible)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    model.train()
    for epoch in range(args.epochs):
        for pixels, points, visible in DataLoader(people, args.batch_size, shuffle=True, collate_fn=collate):
            found = model(pixel_values=pixels).heatmaps
            loss = (found - heatmaps(points, *found.shape[-2:]))[visible].square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.5f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
