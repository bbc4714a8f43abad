"""The list of settings in `fastgpt COMMAND --help`."""

from __future__ import annotations

import shutil
import textwrap
from typing import Any

from fastgpt.config.settings import get, leaves

INDENT = 26


def listing(config: Any) -> str:
    """Returns each setting's flag, help text, and value in `config`, wrapped for the terminal."""
    width = min(shutil.get_terminal_size((100, 24)).columns, 100) - INDENT
    lines, section = [], None
    for leaf in leaves(type(config)).values():
        if leaf.section != section:
            section = leaf.section
            lines += ["", f"{section} options:".lstrip()]
        options = ",".join(map(str, leaf.options))
        flag = f"  --{leaf.name} " + (f"{{{options}}}" if options else leaf.type.__name__.upper())
        value = get(config, leaf)
        default = repr(value) if isinstance(value, str) and not value.strip() else value
        text = textwrap.wrap(f"{leaf.about} (default:\0{default})", max(width, 20))
        if len(flag) < INDENT:
            flag = flag.ljust(INDENT) + text.pop(0)
        lines += [flag, *(" " * INDENT + line for line in text)]
    return "\n".join(lines).replace("\0", " ")
