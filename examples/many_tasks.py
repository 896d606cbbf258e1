"""Tasks with different classes on one frozen backbone: trained one after the other, answered in one batch.

    python examples/many_tasks.py --dataset_name flowers birds --output_dir out

Every folder is a task: `flowers/train/daisy/1.jpg`.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, set_seed

from vpt_peft import VPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("--dataset_name", nargs="+", required=True, help="folders of images, or data sets of the Hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)
    vit = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)

    def transform(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": torch.tensor(batch["label"])}

    model = None
    samples = {}
    for path in args.dataset_name:
        task, data = Path(path).name, load_dataset(path)
        labels = dict(enumerate(data["train"].features["label"].names))
        config = VPTConfig(num_virtual_tokens=args.num_virtual_tokens, id2label=labels)
        if model is None:
            model = get_peft_model(vit, config, adapter_name=task)
        else:
            model.add_adapter(task, config)
        model.set_adapter(task)
        head = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
        prompts = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
        optimizer = torch.optim.AdamW([{"params": prompts, "lr": 3e-2}, {"params": head, "lr": 1e-3}])
        train, test = (data[split].with_transform(transform) for split in ("train", "test"))
        for epoch in range(args.epochs):
            model.train()
            for batch in DataLoader(train, args.batch_size, shuffle=True):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            print(f"{task}, epoch {epoch + 1}: loss {loss.item():.3f}")
        samples[task] = test[:2]["pixel_values"]

    model.save_pretrained(args.output_dir)  # one folder for each task

    # Anywhere else: the backbone once, and an adapter for each task
    vit = AutoModelForImageClassification.from_pretrained(args.model_name_or_path)
    first, *others = samples
    model = PeftModel.from_pretrained(vit, Path(args.output_dir, first), adapter_name=first).eval()
    for task in others:
        model.load_adapter(Path(args.output_dir, task), task)
    images = torch.cat(list(samples.values()))
    names = [task for task, pixels in samples.items() for _ in pixels]
    with torch.no_grad():
        logits = model(pixel_values=images, adapter_names=names).logits
    for task, prediction in zip(names, logits.argmax(-1).tolist(), strict=True):
        print(f"{task}: {model.peft_config[task].id2label[prediction]}")


if __name__ == "__main__":
    main()
