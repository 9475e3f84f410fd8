"""The LoRA guide for image classification (LoRA, LoHa, LoKr, AdaLoRA): train, evaluate, push to the hub, load from there, predict.

python examples/image_classification.py --method lora --push-to me/vit-food101-lora
python examples/image_classification.py --method lokr --dataset photos/ --epochs 2       # photos/train/CLASS/*.jpg, photos/validation/CLASS/*.jpg
"""

from __future__ import annotations

import argparse
import math
import random


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune an image classifier with a LoRA-like method.")
    parser.add_argument("--method", choices=["lora", "loha", "lokr", "adalora"], default="lora")
    parser.add_argument("--model", default="google/vit-base-patch16-224-in21k", help="name on the hub, or a folder")
    parser.add_argument(
        "--dataset", default="ethz/food101", help="name on the hub, or a folder of train/ and validation/ with a folder per class"
    )
    parser.add_argument(
        "--train-examples", type=int, help="use only so many pictures, drawn at random; the same number at most to validate"
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--accumulate", type=int, default=4, help="batches per step")
    parser.add_argument("--learning-rate", type=float, default=5e-3)
    parser.add_argument("--output", default="image-classification", help="folder for checkpoints and the adapter")
    parser.add_argument("--push-to", metavar="OWNER/NAME", help="repository on the hub; made, and private, if there is none")
    return parser.parse_args()


def configuration(method: str, steps: int):
    from veneer import AdaLoraConfig, LoHaConfig, LoKrConfig, LoraConfig

    common = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    if method == "lora":
        return LoraConfig(r=16, lora_alpha=16, lora_dropout=0.1, bias="none", **common)
    if method in ("loha", "lokr"):
        return {"loha": LoHaConfig, "lokr": LoKrConfig}[method](r=16, alpha=16, module_dropout=0.1, **common)
    # Prune between a tenth and a half of the training; no call in the training loop is needed.
    return AdaLoraConfig(init_r=12, target_r=8, tinit=steps // 10, tfinal=steps // 2, deltaT=max(1, steps // 50), **common)


def main(args: argparse.Namespace) -> None:
    import torch
    from datasets import load_dataset
    from PIL import Image, ImageOps
    from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

    from veneer import PeftConfig, PeftModel, get_peft_model

    ds = load_dataset(args.dataset)
    train_ds, val_ds = ds["train"], ds["validation"]
    if args.train_examples:
        train_ds = train_ds.shuffle(seed=0).select(range(min(args.train_examples, len(train_ds))))
        val_ds = val_ds.shuffle(seed=0).select(range(min(args.train_examples, len(val_ds))))
    labels = train_ds.features["label"].names
    label2id, id2label = {name: i for i, name in enumerate(labels)}, dict(enumerate(labels))

    image_processor = AutoImageProcessor.from_pretrained(args.model)

    def random_view(image: Image.Image) -> Image.Image:
        """A random part of the picture, mirrored half of the time; the processor gives it the model's size."""
        edge = random.uniform(0.4, 1) * min(image.size)
        left, top = random.uniform(0, image.width - edge), random.uniform(0, image.height - edge)
        view = image.crop((left, top, left + edge, top + edge))
        return ImageOps.mirror(view) if random.random() < 0.5 else view

    def preprocess_train(batch: dict) -> dict:
        views = [random_view(image.convert("RGB")) for image in batch["image"]]
        return {"pixel_values": image_processor(views, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    def preprocess_val(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": image_processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    def base_model(name: str) -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(name, label2id=label2id, id2label=id2label, ignore_mismatched_sizes=True)

    steps = args.epochs * math.ceil(len(train_ds) / args.batch_size / args.accumulate)
    print(f"{args.method}: {len(labels)} classes, {len(train_ds)} pictures to train, {len(val_ds)} to validate, {steps} steps")
    model = get_peft_model(base_model(args.model), configuration(args.method, steps))
    model.print_trainable_parameters()

    training = TrainingArguments(
        args.output, remove_unused_columns=False, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
        learning_rate=args.learning_rate, num_train_epochs=args.epochs, gradient_accumulation_steps=args.accumulate,
        per_device_train_batch_size=args.batch_size, per_device_eval_batch_size=args.batch_size,
        fp16=torch.cuda.is_available(), logging_steps=10, label_names=["labels"], report_to="none",
    )  # fmt: skip
    trainer = Trainer(
        model,
        training,
        train_dataset=train_ds.with_transform(preprocess_train),
        eval_dataset=val_ds.with_transform(preprocess_val),
        processing_class=image_processor,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model()
    if args.push_to:
        print(model.push_to_hub(args.push_to, metrics=metrics, dataset=args.dataset))

    adapter = args.push_to or args.output
    config = PeftConfig.from_pretrained(adapter)
    model = PeftModel.from_pretrained(base_model(config.base_model_name_or_path), adapter).eval()
    image = val_ds[0]["image"]
    with torch.no_grad():
        logits = model(**image_processor(image.convert("RGB"), return_tensors="pt")).logits
    predicted = model.config.id2label[logits.argmax(-1).item()]
    print(
        f"{adapter}: accuracy {metrics['eval_accuracy']:.3f}; validation picture 0 is {labels[val_ds[0]['label']]}, predicted {predicted}"
    )


if __name__ == "__main__":
    main(arguments())
