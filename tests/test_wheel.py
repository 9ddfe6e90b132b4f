"""The wheel contains only the package, and works without a checkout."""

import os
import pathlib
import site
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel that pip builds from the files that git knows, in a folder of its own."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "transformer_jax", "experiments", "pyproject.toml", "README.md",
                             "LICENSE"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).is_file():
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--no-deps", "-q", "-w", str(built), str(source)], check=True)
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """``installed(*command)`` runs a command of an environment with the wheel, which sees the
    packages of this one."""
    home = tmp_path_factory.mktemp("home")
    venv.create(home / "venv", with_pip=False)
    python = home / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "-q", str(wheel)],
                   check=True)
    packages = next((home / "venv" / "lib").glob("python*")) / "site-packages"
    # After the environment's own packages, so that the wheel comes first.
    (packages / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"JAX_PLATFORMS": "cpu"}

    def run(program: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run([str(home / "venv" / "bin" / program), *arguments], cwd=home, env=environment,
                              capture_output=True, text=True)

    return run


def test_the_wheel_holds_the_package_with_recipes_and_pages_only(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"transformer_jax"}
    assert "transformer_jax/recipes/quickstart.py" in names
    assert any(name.startswith("transformer_jax/inspection/") and name.endswith(".html") for name in names)


def test_the_recipes_outside_the_checkout(installed):
    code = "import transformer_jax.recipes as r; print(r.__file__, r.get('quickstart').steps)"
    ended = installed("python", "-c", code)
    assert ended.returncode == 0, ended.stderr
    assert str(ROOT) not in ended.stdout and ended.stdout.endswith(" 600\n")


def test_a_model_is_trained_outside_the_checkout(installed):
    code = ("import transformer_jax as tj\n"
            "bundle = tj.train('quickstart', texts=['the cat sat on the mat. ' * 200], steps=2, workdir='run')\n"
            "print(bundle.step, tj.evaluate(bundle, ['the cat sat'])['loss'] > 0)")
    ended = installed("python", "-c", code)
    assert ended.returncode == 0 and ended.stdout.endswith("2 True\n"), ended.stderr
    ended = installed("transformer-jax", "generate", "--workdir=run", "--prompt=the", "--max_new_tokens=3")
    assert ended.returncode == 0 and ended.stdout.startswith("the"), ended.stderr


def test_the_console_command(installed):
    ended = installed("transformer-jax", "--help")
    assert ended.returncode == 0 and "preflight" in ended.stdout, ended.stderr
    ended = installed("transformer-jax", "preflight", "--config=quickstart", "--help")
    assert ended.returncode == 0 and "--config.steps  (int, default 600)" in ended.stdout, ended.stderr
    ended = installed("transformer-jax", "genrate")
    assert ended.returncode == 2 and "did you mean 'generate'?" in ended.stderr
