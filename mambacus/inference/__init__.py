"""Generation: continuous batches of completions from prompts and states."""

from mambacus.inference.completion import Completion, Piece, TokenScore
from mambacus.inference.engine import Engine
from mambacus.inference.reading import Request
from mambacus.inference.sampling import SamplingParams
from mambacus.inference.scheduler import Scheduler
from mambacus.inference.stats import EngineStats

__all__ = ["Completion", "Engine", "EngineStats", "Piece", "Request", "SamplingParams", "Scheduler", "TokenScore"]
