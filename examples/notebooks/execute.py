"""Executes the notebooks: makes each .ipynb, with its outputs, anew from the .md beside it.

python examples/notebooks/execute.py            # all of them
python examples/notebooks/execute.py quickstart

Those who edit the .ipynb itself, in Jupyter with jupytext, have the .md written for them.
"""

import argparse
import sys
from pathlib import Path

import jupytext
import nbformat
import traitlets
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))


class ThisPython(AsyncKernelManager):
    """The kernel of this interpreter, registered or not, and no other of its name."""

    @traitlets.default("kernel_spec_manager")
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


def execute(source: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook of a .md file with its outputs, run in a folder by this Python.

    What differs from run to run is left out: times of cells, their random ids, Python's version.
    """
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{i}"
    NotebookClient(
        notebook,
        kernel_manager_class=ThisPython,
        timeout=600,
        coalesce_streams=True,
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"by default all: {', '.join(NAMES)}")
    for name in parser.parse_args().names or NAMES:
        print(name, file=sys.stderr)
        notebook = execute(FOLDER / f"{name}.md", FOLDER)
        jupytext.write(notebook, FOLDER / f"{name}.ipynb")
