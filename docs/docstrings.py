"""How the API pages read the docstrings."""

import re
from typing import Any

import griffe


class Example(griffe.Extension):
    """Lets `Example:` be a section of code, which Griffe knows as `Examples:` alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Renames the section of one object."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
