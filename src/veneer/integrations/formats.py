"""The formats that an adapter can be written in, by name."""

FORMATS = {
    "lora": "plain LoRA of whole layers",
    "peft": "the public format, without parts of fused layers",
    "lycoris": "one file with LyCORIS's keys",
    "kohya": "one file with the keys of kohya's scripts",
}
