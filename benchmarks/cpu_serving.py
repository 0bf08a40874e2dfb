"""Tokens per second of a model served by vLLM on the CPU: bfloat16, packed, W4A16.

    python benchmarks/cpu_serving.py MODEL [--rounds 9] [--threads 1] [--tokens 48] [--work DIR]
        [--ways balanced-4 W4A16 ...] [--isa avx2] [--eager]
    python benchmarks/cpu_serving.py --llama-layers 16   # random weights, sizes of Llama-3.2-1B

Every way is a process of its own; all stay, and one after another measures while the others wait.
One takes about 3 GB and what the model's weights do: --ways takes fewer.
vLLM compiles each, which takes a minute or two, unless --eager tells it not to.
--isa limits the kernels, torch, oneDNN and MKL as in cpu_linear.py. vLLM's own operators, such as
attention, are those of its library for AVX2 then, or for AVX-512.
Reported are medians of the ratios to bfloat16 in the same round. W4A16 is round-to-nearest in
groups of 64 in compressed-tensors' format, which vLLM computes with 8-bit activations on processors
with AMX.
The last tables are where the time of a decode step goes, by torch's profiler.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cpu_linear import LIMITS, VARIABLES

from precalib_kernels.backends.x86 import library
from precalib_kernels.backends.x86.backend import X86Backend

STREAMS = (1, 16)
PACKED = {
    "balanced-4": ("--recipe", "balanced-4"),
    "balanced-4, head balanced-5": ("--recipe", "balanced-4", "--head", "balanced-5"),
    "balanced-3": ("--recipe", "balanced-3"),
}
W4A16 = "W4A16"
FLOAT32 = "float32"  # the original model in it
INT8 = ", 8-bit activations"  # behind the name of a packed way
WAYS = (*PACKED, W4A16, FLOAT32, "balanced-4" + INT8, "balanced-4, head balanced-5" + INT8)
STEP_ROUNDS = 3
MARK = "precalib: "  # before what a server answers; vLLM prints, too
HEAD = "precalib output head"
PARTS = {  # of a step, and names of the operators in which torch's profiler finds them
    "linear layers": (
        "cpu_linear",
        "onednn_mm",
        "aten::linear",
        "weight_packed_linear",
        "int4_scaled_mm_cpu",
        "cpu_gemm_wna16",
    ),
    "attention": ("attention", "kv_cache"),
    "output head": (HEAD,),
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def write_llama(directory: Path, layers: int) -> None:
    """A checkpoint of Llama-3.2-1B's sizes with random weights."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)


def write_w4a16(source: Path, directory: Path, group: int = 64) -> None:
    """Round-to-nearest, symmetric, in compressed-tensors' pack-quantized format."""
    from safetensors.torch import load_file, save_file

    directory.mkdir(parents=True)
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if not name.endswith("_proj.weight"):
                stored[name] = tensor
                continue
            rows, columns = tensor.shape
            grouped = tensor.float().view(rows, -1, group)
            scale = (grouped.abs().amax(-1, keepdim=True) / 7.5).clamp(min=1e-8).bfloat16()
            codes = (grouped / scale.float()).round().clamp(-8, 7).int().view(rows, -1, 8) + 8
            shifts = 4 * torch.arange(8, dtype=torch.int32)
            stored[f"{name}_packed"] = (codes << shifts).sum(-1, dtype=torch.int32)
            stored[f"{name}_scale"] = scale[..., 0].contiguous()
            stored[f"{name}_shape"] = torch.tensor([rows, columns])
    save_file(stored, directory / "model.safetensors")
    for file in source.glob("*.json*"):
        if "index" not in file.name:
            (directory / file.name).write_bytes(file.read_bytes())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    scheme = {"targets": ["Linear"], "weights": weights | {"group_size": group}}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
    }
    (directory / "config.json").write_text(json.dumps(config))


def serve(options: argparse.Namespace) -> None:
    """In a process of its own: answers each line of numbers of streams by a line of JSON.

    The answer is tokens per second; to a negative number, milliseconds of a step by what.
    """
    isa, tokens = options.isa, options.tokens
    if isa:
        X86Backend.isa = library.supported_isas().index(isa)
        limit_vllm(isa)
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        str(options.model),
        dtype=options.dtype,
        enforce_eager=options.eager,
        max_model_len=256,
        max_num_seqs=max(STREAMS),
        skip_tokenizer_init=True,
        additional_config={"precalib": {"activations": "int8"}} if options.int8 else {},
    )
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)

    def seconds(streams: int) -> float:
        prompts = [TokensPrompt(prompt_token_ids=[5 + i, 17, 101, 44]) for i in range(streams)]
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    mark_head()
    for streams in STREAMS:
        seconds(streams)
    print(f"{MARK}null", flush=True)
    for line in sys.stdin:
        streams = int(line)
        answer: Any
        if streams > 0:
            answer = streams * tokens / seconds(streams)
        else:
            step = 1e3 * seconds(-streams)
            with torch.profiler.profile() as profile:
                seconds(-streams)
            answer = {part: spent / tokens for part, spent in parts(profile).items()}
            answer["step"] = step / tokens  # which the profiler does not slow down
        print(f"{MARK}{json.dumps(answer)}", flush=True)


def limit_vllm(isa: str) -> None:
    """Let vLLM take its library for the ISA: it asks torch what the processor has."""
    missing = ["_is_amx_tile_supported"]
    if isa != "avx512_bf16":
        missing.append("_is_avx512_bf16_supported")
    if not isa.startswith("avx512"):
        missing.append("_is_avx512_supported")
    for name in missing:
        setattr(torch.cpu, name, lambda: False)


def mark_head() -> None:
    """Let torch's profiler see where the output head begins and ends."""
    from vllm.model_executor.layers import logits_processor

    processor: Any = logits_processor.LogitsProcessor
    forward = processor.forward

    def marked(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(HEAD):
            return forward(self, *args, **kwargs)

    processor.forward = marked


def parts(profile: torch.profiler.profile) -> dict[str, float]:
    """Milliseconds in each of PARTS."""
    spent = dict.fromkeys(PARTS, 0.0)

    def add(event: Any) -> None:
        for part, names in PARTS.items():
            if any(name in event.name for name in names):
                spent[part] += event.cpu_time_total / 1e3
                return
        for child in event.cpu_children:
            add(child)

    for event in profile.events():
        if event.cpu_parent is None:
            add(event)
    return spent


class Server:
    """A process that serves one model and waits to be asked."""

    def __init__(
        self, model: Path, options: argparse.Namespace, log: Path, way: str = "bfloat16"
    ) -> None:
        self.model, self.log = model, log
        command = [sys.executable, __file__, str(model), "--tokens", str(options.tokens), "--serve"]
        command += ["--int8"] if way.endswith(INT8) else []
        command += ["--dtype", FLOAT32 if way == FLOAT32 else "bfloat16"]
        command += ["--isa", options.isa] if options.isa else []
        command += ["--eager"] if options.eager else []
        limits = dict(zip(VARIABLES, LIMITS.get(options.isa, ()), strict=False))
        threads = {"OMP_NUM_THREADS": str(options.threads)}
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                env=os.environ | ENVIRONMENT | limits | threads,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self._answer()

    def ask(self, streams: int) -> Any:
        assert self.process.stdin
        self.process.stdin.write(f"{streams}\n")
        self.process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> Any:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise SystemExit(f"{self.model} cannot be served: {self.log.read_text()[-3000:]}")


def compare(source: Path, work: Path, options: argparse.Namespace) -> None:
    ways = {"bfloat16": source}
    for way in options.ways or WAYS:
        name = way.removesuffix(INT8)
        ways[way] = source if way == FLOAT32 else work / name
        if ways[way].exists():
            continue
        if way == W4A16:
            write_w4a16(source, ways[way])
        else:
            script = Path(sys.executable).with_name("precalib")
            command = [script, "quantize", source, ways[way], *PACKED[name]]
            subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    servers = {way: Server(path, options, work / f"{way}.log", way) for way, path in ways.items()}
    rates: dict[tuple[str, int], list[float]] = {(way, n): [] for way in ways for n in STREAMS}
    steps: dict[tuple[str, int], list[dict[str, float]]] = {key: [] for key in rates}
    for _ in range(options.rounds):
        for n in STREAMS:
            for way, server in servers.items():
                rates[way, n].append(server.ask(n))
    for _ in range(STEP_ROUNDS):
        for n in STREAMS:
            for way, server in servers.items():
                steps[way, n].append(server.ask(-n))
    for server in servers.values():
        server.stop()
    if options.isa:
        print(f"# simulated on this machine: ISA {options.isa}")
    report(list(ways), options.threads, rates, steps)


def report(
    ways: list[str],
    threads: int,
    rates: dict[tuple[str, int], list[float]],
    steps: dict[tuple[str, int], list[dict[str, float]]],
) -> None:
    print(f"| {threads} thread(s), tokens/s over bfloat16 | 1 stream | 16 streams |")
    print("|---|--:|--:|")
    for way in ways:
        cells = []
        for n in STREAMS:
            pairs = zip(rates[way, n], rates["bfloat16", n], strict=True)
            ratio = statistics.median(ours / dense for ours, dense in pairs)
            cells.append(f"{ratio:.2f} ({statistics.median(rates[way, n]):.1f} tokens/s)")
        print(f"| {way} | " + " | ".join(cells) + " |")
    for n in STREAMS:
        print(f"\n| ms of a step, {n} stream(s) | " + " | ".join(PARTS) + " | rest |")
        print("|---|--:|--:|--:|--:|")
        for way in ways:
            spent = [statistics.median(step[part] for step in steps[way, n]) for part in PARTS]
            rest = statistics.median(step["step"] for step in steps[way, n]) - sum(spent)
            print(f"| {way} | " + " | ".join(f"{part:.2f}" for part in (*spent, rest)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--llama-layers", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--ways", nargs="+", choices=WAYS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--isa", choices=library.supported_isas())
    parser.add_argument("--eager", action="store_true", help="do not compile the model")
    parser.add_argument("--int8", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", default="bfloat16", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        source = options.model
        if options.llama_layers:
            source = work / "llama"
            if not source.exists():
                write_llama(source, options.llama_layers)
        if source is None:
            parser.error("name a model, or --llama-layers")
        compare(source, work, options)


if __name__ == "__main__":
    main()
