"""Pre-train the embedded supervised ViT: name the glyph, whatever its font, slant, thickness, blur and contrast.

    python scripts/pretrain_supervised.py --start_from vpt_peft/embedded/mae --output_dir vpt_peft/embedded/vit

From random weights a transformer needs many times more images before it names any glyph, so the masked autoencoder
lends its weights to start from.
Two CPU cores, under an hour; the same seed on the same machine gives the same weights.
"""

import logging
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from glyphs import GlyphBank, GlyphSampler, build_bank
from recipe import RecipeArguments, begin, cosine_schedule, encoder_config, parameter_groups, save_backbone, update
from transformers import HfArgumentParser, ViTForImageClassification, ViTModel


logger = logging.getLogger("pretrain_supervised")


@dataclass
class Arguments(RecipeArguments):
    """The flags of this recipe."""

    steps: int = field(default=4500, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=128, metadata={"help": "Glyph images a step, drawn afresh each time."})
    learning_rate: float = field(default=1.5e-3, metadata={"help": "Peak rate of AdamW, after the warm-up."})
    warmup_steps: int = field(default=300, metadata={"help": "Steps of linear warm-up before the cosine."})
    start_from: str | None = field(default=None, metadata={"help": "Encoder folder; None: random weights."})
    easy_steps: int = field(default=1000, metadata={"help": "Steps over which the images go from plain to distorted."})
    label_smoothing: float = field(default=0.1, metadata={"help": "Share of the target spread over all classes."})


@torch.no_grad()
def share_right(model: ViTForImageClassification, bank: GlyphBank, batches: int = 16) -> float:
    """Share of freshly drawn glyphs of `bank` whose class the model names, a number from 0 to 1."""
    model.eval()
    stream = islice(GlyphSampler(bank, seed=12345), batches)
    hits = [(model(pixel_values=pixels).logits.argmax(-1) == labels).float().mean() for pixels, labels in stream]
    return torch.stack(hits).mean().item()


def main() -> None:
    """Draw the bank, train, score on the held-out font, save the bare encoder."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    clock = begin(args.seed)
    seen, unseen = build_bank(max_classes=args.max_classes).split(args.held_out_font)
    logger.info("%d glyphs, %d classes, %d held out", len(seen.images), len(seen.classes), len(unseen.images))

    config = encoder_config(num_labels=len(seen.classes))
    # bfloat16 attention by plain matmuls: the fused CPU kernel's backward pass is several times slower.
    model = ViTForImageClassification._from_config(config, attn_implementation="eager")
    if args.start_from is not None:
        start = ViTModel.from_pretrained(args.start_from, add_pooling_layer=False)
        model.vit.load_state_dict(start.state_dict())
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = cosine_schedule(optimizer, args.warmup_steps, args.steps)
    loss_function = torch.nn.CrossEntropyLoss(label_smoothing=args.label_smoothing)

    model.train()
    sampler = GlyphSampler(seen, args.batch_size, seed=args.seed)
    sampler.strength = 0.0
    for step, (pixels, labels) in enumerate(islice(sampler, args.steps)):
        sampler.strength = min(step / args.easy_steps, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixel_values=pixels).logits
        loss = loss_function(logits.float(), labels)
        update(model, loss, optimizer, schedule)
        if step % 100 == 0 or step == args.steps - 1:
            right = (logits.argmax(-1) == labels).float().mean().item()
            logger.info("step %d loss %.3f right %.3f, %s", step, loss.item(), right, clock)
        if step % 1000 == 999 or step == args.steps - 1:
            save_backbone(model.vit.state_dict(), Path(args.output_dir), pretraining="supervised")

    of_seen, of_unseen = share_right(model, seen), share_right(model, unseen)
    logger.info("glyphs named right: seen fonts %.4f, held-out font %.4f; %s", of_seen, of_unseen, clock)


if __name__ == "__main__":
    main()
