"""The probe of a CPU's dtypes, and the choice of a precision by it."""

import subprocess
import sys

import pytest
import torch

from reinforcepp import ReinforceConfig
from reinforcepp.config import RewardModelConfig
from reinforcepp.models import precision
from reinforcepp.models.precision import SMALL_PARAMETERS, automatic_precision, inference_dtype, slow_precision

LARGE = SMALL_PARAMETERS
NATIVE, EMULATED = (199e9, 102e9), (0.9e9, 77e9)


@pytest.fixture
def gpu(monkeypatch):
    """Return a function that makes torch report a GPU, with or without bfloat16."""

    def report(bf16):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
        # With emulation, torch reports bfloat16 for every GPU.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
        )

    return report


def test_both_dtypes_are_measured_in_turn_on_one_core(monkeypatch):
    calls, threads, times = [], [], iter([0.0, 0.0, 1.0, 3.0, 3.5, 3.5])
    real = torch.Tensor.__matmul__

    def product(a, b):
        if len(a) == precision.PROBE_SIZE:
            calls.append((a.dtype, threads[-1]))
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flops = 2 * precision.PROBE_SIZE**3
    with monkeypatch.context() as patch:
        patch.setattr(precision.time, "perf_counter", lambda: next(times))
        assert precision.cpu_flops.__wrapped__() == (flops / 1.0, flops / 0.5)
    assert calls == [(torch.bfloat16, 1), (torch.float32, 1)] and threads == [1, torch.get_num_threads()]


@pytest.mark.full
def test_the_probe_follows_limits_in_the_environment():
    program = "from reinforcepp.models.precision import bf16_is_fast; print(bf16_is_fast())"
    limits = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    import os

    found = subprocess.run([sys.executable, "-c", program], env=os.environ | limits, capture_output=True, text=True)
    assert found.stdout.strip() == "False", found.stderr


def test_automatic_precision_on_a_cpu(monkeypatch):
    config = ReinforceConfig()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_flops", lambda: NATIVE)
    speeds = "a core of this CPU reaches 199 GFLOP/s in bfloat16, compared with 102 GFLOP/s in float32"
    assert automatic_precision(config, LARGE) == ("bf16", speeds)
    assert automatic_precision(config, LARGE - 1)[0] == "no"
    assert automatic_precision(ReinforceConfig(cast_lm_head_to_fp32=True), LARGE) == (
        "no",
        "as cast_lm_head_to_fp32 requires",
    )
    assert automatic_precision(RewardModelConfig(dtype="bfloat16"), LARGE) == ("no", "as dtype bfloat16 requires")
    monkeypatch.setattr(precision, "cpu_flops", lambda: EMULATED)
    assert automatic_precision(config, LARGE)[0] == "no"
    monkeypatch.setattr(precision, "cpu_flops", lambda: (38e9, 102e9))  # AVX512 without bfloat16 instructions
    assert automatic_precision(config, LARGE)[0] == "no"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # Apple's, for example
    monkeypatch.setattr(precision, "cpu_flops", lambda: NATIVE)
    assert automatic_precision(config, LARGE)[0] == "no"


def test_automatic_precision_on_a_gpu(gpu):
    gpu(bf16=True)
    assert automatic_precision(ReinforceConfig(), LARGE) == ("bf16", "Tesla T4 has bfloat16 instructions")
    gpu(bf16=False)
    chosen, reason = automatic_precision(ReinforceConfig(), LARGE)
    assert chosen == "no" and "mixed_precision='fp16'" in reason
    bf16 = ReinforceConfig(mixed_precision="bf16")
    assert slow_precision(bf16, on_gpu=True) == f"mixed_precision bf16: {reason}."
    gpu(bf16=True)
    assert slow_precision(bf16, on_gpu=True) == ""
    assert automatic_precision(ReinforceConfig(), LARGE, "NVIDIA H100")[0] == "bf16"  # planned, not present


def test_models_generate_in_the_dtype_of_their_checkpoint_on_a_gpu(gpu, monkeypatch):
    bf16, fp16, f32 = torch.bfloat16, torch.float16, torch.float32
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_flops", lambda: NATIVE)
    assert inference_dtype("auto", bf16) == f32  # on every CPU
    assert inference_dtype("bfloat16", f32) == bf16
    gpu(bf16=True)
    assert [inference_dtype("auto", dtype) for dtype in (bf16, fp16, f32, None)] == [bf16, fp16, f32, bf16]
    assert inference_dtype("auto", bf16, None) == bf16 and inference_dtype("auto", bf16, f32) == f32
    assert inference_dtype("float32", bf16) == f32
    gpu(bf16=False)
    assert [inference_dtype("auto", dtype) for dtype in (bf16, fp16, f32, None)] == [fp16, fp16, f32, fp16]
