"""Places in the code, as reports name them."""

import os
import re
import sys


def describe(file: str, line: int, function: str) -> str:
    """As "models/dit.py:88 (Block.attend)".

    What was typed is "cell 3, line 2 (attend)" in a notebook, "the prompt (attend)" elsewhere.
    """
    suffix = "" if function == "<module>" else f" ({function})"
    if is_prompt(file):
        return f"the prompt{suffix}"
    number = cell(file)
    if number is not None:
        return f"cell {number}, line {line}{suffix}"
    folder, name = os.path.split(file)
    return f"{os.path.join(os.path.basename(folder), name)}:{line} ({function})"


def is_prompt(file: str) -> bool:
    """Whether it was typed at Python's own prompt, where every statement begins with line 1."""
    return file == "<stdin>" or file.startswith("<python-input")


def is_typed(file: str) -> bool:
    """Whether it was typed at a prompt or in a notebook."""
    return is_prompt(file) or cell(file) is not None


def cell(file: str) -> str | None:
    """The number of the cell that IPython has compiled under this name, which is a temporary one.

    None if it is another file, or this is not IPython.
    """
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", None)
    compiler = getattr(get_ipython() if get_ipython else None, "compile", None)
    names = getattr(compiler, "format_code_name", None)
    label = names(file) if names else None  # ("Cell", "In[3]")
    number = re.search(r"\d+", label[1]) if label else None
    return number.group() if number else None
