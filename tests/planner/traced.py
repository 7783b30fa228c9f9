"""The planner's costs of models, each traced once per process: a trace takes up to two CPU seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from reinforcepp.config import ComputeConfig
from reinforcepp.planner import model_costs

_known: dict[Any, Any] = {}


def _once(trace: Callable[..., Any]) -> Callable[..., Any]:
    def traced(config: Any, dtype: Any, size: Any, settings: Any = None, **named: Any) -> Any:
        settings = settings or ComputeConfig()
        compute = tuple(getattr(settings, field.name) for field in fields(ComputeConfig))
        key = trace.__name__, config.to_json_string(use_diff=False), dtype, size, compute, tuple(sorted(named.items()))
        if key not in _known:
            _known[key] = trace(
                config, dtype, size, *([settings] if trace is model_costs.trained_model else []), **named
            )
        return _known[key]

    return traced


trained_model, frozen_model = _once(model_costs.trained_model), _once(model_costs.frozen_model)
