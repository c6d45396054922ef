"""Two processes that divide a target say what one says, and stop together."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import save_model

import mlxspec
from mlxspec import Drafter, DrafterConfig, Sampling, SpeculativeDecoder, UnsupportedModelError
from mlxspec.errors import ProcessError
from mlxspec.models.memory import weight_bytes
from mlxspec.models.sharding import broadcast, gathered, lost, shard
from tests.conftest import heed_interrupts, plain_greedy, random_llama

COMMAND = [sys.executable, "-c", "from mlxspec.cli import main; main()", "generate", "--drafter", "lookup"]
LAUNCH = [str(Path(sys.executable).with_name("mlx.launch")), "-n", "2", "--backend", "ring", "--"]
ROOT = Path(__file__).parent.parent.parent
GREEDY, DRAWN = 300, 150  # tokens


def launched(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*LAUNCH, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


@contextlib.contextmanager
def two_processes(command: list[str], scratch: Path):
    """Two processes of one command, without mlx.launch, which would end the other one itself."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    (scratch / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    variables = {**os.environ, "MLX_HOSTFILE": str(scratch / "hosts.json"), "OPENBLAS_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, cwd=ROOT, env={**variables, "MLX_RANK": str(rank)}, preexec_fn=heed_interrupts,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stdout.close()
            process.stderr.close()


def kill(processes: list[subprocess.Popen], number: int) -> tuple[bytes, list[str]]:
    """Kill one of two processes. Return what the other one prints, and the lines of its errors."""
    processes[number].send_signal(signal.SIGKILL)
    start = time.perf_counter()
    out, err = processes[1 - number].communicate(timeout=60)
    assert time.perf_counter() - start < 20
    assert processes[1 - number].returncode == 2
    return out, [line for line in err.decode().splitlines() if not line.startswith("[ring]")]


# ----------------------------------------------------------------------- one process


def test_without_other_processes_nothing_is_asked():
    value = object()
    assert broadcast(value, None) is value


def test_values_of_any_length_are_gathered():
    assert gathered(["ä", {"b": 0.1 + 0.2}], mx.distributed.init()) == [["ä", {"b": 0.1 + 0.2}]]


def test_only_an_error_of_the_connection_means_that_another_process_has_stopped():
    assert isinstance(lost(RuntimeError("[ring] connection to a peer was lost")), ProcessError)
    own = RuntimeError("[malloc] Unable to allocate 9 bytes.")
    assert lost(own) is own


@pytest.mark.parametrize("hosts", ["not JSON", '[["127.0.0.1:5999"]]'])
def test_hosts_that_cannot_be_connected_are_one_line(tmp_path, hosts):
    (tmp_path / "hosts.json").write_text(hosts)
    variables = {**os.environ, "MLX_HOSTFILE": str(tmp_path / "hosts.json"), "MLX_RANK": "1"}
    outcome = subprocess.run([*COMMAND, "hello"], cwd=ROOT, capture_output=True, text=True, timeout=60, env=variables)
    errors = [line for line in outcome.stderr.splitlines() if not line.startswith("[ring]")]
    assert outcome.returncode == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: the processes of mlx.launch cannot be connected (")


def test_a_model_that_mlx_lm_cannot_divide_is_named():
    drafter = Drafter(DrafterConfig(8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(UnsupportedModelError, match=r"mlx-lm cannot divide .* over several processes; use one machine"):
        shard(drafter, mx.distributed.init())


def test_the_weights_of_layers_are_counted_once_for_all_processes(stories_folder, stories):
    config = json.loads((stories_folder / "config.json").read_text())
    sizes = {name: weight.size * 4 for name, weight in tree_flatten(stories.parameters())}
    layers = sum(size for name, size in sizes.items() if "layers." in name)
    whole = weight_bytes(stories_folder, config, mx.float32)
    assert whole == sum(sizes.values())
    assert weight_bytes(stories_folder, config, mx.float32, processes=2) == pytest.approx(whole - layers / 2, abs=1)


# ----------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def drafter_folder(stories_folder, stories_drafters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drafter")
    shutil.copytree(stories_folder, folder, dirs_exist_ok=True)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_model(folder, stories_drafters["a noised copy"], donate_model=False)
    return folder


def answers(pair: mlxspec.ModelPair) -> dict[str, list]:
    """Tokens and block efficiency of a greedy and of a drawn answer."""
    found = {}
    for name, sampling, count in [("greedy", Sampling(), GREEDY), ("drawn", Sampling(1.0, seed=3), DRAWN)]:
        decoder = SpeculativeDecoder(pair, sampling, draft_length=4)
        tokens = [token for block in decoder.blocks([1], count) for token in block.tokens]
        found[name] = [tokens, decoder.stats.block_efficiency, decoder.stats.accepted_at]
    return found


def weights_of(pair: mlxspec.ModelPair) -> int:
    return sum(weight.nbytes for _, weight in tree_flatten(pair.target.parameters()))


def one_of_two(target: str, drafter: str, out: str) -> None:
    """What each process of ``mlx.launch`` runs."""
    group = mx.distributed.init()
    pair = mlxspec.load(target, drafter, group=group)
    found: dict = answers(pair)
    found["weights"] = weights_of(pair)
    found["choices"] = []
    for _ in range(2):  # without a seed, and the second time with costs that are on disk
        decoder = SpeculativeDecoder(pair, Sampling(1.0))
        blocks = list(decoder.blocks([1], 40))
        found["choices"].append([[block.tokens, block.drafted] for block in blocks])
    try:
        shard(random_llama(), group)
    except UnsupportedModelError as error:
        found["uneven"] = str(error)
    Path(out, f"{group.rank()}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_say_what_one_says(stories_folder, stories, drafter_folder, tmp_path):
    names = f"{str(stories_folder)!r}, {str(drafter_folder)!r}, {str(tmp_path)!r}"
    code = f"from tests.models.test_sharding import *; one_of_two({names})"
    outcome = launched(sys.executable, "-c", code, HF_HOME=str(tmp_path / "cache"))
    assert outcome.returncode == 0, outcome.stderr
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    pair = mlxspec.load(stories_folder, drafter_folder)
    alone = answers(pair)
    assert alone["greedy"][0] == plain_greedy(stories, [1], GREEDY)
    assert {name: first[name] for name in alone} == alone
    assert 1.5 < first["drawn"][1] < 5  # some drafts are rejected
    assert first["choices"][0] != first["choices"][1]
    embedding = stories.model.embed_tokens.weight.nbytes
    assert first["weights"] - embedding == pytest.approx((weights_of(pair) - embedding) / 2, rel=0.01)
    assert first["uneven"] == "the target's 1 attention heads cannot be divided over 2 processes; use another number"


@pytest.mark.slow
def test_another_target_in_one_process_is_one_line(stories_folder, drafter_folder):
    """The first process has the target, and the second one a noised copy."""
    shell = f'F={stories_folder}; [ "$MLX_RANK" = 1 ] && F={drafter_folder}; exec "$@" --target $F hello'
    outcome = launched("sh", "-c", shell, "sh", *COMMAND)
    errors = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: process 1 of mlx.launch has another target than the first one (")
    assert outcome.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "message"),
    [
        ("chat", "chat runs in one process; under mlx.launch, use generate"),
        ("generate", "mlx.launch passes no standard input on; give the prompt as an argument"),
    ],
)
def test_what_reads_standard_input_in_several_processes_is_refused(stories_folder, verb, message):
    outcome = launched(*[word.replace("generate", verb) for word in COMMAND], "--target", str(stories_folder))
    errors = {line for line in outcome.stderr.splitlines() if line.startswith("error: ")}
    assert errors == {f"error: {message}"}


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_line(stories_folder, tmp_path, killed):
    command = [*COMMAND, "--target", str(stories_folder), "--draft-length", "2", "--max-tokens", "500", "Once upon a"]
    with two_processes(command, tmp_path) as processes:
        assert len(processes[0].stdout.read(20)) == 20  # it is answering
        out, errors = kill(processes, killed)
        assert len(errors) == 1
        assert errors[0].startswith("error: another process of mlx.launch has stopped or cannot be reached")
        assert killed == 1 or out == b""
