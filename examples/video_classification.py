"""Train prompts in VideoMAE on clips that are folders of frames.

    python examples/video_classification.py --clips clips --output_dir out

One folder for each class and clip: `clips/jump/1/000.png`, `clips/jump/1/001.png`, ...
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForVideoClassification, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="MCG-NJU/videomae-base")
    parser.add_argument("--clips", type=Path, required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    names = sorted(folder.name for folder in args.clips.iterdir())
    clips = [(clip, label) for label, name in enumerate(names) for clip in sorted((args.clips / name).iterdir())]
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    videomae = AutoModelForVideoClassification.from_pretrained(
        args.model_name_or_path, id2label=dict(enumerate(names))
    )
    model = get_peft_model(videomae, VPTConfig(num_virtual_tokens=args.num_virtual_tokens))
    model.print_trainable_parameters()

    def collate(batch: list[tuple[Path, int]]) -> dict[str, torch.Tensor]:
        videos = []
        for clip, _ in batch:
            files = sorted(clip.iterdir())
            chosen = np.linspace(0, len(files) - 1, videomae.config.num_frames).round().astype(int)
            videos.append([Image.open(files[index]).convert("RGB") for index in chosen])
        return {**processor(videos, return_tensors="pt"), "labels": torch.tensor([label for _, label in batch])}

    head = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    prompts = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    optimizer = torch.optim.AdamW([{"params": prompts, "lr": 3e-2}, {"params": head, "lr": 1e-3}])
    model.train()
    for epoch in range(args.epochs):
        right = 0
        for batch in DataLoader(clips, args.batch_size, shuffle=True, collate_fn=collate):
            output = model(**batch)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            right += (output.logits.argmax(-1) == batch["labels"]).sum().item()
        print(f"epoch {epoch + 1}: loss {output.loss.item():.3f}, accuracy {right / len(clips):.3f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
