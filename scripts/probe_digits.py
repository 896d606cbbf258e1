"""How well a frozen backbone's features serve scikit-learn's handwritten digits, and how much tuning would add.

    python scripts/probe_digits.py --model_name_or_path vpt_peft/embedded/vit

Splits of 60/20/20 %, one per seed; the share of test images named right by a logistic regression on the class token,
by LoRA (rank 8 on queries and values), and by training every weight.
"""

import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    HfArgumentParser,
    PreTrainedModel,
    set_seed,
)


logger = logging.getLogger("probe_digits")


@dataclass
class Arguments:
    """What is measured."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub id of a ViT."})
    methods: list[str] = field(default_factory=lambda: ["linear", "lora", "full"], metadata={"help": "Any of these."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "One split and one run each."})
    epochs: int = field(default=20, metadata={"help": "For lora and full."})
    lora_learning_rate: float = field(default=5e-3, metadata={"help": "Peak rate of AdamW for lora."})
    full_learning_rate: float = field(default=5e-4, metadata={"help": "Peak rate of AdamW for full."})


class Split(NamedTuple):
    """Row numbers of one stratified split."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_rows(labels: np.ndarray, seed: int) -> Split:
    """60 % for training, 20 % to choose settings by, 20 % to report, the digits in equal shares."""
    rows = np.arange(len(labels))
    train, rest = train_test_split(rows, test_size=0.4, stratify=labels, random_state=seed)
    validation, test = train_test_split(rest, test_size=0.5, stratify=labels[rest], random_state=seed)
    return Split(train, validation, test)


def digit_pixels(model_name_or_path: str) -> tuple[torch.Tensor, np.ndarray]:
    """All 1,797 digits as the model's image processor gives them, (1797, 3, height, width), and their labels."""
    digits = load_digits()
    images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in digits.images]
    processor = AutoImageProcessor.from_pretrained(model_name_or_path)
    return processor(images, return_tensors="pt")["pixel_values"], digits.target


@torch.no_grad()
def class_tokens(model: PreTrainedModel, pixels: torch.Tensor) -> np.ndarray:
    """The class token after the final norm, (images, hidden)."""
    model.eval()
    tokens = [model(pixel_values=batch).last_hidden_state[:, 0] for batch in pixels.split(256)]
    return torch.cat(tokens).numpy()


def linear_probe(features: np.ndarray, labels: np.ndarray, split: Split) -> float:
    """Share of test images named right by a logistic regression whose strength is chosen on the validation part."""
    probes = [
        make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000)).fit(
            features[split.train], labels[split.train]
        )
        for c in (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    ]
    best = max(probes, key=lambda probe: probe.score(features[split.validation], labels[split.validation]))
    return float(best.score(features[split.test], labels[split.test]))


def fine_tune(
    model: torch.nn.Module, pixels: torch.Tensor, labels: np.ndarray, split: Split, rate: float, epochs: int
) -> float:
    """Share of test images named right after training what asks for gradients: AdamW, batches of 64, one-cycle rate, no augmentation."""
    targets = torch.from_numpy(labels)
    steps = epochs * -(-len(split.train) // 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    model.train()
    for _ in range(epochs):
        for rows in torch.from_numpy(split.train)[torch.randperm(len(split.train))].split(64):
            loss = model(pixel_values=pixels[rows], labels=targets[rows]).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()
    with torch.no_grad():
        guesses = model(pixel_values=pixels[split.test]).logits.argmax(-1)
    return (guesses == targets[split.test]).float().mean().item()


def main() -> None:
    """Measure each method over the seeds and log the mean and the single shares."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    pixels, labels = digit_pixels(args.model_name_or_path)
    features = class_tokens(AutoModel.from_pretrained(args.model_name_or_path), pixels)
    for method in args.methods:
        shares = []
        for seed in args.seeds:
            split = split_rows(labels, seed)
            if method == "linear":
                shares.append(linear_probe(features, labels, split))
                continue
            set_seed(seed)
            model = AutoModelForImageClassification.from_pretrained(args.model_name_or_path, num_labels=10)
            rate = args.full_learning_rate
            if method == "lora":
                targets = ["q_proj", "v_proj"]
                model = get_peft_model(model, LoraConfig(target_modules=targets, modules_to_save=["classifier"]))
                rate = args.lora_learning_rate
            shares.append(fine_tune(model, pixels, labels, split, rate, args.epochs))
        logger.info("%s: mean %.4f of %s", method, np.mean(shares), [f"{a:.4f}" for a in shares])


if __name__ == "__main__":
    main()
