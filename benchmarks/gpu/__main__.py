"""Everything that is measured on one GPU, in slices of under ten minutes on an H200.

    python -m benchmarks.gpu                 all slices
    python -m benchmarks.gpu steps limits    some: kernels, steps, limits, shards, text, vae, latte, engine
    python -m benchmarks.gpu --toy           on any device, tiny: whether it runs, not how fast

Each slice prints a table and writes outputs/benchmarks/gpu_SLICE.json. Beside PyTorch they need einops, pyarrow,
safetensors, universal_pathlib and xxhash; text transformers, vae and latte diffusers, engine DeepSpeed; none Ray or a
decoder. The step is `benchmarks.plain_step`'s, but for engine. Near a GPU's limit,
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True leaves fewer gaps between allocations.
"""

import argparse
import sys
import traceback
from dataclasses import replace

import torch

from benchmarks.gpu import encoders, kernels, training
from benchmarks.gpu.machine import Machine
from benchmarks.table import Row, save, show
from models.compute import default_device

PACKAGES = ("torch", "triton", "diffusers", "transformers", "deepspeed")
SLICES = {
    "kernels": kernels.measure,
    "steps": training.measure_steps,
    "limits": training.measure_limits,
    "shards": training.measure_from_shards,
    "text": encoders.measure_text,
    "vae": encoders.measure_vae,
    "latte": encoders.measure_latte,
    "engine": training.measure_engine,  # last, as DeepSpeed keeps what it has
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="What one GPU does.")
    parser.add_argument("slices", nargs="*", metavar="slice", help=", ".join(SLICES))
    parser.add_argument("--toy", action="store_true", help="tiny, on any device: whether it runs, not how fast")
    options = parser.parse_args()
    unknown = [name for name in options.slices if name not in SLICES]
    if unknown:
        print(f"error: found slice {unknown[0]!r}, expected some of {', '.join(SLICES)}", file=sys.stderr)
        return 2
    if not (options.toy or torch.cuda.is_available()):
        print("error: found no CUDA device, expected one; --toy tries the code without", file=sys.stderr)
        return 2
    machine = Machine(default_device(), options.toy)
    failed = [name for name in SLICES if name in (options.slices or SLICES) and not _run(name, machine)]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(name: str, machine: Machine) -> bool:
    """Whether it came to its end. Each row is written as it comes, and what fails ends its own slice alone: time on a
    GPU is dear."""
    print(f"{name}{' (toy: these numbers mean nothing)' if machine.toy else ''}", flush=True)
    machine.forget_peak()
    rows: list[Row] = []
    try:
        for row in SLICES[name](machine):
            rows.append(replace(row, target=None, holds=None) if machine.toy else row)
            show(rows[-1])
            save(f"gpu_{name}{'_toy' if machine.toy else ''}", rows, PACKAGES)
    except Exception:
        traceback.print_exc()
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
