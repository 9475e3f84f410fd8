"""BOFT on DINOv2, an image classifier: train, merge into the weights, save a model that needs no adapter library, load it, predict.

python examples/dinov2_boft.py --output dinov2-food101
python examples/dinov2_boft.py --model facebook/dinov2-small --dataset photos/          # photos/train/CLASS/*.jpg, photos/validation/CLASS/*.jpg
"""

from __future__ import annotations

import argparse


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune a DINOv2 image classifier with BOFT, and merge it.")
    parser.add_argument("--model", default="facebook/dinov2-large", help="name on the hub, or a folder")
    parser.add_argument(
        "--dataset", default="ethz/food101", help="name on the hub, or a folder of train/ and validation/ with a folder per class"
    )
    parser.add_argument(
        "--train-examples", type=int, help="use only so many pictures, drawn at random; the same number at most to validate"
    )
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--output", default="dinov2-boft", help="folder for the adapter (adapter/) and the merged model (merged/)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import torch
    from datasets import load_dataset
    from transformers import AutoImageProcessor, Dinov2ForImageClassification, Trainer, TrainingArguments

    from veneer import BOFTConfig, get_peft_model

    ds = load_dataset(args.dataset)
    train_ds, val_ds = ds["train"], ds["validation"]
    if args.train_examples:
        train_ds = train_ds.shuffle(seed=0).select(range(min(args.train_examples, len(train_ds))))
        val_ds = val_ds.shuffle(seed=0).select(range(min(args.train_examples, len(val_ds))))
    labels = train_ds.features["label"].names
    processor = AutoImageProcessor.from_pretrained(args.model)

    def preprocess(batch: dict) -> dict:
        images = [image.convert("RGB") for image in batch["image"]]
        return {"pixel_values": processor(images, return_tensors="pt")["pixel_values"], "labels": batch["label"]}

    config = BOFTConfig(
        boft_block_size=4,
        boft_n_butterfly_factor=2,
        target_modules=["q_proj", "v_proj", "k_proj", "o_proj", "fc1", "fc2"],
        boft_dropout=0.1,
        bias="boft_only",
        modules_to_save=["classifier"],
    )
    base = Dinov2ForImageClassification.from_pretrained(
        args.model, id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)}
    )
    boft_model = get_peft_model(base, config)
    boft_model.print_trainable_parameters()

    trainer = Trainer(
        boft_model,
        TrainingArguments(
            args.output,
            remove_unused_columns=False,
            eval_strategy="epoch",
            save_strategy="no",
            learning_rate=args.learning_rate,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            logging_steps=10,
            bf16=torch.cuda.is_available(),
            report_to="none",
        ),
        train_dataset=train_ds.with_transform(preprocess),
        eval_dataset=val_ds.with_transform(preprocess),
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
    )
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    boft_model.save_pretrained(f"{args.output}/adapter")

    inputs = preprocess(val_ds[:4])["pixel_values"].to(boft_model.device)
    boft_model.eval()
    with torch.no_grad():
        adapted = boft_model(inputs).logits
    boft_model.merge_and_unload().save_pretrained(f"{args.output}/merged")
    processor.save_pretrained(f"{args.output}/merged")

    merged = Dinov2ForImageClassification.from_pretrained(f"{args.output}/merged").eval().to(inputs.device)
    with torch.no_grad():
        logits = merged(inputs).logits
    print(f"merged logits differ from the adapter's by at most {(logits - adapted).abs().max():.1e}")
    predicted = merged.config.id2label[logits[0].argmax().item()]
    print(f"{args.output}: accuracy {accuracy:.3f}; validation picture 0 is {labels[val_ds[0]['label']]}, predicted {predicted}")


if __name__ == "__main__":
    main(arguments())
