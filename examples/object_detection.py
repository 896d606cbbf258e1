"""Train prompts for object detection in a Trainer of one's own.

    python examples/object_detection.py --dataset_name cells --output_dir out

The folder has images with COCO JSON: `cells/train/1.png`, `cells/train/_annotations.coco.json`, `cells/valid/...`.
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
    parser.add_argument("--dataset_name", required=True, help="a folder with COCO JSON, or a data set of the Hub")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--image_size", type=int, nargs=2, default=[518, 518])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=10)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    set_seed(0)
    task = get_task("object-detection")
    wanted = DataArguments(dataset_name=args.dataset_name, image_size=args.image_size)
    data = task.read(wanted)
    processor = task.prepare_processor(AutoImageProcessor.from_pretrained(args.model_name_or_path), wanted)

    # A detector of transformers as it is; a plain ViT gets a feature pyramid and a dense head
    detector = task.load_model(args.model_name_or_path, task.id2label(data["train"]), {}, processor)
    model = get_peft_model(detector, VPTConfig(num_virtual_tokens=args.num_virtual_tokens))
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
    print(f"mAP {trainer.evaluate()['eval_map']:.3f}")
    model.save_pretrained(args.output_dir)
    processor.save_pretrained(args.output_dir)

    image = data["validation"][0]["image"].convert("RGB")
    for found in task.predict(model.eval(), processor, [image])[0]:
        print(f"{found['label']} {found['score']:.2f} at ({found['xmin']:.0f}, {found['ymin']:.0f})")


if __name__ == "__main__":
    main()
