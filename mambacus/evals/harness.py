"""Our models as an lm_eval model: the numbers of lm_eval's ``hf`` model, reading what requests share once.

Tokenisation, truncation and the windows of the rolling perplexity are lm_eval's: `TemplateLM` encodes context and
continuation, `get_rolling_token_windows` cuts documents.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn
from tqdm import tqdm

from mambacus.evals.encoding import Encoder
from mambacus.evals.generation import generate
from mambacus.evals.prefixes import Tokens
from mambacus.evals.scoring import STATE_BYTES, Counts, Pair, Score, Scorer
from mambacus.inference import Completion, Engine, SamplingParams
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
        state_reuse: read a context, or a beginning of contexts, shared by several requests once and fork its state.
        state_bytes: most bytes of states of shared beginnings held at once.
        seed: of sampled generation.

    Attributes:
        counts: tokens read and saved so far, by scoring and in the prompts of generation.
        prompt_tokens: tokens of the prompts of generation, each counted whole.
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
        state_bytes: int = STATE_BYTES,
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
        self.prompt_tokens = 0
        self._scorer = Scorer(model, batch_size, state_reuse, self.counts, state_bytes)
        self._device = self._scorer.device
        self._engine = Engine(model, tokenizer, batch_size=batch_size)
        self._encoder = Encoder(tokenizer, self._checked)
        self._encode = functools.lru_cache(maxsize=4096)(self._encode_once)  # choices repeat their context
        self._encoded: dict[str, Tokens] = {}  # of the requests being answered
        self._prefix = str(tokenizer.decode([self.prefix_token_id]))

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
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self._engine.stats.generated_tokens,
        }

    def warm_up(self) -> None:
        """Load what passes need, kernels above all, before anything is timed; nothing is counted."""
        self._scorer.warm_up()

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the tokens of ``string``; special tokens as the tokenizer adds them, unless the string has its own."""
        if add_special_tokens is None and string in self._encoded:
            return list(self._encoded[string])
        return list(self._encode(string, add_special_tokens))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; what `TemplateLM` will encode one by one is encoded together first."""
        pairs = [request.args for request in requests if request.args[0]]
        texts = dict.fromkeys(text for context, rest in pairs for text in (context.rstrip(), context + rest))
        plain = [text for text in texts if text and not has_bos_prefix(text, self._prefix)]
        self._encoded = dict(zip(plain, self._encoder.encode(plain), strict=True))
        try:
            return list(super().loglikelihood(requests, disable_tqdm))
        finally:
            self._encoded = {}

    def _encode_once(self, string: str, add_special_tokens: bool | None) -> Tokens:
        if add_special_tokens is None and has_bos_prefix(string, self._prefix):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self._checked(self.tokenizer.encode(string, **options))

    def _checked(self, ids: Sequence[int]) -> Tokens:
        return tuple(self._engine.encode(ids)) if ids else ()  # which refuses tokens that the model does not have

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score encoded requests (strings or None, context tokens, continuation tokens)."""
        pairs = [self._fit(context, continuation) for _, context, continuation in requests]
        waiting: dict[Pair, list[int]] = {}
        for index, pair in enumerate(pairs):
            waiting.setdefault(pair, []).append(index)
        with tqdm(total=len(pairs), desc="loglikelihood", disable=disable_tqdm or None) as progress:

            def done(scores: Mapping[Pair, Score]) -> None:
                """Hand answers to lm_eval's cache as they come, so that an interrupted run loses little."""
                for pair, score in scores.items():
                    indices = waiting.pop(pair, [])
                    progress.update(len(indices))
                    for index in indices:
                        if requests[index][0] is not None:  # a window of a rolling request is stored with its document
                            answer = (score.loglikelihood, score.is_greedy)
                            self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)

            scores = self._scorer.score(pairs, done)
        return [(score.loglikelihood, score.is_greedy) for score in scores]

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
            found = self._generate([requests[index] for index in indices])
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
        return texts

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        """Generate with one task's settings; the text is cut by lm_eval's own code, so that it is cut alike."""
        options: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], MAX_GEN_TOKS))
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
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        self.truncated_requests += sum(len(prompt) > room for prompt in prompts)
        prompts = [prompt[-room:] or self._engine.encode([]) for prompt in prompts]
        self.prompt_tokens += sum(map(len, prompts))
        params = SamplingParams(max_new_tokens=new_tokens, stop=until, seed=self.seed, **options)
        texts = [""] * len(requests)

        def finished(number: int, completions: Sequence[Completion]) -> None:
            text = self.tokenizer.decode(completions[0].token_ids, skip_special_tokens=True)
            texts[number] = postprocess_generated_text(text, until, None)
            self.cache_hook.add_partial("generate_until", requests[number].args, texts[number])

        with tqdm(total=len(prompts), desc="generate_until", disable=None) as progress:
            generate(self._engine, self._scorer, prompts, params, progress.update, finished)
        return texts
