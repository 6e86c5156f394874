"""The model runner: computes a step for all of its requests, and samples their next tokens."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from math import isfinite
from typing import cast

import torch
from torch import Tensor

from gpt2core.batching import uses_varlen
from gpt2core.inference import native
from gpt2core.inference.adapters import Adapter, AdapterStack, NativeAdapterStack
from gpt2core.inference.graphs import RowDecoder
from gpt2core.inference.kv_cache import AlignedRowCache, PrefillBatch, RowCache, StaticRowCache
from gpt2core.inference.native import Span
from gpt2core.inference.quantized import Attention, QuantizedModel
from gpt2core.inference.request import Request, TokenLogprobs
from gpt2core.inference.scheduler import Output, Step
from gpt2core.sampling import NonFiniteLogits, choose, draw, most_likely
from gpt2core.tensors import int_tensor, to_device

logger = logging.getLogger(__name__)


class ModelRunner:
    def __init__(self, model: QuantizedModel, row_cache: RowCache) -> None:
        self._model, self._row_cache = model, row_cache
        # the adapters of the last step that used any; most steps use the same ones
        self._stack: AdapterStack | NativeAdapterStack | None = None
        self._decoder = RowDecoder(model, row_cache) if isinstance(row_cache, StaticRowCache) else None
        self._use_varlen = uses_varlen(model.device, model.dtype, model.config.head_width)

    def run(self, step: Step) -> list[Output]:
        """Compute a step, extend its caches, and return the output of each request of `step.sampled`."""
        self._update_stack(step)
        if self._decoder is None or not step.rows:
            return self._sample(self._logits(step), step.sampled)
        uses_adapters = any(request is not None and request.adapter is not None for request in step.rows)
        stack = cast(AdapterStack, self._stack) if uses_adapters else None
        logits, best = self._decoder.run(stack)
        if not step.chunks:
            running = [request for request in step.rows if request is not None]
            # log probabilities are computed from the logits, which the next step overwrites
            can_overlap = all(r.n_logprobs is None for r in running) and any(r.n_left > 1 for r in running)
            ahead = partial(self._decoder.run_ahead, stack=stack) if can_overlap else None
            return self._sample(logits, step.sampled, best, ahead)
        return self._sample(torch.cat([logits, self._logits(Step([], step.chunks))]), step.sampled)

    def drop_adapter(self, adapter: Adapter) -> None:
        """Release the adapter if it is in the stack."""
        if self._stack is not None and adapter in self._stack.adapters:
            self._set_stack(None)

    def _logits(self, step: Step) -> Tensor:
        """Compute the logits (n, token_count) for `step.sampled` in one forward pass."""
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
            return hidden.new_zeros(0, self._model.config.token_count, dtype=torch.float32)
        if len(selected) < len(hidden):
            hidden = hidden[to_device(int_tensor(selected), hidden.device)]
        return self._model.logits(hidden)

    def _forward(self, step: Step) -> Tensor:
        """Compute the hidden states (N, C) of the rows' tokens, then of the chunks' tokens."""
        rows, n_rows, device = self._row_cache, len(step.rows), self._model.device
        ids, positions, adapters = rows.inputs() if n_rows else ([], [], [])
        for chunk in step.chunks:
            ids += chunk.request.input_ids[chunk.positions.start : chunk.positions.stop]
            positions += chunk.positions
            adapters += [chunk.request.adapter] * chunk.n
        used = self._stack is not None and any(adapter is not None for adapter in adapters)
        hidden = self._model.hidden(
            to_device(int_tensor(ids), device),
            to_device(int_tensor(positions), device),
            self._spans(step) if self._model.is_native else self._attention(step),
            self._stack.for_rows(adapters) if used and self._stack is not None else None,
        )
        if n_rows:
            rows.end_step()
        for chunk in step.chunks:
            chunk.prefill.advance(chunk.n)
        return hidden

    def _attention(self, step: Step) -> Attention:
        parts = list[tuple[int, Callable[[int, Tensor, float], Tensor]]]()  # (number of tokens, attend)
        if step.rows:
            assert isinstance(self._row_cache, AlignedRowCache)
            self._row_cache.begin_step()
            parts.append((len(step.rows), self._row_cache.attend))
        if step.chunks and self._use_varlen:
            n_new = [chunk.n for chunk in step.chunks]
            parts.append((sum(n_new), PrefillBatch([chunk.prefill for chunk in step.chunks], n_new).attend))
        else:
            parts += [(chunk.n, chunk.prefill.attend) for chunk in step.chunks]
        sizes, functions = zip(*parts, strict=True)

        def attention(layer: int, qkv: Tensor) -> Tensor:
            scale = self._model.blocks[layer].scale
            outputs = [attend(layer, part, scale) for attend, part in zip(functions, qkv.split(sizes), strict=True)]
            return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

        return attention

    def _spans(self, step: Step) -> list[Span]:
        assert isinstance(self._row_cache, AlignedRowCache)
        spans = self._row_cache.begin_native_step() if step.rows else []
        return spans + [native.span(chunk.prefill.kv, chunk.prefill.length, chunk.n) for chunk in step.chunks]

    def _update_stack(self, step: Step) -> None:
        """Ensure that the stack has all adapters of the step.

        With native kernels or CUDA graphs, unused adapters stay in it: native kernels skip them, and graphs would have
        to be captured again for another stack.
        """
        requests = (*step.rows, *(chunk.request for chunk in step.chunks))
        used = {request.adapter for request in requests if request is not None and request.adapter is not None}
        stacked = set() if self._stack is None else set(self._stack.adapters)
        if self._decoder is not None or self._model.is_native:
            used |= stacked
        if used and used != stacked:
            self._set_stack(self._model.stack(sorted(used, key=id)))

    def _set_stack(self, stack: AdapterStack | NativeAdapterStack | None) -> None:
        self._stack = stack
        if self._decoder is not None:
            self._decoder.forget_stack()

    def _sample(
        self,
        logits: Tensor,
        requests: Sequence[Request | None],
        best: Tensor | None = None,
        ahead: Callable[[Tensor], None] | None = None,
    ) -> list[Output]:
        """Return the output of each row of logits (n, token_count); the output of a row without request is meaningless.

        An error is also an output: it ends only its own request.

        Args:
            best, ahead: as in `gpt2core.sampling.choose`.
        """
        if not requests:
            return []
        outputs = choose(
            [None if request is None else request.sampler for request in requests],
            logits,
            [[] if request is None else request.tokens for request in requests],
            best,
            *((native.most_likely, native.draw) if self._model.is_native else (most_likely, draw)),
            ahead,
        )
        for i, request in enumerate(requests):
            if request is not None and request.n_logprobs is not None:
                outputs[i] = _record(request, logits[i : i + 1], outputs[i])
            if isinstance(error := outputs[i], Exception):
                logger.warning("a request failed: %s", error)
        return outputs


def _record(request: Request, logits: Tensor, output: Output) -> Output:
    """Record the token's log probabilities from logits (1, token_count). Return the output, or an error that occurs."""
    try:
        if not all(isfinite(token.logprob) for token in request.prompt_logprobs):
            raise NonFiniteLogits
        if isinstance(output, int):
            request.logprobs += _logprobs(logits, [output], request.n_logprobs or 0)
    except Exception as error:
        return error
    return output


def _record_prompt(request: Request, logits: Tensor) -> None:
    """Record the log probabilities of n prompt tokens, from the logits (n, token_count) of the tokens before them."""
    first = len(request.prompt_logprobs) + 1
    tokens = request.input_ids[first : first + len(logits)]
    request.prompt_logprobs += _logprobs(logits[: len(tokens)], tokens, request.n_logprobs or 0)


def _logprobs(logits: Tensor, tokens: Sequence[int], n_top: int) -> list[TokenLogprobs]:
    """Return the log probabilities of one token per row of logits (n, token_count), and of the most likely tokens."""
    logprobs = logits.log_softmax(-1)
    chosen = logprobs.gather(1, torch.tensor(tokens, dtype=torch.long, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = (columns.tolist() for columns in logprobs.topk(n_top))
    return [TokenLogprobs(p, list(zip(*top, strict=True))) for p, *top in zip(chosen, ids, values, strict=True)]
