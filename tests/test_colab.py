"""The notebooks of colab/ are stored without outputs, and run from start to end at the small
size."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import jax
import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPOSITORY / "colab").glob("*.ipynb"))
PROJECT = "transformer-jax/transformer_jax"
ADDRESS = f"https://github.com/{PROJECT}"

# One device, as on most machines; sharding is shown on eight.
FLAGS = {"5_your_own_research_code": "--xla_force_host_platform_device_count=8"}
SHOWN = {
    "1_train_a_gpt": ["--- step 200 ---", "resuming from step 200 of 300", "the same to the bit"],
    "2_look_inside": ["induction heads (layer, head): (1, ", "<iframe srcdoc=", "without the induction heads"],
    "3_masked_model_from_one_book": ["bigram", "--- step 200 ---\nO diretor do", "p = "],
    "4_translation": ["exactly the reference: ", "1998-04-23", "<iframe srcdoc="],
    "5_your_own_research_code": ["8 device(s): {'data': 2, 'fsdp': 2, 'expert': 1, 'sequence': 1, 'tensor': 2}",
                                 "on each device (2, 32, 32)"],
    "6_a_historia_em_portugues": ["19 caracteres", "0.880784  0.119201  0.000015", "Je suis étudiant -> I am a student",
                                  "6 x 4 = 24 olhares", "até que ele ficasse <mask>    cheio", "vazia",
                                  "0.4075  0.2715", "RL  : "],
    "7_the_story_in_english": ["19 characters", "0.880784  0.119201  0.000015", "Je suis étudiant -> I am a student",
                               "6 x 4 = 24 looks", "até que ele ficasse <mask>    cheio", "vazia", "0.4075  0.2715",
                               "RL  : "],
    "8_features_and_circuits": ["the sum of the graph: ", "<iframe srcdoc=", "confirmed: without 16 features"],
    "9_architectures_of_today": ["residual parallel", "latent attention True", "right in 100.0% of new sentences",
                                 "layers.1.router_probabilities", "<iframe srcdoc=", "p(sing or sings)"],
}


def code_cells(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def python(source):
    """The cell as Python, with its magics as calls."""
    return TransformerManager().transform_cell(source)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def test_every_notebook_is_known():
    assert [path.stem for path in NOTEBOOKS] == sorted(SHOWN)


def test_git_holds_no_outputs(path, notebook):
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert path.read_text() == nbformat.writes(notebook) + "\n"  # the layout of another tool would change every line
    assert notebook.metadata.kernelspec == {"display_name": "Python 3", "language": "python", "name": "python3"}
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    for cell in notebook.cells:
        assert cell.source.strip(), cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.id


def test_only_public_names(notebook):
    for source in code_cells(notebook):
        for node in ast.walk(ast.parse(python(source))):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom):
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("_") and name != "__version__"], ast.unparse(node)


def test_it_opens_with_the_one_setup_cell(path, notebook):
    opening, setup = notebook.cells[:2]
    assert f"(https://colab.research.google.com/github/{PROJECT}/blob/main/colab/{path.name})" in opening.source
    assert setup.source == code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0]
    assert sum('SIZE = "small"  # @param ["small", "tpu"]' in source for source in code_cells(notebook)) == 1


def test_links_lead_somewhere(path, notebook):
    for cell in notebook.cells:
        for target in re.findall(r"\]\(([^)]+)\)", cell.source) if cell.cell_type == "markdown" else []:
            inside = target.removeprefix(f"{ADDRESS}/blob/main/")
            if inside != target:
                assert (REPOSITORY / inside).is_file(), target
            elif not target.startswith("https://"):
                assert (path.parent / target).is_file(), target


def run_setup(code, **variables):
    """What the setup cell prints in a process of its own."""
    setup = code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0]
    done = subprocess.run([sys.executable, "-c", code, setup], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": str(REPOSITORY), "XLA_FLAGS": ""} | variables)
    return done.stdout


# Runs the cell in an IPython whose pip only prints its arguments, and installs the library if
# INSTALLS is set.
IN_IPYTHON = """
import importlib.metadata, importlib.util, os, sys
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
installed = []
def pip(line):
    print("pip", line)
    installed.append("INSTALLS" in os.environ)
shell.register_magic_function(pip, magic_name="pip")
importlib.util.find_spec = lambda name: (installed or None) and installed[-1] or None
if "JAX_VERSION" in os.environ:
    importlib.metadata.version = lambda name: os.environ["JAX_VERSION"]
error = shell.run_cell(sys.argv[1]).error_in_exec
print(error)
"""


def test_installing_leaves_jax_as_it_is():
    shown = run_setup(IN_IPYTHON, JAX_PLATFORMS="cpu", INSTALLS="1").splitlines()
    assert shown[0] == f"pip install --quiet jax=={jax.__version__} git+{ADDRESS}"
    assert shown[1].startswith(f"jax {jax.__version__}, ") and shown[-1] == "None"


def test_a_failed_installation_prints_what_to_do():
    shown = run_setup(IN_IPYTHON, JAX_PLATFORMS="cpu")
    assert f"git+{ADDRESS} could not be installed" in shown and "path of a wheel" in shown.splitlines()[-1]


def test_a_jax_that_is_too_old_prints_what_to_do():
    shown = run_setup(IN_IPYTHON, JAX_PLATFORMS="cpu", JAX_VERSION="0.7.2").splitlines()
    assert "needs jax 0.10 or newer, and this runtime has 0.7.2" in shown[-1] and "Restart session" in shown[-1]
    assert not any(line.startswith("pip") for line in shown)
    oldest = re.search(r"OLDEST_JAX = \((\d+), (\d+)\)", code_cells(nbformat.read(NOTEBOOKS[0], as_version=4))[0])
    assert f'"jax>={oldest[1]}.{oldest[2]}"' in (REPOSITORY / "pyproject.toml").read_text()


def test_without_its_accelerator_it_runs_on_the_cpu():
    shown = run_setup("import sys\nexec(sys.argv[1].replace('%pip', '# '))", JAX_PLATFORMS="cuda")
    assert f"jax {jax.__version__}, 1 x cpu\nThere is no GPU or TPU, so everything runs on the CPU" in shown


@pytest.mark.long
def test_it_runs(path, notebook, tmp_path):
    variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": FLAGS.get(path.stem, ""), "PYTHONPATH": str(REPOSITORY),
                 "IPYTHONDIR": str(tmp_path / "ipython")}
    corpora = pathlib.Path(os.environ.get("TRANSFORMER_JAX_DATA", REPOSITORY.parent / "shared" / "data"))
    if corpora.is_dir():
        variables["TRANSFORMER_JAX_DATA"] = str(corpora)
    workdir = tmp_path / "work"
    workdir.mkdir()
    client = NotebookClient(notebook, kernel_name="python3", timeout=600, startup_timeout=300,
                            resources={"metadata": {"path": str(workdir)}})
    client.execute(env=os.environ | variables)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    streams = {name: "".join(output.text for output in outputs if output.get("name") == name)
               for name in ("stdout", "stderr")}
    assert streams["stderr"] == "" and "Warning" not in streams["stdout"]
    shown = streams["stdout"] + "".join(output.get("data", {}).get("text/html", "") for output in outputs)
    assert [text for text in SHOWN[path.stem] if text not in shown] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if kept := os.environ.get("TRANSFORMER_JAX_EXECUTED_NOTEBOOKS"):  # for the documentation site
        pathlib.Path(kept).mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, pathlib.Path(kept) / path.name)
