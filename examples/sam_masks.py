"""SAM with LoRA or DoRA on q and v of its fused `qkv`, the model's class unchanged: train on masks, merge, save, load.

    python examples/sam_masks.py                                        # a small random SAM, about ten seconds
    python examples/sam_masks.py --model facebook/sam-vit-base --method dora

The pictures are drawn: one bright shape on noise, its box as the prompt, its pixels as the mask.
"""

from __future__ import annotations

import argparse
import copy


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fine-tune SAM's image encoder on masks.")
    parser.add_argument("--method", choices=["lora", "dora"], default="lora")
    parser.add_argument("--model", help="name on the hub, such as facebook/sam-vit-base, or a folder; a small random SAM if left out")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--output", default="sam-masks", help="folder for the adapter")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    import torch
    from PIL import Image, ImageDraw
    from torch.nn.functional import binary_cross_entropy_with_logits
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    from veneer import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    if args.model:
        base, processor = SamModel.from_pretrained(args.model), SamProcessor.from_pretrained(args.model)
    else:
        places = {"image_size": 64, "patch_size": 8}
        vision = {"hidden_size": 64, "output_channels": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "mlp_dim": 128, **places}
        more = {"window_size": 4, "global_attn_indexes": [2], "num_pos_feats": 16, "initializer_range": 0.2}
        decoder = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
        prompts = {"hidden_size": 32, **places}
        parts = {"vision_config": vision | more, "prompt_encoder_config": prompts, "mask_decoder_config": decoder}
        base = SamModel(SamConfig(**parts, initializer_range=0.1))
        size, mask = {"height": 64, "width": 64}, {"height": 32, "width": 32}
        longest = {"size": {"longest_edge": 64}, "mask_size": {"longest_edge": 32}}
        processor = SamProcessor(SamImageProcessor(pad_size=size, mask_pad_size=mask, **longest))
    fresh = copy.deepcopy(base)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")

    def batch(size: int) -> tuple[dict, torch.Tensor]:
        """Drawn pictures with their boxes as the model takes them, and their masks at the size that it predicts."""
        images, boxes, masks = [], [], []
        for _ in range(size):
            x, y, width, height = torch.randint(0, 32, (4,)).tolist()
            box = [x, y, x + 16 + width // 2, y + 16 + height // 2]
            image = Image.fromarray(torch.randint(0, 128, (64, 64, 3), dtype=torch.uint8).numpy())
            mask = Image.new("L", image.size)
            draw = ["ellipse", "rectangle"][int(torch.randint(2, ()))]
            getattr(ImageDraw.Draw(image), draw)(box, fill=tuple(torch.randint(160, 256, (3,)).tolist()))
            getattr(ImageDraw.Draw(mask), draw)(box, fill=1)
            images, boxes, masks = [*images, image], [*boxes, [box]], [*masks, mask]
        inputs = processor(images, input_boxes=boxes, segmentation_maps=masks, return_tensors="pt").to(device)
        truth = inputs.pop("labels").float()
        return {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"].float(), "multimask_output": False}, truth

    def overlap(model: torch.nn.Module) -> float:
        """Mean intersection over union on pictures that are not trained on."""
        model.eval()
        with torch.no_grad():
            found = model(**test_inputs).pred_masks[:, 0, 0] > 0
        both, either = (found & (test_truth > 0)).sum((1, 2)), (found | (test_truth > 0)).sum((1, 2))
        return float((both / either.clamp(min=1)).mean())

    test_inputs, test_truth = batch(16)
    config = LoraConfig(
        r=16,
        lora_alpha=32,
        target_modules=["qkv.q", "qkv.v"],
        lora_dropout=0.1,
        use_dora=args.method == "dora",
        task_type="FEATURE_EXTRACTION",
        modules_to_save=None if args.model else ["mask_decoder"],  # a pretrained decoder stays frozen; a random one has everything to learn
    )
    model = get_peft_model(base, config).to(device)
    model.print_trainable_parameters()
    before = overlap(model)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    losses = []
    for step in range(args.steps):
        model.train()
        inputs, truth = batch(args.batch_size)
        logits = model(**inputs).pred_masks[:, 0, 0]
        share = logits.sigmoid()
        dice = 1 - (2 * (share * truth).sum((1, 2)) + 1) / (share.sum((1, 2)) + truth.sum((1, 2)) + 1)
        loss = binary_cross_entropy_with_logits(logits, truth) + dice.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        if step % 10 == 9:
            print(f"step {step + 1}: loss {sum(losses[-10:]) / 10:.3f}")
    after = overlap(model)

    model.save_pretrained(args.output)
    with torch.no_grad():
        trained = model(**test_inputs).pred_masks
        loaded = PeftModel.from_pretrained(fresh, args.output).to(device).eval()(**test_inputs).pred_masks
        merged = model.merge_and_unload()(**test_inputs).pred_masks
    equal = "equal" if torch.equal(loaded, trained) else "other"
    print(f"loaded on a fresh base: {equal} masks; merged: within {(merged - trained).abs().max():.1e}")
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    print(f"{args.output}: loss {first:.3f} -> {last:.3f}, intersection over union {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main(arguments())
