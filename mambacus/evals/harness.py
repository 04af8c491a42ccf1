"""Our models as an lm_eval model: the numbers of lm_eval's ``hf`` model, reading each shared context once.

Tokenisation, truncation and the windows of the rolling perplexity are lm_eval's: `TemplateLM` encodes context and
continuation, `get_rolling_token_windows` cuts documents.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from mambacus.evals.scoring import Counts, Scorer, Tokens
from mambacus.inference import Engine, SamplingParams
from mambacus.runtime.errors import UserError

MAX_LENGTH = 2048  # lm_eval's default where a config names no length, as Mamba's do not
MAX_GEN_TOKS = 256  # lm_eval's default


class MambacusLM(TemplateLM):
    """Answers lm_eval's three kinds of requests with a `MambaLM`.

    Args:
        model: a `MambaLM`, or a ``peft.PeftModel`` around one, on its device and in evaluation mode.
        tokenizer: its tokenizer (transformers), with an end-of-text token.
        batch_size: contexts, or whole requests, of one pass.
        max_length: longest input in tokens; longer ones are cut on the left as lm_eval does, and counted.
        state_reuse: read a context shared by several continuations once and fork its state.
        seed: of sampled generation.

    Attributes:
        counts: tokens read and saved so far.
        truncated_requests: requests that were cut to ``max_length``.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        batch_size: int = 16,
        max_length: int = MAX_LENGTH,
        state_reuse: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-text token, which evaluation needs as a prefix and a stop")
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.max_length = max_length
        self.seed = seed
        self.counts = Counts()
        self.truncated_requests = 0
        self._scorer = Scorer(model, batch_size, state_reuse, self.counts)
        self._device = self._scorer.device
        self._engine = Engine(model, tokenizer, batch_size=batch_size)
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_once)  # choices repeat their context

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that an empty context becomes, as in lm_eval's ``hf`` model."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm_eval stores requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def state_reuse_record(self) -> dict[str, Any]:
        """Return what was read and saved, for the record."""
        return {
            "enabled": self._scorer.state_reuse,
            **self.counts.as_dict(),
            "truncated_requests": self.truncated_requests,
            "prompt_tokens": self._engine.stats.prompt_tokens,
            "generated_tokens": self._engine.stats.generated_tokens,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of ``string``; special tokens as the tokenizer adds them, unless the string has its own."""
        return list(self._encode(string, add_special_tokens))

    def _encode_once(self, string: str, add_special_tokens: bool | None) -> Tokens:
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids = self.tokenizer.encode(string, **options)
        return tuple(self._engine.encode(ids)) if ids else ()  # which refuses tokens that the model does not have

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score encoded requests (strings or None, context tokens, continuation tokens)."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm or None) as progress:
            scores = self._scorer.score(pairs, progress.update)
        answers = [(score.loglikelihood, score.is_greedy) for score in scores]
        for (strings, _, _), answer in zip(requests, answers, strict=True):
            if strings is not None:  # windows of a rolling request are stored with their document
                self.cache_hook.add_partial("loglikelihood", strings, answer)
        return answers

    def _fit(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Tokens, Tokens]:
        """Cut the context on the left so that at most ``max_length`` tokens are read."""
        if len(continuation) > self.max_length:
            raise UserError(f"a continuation of {len(continuation)} tokens exceeds --max-length {self.max_length}")
        room = self.max_length + 1 - len(continuation)  # the continuation's last token is scored, not read
        self.truncated_requests += len(context) > room
        return tuple(context[-room:]), tuple(continuation)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each document, cut into windows as lm_eval defines them."""
        windows: list[tuple[None, list[int], list[int]]] = []
        ends = []
        for request in requests:
            cut = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(None, *make_disjoint_window(window)) for window in cut]
            ends.append(len(windows))
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        totals = []
        for request, begin, end in zip(requests, [0, *ends], ends, strict=False):
            totals.append(sum(loglikelihood for loglikelihood, _ in scores[begin:end]))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each request, cut at the first of its stop strings."""
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(sorted(request.args[1].items())), []).append(index)
        texts = [""] * len(requests)
        for indices in by_settings.values():
            settings = requests[indices[0]].args[1]
            found = self._generate([requests[index].args[0] for index in indices], settings)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generate(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Generate with one task's settings; the text is cut by lm_eval's own code, so that it is cut alike."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKS))
        eos = self.tokenizer.decode([self.eot_token_id])
        until = [stop for stop in handle_stop_sequences(options.pop("until"), eos=eos) if stop]
        new_tokens = options.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room < 1:
            raise UserError(
                f"generating {new_tokens} tokens leaves no room for a prompt in --max-length {self.max_length}"
            )
        if not options.pop("do_sample"):
            options["temperature"] = 0.0
        unknown = sorted(options.keys() - {"temperature", "top_k", "top_p", "min_p", "repetition_penalty"})
        if unknown:
            raise UserError(f"generation_kwargs: {', '.join(unknown)}: not supported by this model")
        prompts = [self.tok_encode(context) for context in contexts]
        self.truncated_requests += sum(len(prompt) > room for prompt in prompts)
        params = SamplingParams(max_new_tokens=new_tokens, stop=until, seed=self.seed, **options)
        with tqdm(total=len(prompts), desc="generate_until", disable=None) as progress:
            found = self._engine.generate([prompt[-room:] for prompt in prompts], params, progress=progress.update)
        texts = [self.tokenizer.decode(completion.token_ids, skip_special_tokens=True) for (completion,) in found]
        return [postprocess_generated_text(text, until, None) for text in texts]
