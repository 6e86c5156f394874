"""Adds the steps of a trial to a sweep, by the kind of the sweep. Trials share steps with equal inputs."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pipelines.variants import Parameters
from steps.attention_trial import attention_trial
from steps.config import SweepConfig, TrackingConfig
from steps.fetch_data import fetch_step
from steps.fetch_text import text_step
from steps.finetune import finetune
from steps.finetune_trial import finetune_trial
from steps.prepare_base import prepare_base
from steps.pretrain_trial import pretrain_trial
from steps.split_data import split_data


class _Trials:
    """Adds the trials of a sweep to the pipeline. Call it for each trial; it adds only the steps that are new."""

    def __init__(self, sweep: SweepConfig, seed: int, tracking: TrackingConfig) -> None:
        """`seed`: the seed of the run; each trial also has its own."""
        self.sweep, self.seed, self.tracking = sweep, seed, tracking
        self._names: set[str] = set()
        self._outputs: dict[str, Any] = {}

    def __call__(self, label: str, parameters: Parameters, trial_seed: int) -> Any:
        """Add the steps of a trial; return the artifact with its Trial.

        Args:
            label, parameters: the variant's.
            trial_seed: the seed of the training.
        """
        raise NotImplementedError

    def _shared(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, which is called once for equal keys."""
        text = f"{kind} {key!r}"  # the repr of a dataclass contains all values
        if text not in self._outputs:
            self._outputs[text] = make()
        return self._outputs[text]

    def _name(self, text: str) -> str:
        """Return a new step name of letters, digits and underscores."""
        plain = re.sub(r"\W+", "_", text).strip("_")
        name, number = plain, 1
        while name in self._names:
            number += 1
            name = f"{plain}_{number}"
        self._names.add(name)
        return name

    def _trial_name(self, label: str, trial_seed: int) -> str:
        return self._name(f"trial_{label}_seed_{trial_seed}")


class _FinetuneTrials(_Trials):
    """Only training uses the trial's seed; data, split and base use the run's.

    Variants that differ only in decoding share their adapters.
    """

    def __call__(self, label: str, parameters: Parameters, trial_seed: int) -> Any:
        data, base, lora, generation = (parameters[name] for name in ("data", "base", "lora", "generation"))
        train = replace(parameters["train"], seed=trial_seed)
        base, base_sha256 = self._shared("resolved", base, base.resolved)
        parts = self._shared("data", (data, base), lambda: self._prepare_data(data, base, base_sha256))
        base_dir = self._shared(
            "base",
            (base, data.n_facts),
            lambda: prepare_base(base, data.n_facts, self.seed, base_sha256, id=self._name("prepare_base")),
        )
        trained = self._shared("adapters", (data, base, lora, train), lambda: self._train(parts, base_dir, lora, train))
        adapters = [adapter for adapter, _, _ in trained]
        _, history, summary = trained[0]
        _, val, test, _ = parts
        name, n = self._trial_name(label, trial_seed), self.sweep.samples
        return finetune_trial(
            label, trial_seed, base_dir, adapters, val, test, history, summary, generation, n, id=name
        )

    def _prepare_data(self, data: Any, base: Any, base_sha256: str) -> Any:
        records = fetch_step(data)(data, base, self.seed, base_sha256, id=self._name("fetch_data"))
        return split_data(records, data, self.seed, id=self._name("split_data"))

    def _train(self, parts: Any, base: Any, lora: Any, train: Any) -> list[Any]:
        """Add `sweep.repeats` training runs; return the outputs of each."""
        runs: list[Any] = []
        after: list[str] = []  # not in parallel: runs with equal inputs share a checkpoint
        for _ in range(self.sweep.repeats):
            # a repeated training run is compared with the first one, so it must not come from the cache
            step = finetune.with_options(enable_cache=False) if runs else finetune
            name = self._name(f"finetune_seed_{train.seed}")
            runs.append(step(parts[0], parts[1], base, lora, train, self.tracking, id=name, after=after))
            after = [name]
        return runs


class _PretrainTrials(_Trials):
    def __call__(self, label: str, parameters: Parameters, trial_seed: int) -> Any:
        text, model, pretrain = (parameters[name] for name in ("text", "model", "pretrain"))
        documents = self._shared("text", text, lambda: text_step(text)(text, self.seed, id=self._name("fetch_text")))
        name = self._trial_name(label, trial_seed)
        return pretrain_trial(label, trial_seed, documents, text, model, pretrain, self.tracking, id=name)


class _AttentionTrials(_Trials):
    def __call__(self, label: str, parameters: Parameters, trial_seed: int) -> Any:
        return attention_trial(label, trial_seed, parameters["attention"], id=self._trial_name(label, trial_seed))


# Kind of sweep -> the class that adds its trials
TRIALS: Mapping[str, type[_Trials]] = {
    "finetune": _FinetuneTrials,
    "pretrain": _PretrainTrials,
    "attention": _AttentionTrials,
}
