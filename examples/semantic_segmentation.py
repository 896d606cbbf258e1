"""Train prompts for semantic segmentation in a Trainer of one's own.

    python examples/semantic_segmentation.py --dataset_name streets --output_dir out

The folder has images and masks: `streets/train/images/1.png`, `streets/train/masks/1.png`, `streets/id2label.json`.
The same lines with "object-detection" train boxes: see `object_detection.py`.
"""

import argparse

from peft import get_peft_model
from transformers import AutoImageProcessor, Trainer, set_seed

from vpt_peft import VPTConfig, training_recipe
from vpt_peft.data import DataArguments
from vpt_peft.tasks import get_task


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", default="facebook/dinov2-base")
    parser.add_argument("--dataset_name", required=True, help="a folder of images and masks, or a data set of the Hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--image_size", type=int, nargs=2, default=[518, 518])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    task = get_task("semantic-segmentation")
    wanted = DataArguments(dataset_name=args.dataset_name, image_size=args.image_size)
    data = task.read(wanted)
    processor = task.prepare_processor(AutoImageProcessor.from_pretrained(args.model_name_or_path), wanted)

    # A segmenter of transformers as it is; an encoder gets a linear head
    segmenter = task.load_model(args.model_name_or_path, task.id2label(data["train"]), {}, processor)
    model = get_peft_model(segmenter, VPTConfig(num_virtual_tokens=args.num_virtual_tokens))
    recipe = training_recipe(
        model,
        task.rows(data["train"], processor, "resize_crop_flip", train=True),
        task.rows(data["validation"], processor),
        task=task.pipeline_tag,
        output_dir=args.output_dir,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
    )
    trainer = Trainer(**recipe)
    trainer.train()
    print(f"mean IoU {trainer.evaluate()['eval_mean_iou']:.3f}")
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    image = data["validation"][0]["image"].convert("RGB")
    for found in task.predict(model.eval(), processor, [image])[0]:
        print(f"{found['label']}: {found['share']:.0%} of the image")


if __name__ == "__main__":
    main()
