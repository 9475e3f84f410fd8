"""The fields between two lines of dashes with which a card on the hub begins."""

from __future__ import annotations

import re
from typing import Any

from .errors import ConfigError


def parse(text: str) -> tuple[dict[str, Any], str]:
    """The fields and the rest of a card.

    Raises:
        ConfigError: the fields are not YAML.

    >>> parse("---\\nlicense: mit\\n---\\n# Mine")
    ({'license': 'mit'}, '# Mine')
    """
    import yaml

    found = re.match(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$\n?", text, re.DOTALL | re.MULTILINE)
    if found is None:
        return {}, text
    try:
        fields = yaml.safe_load(found[1]) or {}
    except yaml.YAMLError as e:
        raise ConfigError(f"README.md: its front matter is not YAML ({' '.join(str(e).split())}); mend it, or delete the file") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"README.md: its front matter holds {type(fields).__name__}, not fields and values; mend it, or delete the file")
    return fields, text[found.end() :]


def compose(fields: dict[str, Any], body: str) -> str:
    """A card of these fields and this rest.

    >>> parse(compose({"license": "mit"}, "# Mine"))
    ({'license': 'mit'}, '\\n# Mine')
    """
    import yaml

    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n\n{body.lstrip()}"


def united(*values: Any) -> list[Any]:
    """The items of several fields, each a list, one item or nothing, every item once.

    >>> united("lora", ["veneer", "lora"], None)
    ['lora', 'veneer']
    """
    lists = [[] if not v else [v] if isinstance(v, str) else list(v) for v in values]
    return list(dict.fromkeys(item for items in lists for item in items))
