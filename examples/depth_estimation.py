"""Train prompts in the encoder of DPT, Depth Anything or another model of depth.

    python examples/depth_estimation.py --images rooms/images --depths rooms/depths --output_dir out

Depths are PNGs of one channel with the names of the images (`rooms/depths/1.png` for `rooms/images/1.png`); 0 is unknown.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForDepthEstimation, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="depth-anything/Depth-Anything-V2-Small-hf")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--depths", type=Path, required=True)
    parser.add_argument("--scale", type=float, default=1.0, help="what a value of the PNGs stands for, in metres")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    estimator = AutoModelForDepthEstimation.from_pretrained(args.model_name_or_path)
    # What stands behind the encoder knows depth already and stays frozen; `modules_to_save=None` would train it too
    model = get_peft_model(estimator, VPTConfig(num_virtual_tokens=args.num_virtual_tokens, modules_to_save=[]))
    model.print_trainable_parameters()

    def collate(paths: list[Path]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        images = [Image.open(path).convert("RGB") for path in paths]
        depths = [np.asarray(Image.open(args.depths / f"{path.stem}.png"), dtype=np.float32) for path in paths]
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        return pixels, [args.scale * torch.from_numpy(depth) for depth in depths]

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    for epoch in range(args.epochs):
        for pixels, depths in DataLoader(sorted(args.images.iterdir()), args.batch_size, True, collate_fn=collate):
            found = model(pixel_values=pixels).predicted_depth
            losses = []
            for of_image, depth in zip(found, depths, strict=True):
                enlarged = torch.nn.functional.interpolate(of_image[None, None], depth.shape, mode="bilinear")[0, 0]
                losses.append((enlarged - depth)[depth > 0].abs().mean())
            loss = torch.stack(losses).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
