"""What the product never does, seen in its source: run data as code, or reach for the network."""

import ast
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels/precalib_kernels", "offline_quantize", "vllm_precalib")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Modules that read data as code, or that talk to other machines.
CODE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "code", "runpy"}
NETWORK = {
    *("socket", "ssl", "http", "urllib", "ftplib", "smtplib", "telnetlib", "xmlrpc"),
    *("requests", "httpx", "aiohttp", "urllib3", "huggingface_hub", "websockets", "zmq", "grpc"),
}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "input", "breakpoint"}
# Functions that run code or commands, or load files as code.
FUNCTIONS = {
    *(f"os.{name}" for name in ("system", "popen", "execv", "execve", "execvp", "spawnv")),
    *(f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")),
    *("torch.load", "torch.hub.load", "numpy.load", "np.load", "yaml.load", "tempfile.mktemp"),
    *("importlib.import_module", "importlib.reload", "ctypes.CDLL", "ctypes.PyDLL"),
    *("site.addsitedir", "pandas.read_pickle", "torch.jit.load"),
}
# Where one of them is needed, and what for.
ALLOWED = MappingProxyType(
    {
        "kernels/precalib_kernels/toolchain/compile.py": {
            "ctypes.CDLL": "loads the libraries that it compiled, or that the wheel holds",
            "subprocess.run": "runs the compiler, with a list of words",
        },
        "kernels/precalib_kernels/backends/arm/library.py": {
            "ctypes.CDLL": "shows the kernels the OpenMP runtime that torch has loaded"
        },
        "offline_quantize/benchmark/drivers.py": {
            "subprocess.Popen": "starts vllm bench and guidellm, with a list of words"
        },
        "offline_quantize/benchmark/environment.py": {
            "subprocess.run": "asks git for the commit that is measured"
        },
        "offline_quantize/benchmark/targets.py": {
            "urllib": "asks the server that is to be measured for its model"
        },
        "offline_quantize/benchmark/server.py": {
            "socket": "finds a free port of this machine",
            "subprocess.Popen": "starts the server that is measured",
            "urllib": "asks that server whether it is ready",
        },
        "vllm_precalib/endpoint/comparison.py": {
            "aiohttp": "asks another server, at an address that the operator gave"
        },
        "vllm_precalib/endpoint/security.py": {"http": "names of status codes"},
        "vllm_precalib/endpoint/served_model.py": {
            "huggingface_hub": "looks into the cache on disk; asks nobody"
        },
        "kernels/precalib_kernels/backends/x86/library.py": {
            "ctypes.CDLL": "finds functions of the libtorch that torch has loaded"
        },
        "offline_quantize/checkpoint/hub.py": {
            "huggingface_hub": "downloads the checkpoint asked for"
        },
        "offline_quantize/checkpoint/ray_pool.py": {
            "socket": "asks whether anything answers at the address of the Ray cluster"
        },
        "offline_quantize/commands/push.py": {"huggingface_hub": "uploads, as the command says"},
        "offline_quantize/cli/doctor.py": {
            "importlib.import_module": "of the plugin, by a name that is written there"
        },
    }
)


def found(text: str) -> Iterator[str]:
    """Names of what a source file may not use."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            tops = [alias.name.partition(".")[0] for alias in node.names]
            yield from (top for top in tops if top in CODE | NETWORK)
        elif isinstance(node, ast.ImportFrom):
            top = (node.module or "").partition(".")[0]
            if top in CODE | NETWORK:
                yield top
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if f"{node.module}.{alias.name}" in FUNCTIONS
            )
        elif isinstance(node, ast.Call):
            if ast.unparse(node.func) in CALLS | FUNCTIONS:
                yield ast.unparse(node.func)
        elif isinstance(node, ast.Attribute) and ast.unparse(node) in ("sys.path", "sys.meta_path"):
            yield ast.unparse(node)
        elif isinstance(node, ast.keyword):
            yield from _keyword(node)


def _keyword(node: ast.keyword) -> Iterator[str]:
    constant = node.value.value if isinstance(node.value, ast.Constant) else None
    if node.arg == "trust_remote_code" and constant is not False:
        yield "trust_remote_code"
    if node.arg == "shell" and constant is not False:
        yield "shell"
    if node.arg == "weights_only" and constant is not True:
        yield "weights_only"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_data_as_code_or_reaches_for_the_network(path):
    allowed = ALLOWED.get(path.relative_to(ROOT).as_posix(), {})
    assert set(found(path.read_text())) <= allowed.keys()


def test_what_is_allowed_is_used():
    for name, reasons in ALLOWED.items():
        assert set(found((ROOT / name).read_text())) == reasons.keys()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("import pickle", "pickle"),
        ("import urllib.request", "urllib"),
        ("def f():\n    from http import client", "http"),
        ("from os import system", "os.system"),
        ("x = eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import sys\nsys.path.insert(0, '.')", "sys.path"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("f(trust_remote_code=asked)", "trust_remote_code"),
        ("run('ls', shell=True)", "shell"),
        ("import subprocess as s\nimport subprocess\nsubprocess.run(['ls'])", "subprocess.run"),
        ("load(x, weights_only=False)", "weights_only"),
    ],
)
def test_each_is_found(text, name):
    assert name in set(found(text))


def test_every_load_of_transformers_says_that_no_code_is_run():
    """Its default is to ask on the terminal."""
    calls = [
        node
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
        and not (isinstance(node.func.value, ast.Name) and node.func.value.id in ("cls", "kind"))
    ]
    assert len(calls) > 2
    for call in calls:
        assert "trust_remote_code" in {keyword.arg for keyword in call.keywords}
