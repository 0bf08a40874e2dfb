"""Whether a vLLM has what the plugin imports, calls and overrides: `vllm_contract.py [WHEEL]`.

It reads vLLM's Python files and imports none of them, so a wheel for another machine will do, or
its unpacked folder `vllm`. Without either the installed vLLM is read.

Checked are imports, also of benchmarks and in the documents; calls of imported names; methods of
ours that take the place of vLLM's; vLLM's calls of these; attributes that we read (ATTRIBUTES);
environment variables that the documents name.
"""

import argparse
import ast
import inspect
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from python_source import (
    Definition,
    Function,
    Package,
    call_signature,
    decorators,
    installed,
    members,
    misfit,
    parse,
    receivers,
    unpack,
    without_self,
)

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "vllm_precalib"
LAYERS = "vllm.model_executor.layers"
KERNELS = "vllm.model_executor.kernels.linear"
# What we read from objects that vLLM hands us, with the arguments of what we call.
ATTRIBUTES = {
    "vllm.config:VllmConfig": ("additional_config", "load_config"),
    "vllm.config:LoadConfig": ("load_format",),
    "vllm.platforms.interface:Platform": ("device_type",),
    "vllm.logger:_VllmLogger": ("info_once(text, name, other)",),
    "vllm.model_executor.models.utils:WeightsMapper": ("apply_dict(modules)",),
    "vllm.model_executor.parameter:BasevLLMParameter": ("tp_rank",),
    f"{LAYERS}.quantization.base_config:QuantizationConfig": ("packed_modules_mapping",),
    f"{LAYERS}.linear:QKVParallelLinear": ("num_kv_head_replicas", "weight_loader_v2"),
    f"{LAYERS}.linear:UnquantizedLinearMethod": (
        "process_weights_after_loading(layer)",
        "apply(layer, x, bias)",
    ),
    f"{LAYERS}.vocab_parallel_embedding:VocabParallelEmbedding": ("org_vocab_size",),
    f"{KERNELS}:MPLinearKernel": (
        "process_weights_after_loading(layer)",
        "apply_weights(layer, x)",
    ),
}
# Files whose calls of `…quant_method` and `…quant_config` may reach ours.
CALLERS = (
    "model_executor/layers/linear.py",
    "model_executor/layers/vocab_parallel_embedding.py",
    "model_executor/layers/logits_processor.py",
    "model_executor/layers/quantization/base_config.py",
    "model_executor/layers/quantization/online/fp8.py",
    "model_executor/layers/quantization/online/requantization.py",
    "model_executor/model_loader/utils.py",
)
RECEIVERS = {
    "quant_method": ("linear_method", "PrecalibLinearMethod"),
    "requantization_source": ("linear_method", "PrecalibLinearMethod"),
    "quant_config": ("config", "PrecalibConfig"),
}


def faults(folder: Path) -> Iterator[str]:
    """What the vLLM in `folder` lacks, a sentence each."""
    vllm = Package(folder)
    for path in sources():
        for where, tree in trees(path):
            yield from import_faults(vllm, tree, where)
            yield from call_faults(vllm, tree, where)
    for path in sorted(PLUGIN.glob("*.py")):
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                yield from class_faults(vllm, Definition(f"vllm_precalib.{path.stem}", node))
    yield from attribute_faults(vllm)
    yield from caller_faults(vllm)
    yield from kernel_faults(vllm)
    yield from variable_faults(vllm)


def sources() -> list[Path]:
    """Our files that may name something of vLLM."""
    code = [*PLUGIN.glob("*.py"), *(ROOT / "benchmarks").rglob("*.py"), *documents()]
    return sorted(code)


def documents() -> list[Path]:
    """Pages that show code."""
    return [ROOT / "README.md", ROOT / "deploy" / "README.md", *(ROOT / "docs").glob("*.md")]


def trees(path: Path) -> Iterator[tuple[str, ast.AST]]:
    """The syntax tree of a file, or of each piece of Python in a document."""
    where = str(path.relative_to(ROOT))
    if path.suffix == ".py":
        yield where, parse(path)
        return
    for block in re.findall(r"```python\n(.*?)```", path.read_text(), re.S):
        yield where, ast.parse(block)


def imports(vllm: Package, tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Module, name and our name for it, of everything that is imported from vLLM."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _inside(vllm, node.module or ""):
            for alias in node.names:
                yield node.module or "", alias.name, alias.asname or alias.name


def import_faults(vllm: Package, tree: ast.AST, where: str) -> Iterator[str]:
    """Names that cannot be imported."""
    for module, name, _ in imports(vllm, tree):
        if vllm.resolve(module, name) is None:
            yield f"{where}: vLLM has no {module}.{name}"
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import) else ():
            if _inside(vllm, alias.name) and vllm.path(alias.name) is None:
                yield f"{where}: vLLM has no module {alias.name}"


def call_faults(vllm: Package, tree: ast.AST, where: str) -> Iterator[str]:
    """Calls of imported functions and classes whose arguments do not fit."""
    names = {ours: vllm.resolve(module, name) for module, name, ours in imports(vllm, tree)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        found = names.get(node.func.id)
        accepts = None if found is None else call_signature(vllm, found)
        if accepts and (reason := misfit(accepts, node)):
            yield f"{where}, line {node.lineno}: {node.func.id}(…): {reason}"


def class_faults(vllm: Package, ours: Definition) -> Iterator[str]:
    """Methods that do not fit in the place of vLLM's, and abstract ones that are missing."""
    assert isinstance(ours.node, ast.ClassDef)
    where, own = f"{ours.module}.{ours.node.name}", members(ours.node)
    known = {name: (module, real) for module, real, name in imports(vllm, parse(_path(ours)))}
    for base in ours.node.bases:
        found = vllm.resolve(*known[name]) if (name := ast.unparse(base)) in known else None
        if found is None or not isinstance(found.node, ast.ClassDef):
            continue
        line = vllm.ancestors(found)
        inherited = {n: each for c in reversed(line) for n, each in members(c.node).items()}
        for name, theirs in inherited.items():
            if not isinstance(theirs, Function):
                continue
            if "abstractmethod" in decorators(theirs) and name not in own:
                yield f"{where}: vLLM wants a method {name}"
            elif name in own and name != "__init__" and (reason := unlike(vllm, theirs, own[name])):
                yield f"{where}.{name}: {reason}"
        yield from super_faults(inherited, ours)


def super_faults(inherited: Mapping[str, ast.AST], ours: Definition) -> Iterator[str]:
    """Calls of vLLM's own method by ours whose arguments do not fit."""
    for call in (node for node in ast.walk(ours.node) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "super()":
            theirs, where = inherited.get(call.func.attr), f"{ours.module}, line {call.lineno}"
            if theirs is None:
                yield f"{where}: vLLM has no method {call.func.attr}"
            elif reason := misfit(without_self(theirs), call):
                yield f"{where}: super().{call.func.attr}(…): {reason}"


def unlike(vllm: Package, theirs: ast.AST, ours: ast.AST) -> str | None:
    """Why our method cannot take the place of vLLM's, or None."""
    kinds = {"staticmethod", "classmethod", "property"}
    kind, own = decorators(theirs) & kinds, decorators(ours) & kinds
    assert isinstance(theirs, Function)
    on_objects = "property" not in kind and not own
    if kind != own and not (on_objects and receivers(vllm.folder, theirs.name) <= RECEIVERS.keys()):
        return "is another kind of method in vLLM"
    want, have = without_self(theirs).parameters, without_self(ours).parameters
    open_kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    takes_more = [p.kind for p in have.values() if p.kind in open_kinds]
    for name, parameter in want.items():
        if parameter.kind not in open_kinds and name not in have and not takes_more:
            return f"vLLM passes '{name}'"
    if any(p.kind in open_kinds for p in want.values()):
        return None  # vLLM leaves the rest to the class; its calls are checked
    for name, parameter in have.items():
        needed = parameter.default is inspect.Parameter.empty and parameter.kind not in open_kinds
        if needed and name not in want:
            return f"vLLM does not pass '{name}'"
    return None


def attribute_faults(vllm: Package) -> Iterator[str]:
    """Attributes of ATTRIBUTES that are gone or take other arguments."""
    for place, wanted in ATTRIBUTES.items():
        module, name = place.split(":")
        found = vllm.resolve(module, name)
        if found is None or not isinstance(found.node, ast.ClassDef):
            yield f"vLLM has no class {module}.{name}"
            continue
        for text in wanted:
            call = ast.parse(text, mode="eval").body
            attribute = text.split("(")[0]
            member = vllm.member(found, attribute)
            if member is None:
                yield f"{module}.{name} has no '{attribute}'"
            elif isinstance(call, ast.Call):
                reason = misfit(without_self(member), call)
                if reason:
                    yield f"{module}.{name}.{text}: {reason}"


def caller_faults(vllm: Package) -> Iterator[str]:
    """vLLM's calls of our methods whose arguments do not fit, or lack what we look for."""
    ours = {}
    for receiver, (module, name) in RECEIVERS.items():
        bodies = {each.name: each for each in _classes(PLUGIN / f"{module}.py")}
        ours[receiver] = members(bodies[name])
    create = ours["quant_method"]["create_weights"]
    keys = set(re.findall(r"extra_weight_attrs\['(\w+)'\]", ast.unparse(create)))
    for file in CALLERS:
        path = vllm.folder / file
        if not path.is_file():
            continue  # older than what it is about
        for call in (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)):
            if not isinstance(call.func, ast.Attribute):
                continue
            receiver = ast.unparse(call.func.value).rpartition(".")[2]
            method = ours.get(receiver, {}).get(call.func.attr)
            if not isinstance(method, Function):
                continue
            where = f"{file}, line {call.lineno}: {ast.unparse(call.func)}(…)"
            if reason := misfit(without_self(method), call):
                yield f"{where}: {reason}"
            passed = {each.arg for each in call.keywords}
            if method is create and None not in passed and keys - passed:
                yield f"{where}: does not pass {', '.join(sorted(keys - passed))}"


def kernel_faults(vllm: Package) -> Iterator[str]:
    """Kernels that we know the layout of and vLLM no longer has."""
    (known,) = (
        node.value
        for node in parse(PLUGIN / "mixed_precision_backend.py").body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "KNOWN"
    )
    for name in ast.literal_eval(known):
        if vllm.resolve(KERNELS, name) is None:
            yield f"vLLM has no kernel {name}"


def variable_faults(vllm: Package) -> Iterator[str]:
    """Environment variables of the documents that vLLM does not read."""
    known = (vllm.folder / "envs.py").read_text(encoding="utf-8")
    for path in documents():
        for name in sorted(set(re.findall(r"\bVLLM_[A-Z_]+[A-Z]\b", path.read_text()))):
            if not re.search(rf"['\"]{name}['\"]", known):
                yield f"{path.relative_to(ROOT)}: vLLM does not know {name}"


def _inside(vllm: Package, module: str) -> bool:
    return module == vllm.name or module.startswith(vllm.name + ".")


def _path(ours: Definition) -> Path:
    return PLUGIN / f"{ours.module.rpartition('.')[2]}.py"


def _classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in parse(path).body if isinstance(node, ast.ClassDef)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "vllm", type=Path, nargs="?", default=installed("vllm"), help="wheel or folder"
    )
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="keep a wheel's files there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.vllm
        if folder is not None and folder.suffix == ".whl":
            folder = unpack(folder, options.unpack or Path(temporary), "cpu")
        if folder is None or not (folder / "envs.py").is_file():
            parser.exit(2, f"no vLLM in {options.vllm}; name a wheel or its folder 'vllm'\n")
        found = list(faults(folder))
    print(*found, f"vllm-contract: {options.vllm}: {len(found)} faults", sep="\n")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
