"""Speculation on a model whose weights are spread over processes, one per GPU (or CPU).

torchrun --nproc-per-node 2 examples/tensor_parallel.py --model Qwen/Qwen3-8B
"""

from __future__ import annotations

import os
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.distributed import DistributedConfig

import specdec
from specdec.common.loading import path_of


def main(
    model: Annotated[str, typer.Option(help="Folder or hub name of a causal LM, or embedded.")] = "embedded",
    prompt: Annotated[str, typer.Option(help="Text to complete.")] = "def main():\n",
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 64,
) -> None:
    """Complete a prompt with and without speculation; each process must give the same tokens."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(backend)
    distributed = DistributedConfig(tp_plan="auto")
    target = AutoModelForCausalLM.from_pretrained(path_of(model), distributed_config=distributed)
    tokenizer = AutoTokenizer.from_pretrained(path_of(model))
    inputs = tokenizer(prompt, return_tensors="pt").to(target.device)
    fast = specdec.accelerate(target)
    outputs = []
    for generate in (target.generate, fast.generate):
        torch.manual_seed(0)
        outputs.append(generate(**inputs, max_new_tokens=tokens, do_sample=True))
    if torch.distributed.get_rank() == 0:
        print(tokenizer.decode(outputs[1][0]))
        print(fast.report)
    print(f"process {torch.distributed.get_rank()}: identical to generate(): {torch.equal(*outputs)}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
