"""Generation: batched decoding from prompts and states."""

from mambacus.inference.engine import Completion, Engine, EngineStats
from mambacus.inference.sampling import SamplingParams

__all__ = ["Completion", "Engine", "EngineStats", "SamplingParams"]
