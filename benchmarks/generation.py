"""vLLM beside transformers on an 82-million-parameter GPT-2 shape, into benchmarks/results/generation_cpu.json.

python benchmarks/generation.py [--dtype bfloat16] [--rounds 5]

The shape is that of distilgpt2, with random weights made on the spot, so nothing is downloaded; random token ids are
the prompts. What a token costs doesn't depend on whether the weights make sense.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from results import FOLDER, write_result
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from reinforcepp.commands.engine_benchmark.run import Comparison, compare, plot, show
from reinforcepp.types import Sampling

SHAPES = {
    "82m": {"n_layer": 6, "n_embd": 768, "n_head": 12, "vocab_size": 50257},
    "tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 320},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="82m", choices=SHAPES, help="tiny only shows that the benchmark runs")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=128)
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="generation_cpu", help="name of the result file and the plot")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = save_random_model(Path(folder), SHAPES[arguments.shape])
        result = compare(
            Comparison(
                model=folder,
                prompts=random_prompts(arguments.prompts, arguments.prompt_tokens, vocabulary),
                sampling=Sampling(arguments.new_tokens, temperature=1.0),
                dtype=arguments.dtype,
                batch_sizes=arguments.batch_sizes,
                rounds=arguments.rounds,
            )
        )
    result["settings"]["model"] = f"random GPT-2 shape {arguments.shape}: {SHAPES[arguments.shape]}"
    show(result)
    write_result(arguments.name, result)
    plot(result, FOLDER / f"{arguments.name}.png")


def save_random_model(folder: Path, shape: dict[str, int]) -> int:
    """A model folder with random weights and a tokenizer of single bytes; returns the size of its vocabulary."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, n_positions=1024, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():  # wider than the initialisation, so that greedy choices aren't near-ties
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    model.save_pretrained(folder)
    letters = {symbol: i for i, symbol in enumerate(["<|endoftext|>", *pre_tokenizers.ByteLevel.alphabet()])}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    return shape["vocab_size"]


def random_prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Token ids other than EOS; no two prompts begin alike, so none shares another's cache."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, vocabulary, (count, length), generator=generator).tolist()


if __name__ == "__main__":
    main()
