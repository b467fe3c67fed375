"""What importing costs, what is public, and that our `kernels` does not stand in the way of others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import steering

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).with_name("goldens") / "public_api.txt"


def python(code: str) -> str:
    """Run code in a fresh interpreter with the repository first on the path; returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_imports_with_our_kernels_first_on_the_path() -> None:
    """A Hugging Face package is named `kernels` too, and transformers asks for it by that name."""
    out = python("import transformers, kernels; transformers.LlamaForCausalLM; print(kernels.__file__)")
    assert Path(out.strip()).parent == ROOT / "kernels"


def test_importing_steering_loads_no_library() -> None:
    heavy = "{'torch', 'numpy', 'transformers', 'triton', 'safetensors', 'pydantic', 'fastapi'}"
    assert python(f"import steering; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_errors_load_no_library() -> None:
    assert python("from steering import SpecError; print('torch' in sys.modules)").strip() == "False"


def test_the_public_names_are_the_listed_ones() -> None:
    """A name that comes or goes is a decision: change the list in the same commit."""
    assert [*sorted(steering.__all__)] == GOLDEN.read_text(encoding="utf-8").split()


@pytest.mark.parametrize("name", [n for n in steering.__all__ if n != "__version__"])
def test_every_public_name_can_be_imported(name: str) -> None:
    assert getattr(steering, name) is not None
    assert name in dir(steering)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no public name 'Absent'"):
        _ = steering.Absent


def test_the_registry_is_filled_however_it_is_imported() -> None:
    assert "lqr" in python("from steering import REGISTRY; print(sorted(REGISTRY))")
