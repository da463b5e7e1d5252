"""The notebooks run, and those that are shown are of the same cells, with their outputs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

for name in ("jupytext", "nbclient", "ipykernel"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'jax_sage[dev]'")
for name in ("flax", "optax", "matplotlib", "tqdm", "sklearn"):
    pytest.importorskip(name, reason=f"{name} is not installed: pip install 'jax_sage[examples]'")

import jupytext  # noqa: E402
import nbformat  # noqa: E402

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.md"))
# A path, a temporary name, a warning: nothing that a reader should see.
UNWANTED = re.compile(r"/(home|root|tmp|work|usr|Users)/|ipykernel_|Warning|unknown place")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def cells(notebook):
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def texts(output):
    """What an output shows as text."""
    if output.output_type == "stream":
        yield output.text
    else:
        yield from (text for kind, text in output.data.items() if kind.startswith("text/"))


def check_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "execute_result"}
    for output in outputs:
        for text in texts(output):
            assert not UNWANTED.search(text), text
    # What a progress bar writes is one line.
    for output in outputs:
        if output.get("name") == "stderr":
            assert output.text.startswith("training: 100%") and output.text.count("\n") == 1
    for cell in code:
        last = cell.source.rstrip().splitlines()[-1]
        if last.endswith(".plot()"):
            assert cell.outputs[-1].data["image/png"]
        elif re.fullmatch(r"\w+", last) or last.startswith("print("):
            assert cell.outputs


def test_there_are_notebooks():
    assert NAMES == ["quantization", "quickstart", "swap_a_model"]


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_that_is_shown(name):
    """Run python examples/notebooks/execute.py after changing one."""
    shown = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(shown)
    assert cells(shown) == cells(jupytext.read(FOLDER / f"{name}.md"))
    check_outputs(shown)


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs(name, script, tmp_path):
    notebook = script.execute(FOLDER / f"{name}.md", tmp_path)
    check_outputs(notebook)
    assert list(tmp_path.iterdir()) == []
