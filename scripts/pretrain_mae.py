"""Pre-train the embedded masked autoencoder: fill in glyph images most of whose patches are hidden; no labels.

    python scripts/pretrain_mae.py --output_dir vpt_peft/embedded/mae

Two CPU cores, under an hour; the same seed on the same machine gives the same weights. The decoder is thrown away
and the encoder saved as a plain ViT. Masked Autoencoders Are Scalable Vision Learners, arXiv:2111.06377.
"""

import logging
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from glyphs import GlyphSampler, build_bank
from recipe import (
    RecipeArguments,
    begin,
    cosine_schedule,
    encoder_config,
    parameter_groups,
    save_backbone,
    sincos_positions,
    update,
)
from transformers import HfArgumentParser, ViTMAEConfig, ViTMAEForPreTraining


logger = logging.getLogger("pretrain_mae")


@dataclass
class Arguments(RecipeArguments):
    """The flags of this recipe."""

    steps: int = field(default=2200, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=256, metadata={"help": "Glyph images a step, drawn afresh each time."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of AdamW, after the warm-up."})
    warmup_steps: int = field(default=200, metadata={"help": "Steps of linear warm-up before the cosine."})
    mask_ratio: float = field(default=0.7, metadata={"help": "Share of the 64 patches that the encoder never sees."})


@torch.no_grad()
def start_as_published(model: ViTMAEForPreTraining) -> None:
    """Set the paper's starting values, which a model made from a config in memory lacks: its positions are zero."""
    side = model.config.image_size // model.config.patch_size
    embeddings, decoder = model.vit.embeddings, model.decoder
    embeddings.position_embeddings.copy_(sincos_positions(model.config.hidden_size, side))
    decoder.decoder_pos_embed.copy_(sincos_positions(model.config.decoder_hidden_size, side))
    torch.nn.init.normal_(embeddings.cls_token, std=0.02)
    torch.nn.init.normal_(decoder.mask_token, std=0.02)
    torch.nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))


def main() -> None:
    """Draw the bank, train encoder and decoder, score on the held-out font, save the encoder."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    clock = begin(args.seed)
    seen, unseen = build_bank(max_classes=args.max_classes).split(args.held_out_font)
    logger.info("%d glyphs, %d held out", len(seen.images), len(unseen.images))

    encoder = encoder_config().to_dict()
    config = ViTMAEConfig(
        **{name: encoder[name] for name in encoder if name in ViTMAEConfig().to_dict() and name != "model_type"},
        mask_ratio=args.mask_ratio,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
        # Most patches are plain paper: normalised per patch, they would be pure noise to predict.
        norm_pix_loss=False,
    )
    # bfloat16 attention by plain matmuls: the fused CPU kernel's backward pass is several times slower.
    model = ViTMAEForPreTraining._from_config(config, attn_implementation="eager")
    start_as_published(model)
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)
    schedule = cosine_schedule(optimizer, args.warmup_steps, args.steps)

    model.train()
    for step, (pixels, _) in enumerate(islice(GlyphSampler(seen, args.batch_size, seed=args.seed), args.steps)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(pixel_values=pixels).loss
        update(model, loss, optimizer, schedule)
        if step % 100 == 0 or step == args.steps - 1:
            logger.info("step %d loss %.4f, %s", step, loss.item(), clock)
        if step % 1000 == 999 or step == args.steps - 1:
            save_backbone(model.vit.state_dict(), Path(args.output_dir), pretraining="mae")

    model.eval()
    with torch.no_grad():
        held_out = [model(pixel_values=pixels) for pixels, _ in islice(GlyphSampler(unseen, seed=12345), 16)]
        error = torch.stack([output.loss for output in held_out]).mean().item()
    logger.info("squared error of hidden patches, held-out font: %.4f; %s", error, clock)


if __name__ == "__main__":
    main()
