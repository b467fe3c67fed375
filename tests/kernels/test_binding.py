"""Operators bound to all their arguments but the rows, and what a CPU compiles: the same bits, and where it may not."""

from __future__ import annotations

import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels
from kernels import bind, feedback_
from tests.kernels import cases, edit_cases
from tests.kernels.cases import DTYPES, MUTATED, Batch, assert_same, both_ways, clone, same_bits

FORMS = ("feedback", *edit_cases.FORMS)
ROWS = ("y_TE", "x_TD")
each_form = pytest.mark.parametrize("form", FORMS)


def batch(form: str, T: int = 12, E: int = 40, **options: object) -> Batch:
    if form == "feedback":
        return cases.batch(T, E, 3, knees=True, **options)  # type: ignore[arg-type]
    return edit_cases.batch(form, T, E, **options)  # type: ignore[arg-type]


def operator(form: str) -> object:
    return getattr(kernels, f"{form}_")


def bound(form: str, args: Batch) -> kernels.binding.Bound:
    return bind(operator(form), *(value for name, value in args.items() if name not in ROWS))  # type: ignore[arg-type]


def rows(args: Batch) -> tuple[Tensor, Tensor]:
    return args["y_TE"], args.get("x_TD", args["y_TE"])


@each_form
@both_ways
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_bound_call_is_the_operator_bit_for_bit(dtype: torch.dtype, form: str) -> None:
    args = batch(form, dtype=dtype)
    want, got = clone(args), clone(args)
    operator(form)(*want.values())  # type: ignore[operator]
    run = bound(form, got)
    run(*rows(got))
    assert_same(got, want)
    for out in (want, got):  # a gate closes, and the next step comes
        out["strength_TR"][::2] = 0
    operator(form)(*want.values())  # type: ignore[operator]
    run(*rows(got))
    assert_same(got, want)


@each_form
def test_bound_call_keeps_what_it_points_to(form: str) -> None:
    args = batch(form)
    seen = [weakref.ref(value) for name, value in args.items() if name not in ROWS]
    run, y_and_x = bound(form, args), rows(args)
    del args
    assert all(each() is not None for each in seen)
    run(*y_and_x)
    del run
    assert not any(each() is not None for each in seen)


@each_form
@both_ways
def test_rows_of_another_shape_are_refused(form: str) -> None:
    args = batch(form, slots="all")
    run = bound(form, args)
    for wrong in (args["y_TE"][:-1], args["y_TE"][:, :-1]):
        with pytest.raises(ValueError, match=r"must (be|have)"):
            run(wrong, args.get("x_TD", wrong))
    if form == "feedback":
        with pytest.raises(ValueError, match=r"must (be|have)"):
            run(args["y_TE"], args["x_TD"][:, :-1])


@each_form
@both_ways
@pytest.mark.parametrize("slot", [99, -1])
def test_slot_beyond_the_bank_is_refused_before_anything_is_written(slot: int, form: str, way: str) -> None:
    args = batch(form, slots="all")
    args["slot_T"][5] = slot
    before = clone(args)
    if way == "reference" and slot < 0:
        pytest.skip("torch counts from the end")
    with pytest.raises(IndexError):
        bound(form, args)(*rows(args))
    assert_same(args, before)


@pytest.mark.parametrize("form", edit_cases.FORMS)
def test_channel_beyond_the_knobs_is_refused_before_anything_is_written(form: str, way: str) -> None:
    args = batch(form, slots="all")
    memory = torch.full((2, *args["measured_TR"].shape), 7.0)
    args["measured_TR"] = memory[0]
    run = bound(form, args)
    args["channel_SM"][3] = args["strength_TR"].shape[1]
    args["slot_T"][5] = 3
    before = clone(args)
    with pytest.raises((IndexError, RuntimeError)):  # torch's own where the reference runs
        run(*rows(args))
    assert (memory[1] == 7).all()
    if way == "compiled":
        assert_same(args, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_read_site_may_have_another_dtype(dtype: torch.dtype, way: str) -> None:
    args = batch("feedback", dtype=dtype)
    exact = clone(args)
    args["x_TD"] = args["x_TD"].float()
    exact["x_TD"] = exact["x_TD"].float().to(dtype)
    for each in (args, exact):
        feedback_(*each.values())
    assert_same(args, exact)


@both_ways
def test_row_of_many_zeros_ties_and_scores_that_are_no_numbers() -> None:
    """What the count-th largest score of the compiled search could trip over: its oracle is a sort."""
    y = torch.zeros(9, 33)
    y[1, :5], y[2], y[3, ::2], y[4, 7], y[5] = 1e-45, 1.0, torch.inf, torch.nan, torch.nan
    y[6] = torch.linspace(1e-40, 3e38, 33)
    y[7] = torch.linspace(1, 1 + 32 * 2**-23, 33)
    y[8, :20] = -2.0
    for count in (1, 5, 17, 32, 33):
        args = edit_cases.batch("sparsify", 9, 33, 1, K=0, slots="one", bounds=False)
        args["weight_SME"][3], args["count_SM"][3] = 1.0, count
        args["strength_TR"][:] = 0  # only measure: nothing is hidden by a diverged row
        args["y_TE"] = y.clone()
        kernels.sparsify_(*args.values())
        least_T1 = y.abs().sort(dim=-1, descending=True).values[:, count - 1, None]
        lost_T = (~(y.abs() >= least_T1)).float().mean(-1)
        measured = args["measured_TR"][:, args["channel_SM"][3, 0]]
        torch.testing.assert_close(measured, lost_T, rtol=0, atol=1e-6)


def test_warm_compiles_once_and_touches_nothing() -> None:
    pytest.importorskip("numba")
    from kernels import _edits_cpu, _feedback_cpu

    for _ in range(2):
        kernels.warm()
    for form in FORMS:
        for dtype in DTYPES:
            args = batch(form, dtype=dtype)
            bound(form, args)(*rows(args))
    assert len(_feedback_cpu.feedback.signatures) == len(_edits_cpu.edit.signatures) == 1, "one compilation serves all"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sixteen_bits_are_read_and_rounded_as_torch_does(dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    from kernels._memory import KINDS, add

    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 6e-8, 6.1e-5, 65504.0, 65520.0, 3e38, 1e-40])
    draw = torch.Generator().manual_seed(0)
    row = torch.cat([special, torch.randn(4096, generator=draw) * torch.logspace(-9, 9, 4096)]).to(dtype)
    step = torch.cat([torch.zeros(len(special)), torch.randn(4096, generator=draw)])
    want = (row.float() + step).to(dtype)
    add(row.data_ptr(), KINDS[dtype], step.numpy())
    assert torch.equal(row.isnan(), want.isnan())
    assert same_bits(row[~row.isnan()], want[~want.isnan()])


def test_without_a_place_to_keep_it_a_function_is_compiled_all_the_same() -> None:
    pytest.importorskip("numba")
    from kernels._compile import jit

    assert jit is not None
    names: dict[str, object] = {}
    exec("def twice(values):\n    for i in range(values.size):\n        values[i] *= 2\n", names)
    values = np.ones(3, np.float32)
    jit(names["twice"])(values)  # type: ignore[arg-type]  # code from no file has no place
    assert (values == 2).all()


CALLS = """
import numpy as np
from kernels._compile import jit
from kernels._memory import least
@jit
def smaller(one, other):
    return least(one, other)
"""


FULL = """
from numba.core.caching import IndexDataCacheFile as File
def fail(*_):
    raise OSError(28, "No space left on device")
File._save_data = fail
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A copy of what compiles, with a function that calls one of another file."""
    pytest.importorskip("numba")
    package = tmp_path / "kernels"
    package.mkdir()
    for name in ("_compile.py", "_memory.py"):
        shutil.copy(Path(kernels.__file__).with_name(name), package)
    (package / "__init__.py").touch()
    (package / "_calls.py").write_text(CALLS)
    return package


def smaller(package: Path, before: str = "") -> str:
    line = f"{before}\nimport kernels._calls as c; print(c.smaller(c.np.float32(1), c.np.float32(2)))"
    command = [sys.executable, "-c", line]
    return subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True).stdout.strip()


def test_a_changed_file_is_compiled_anew_into_the_functions_of_others(package: Path) -> None:
    assert smaller(package) == "1.0"
    memory = package / "_memory.py"
    memory.write_text(memory.read_text().replace("return one if one < other", "return one if one > other"))
    # The index is written and the code is not: the next process must not find the code of before under the new index.
    assert smaller(package, FULL) == "2.0"
    assert smaller(package) == "2.0"


def test_a_damaged_cache_is_made_anew(package: Path) -> None:
    assert smaller(package) == "1.0"
    for kind in ("nbi", "nbc"):
        files = list(package.rglob(f"*.{kind}"))
        for path in files:
            path.write_bytes(path.read_bytes()[:30])
        assert smaller(package) == "1.0"
        assert files
        assert all(path.stat().st_size > 30 for path in files)


WITHOUT = """
import sys
import torch
import kernels
assert "numba" not in sys.modules, "the package must not wait for numba"
sys.modules["numba"] = None
from kernels import feedback
from tests.kernels.cases import assert_same, batch, clone
args = batch(6, 24, 2, knees=True)
want, got, tied = clone(args), clone(args), clone(args)
feedback.reference(*want.values())
kernels.feedback_(*got.values())
kernels.warm()
y, x, *others = tied.values()
kernels.bind(kernels.feedback_, *others)(y, x)
assert_same(got, want)
assert_same(tied, want)
"""


def test_without_numba_the_reference_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_mutated_argument_of_a_bound_call_is_mutated() -> None:
    args = batch("feedback", slots="all")
    before = clone(args)
    bound("feedback", args)(*rows(args))
    assert all(not same_bits(args[name], before[name]) for name in MUTATED)
