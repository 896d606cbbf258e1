"""Prompts in the vision tower of a model that writes text about images (LLaVA and its kin).

    python examples/vlm_tower.py --model_name_or_path llava-hf/llava-1.5-7b-hf --image cat.jpg \\
        --prompt "USER: <image> What is this? ASSISTANT:" --answer " A cat." --output_dir out

Fits the prompts of the tower to one answer, to show where they go; put your data in place of it.
"""

import argparse

import torch
from peft import get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--backbone", help="dotted path of the tower, where the model holds several encoders")
    parser.add_argument("--image", required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--learning_rate", type=float, default=1e-2)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    processor = AutoProcessor.from_pretrained(args.model_name_or_path)
    vlm = AutoModelForImageTextToText.from_pretrained(args.model_name_or_path)
    config = VPTConfig(num_virtual_tokens=args.num_virtual_tokens, backbone=args.backbone, modules_to_save=[])
    model = get_peft_model(vlm, config)
    model.print_trainable_parameters()

    image = Image.open(args.image).convert("RGB")
    asked = processor(images=image, text=args.prompt, return_tensors="pt")
    inputs = processor(images=image, text=args.prompt + args.answer, return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], args.learning_rate)
    model.train()
    for step in range(args.steps):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")
    model.eval()
    written = model.generate(**asked, max_new_tokens=8, do_sample=False)
    print(processor.batch_decode(written, skip_special_tokens=True)[0])
    model.save_pretrained(args.output_dir)


if __name__ == "__main__":
    main()
