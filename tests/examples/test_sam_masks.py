"""SAM with adapters on q and v: a random small one, and the same code on one that is loaded by name."""

from __future__ import annotations

import json
import re

from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

NUMBERS = r"loss (\S+) -> (\S+), intersection over union (\S+) -> (\S+)"


def test_a_random_sam_learns(run, tmp_path):
    said = run("sam_masks.py", "--method", "dora")
    first, last, before, after = (float(x) for x in re.search(NUMBERS, said).groups())
    assert last < 0.5 * first and after > before + 0.4
    assert "loaded on a fresh base: equal masks" in said and float(re.search(r"merged: within (\S+)", said)[1]) < 1e-3


def test_a_sam_from_the_hub(hub, run, tmp_path):
    vision = {
        "hidden_size": 32,
        "output_channels": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "mlp_dim": 64,
        "num_pos_feats": 16,
    }
    places = {"image_size": 64, "patch_size": 8}
    config = SamConfig(
        vision_config={**vision, **places, "window_size": 4, "global_attn_indexes": [1], "initializer_range": 0.2},
        prompt_encoder_config={**places, "hidden_size": 32},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32},
        initializer_range=0.2,
    )
    SamModel(config).save_pretrained(tmp_path / "sam")
    size, mask = {"height": 64, "width": 64}, {"height": 32, "width": 32}
    processor = SamImageProcessorPil(size={"longest_edge": 64}, pad_size=size, mask_size={"longest_edge": 32}, mask_pad_size=mask)
    SamProcessor(processor).save_pretrained(tmp_path / "sam")
    hub.add("facebook/sam-vit-base", tmp_path / "sam")
    said = run("sam_masks.py", "--model", "facebook/sam-vit-base", "--steps", "30", "--learning-rate", "1e-2")
    first, last, _, _ = (float(x) for x in re.search(NUMBERS, said).groups())
    assert last < first
    written = json.loads((tmp_path / "empty" / "sam-masks" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "facebook/sam-vit-base" and written["modules_to_save"] is None
