"""The model runner: one step's forward over all of its requests, and the sampling of their next tokens."""

import logging
from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from gpt2core.inference.adapters import Adapter, AdapterStack, RowAdapters
from gpt2core.inference.kv_cache import RowCache
from gpt2core.inference.quantized import QuantizedModel
from gpt2core.inference.request import Request, TokenLogprobs
from gpt2core.inference.scheduler import Output, Step
from gpt2core.sampling import NonFiniteLogits, most_likely

logger = logging.getLogger(__name__)


class ModelRunner:
    def __init__(self, model: QuantizedModel, row_cache: RowCache) -> None:
        self._model, self._row_cache = model, row_cache
        self._stack: AdapterStack | None = None  # of the last step with adapters; most steps use the same ones

    def run(self, step: Step) -> list[Output]:
        """Compute a step, extend its caches, and return an output for each of `step.sampled`."""
        hidden = self._forward(step)  # (N, C)
        n_rows = len(step.rows)
        selected, end = list(range(n_rows)), n_rows
        for chunk in step.chunks:
            end += chunk.n
            if chunk.request.has_prompt_logprobs:
                _record_prompt(chunk.request, self._model.logits(hidden[end - chunk.n : end]))
            if chunk.is_last:
                selected.append(end - 1)
        if not selected:
            return []
        return self._sample(hidden if len(selected) == len(hidden) else hidden[selected], step.sampled)

    def drop_adapter(self, adapter: Adapter) -> None:
        """Release the adapter's place in the stack."""
        if self._stack is not None and adapter in self._stack.adapters:
            self._stack = None

    def _forward(self, step: Step) -> Tensor:
        """Hidden states (N, C) of the rows' tokens and of the chunks' tokens."""
        rows, n_rows, device = self._row_cache, len(step.rows), self._model.device
        ids, positions, adapters = rows.inputs()
        for chunk in step.chunks:
            ids += chunk.request.input_ids[chunk.positions.start : chunk.positions.stop]
            positions += chunk.positions
            adapters += [chunk.request.adapter] * chunk.n
        rows.begin_step()

        def attention(layer: int, qkv: Tensor) -> Tensor:
            scale = self._model.blocks[layer].scale
            parts = [rows.attend(layer, qkv[:n_rows], scale)] if n_rows else []
            start = n_rows
            for chunk in step.chunks:
                parts.append(chunk.prefill.attend(layer, qkv[start : start + chunk.n], scale))
                start += chunk.n
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        hidden = self._model.hidden(
            torch.tensor(ids, device=device),
            torch.tensor(positions, device=device),
            attention,
            self._row_adapters(adapters),
        )
        rows.end_step()
        for chunk in step.chunks:
            chunk.prefill.advance(chunk.n)
        return hidden

    def _row_adapters(self, adapters: Sequence[Adapter | None]) -> RowAdapters | None:
        """None if no row uses an adapter."""
        used = tuple(sorted({adapter for adapter in adapters if adapter is not None}, key=id))
        if not used:
            return None
        if self._stack is None or self._stack.adapters != used:
            self._stack = AdapterStack(used, self._model.dtype, self._model.device)
        return self._stack.for_rows(adapters)

    def _sample(self, hidden: Tensor, requests: Sequence[Request | None]) -> list[Output]:
        """The output of each row of hidden (n, C); that of a row without a request is meaningless."""
        logits = self._model.logits(hidden)  # (n, token_count)
        best = most_likely(logits)
        return [0 if request is None else _output(request, logits, i, best[i]) for i, request in enumerate(requests)]


def _output(request: Request, logits: Tensor, i: int, best: int | None) -> Output:
    """The next token of the request in row i of the logits. An error is returned: it ends this request alone."""
    try:
        if not all(isfinite(one.logprob) for one in request.prompt_logprobs):
            raise NonFiniteLogits
        token = request.sampler.choose(logits, i, best, request.tokens)
        if request.n_logprobs is not None:
            request.logprobs += _logprobs(logits[i : i + 1], [token], request.n_logprobs)
    except Exception as error:
        logger.warning("a request failed: %s", error)
        return error
    return token


def _record_prompt(request: Request, logits: Tensor) -> None:
    """Record the log probabilities of the prompt's tokens that follow those with logits (n, token_count)."""
    first = len(request.prompt_logprobs) + 1
    tokens = request.input_ids[first : first + len(logits)]
    request.prompt_logprobs += _logprobs(logits[: len(tokens)], tokens, request.n_logprobs or 0)


def _logprobs(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Of one token per row of logits (n, token_count), and of the most likely ones."""
    logprobs = logits.log_softmax(-1)
    own = logprobs.gather(1, torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (columns.tolist() for columns in logprobs.topk(n_top))
    return [TokenLogprobs(one, list(zip(*top, strict=True))) for one, *top in zip(own, ids, values, strict=True)]
