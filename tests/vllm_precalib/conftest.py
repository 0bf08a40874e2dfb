"""Real vLLM layers on a pretended rank, and engines in processes of their own."""

import collections
import contextlib
import importlib.util
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent

# How each suite of engines_suite.py is started; see section "Start-up" of vLLM's notes on CPUs.
# Those of experts/experts_suite.py and options_suite.py have names that begin with that word.
SUITE_SECONDS = 600
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
NO_COMPILER = {"TORCHDYNAMO_DISABLE": "1"}  # the sampler would start one
EAGER = {**IN_PROCESS, **NO_COMPILER}
COMPILED = {**IN_PROCESS, "VLLM_CPU_CI_ENV": "1", "VLLM_USE_AOT_COMPILE": "0"}
TWO = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # the core of each worker
FOUR = {"VLLM_CPU_OMP_THREADS_BIND": "0|1|0|1"}
PARALLEL = {**TWO, **NO_COMPILER}
SUITE_ENVIRONMENT = {
    "eager": EAGER,
    "compiled": COMPILED,
    "parallel": PARALLEL,
    "options": EAGER,
    "parallel_four": {**FOUR, **NO_COMPILER},
    "pipeline": TWO,
    "pipeline_four": FOUR,
    "ray": EAGER,
    "experts": EAGER,
    "experts_families": EAGER,
    "experts_compiled": COMPILED,
    "experts_parallel": PARALLEL,
}


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tiny.py."""
    spec = importlib.util.spec_from_file_location("tiny", HERE / "tiny.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Results of a suite of engines_suite.py, each run once, by the names of its cases.

    A case that failed is `{"failed": text}`; "log" is the output of all, "code" how the
    process ended.
    """
    done: dict[str, dict[str, Any]] = {}

    def run(name: str) -> dict[str, Any]:
        if name not in done:
            common = {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
            script = {"experts": "experts/experts_suite.py", "options": "options_suite.py"}.get(
                name.partition("_")[0], "engines_suite.py"
            )
            folder = tmp_path_factory.mktemp(name)
            log, results = folder / "log", folder / "results.json"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    [sys.executable, HERE / script, name, folder],
                    env={**os.environ, **common, **SUITE_ENVIRONMENT[name]},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that its workers can be stopped with it
                )
                try:
                    end = f"the process ended with code {process.wait(SUITE_SECONDS)}"
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    end = f"the process took longer than {SUITE_SECONDS} s"
            text = log.read_text(errors="replace")
            missing = {"failed": f"{end} before this case did\n{text[-5000:]}"}
            finished = json.loads(results.read_text()) if results.exists() else {}
            done[name] = collections.defaultdict(
                lambda: missing, finished, log=text, code=process.poll()
            )
        return done[name]

    return run


@pytest.fixture
def case(suite: Callable[[str], dict[str, Any]]) -> Callable[[str, str], Any]:
    """The result of a case of a suite, by their names."""

    def get(suite_name: str, case_name: str) -> Any:
        result = suite(suite_name)[case_name]
        assert "failed" not in result, result["failed"]
        return result

    return get


@pytest.fixture
def logged() -> Iterator[list[tuple[str, str]]]:
    """Level and text of what we log; vLLM may or may not pass it on to the root logger."""
    lines: list[tuple[str, str]] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.levelname, record.getMessage()))  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.precalib")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Callable[..., contextlib.AbstractContextManager[None]]:
    """`with rank(1, of=2): …` builds vLLM layers as that tensor-parallel rank would."""
    from vllm.config import VllmConfig, set_current_vllm_config

    @contextlib.contextmanager
    def pretend(index: int = 0, of: int = 1, **options: Any) -> Iterator[None]:
        for module in ("layers.linear", "parameter", "layers.vocab_parallel_embedding"):
            path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            monkeypatch.setattr(f"{path}_rank", lambda: index)
            monkeypatch.setattr(f"{path}_world_size", lambda: of)
        with set_current_vllm_config(VllmConfig(**options)):
            yield

    return pretend


@pytest.fixture(params=["x86", "dense", "reference"])
def additional(request: pytest.FixtureRequest) -> dict[str, Any]:
    """vLLM's additional_config that takes each backend which can run without a GPU."""
    from precalib_kernels.backends.base import LinearSpec
    from precalib_kernels.format.layout import Layout
    from vllm_precalib.backends import plugin_registry

    spec = LinearSpec(Layout(bits=4, group_size=128), 128, (16,), torch.float32, "cpu")
    if reason := plugin_registry().reasons(spec)[request.param]:
        pytest.skip(reason)
    return {"precalib": {"backend": request.param}}
