import ctypes
import json
import os
import subprocess
import sys

import pytest

import mlxspec
from mlxspec import blas

PRODUCT = """
import json, time
{first}
import mlxspec
import mlx.core as mx
from mlxspec.blas import blas_name
a = mx.random.normal((512, 512))
times = []
for _ in range(8):
    start = time.perf_counter()
    mx.eval(a @ a)
    times.append(time.perf_counter() - start)
print(json.dumps([blas_name(), min(times)]))
"""


def installed() -> bool:
    try:
        ctypes.CDLL(blas.LIBRARY)
    except OSError:
        return False
    return True


needs_openblas = pytest.mark.skipif(
    sys.platform != "linux" or not installed(), reason=f"needs Linux with OpenBLAS; apt install {blas.PACKAGE}"
)


def in_new_process(code: str, switch: str) -> list:
    environment = {**os.environ, blas.SWITCH: switch, "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("LD_PRELOAD", None)
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@needs_openblas
def test_mlx_computes_with_openblas_where_it_is_installed_and_is_many_times_faster():
    name, seconds = in_new_process(PRODUCT.format(first=""), "")
    off, slow = in_new_process(PRODUCT.format(first=""), "off")
    assert name.startswith("OpenBLAS ")
    assert off == "reference BLAS"
    assert seconds < slow / 3


@needs_openblas
@pytest.mark.skipif(not blas.has_amx(), reason="needs a processor with AMX")
def test_a_processor_with_amx_gets_kernels_that_are_at_least_as_fast_as_those_openblas_would_choose(monkeypatch):
    monkeypatch.setenv(blas.CORE, "SapphireRapids")
    _, slow = in_new_process(PRODUCT.format(first=""), "")
    monkeypatch.delenv(blas.CORE)
    _, fast = in_new_process(PRODUCT.format(first=""), "")
    assert fast < 1.3 * slow


@needs_openblas
def test_the_name_is_that_of_the_library_in_use_if_mlx_was_imported_first():
    assert in_new_process(PRODUCT.format(first="import mlx.core"), "")[0] == "reference BLAS"


@needs_openblas
def test_openblas_that_is_loaded_after_mlx_is_not_named_since_mlx_does_not_use_it():
    late = f"import ctypes, mlx.core; ctypes.CDLL('{blas.LIBRARY}', mode=ctypes.RTLD_GLOBAL)"
    name, slow = in_new_process(PRODUCT.format(first=late), "")
    _, fast = in_new_process(PRODUCT.format(first=""), "")
    assert name == "reference BLAS"
    assert fast < slow / 3


@pytest.mark.parametrize("own", [None, "Haswell"])
def test_the_kernels_chosen_for_openblas_are_not_passed_on_to_child_processes(monkeypatch, own):
    seen = []
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.delenv(blas.SWITCH, raising=False)
    monkeypatch.delenv(blas.CORE, raising=False)
    if own:
        monkeypatch.setenv(blas.CORE, own)
    monkeypatch.setattr(blas, "has_amx", lambda: True)
    monkeypatch.setattr(blas.ctypes, "CDLL", lambda *_, **options: seen.append(os.environ.get(blas.CORE)))
    blas.load_openblas()
    assert seen == [own or "SkylakeX"]
    assert os.environ.get(blas.CORE) == own


def test_an_unknown_value_of_the_switch_is_one_line(mlxspec_command, monkeypatch):
    monkeypatch.setenv(blas.SWITCH, "no")
    outcome = mlxspec_command("models")
    assert outcome.status == 2
    assert outcome.err == "error: MLXSPEC_OPENBLAS is 'no'; use \"off\" for the BLAS of MLX's wheel, or unset it\n"
    with pytest.raises(mlxspec.InvalidRequestError, match="MLXSPEC_OPENBLAS is 'no'"):
        mlxspec.load()
    monkeypatch.setenv(blas.SWITCH, "off")
    assert mlxspec_command("models").status == 0


LOADED = """
import json
import mlxspec, mlx.core as mx
from mlx.utils import tree_flatten
pair = mlxspec.load({quantize})
kinds = sorted(set(str(weight.dtype) for _, weight in tree_flatten(pair.target.parameters())))
answer = mlxspec.generate(pair, "Once upon a time", max_tokens=40, draft_length=4)
print(json.dumps([kinds, answer.text]))
"""


@pytest.mark.slow
@needs_openblas
def test_a_small_quantized_target_is_held_in_float32_with_a_fast_blas_and_writes_the_same_text():
    kinds, text = in_new_process(LOADED.format(quantize=""), "")
    stored, expected = in_new_process(LOADED.format(quantize=""), "off")
    assert kinds == ["mlx.core.float32"]
    assert "mlx.core.uint32" in stored
    assert text == expected


@pytest.mark.slow
@needs_openblas
def test_quantize_none_keeps_the_weights_as_they_are_stored():
    kinds, _ = in_new_process(LOADED.format(quantize="quantize='none'"), "")
    assert "mlx.core.uint32" in kinds


def test_a_list_of_processors_that_is_not_utf8_is_read(monkeypatch, tmp_path):
    processors = tmp_path / "cpuinfo"
    monkeypatch.setattr(blas, "Path", lambda path: processors)
    processors.write_bytes(b"model name : \xff\xfe\nflags : fpu amx_tile\n")
    assert blas.has_amx()
    processors.write_bytes(b"model name : \xff\xfe\nflags : fpu\n")
    assert not blas.has_amx()
