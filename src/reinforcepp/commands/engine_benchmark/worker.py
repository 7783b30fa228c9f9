"""The worker process of one generation method, which reads jobs as JSON lines.

The first line contains the arguments of ``Worker``, and each further line a job. The worker writes one line per line.
Standard output is only for this protocol, so the output of libraries goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from reinforcepp.errors import ReinforceError
from reinforcepp.types import Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = dict[str, Any]


def main() -> None:
    """Run jobs until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker: Worker | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if worker is None:
                worker = Worker(**job)
                answer: Answer = {"peak_rss_mib": _peak_rss()}
            else:
                answer = getattr(worker, job.pop("do"))(**job)
        except ReinforceError as error:
            answer = {"error": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Worker:
    """A loaded model with a generation method.

    ``one_by_one`` and ``batched`` call ``generate`` of transformers; ``engine`` and ``vllm`` are rollout engines.
    """

    def __init__(self, way: str, model: str, dtype: str, max_length: int, largest: int, vllm: dict[str, Any]) -> None:
        import torch

        from reinforcepp.models import loading as models
        from reinforcepp.models.devices import choose_device

        choose_device()
        self.way = way
        self.tokenizer = models.load_tokenizer(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        precision: torch.dtype = getattr(torch, dtype)
        self.engine: Any = None
        if way == "vllm":
            from reinforcepp.rollout.vllm_integration import VllmEngine

            self.engine = VllmEngine(
                model, self.tokenizer, dtype=precision, max_length=max_length, max_num_seqs=largest, **vllm
            )
            return
        if way == "engine":
            from reinforcepp.rollout.transformers_engine import TransformersEngine

            self.model: PreTrainedModel = models.load_policy(model, precision).to(self.device)
            self.engine = TransformersEngine(self.model, self.tokenizer, batch_size=largest)
            return
        from transformers import AutoModelForCausalLM

        # load_policy would make GPT-2 faster than it is for users of transformers.
        with models.safe_folder(model) as folder:
            loaded = AutoModelForCausalLM.from_pretrained(
                folder, dtype=precision, trust_remote_code=False, use_safetensors=True
            )
        self.model = loaded.to(self.device).eval()

    def run(self, prompts: list[list[int]], sampling: dict[str, Any]) -> Answer:
        """Generate responses to ``prompts``. The latency of a prompt is from the start of the batch to its last token."""
        settings = Sampling(**sampling)
        if self.way == "vllm":
            self.engine.reset_prefix_cache()  # Otherwise later rounds would reuse the cached prompts of the first one.
        start = time.perf_counter()
        if self.engine is not None:
            completions = self.engine.generate([Prompt("", tuple(ids), i) for i, ids in enumerate(prompts)], settings)
            seconds = time.perf_counter() - start
            ids, logprobs = [list(c.ids) for c in completions], [list(c.logprobs) for c in completions]
            latencies = [seconds] * len(prompts)
        else:
            ids, latencies, logprobs = [], [], None
            width = 1 if self.way == "one_by_one" else len(prompts)
            for first in range(0, len(prompts), width):
                ids += _generate_plainly(self.model, self.tokenizer, prompts[first : first + width], settings)
                latencies += [time.perf_counter() - start] * width
        return {
            "seconds": latencies[-1],
            "tokens": sum(map(len, ids)),
            "latencies": latencies,
            "ids": ids,
            "logprobs": logprobs,
            "peak_rss_mib": _peak_rss(),
            "peak_gpu_mib": _peak_gpu(),
        }

    def score(self, prompts: list[list[int]], completions: list[list[int]]) -> Answer:
        """Return the log-probabilities of ``completions`` under the model in transformers."""
        import torch

        from reinforcepp.models.logprobs import response_logprobs

        rows = []
        for prompt, ids in zip(prompts, completions, strict=True):
            with torch.no_grad():
                rows.append(response_logprobs(self.model, [prompt], [ids], pad_id=0)[0][0].tolist())
        return {"logprobs": rows}

    def bandwidth(self) -> Answer:
        """Return the memory bandwidth in bytes/second and the bytes of weights that each decoding step reads."""
        import torch

        weights = {id(p): p.numel() * p.element_size() for p in self.model.parameters()}
        embeddings = self.model.get_input_embeddings().weight
        output = self.model.get_output_embeddings()
        if output is None or output.weight is not embeddings:
            weights.pop(
                id(embeddings), None
            )  # A step looks up a few rows of the embeddings and doesn't read all of them.
        block = torch.ones(1 << 27, device=self.device)
        best = min(_timed(lambda: block.sum().item()) for _ in range(10))
        return {"bytes_per_second": block.numel() * block.element_size() / best, "weight_bytes": sum(weights.values())}


def _generate_plainly(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[int]], sampling: Sampling
) -> list[list[int]]:
    """Run the library's ``generate`` on one padded batch and return the tokens up to the end of each response."""
    import torch

    from reinforcepp.models.loading import eos_token_ids
    from reinforcepp.models.tokenization import pad

    pad_id = int(tokenizer.pad_token_id)
    ids_BL, mask_BL = (x.to(model.device) for x in pad(prompts, pad_id, left=True))
    ends = eos_token_ids(model, tokenizer)
    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed)
        drawn = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    out_BL = model.generate(
        input_ids=ids_BL,
        attention_mask=mask_BL,
        max_new_tokens=sampling.max_new_tokens,
        pad_token_id=pad_id,
        eos_token_id=sorted(ends),
        **drawn,
    )
    rows = []
    for row in out_BL[:, ids_BL.shape[1] :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def _timed(job: Callable[[], Any]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def _peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1 << 20)


def _peak_gpu() -> float | None:
    import torch

    return torch.cuda.max_memory_reserved() / (1 << 20) if torch.cuda.is_available() else None


if __name__ == "__main__":
    main()
