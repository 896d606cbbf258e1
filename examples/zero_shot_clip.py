"""Prompts in the image tower of CLIP or SigLIP, trained against the frozen text tower.

    python examples/zero_shot_clip.py --dataset_name flowers --output_dir out

Classes are words, not rows of a head: the tuned tower is used with other classes as it is.
"""

import argparse

import torch
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="openai/clip-vit-base-patch32")
    parser.add_argument("--dataset_name", required=True, help="a folder of images, or a data set of the Hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--template", default="a photo of a {}")
    parser.add_argument("--num_virtual_tokens", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def features(output: object) -> torch.Tensor:
    """Unit features, whichever form this version of transformers gives them in."""
    found = output if isinstance(output, torch.Tensor) else output.pooler_output
    return found / found.norm(dim=-1, keepdim=True)


def main() -> None:
    args = parse_args()
    set_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = load_dataset(args.dataset_name)
    names = data["train"].features["label"].names
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)

    def transform(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        pixels = processor.image_processor(images, return_tensors="pt")
        return {**pixels, "labels": torch.tensor(batch["label"])}

    train, test = (data[split].with_transform(transform) for split in ("train", "test"))

    clip = AutoModel.from_pretrained(args.model_name_or_path).to(device)
    # The tower of the images; what speaks for the task is text, so there is no head to train
    config = VPTConfig(num_virtual_tokens=args.num_virtual_tokens, backbone="vision_model", modules_to_save=[])
    model = get_peft_model(clip, config)

    words = processor.tokenizer([args.template.format(name) for name in names], padding=True, return_tensors="pt")
    with torch.no_grad():
        classes = features(clip.get_text_features(**words.to(device)))
        scale = clip.logit_scale.exp()

    def logits(pixel_values: torch.Tensor) -> torch.Tensor:
        return scale * features(clip.get_image_features(pixel_values=pixel_values.to(device))) @ classes.T

    def accuracy() -> float:
        model.eval()
        right = 0
        with torch.no_grad():
            for batch in DataLoader(test, args.batch_size):
                right += (logits(batch["pixel_values"]).argmax(-1).cpu() == batch["labels"]).sum().item()
        return right / len(test)

    with model.disable_adapter():
        print(f"without prompts: accuracy {accuracy():.3f}")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.learning_rate)
    for epoch in range(args.epochs):
        model.train()
        for batch in DataLoader(train, args.batch_size, shuffle=True):
            loss = torch.nn.functional.cross_entropy(logits(batch["pixel_values"]), batch["labels"].to(device))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy():.3f}")
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
