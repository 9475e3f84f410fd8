"""The README.md of an adapter: what it is, of which base, and how to use it."""

from __future__ import annotations

from .config import PeftConfig

CARD_NAME = "README.md"


def model_card(config: PeftConfig, parameters: int) -> str:
    """A model card with the front matter that the hub reads."""
    facts = config.facts()
    base = config.base_model_name_or_path
    front = ["---", *([f"base_model: {base}"] if base and not base.startswith(("/", ".")) else []), "library_name: peft", "tags:"]
    front += [f"- {config.peft_type.lower()}", "- veneer", "---"]
    saved = f", with whole modules: {', '.join(config.modules_to_save)}" if config.modules_to_save else ""
    return "\n".join(
        [
            *front,
            "",
            f"# {facts.title} adapter",
            "",
            f"{facts.title} ({facts.equation}; [arXiv:{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv})), {parameters:,} parameters{saved}.",
            "",
            "```python",
            "from veneer import PeftModel  # or: from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base_model, ADAPTER)  # this directory or repository",
            "```",
            "",
        ]
    )
