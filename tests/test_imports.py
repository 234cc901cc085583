"""The public names, and that asking for them costs nothing until a verb is called."""

import json
import subprocess
import sys
from importlib.resources import files

import pytest

import suanli

HEAVY = (
    "torch",
    "numpy",
    "sklearn",
    "scipy",
    "matplotlib",
    "PIL",
    "timm",
    "tensorboard",
    "mlflow",
    "wandb",
    "openvino",
    "onnx",
)


def test_public_names() -> None:
    assert sorted(suanli.__all__) == [
        "DataError",
        "Diverged",
        "GateError",
        "Interrupted",
        "MachineError",
        "Run",
        "SuanliError",
        "UsageError",
        "bench",
        "compare",
        "convert",
        "device",
        "embed",
        "evaluate",
        "export",
        "load",
        "optimize",
        "predict",
        "prepare",
        "report",
        "run",
        "runs",
        "serve",
        "speed_up",
        "train",
    ]


@pytest.mark.parametrize("name", [n for n in suanli.__all__ if n.islower()])
def test_a_verb_is_the_function_and_stays_it(name: str) -> None:
    """A submodule of the same name must not take the place of the function once it is imported."""
    verb = getattr(suanli, name)
    assert callable(verb)
    assert getattr(suanli, name) is verb


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="optimise"):
        suanli.optimise  # noqa: B018


@pytest.mark.parametrize(
    "work",
    [
        "import suanli",
        "import suanli, suanli.core.types, suanli.core.errors, suanli.core.registry, suanli.core.console, suanli.cli",
        "import sys; sys.argv = ['suanli', '--help']; import suanli.cli; suanli.cli.main()",
        "import sys; sys.argv = ['suanli', 'train', '--help']; import suanli.cli; suanli.cli.main()",
        "from suanli.core import registry; [registry.names(kind) for kind in registry.FOLDERS]",
    ],
    ids=["import", "light modules", "help", "help of a verb", "names of every room"],
)
def test_imports_nothing_heavy(work: str) -> None:
    code = (
        "import json, sys\n"
        "try:\n"
        f"    exec({work!r})\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stderr.splitlines()[-1]) == []


def test_the_package_is_typed() -> None:
    assert (files("suanli") / "py.typed").is_file()
