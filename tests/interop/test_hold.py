"""Held adapters and HF PEFT: what is written is read by it with equal outputs, and what it writes goes onto the shelf."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

from veneer import LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # HF PEFT asks for the old name

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def named(*labels: str) -> dict:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


def vit(*labels: str) -> ViTForImageClassification:
    torch.manual_seed(3)
    return ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, **named(*labels))).eval()


def bert(*labels: str) -> BertForSequenceClassification:
    torch.manual_seed(3)
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=32, max_position_embeddings=16, **named(*labels))).eval()


def of_bert(kind=LoraConfig, **options):
    return kind(target_modules=["query", "value"], modules_to_save=["classifier"], **options)


CONFIGS = {
    "lora": of_bert(r=4, init_lora_weights=False),
    "loha": of_bert(LoHaConfig, r=2, init_weights=False),
    "oft": of_bert(OFTConfig, oft_block_size=4, init_weights=False),
}


@pytest.fixture
def ids() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 32, (3, 7))}


@pytest.fixture
def model() -> PeftModel:
    model = get_peft_model(bert("yes", "no"), CONFIGS["lora"], "lora")
    for name in ("loha", "oft"):
        model.add_adapter(name, CONFIGS[name])
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".classifier.veneer." in n:
                p.normal_()
    return model.eval()


def logits(model, ids, name) -> torch.Tensor:
    model.set_adapter(name)
    with torch.no_grad():
        return model(**ids).logits


def test_hf_peft_reads_what_was_saved_from_the_shelf_and_what_lies_on_disk(model, ids, tmp_path):
    expected = {n: logits(model, ids, n) for n in CONFIGS}
    assert len({t.sum().item() for t in expected.values()}) == 3
    model.hold(attached=1, device_bytes=0, offload=tmp_path / "held")
    assert sorted(model.adapter_locations.values()) == ["attached", "disk", "disk"]
    model.save_pretrained(tmp_path / "saved")
    for name in CONFIGS:
        for folder in ("saved", "held"):
            if (tmp_path / folder / name).exists():
                assert json.loads((tmp_path / folder / name / "labels.json").read_text()) == ["yes", "no"]
                theirs = peft.PeftModel.from_pretrained(bert("yes", "no"), tmp_path / folder / name).eval()
                assert torch.allclose(theirs(**ids).logits, expected[name], atol=1e-5), (name, folder)
    assert {p.name for p in (tmp_path / "held").iterdir()} == set(CONFIGS) - {model.active_adapter}


def test_many_that_hf_peft_wrote_go_onto_the_shelf(ids, tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["classifier"], init_lora_weights=False)
    theirs = peft.get_peft_model(bert("yes", "no"), config, adapter_name="n0")
    for i in range(1, 6):
        theirs.add_adapter(f"n{i}", config)
    theirs.eval().save_pretrained(tmp_path)
    held = get_peft_model(bert("yes", "no"), CONFIGS["loha"], "own").eval()
    for i in range(6):
        held.load_adapter(tmp_path / f"n{i}", f"n{i}", packed=True)
    held.hold(attached=2)
    for i in (3, 0, 5, 1, 3):
        theirs.set_adapter(f"n{i}")
        assert torch.allclose(logits(held, ids, f"n{i}"), theirs(**ids).logits, atol=1e-6)
    assert sorted(held.adapter_locations.values()) == ["attached"] * 2 + ["packed"] * 5


def test_a_head_of_another_label_set_is_read_by_hf_peft_on_a_model_of_its_size(tmp_path):
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    config = LoraConfig(r=2, modules_to_save=["classifier"], init_lora_weights=False)
    get_peft_model(vit("fir", "oak", "yew"), config).save_pretrained(tmp_path / "first")
    model = get_peft_model(vit("cat", "dog"), LoraConfig(r=2), "other").eval()
    model.load_adapter(tmp_path / "first", "trees", packed=True)
    model.set_adapter("trees")
    model.save_pretrained(tmp_path / "again", selected_adapters=["trees"])
    theirs = peft.PeftModel.from_pretrained(vit("fir", "oak", "yew"), tmp_path / "again" / "trees").eval()
    assert torch.allclose(theirs(**pixels).logits, model(**pixels).logits, atol=1e-6)
    assert list(model.config.id2label.values()) == ["fir", "oak", "yew"]


def test_trainer_trains_an_adapter_from_the_shelf_and_leaves_the_others(tmp_path):
    config = LoraConfig(r=2, modules_to_save=["classifier"])
    get_peft_model(vit("fir", "oak", "yew"), config).save_pretrained(tmp_path / "trees")
    model = get_peft_model(vit("cat", "dog"), LoraConfig(r=2), "pets")
    model.load_adapter(tmp_path / "trees", "trees", is_trainable=True, packed=True)
    model.hold(attached=1)
    model.set_adapter("trees")
    rows = [{"pixel_values": torch.randn(3, 16, 16), "labels": i % 3} for i in range(12)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=4, learning_rate=0.05, use_cpu=True, report_to=[]
    )
    before = {n: t.clone() for n, t in model.state_dict().items()}
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed and all(".veneer.trees." in n for n in changed)
    assert any("classifier" in n for n in changed) and model.adapter_locations == {"pets": "packed", "trees": "attached"}
    again = PeftModel.from_pretrained(vit("cat", "dog"), tmp_path / "out" / "checkpoint-4" / "trees").eval()
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    assert torch.equal(again(**pixels).logits, model.eval()(**pixels).logits)
    assert list(again.config.id2label.values()) == ["fir", "oak", "yew"]
