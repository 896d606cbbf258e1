"""Train prompts on a folder of images with a loop of one's own and accelerate.

    accelerate launch examples/image_classification_no_trainer.py --dataset_name flowers --output_dir out

The folder has one sub-folder per split and class: `flowers/train/daisy/1.jpg`.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, AutoModelForImageClassification, get_cosine_schedule_with_warmup

from vpt_peft import VPTConfig, initialize_prompts


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="google/vit-base-patch16-224-in21k")
    parser.add_argument("--dataset_name", required=True, help="a folder of images, or a data set of the Hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--prompt_learning_rate", type=float, default=3e-2)
    parser.add_argument("--head_learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    accelerator = Accelerator()
    set_seed(args.seed)

    data = load_dataset(args.dataset_name)
    names = data["train"].features["label"].names
    processor = AutoImageProcessor.from_pretrained(args.model_name_or_path)

    def transform(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {**processor(images, return_tensors="pt"), "labels": torch.tensor(batch["label"])}

    train, test = (data[split].with_transform(transform) for split in ("train", "test"))
    train_loader = DataLoader(train, args.batch_size, shuffle=True)
    test_loader = DataLoader(test, args.batch_size)

    vit = AutoModelForImageClassification.from_pretrained(
        args.model_name_or_path,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
    )
    model = get_peft_model(vit, VPTConfig(num_virtual_tokens=args.num_virtual_tokens))
    # Prompts begin as tokens of the training images, the head at zero: neither disturbs what the backbone knows
    initialize_prompts(model, train_loader, method="tokens", seed=args.seed)
    head = [parameter for name, parameter in model.named_parameters() if "modules_to_save" in name]
    for parameter in head:
        torch.nn.init.zeros_(parameter)

    prompts = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in name]
    groups = [
        {"params": prompts, "lr": args.prompt_learning_rate, "weight_decay": 0.0},
        {"params": head, "lr": args.head_learning_rate, "weight_decay": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups)
    steps = args.epochs * len(train_loader)
    scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    model, optimizer, train_loader, test_loader, scheduler = accelerator.prepare(
        model, optimizer, train_loader, test_loader, scheduler
    )

    for epoch in range(args.epochs):
        model.train()
        for batch in train_loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(prompts + head, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        model.eval()
        right = total = 0
        for batch in test_loader:
            with torch.no_grad():
                predictions = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
            predictions, labels = accelerator.gather_for_metrics((predictions, batch["labels"]))
            right += (predictions == labels).sum().item()
            total += len(labels)
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {right / total:.3f}")

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(args.output_dir, is_main_process=accelerator.is_main_process)


if __name__ == "__main__":
    main()
