"""Rates of the phases of a step for models of 0.5B and 1.5B parameters, and their share of the GPU's peak."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from common import SHAPES, Node, data_sheet, installed, prompts, random_model, seconds_of, start_vllm, tokenizer

from reinforcepp import Sampling, TransformersEngine
from reinforcepp.models.logprobs import is_packable, response_logprobs
from reinforcepp.models.micro_batches import DEFAULT_GPU_TOKENS, MicroBatchLimit, micro_batches
from reinforcepp.models.token_logprobs import head_logprobs

PROMPT, NEW = 128, 256


def timings_half(node: Node) -> dict[str, Any]:
    """The 0.5B shape."""
    return _timings(node, "0.5B")


def timings_large(node: Node) -> dict[str, Any]:
    """The 1.5B shape."""
    return _timings(node, "1.5B")


def _timings(node: Node, shape: str) -> dict[str, Any]:
    measured: dict[str, Any] = {"shape": node.shape(shape)}
    for dtype in (torch.bfloat16, torch.float32) if node.on_gpu else (torch.float32,):
        model = random_model(node, shape, dtype)
        name = str(dtype).removeprefix("torch.")
        measured[name] = {}
        for phase, result in _phases(node, shape, model):
            measured[name][phase] = result
        del model
        if node.on_gpu:
            torch.cuda.empty_cache()
    return measured


def _phases(node: Node, shape: str, model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    cost = Cost(node, shape, model.dtype)
    length, new = (PROMPT, NEW) if node.on_gpu else (8, 8)
    vocabulary = SHAPES[node.shape(shape)][-1]

    for rows in (32, 8) if node.on_gpu else (2,):
        context = [prompt.ids for prompt in prompts(rows, length)]
        answers = torch.randint(1, vocabulary, (rows, new), generator=torch.Generator().manual_seed(1)).tolist()

        def score(context: Any = context, answers: Any = answers) -> Any:
            with torch.no_grad():
                return response_logprobs(model, context, answers, pad_id=0)

        def update(context: Any = context, answers: Any = answers) -> None:
            logprobs, _, _ = response_logprobs(model, context, answers, pad_id=0)
            logprobs.mean().backward()
            model.zero_grad(set_to_none=True)

        flops = cost.forward(rows, length + new, rows * new)
        yield f"score_{rows}", cost.of_flops(seconds_of(node, score), flops, rows * (length + new))
        yield f"update_{rows}", cost.of_flops(seconds_of(node, update), 3 * flops, rows * (length + new))

    yield from _packing(node, model)

    tokens = 4096 if node.on_gpu else 16
    hidden = torch.randn(tokens, cost.width, device=node.device, dtype=model.dtype, requires_grad=True)
    ids = torch.randint(0, vocabulary, (tokens,), device=node.device)
    head = model.get_output_embeddings()

    def head_alone() -> None:
        head_logprobs(head, hidden, ids)[0].mean().backward()
        model.zero_grad(set_to_none=True)

    yield "head", cost.of_flops(seconds_of(node, head_alone), 6 * tokens * cost.width * vocabulary, tokens)

    rows = 512 if node.on_gpu else 4
    if installed("vllm"):
        engine: Any = start_vllm(node, model, max_length=length + new, max_num_seqs=rows)
    else:
        engine = TransformersEngine(model, tokenizer(), rows)
    try:
        for count in (128, rows) if node.on_gpu else (rows,):
            batch, sampling = prompts(count, length), Sampling(new, temperature=1.0)
            generated: list[int] = []

            def decode(batch: Any = batch, sampling: Any = sampling, generated: list[int] = generated) -> None:
                generated.append(sum(len(completion.ids) for completion in engine.generate(batch, sampling)))

            seconds = seconds_of(node, decode, rounds=1)
            rates = cost.of_bytes(seconds, cost.decoded(count, length, new), generated[-1])
            yield f"decode_{count}", rates | {"engine": engine.name}
    finally:
        engine.close()


def _packing(node: Node, model: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the times of an update of rows whose lengths vary as in real data, padded and packed."""
    lengths = uneven_lengths(64 if node.on_gpu else 6)
    context = [prompts(1, length, seed)[0].ids for seed, (length, _) in enumerate(lengths)]
    answers = [prompts(1, length, seed)[0].ids for seed, (_, length) in enumerate(lengths)]
    tokens = sum(map(sum, lengths))
    for name, packed in (("padded", False), ("packed", True)):
        if packed and not is_packable(model, max(map(sum, lengths))):
            yield "update_packed", {"reason": "this model isn't packed"}
            return
        limit = MicroBatchLimit(DEFAULT_GPU_TOKENS, packed=packed)
        batches = list(micro_batches(lengths, range(len(lengths)), limit))

        def update(batches: Any = batches, packed: bool = packed) -> None:
            for rows in batches:
                parts = [[all_rows[row] for row in rows] for all_rows in (context, answers)]
                response_logprobs(model, *parts, pad_id=0, padding_free=packed)[0].sum().backward()
            model.zero_grad(set_to_none=True)

        seconds = seconds_of(node, update)
        computed = sum(limit.tokens_of([lengths[row] for row in rows]) for rows in batches)
        facts = {"passes": len(batches), "padding": 1 - tokens / computed, "kernel": _kernel(node, model, packed)}
        yield f"update_{name}", {"seconds": seconds, "tokens_per_second": tokens / seconds} | facts


def uneven_lengths(rows: int) -> list[tuple[int, int]]:
    """Return tokens of prompts and responses; half of the responses are shorter than 120 tokens, and few are at 512."""
    drawn = torch.randn(2, rows, generator=torch.Generator().manual_seed(0))
    prompt, response = (
        mean * (spread * values).exp() for mean, spread, values in ((60, 0.5, drawn[0]), (120, 0.8, drawn[1]))
    )
    return list(zip(prompt.int().clamp(8, 256).tolist(), response.int().clamp(8, 512).tolist(), strict=True))


def _kernel(node: Node, model: Any, packed: bool) -> str:
    if not packed:
        return "sdpa with a mask"
    half = node.on_gpu and model.dtype in (torch.float16, torch.bfloat16)
    return "varlen" if half else "sdpa per length"


class Cost:
    """FLOPs and bytes of a shape, and the shares of the GPU's peak rates that times reach."""

    def __init__(self, node: Node, shape: str, dtype: torch.dtype) -> None:
        self.width, inner, self.layers, heads, kv_heads, self.vocabulary = SHAPES[node.shape(shape)]
        self.kv_width = self.width * kv_heads // heads
        self.body = self.layers * (self.width * (2 * self.width + 2 * self.kv_width) + 3 * self.width * inner)
        """Weights of the matrix products of all layers."""
        self.size = dtype.itemsize
        sheet = data_sheet(node)
        self.peak = None if sheet is None else 1e12 * (sheet.half_tflops if self.size == 2 else sheet.float32_tflops)
        self.bandwidth = None if sheet is None else 1e9 * sheet.gigabytes_per_second

    def forward(self, rows: int, length: int, responses: int) -> float:
        """Return the FLOPs of a forward pass; causal attention multiplies half of the pairs of tokens."""
        attention = 2 * self.layers * rows * length * length * self.width
        return 2.0 * self.body * rows * length + attention + 2.0 * self.width * self.vocabulary * responses

    def decoded(self, rows: int, length: int, new: int) -> float:
        """Return the bytes that generation reads: all weights once per token, and the cache of all rows."""
        weights = (self.body + self.width * self.vocabulary) * self.size * new
        cache = rows * new * (length + new / 2) * 2 * self.layers * self.kv_width * self.size
        return weights + cache

    def of_flops(self, seconds: float, flops: float, tokens: int) -> dict[str, Any]:
        share = None if self.peak is None else flops / seconds / self.peak
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "tflops": flops / seconds / 1e12,
            "mfu": share,
        }

    def of_bytes(self, seconds: float, moved: float, tokens: int) -> dict[str, Any]:
        share = None if self.bandwidth is None else moved / seconds / self.bandwidth
        return {
            "seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "gb_per_second": moved / seconds / 1e9,
            "mbu": share,
        }
