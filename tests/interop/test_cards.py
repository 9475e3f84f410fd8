"""What a model card says about an adapter, and that its words about other libraries hold."""

from __future__ import annotations

import re

import peft
import pytest
import torch
import yaml
from transformers import SamConfig, SamModel, ViTConfig, ViTForImageClassification

from veneer import BOFTConfig, ConfigError, LoraConfig, VeraConfig, get_peft_model
from veneer.cards import CARD_NAME

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # read by HF PEFT


def small_sam() -> SamModel:
    torch.manual_seed(0)
    places = {"image_size": 32, "patch_size": 8}
    vision = {"hidden_size": 16, "output_channels": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, **places}
    more = {"window_size": 0, "global_attn_indexes": [0], "num_pos_feats": 8, "initializer_range": 0.2}
    decoder = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    prompts = {"hidden_size": 16, **places}
    return SamModel(SamConfig(vision_config=vision | more, prompt_encoder_config=prompts, mask_decoder_config=decoder)).eval()


def small_vit(**options: object) -> ViTForImageClassification:
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
    }
    return ViTForImageClassification(ViTConfig(**sizes, **options))


def card_of(model, directory) -> str:
    model.save_pretrained(directory)
    return (directory / CARD_NAME).read_text(encoding="utf-8")


def test_parts_of_a_fused_layer_and_the_way_to_hf_peft(tmp_path):
    config = LoraConfig(r=2, target_modules=["qkv.q", "qkv.v"], init_lora_weights=False)
    model = get_peft_model(small_sam(), config).eval()
    card = card_of(model, tmp_path / "parts")
    assert "| adapted | 2 weights: `qkv.q`, `qkv.v` |" in card and "pipeline_tag: mask-generation" in card
    assert "from peft import" not in card and "save_as_lora" in card

    model.save_as_lora(tmp_path / "whole")
    assert "from peft import PeftModel" in (tmp_path / "whole" / CARD_NAME).read_text(encoding="utf-8")
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32), "input_boxes": torch.tensor([[[2.0, 3.0, 20.0, 25.0]]])}
    with torch.no_grad():
        theirs = peft.PeftModel.from_pretrained(small_sam(), tmp_path / "whole").eval()(**inputs).pred_masks
        base = small_sam()(**inputs).pred_masks
        torch.testing.assert_close(theirs, model(**inputs).pred_masks)
    assert not torch.equal(theirs, base)


def test_the_number_of_trained_parameters_is_the_models_own(tmp_path):
    for name, config in {
        "lora": LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, modules_to_save=["classifier"]),
        "boft": BOFTConfig(target_modules=["q_proj"], bias="boft_only"),
        "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }.items():
        model = get_peft_model(small_vit(), config)
        trained, total = model.get_nb_trainable_parameters()
        assert f"| {trained:,} of {total:,} (" in card_of(model, tmp_path / name), name


def test_methods_and_their_papers(tmp_path):
    card = card_of(get_peft_model(small_vit(), LoraConfig(r=2, use_dora=True, lora_dropout=0.1)), tmp_path)
    assert "arxiv.org/abs/2106.09685" in card and "arxiv.org/abs/2402.09353" in card and "`r=2, lora_dropout=0.1, use_dora=True`" in card


@pytest.mark.parametrize(("labels", "expected"), [(["a cat", "l'œuf"], "labels = ['a cat', \"l'œuf\"]"), (None, "num_labels=2")])
def test_the_labels_of_a_new_head(tmp_path, labels, expected):
    names = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}} if labels else {"num_labels": 2}
    model = small_vit(**names)
    model.save_pretrained(tmp_path / "base")
    model.config._name_or_path = model.name_or_path = "someone/base"
    card = card_of(get_peft_model(model, LoraConfig(r=2, modules_to_save=["classifier"])), tmp_path / "adapter")
    assert expected in card and "base_model: someone/base" in card
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        found: dict = {}
        exec(code.replace("someone/base", str(tmp_path / "base")).replace("path/to/this/folder", str(tmp_path / "adapter")), found)
        assert list(found["model"].config.id2label.values()) == (labels or ["LABEL_0", "LABEL_1"])


def test_a_base_on_this_machine_is_not_told_to_others(tmp_path):
    model = small_vit()
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    card = card_of(get_peft_model(model, LoraConfig(r=2)), tmp_path / "adapter")
    assert str(tmp_path) not in card and "base_model" not in yaml.safe_load(card.split("---\n")[1])


def test_saving_keeps_its_own_card_true_and_a_persons_as_it_is(tmp_path):
    card_of(get_peft_model(small_vit(), LoraConfig(r=2)), tmp_path)
    card = card_of(get_peft_model(small_vit(), BOFTConfig(target_modules=["q_proj"])), tmp_path)
    assert "BOFT" in card and "lora" not in card.lower()
    (tmp_path / CARD_NAME).write_text("# Mine\n", encoding="utf-8")
    model = get_peft_model(small_vit(), LoraConfig(r=2))
    assert card_of(model, tmp_path) == "# Mine\n"
    model.create_or_update_model_card(tmp_path)
    once = (tmp_path / CARD_NAME).read_text(encoding="utf-8")
    model.create_or_update_model_card(tmp_path)
    assert "# Mine\n" in once and "LoRA" in once and (tmp_path / CARD_NAME).read_text(encoding="utf-8") == once


def test_front_matter_that_is_not_yaml(tmp_path):
    (tmp_path / CARD_NAME).write_text("---\ntags: [a\n---\nMine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="front matter is not YAML"):
        get_peft_model(small_vit(), LoraConfig(r=2)).create_or_update_model_card(tmp_path)
    assert (tmp_path / CARD_NAME).read_text(encoding="utf-8") == "---\ntags: [a\n---\nMine\n"
