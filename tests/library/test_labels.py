"""Label names: each adapter with a head of its own keeps its own, whatever their number, and switching says them in the model's configuration."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)

from veneer import AdapterFileError, LoraConfig, PeftModel, TaskType, get_peft_model

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ANIMALS, PLANTS = ["cat", "dog", "eel", "fox"], ["fir", "oak", "yew"]


def named(labels: list[str]) -> dict:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


def vit(labels: list[str]) -> ViTForImageClassification:
    torch.manual_seed(3)
    model = ViTForImageClassification(ViTConfig(**SMALL, image_size=16, patch_size=8, **named(labels)))
    with torch.no_grad():
        model.classifier.weight.normal_()
    return model.eval()


def bert(labels: list[str]) -> BertForSequenceClassification:
    torch.manual_seed(3)
    return BertForSequenceClassification(BertConfig(**SMALL, vocab_size=32, max_position_embeddings=16, **named(labels))).eval()


def with_head(**options) -> LoraConfig:
    return LoraConfig(r=2, modules_to_save=["classifier"], init_lora_weights=False, **options)


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


@pytest.fixture
def plants(tmp_path):
    """An adapter whose head names three plants."""
    model = get_peft_model(vit(PLANTS), with_head())
    model.save_pretrained(tmp_path / "plants")
    return tmp_path / "plants", model


def labels_of(model) -> list[str]:
    assert model.config.label2id == {n: i for i, n in model.config.id2label.items()}
    assert model.config.num_labels == len(model.config.id2label)
    return list(model.config.id2label.values())


class TestSwitching:
    def test_each_adapter_says_its_own(self, plants, inputs):
        folder, alone = plants
        model = get_peft_model(vit(ANIMALS), with_head(), "animals").eval()
        model.load_adapter(folder, "plants")
        assert labels_of(model) == ANIMALS
        model.set_adapter("plants")
        assert labels_of(model) == PLANTS and model.num_labels == 3
        assert torch.equal(model(**inputs).logits, alone.eval()(**inputs).logits)
        with model.disable_adapter():
            assert labels_of(model) == ANIMALS and model(**inputs).logits.shape == (2, 4)
        assert labels_of(model) == PLANTS
        model.set_adapter("animals")
        assert labels_of(model) == ANIMALS and model(**inputs).logits.shape == (2, 4)
        model.set_adapter(["animals", "plants"])
        assert labels_of(model) == PLANTS and model(**inputs).logits.shape == (2, 3)
        model.delete_adapter("plants")
        assert labels_of(model) == ANIMALS
        base = model.unload()
        assert labels_of(base) == ANIMALS and base.num_labels == 4

    def test_an_adapter_without_a_head_says_the_bases(self, plants, inputs):
        model = get_peft_model(vit(ANIMALS), LoraConfig(r=2), "plain").eval()
        model.load_adapter(plants[0], "plants")
        model.set_adapter("plants")
        model.set_adapter("plain")
        assert labels_of(model) == ANIMALS

    def test_what_is_written_into_the_configuration_is_kept(self, plants, tmp_path):
        model = get_peft_model(vit(ANIMALS), with_head(), "a")
        model.load_adapter(plants[0], "plants")
        model.config.id2label = dict(enumerate("wxyz"))
        model.set_adapter("plants")
        model.set_adapter("a")
        assert list(model.config.id2label.values()) == list("wxyz")
        model.save_pretrained(tmp_path / "out")
        assert json.loads((tmp_path / "out" / "a" / "labels.json").read_text()) == list("wxyz")
        assert json.loads((tmp_path / "out" / "plants" / "labels.json").read_text()) == PLANTS

    @pytest.mark.parametrize("make", [vit, bert])
    def test_a_head_of_another_size_trains_with_the_right_loss(self, make, tmp_path):
        get_peft_model(make(PLANTS), with_head()).save_pretrained(tmp_path / "plants")
        ids = {"pixel_values": torch.randn(4, 3, 16, 16)} if make is vit else {"input_ids": torch.randint(0, 32, (4, 5))}
        model = get_peft_model(make(ANIMALS), with_head(), "animals").eval()
        answers = torch.tensor([2, 0, 1, 2])
        model(**ids, labels=answers)
        model.load_adapter(tmp_path / "plants", "plants", is_trainable=True)
        model.set_adapter("plants")
        out = model(**ids, labels=answers)
        assert torch.allclose(out.loss, torch.nn.functional.cross_entropy(out.logits, answers))
        out.loss.backward()
        head = dict(model.named_parameters())["base_model.model.classifier.veneer.plants.weight"]
        assert head.shape == (3, 16) and head.grad.abs().sum() > 0

    def test_one_kind_of_loss_does_not_stick_to_the_next_adapter(self, tmp_path, inputs):
        get_peft_model(vit(["years"]), with_head()).save_pretrained(tmp_path / "years")
        model = get_peft_model(vit(ANIMALS), with_head(), "animals").eval()
        model(**inputs, labels=torch.tensor([1, 2]))
        assert model.config.problem_type == "single_label_classification"
        model.load_adapter(tmp_path / "years", "years")
        model.set_adapter("years")
        out = model(**inputs, labels=torch.tensor([1.5, 2.5]))
        assert torch.allclose(out.loss, (out.logits.squeeze() - torch.tensor([1.5, 2.5])).square().mean())
        model.set_adapter("animals")
        assert model.config.problem_type == "single_label_classification"


def segformer(labels: list[str]) -> SegformerForSemanticSegmentation:
    torch.manual_seed(3)
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2], "decoder_hidden_size": 8}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **named(labels))).eval()


def test_a_head_that_ends_in_a_convolution(tmp_path):
    pixels = torch.randn(1, 3, 64, 64)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["decode_head"], init_lora_weights=False)
    alone = get_peft_model(segformer(PLANTS), config).eval()
    alone.save_pretrained(tmp_path)
    model = get_peft_model(segformer(ANIMALS), LoraConfig(r=2, target_modules=["q_proj"]), "animals").eval()
    model.load_adapter(tmp_path, "plants", packed=True)
    model.set_adapter("plants")
    assert torch.equal(model(pixel_values=pixels).logits, alone(pixel_values=pixels).logits)
    assert labels_of(model) == PLANTS
    assert model.get_base_model().decode_head.copy_of("plants").classifier.out_channels == 3
    with model.disable_adapter():
        assert model(pixel_values=pixels).logits.shape[1] == 4


class TestFiles:
    def test_names_travel_with_the_adapter(self, plants, inputs):
        folder, alone = plants
        assert json.loads((folder / "labels.json").read_text()) == PLANTS
        model = PeftModel.from_pretrained(vit(ANIMALS), folder).eval()
        assert labels_of(model) == PLANTS
        assert torch.equal(model(**inputs).logits, alone.eval()(**inputs).logits)

    def test_a_head_without_names_gets_numbers(self, plants):
        (plants[0] / "labels.json").unlink()
        model = PeftModel.from_pretrained(vit(ANIMALS), plants[0])
        assert labels_of(model) == ["LABEL_0", "LABEL_1", "LABEL_2"]

    def test_numbers_are_not_written(self, tmp_path):
        model = get_peft_model(vit(["LABEL_0", "LABEL_1"]), with_head())
        (tmp_path / "labels.json").write_text('["old", "names"]')
        model.save_pretrained(tmp_path)
        assert not (tmp_path / "labels.json").exists()

    def test_merging_for_good_keeps_the_heads_own(self, plants, inputs):
        folder, alone = plants
        model = PeftModel.from_pretrained(vit(ANIMALS), folder).eval()
        merged = model.merge_and_unload()
        assert labels_of(merged) == PLANTS and merged.num_labels == 3 and merged.classifier.out_features == 3
        assert torch.allclose(merged(**inputs).logits, alone.eval()(**inputs).logits, atol=1e-6)

    def test_a_wrong_number_of_names_is_refused(self, plants):
        (plants[0] / "labels.json").write_text('["fir", "oak"]')
        model = get_peft_model(vit(ANIMALS), with_head(), "animals")
        with pytest.raises(AdapterFileError, match="names 2 labels, and the head beside it has 3 outputs"):
            model.load_adapter(plants[0], "plants")
        assert list(model.peft_config) == ["animals"] and labels_of(model) == ANIMALS

    @pytest.mark.parametrize("text", ["{", '{"0": "fir"}', "[1, 2, 3]"])
    def test_what_is_no_list_of_names_is_refused(self, plants, text):
        (plants[0] / "labels.json").write_text(text)
        with pytest.raises(AdapterFileError, match=r"labels\.json is no"):
            PeftModel.from_pretrained(vit(ANIMALS), plants[0])

    def test_a_head_of_another_width_is_refused(self, tmp_path):
        base = ViTForImageClassification(ViTConfig(**SMALL | {"hidden_size": 8}, image_size=16, patch_size=8, **named(PLANTS)))
        get_peft_model(base, with_head()).save_pretrained(tmp_path)
        with pytest.raises(AdapterFileError, match="another size, label set or rank"):
            PeftModel.from_pretrained(vit(ANIMALS), tmp_path)

    def test_reading_over_an_attached_adapter_takes_its_labels(self, plants, inputs):
        folder, alone = plants
        model = get_peft_model(vit(ANIMALS), with_head(task_type=TaskType.SEQ_CLS), "animals").eval()
        model.load_adapter(folder, "animals")
        assert labels_of(model) == PLANTS
        assert torch.equal(model(**inputs).logits, alone.eval()(**inputs).logits)


class TestHotSwap:
    def test_names_follow_the_numbers(self, tmp_path, inputs):
        other = get_peft_model(vit(["ant", "bee", "elk", "yak"]), with_head())
        other.save_pretrained(tmp_path / "other")
        model = get_peft_model(vit(ANIMALS), with_head()).eval()
        model.load_adapter(tmp_path / "other", "default", hotswap=True)
        assert labels_of(model) == ["ant", "bee", "elk", "yak"]
        assert torch.equal(model(**inputs).logits, other.eval()(**inputs).logits)
        model.save_pretrained(tmp_path / "saved")
        assert labels_of(PeftModel.from_pretrained(vit(ANIMALS), tmp_path / "saved")) == ["ant", "bee", "elk", "yak"]

    def test_an_adapter_without_a_head_brings_back_the_bases_names(self, tmp_path):
        get_peft_model(vit(ANIMALS), LoraConfig(r=2)).save_pretrained(tmp_path / "plain")
        get_peft_model(vit(["ant", "bee", "elk", "yak"]), with_head()).save_pretrained(tmp_path / "other")
        model = get_peft_model(vit(ANIMALS), with_head())
        model.load_adapter(tmp_path / "other", "default", hotswap=True)
        model.load_adapter(tmp_path / "plain", "default", hotswap=True)
        assert labels_of(model) == ANIMALS

    def test_another_number_of_labels_is_refused_and_nothing_changes(self, plants):
        model = get_peft_model(vit(ANIMALS), with_head())
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        with pytest.raises(AdapterFileError):
            model.load_adapter(plants[0], "default", hotswap=True)
        assert labels_of(model) == ANIMALS
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
