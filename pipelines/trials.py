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

# Adds the steps of a trial: (label, the variant's parameters, seed of the trial) -> the artifact with its Trial
AddTrial = Callable[[str, Parameters, int], Any]


def finetune_trials(sweep: SweepConfig, seed: int, tracking: TrackingConfig) -> AddTrial:
    """Return a function that adds the steps of a finetuning trial.

    Data, split and base use the run's seed, only training uses the trial's. Variants that differ only in decoding share
    their adapters.
    """
    shared = _SharedSteps()

    def prepare(data: Any, base: Any, base_sha256: str) -> Any:
        records = fetch_step(data)(data, base, seed, base_sha256, id=shared.name("fetch_data"))
        return split_data(records, data, seed, id=shared.name("split_data"))

    def train_adapters(parts: Any, base: Any, lora: Any, train: Any) -> list[Any]:
        runs: list[Any] = []
        for _ in range(sweep.repeats):
            # a repeated training run is compared with the first one, so it must not come from the cache
            step = finetune.with_options(enable_cache=False) if runs else finetune
            name = shared.name(f"finetune_seed_{train.seed}")
            after = [shared.last] if runs else []  # not in parallel: runs with equal inputs share a checkpoint
            runs.append(step(parts[0], parts[1], base, lora, train, tracking, id=name, after=after))
            shared.last = name
        return runs

    def run(label: str, parameters: Parameters, trial_seed: int) -> Any:
        data, base, lora, generation = (parameters[name] for name in ("data", "base", "lora", "generation"))
        train = replace(parameters["train"], seed=trial_seed)
        base, base_sha256 = shared.get("resolved", base, base.resolved)
        parts = shared.get("data", (data, base), lambda: prepare(data, base, base_sha256))
        base_dir = shared.get(
            "base",
            (base, data.n_facts),
            lambda: prepare_base(base, data.n_facts, seed, base_sha256, id=shared.name("prepare_base")),
        )
        adapters = shared.get(
            "adapters", (data, base, lora, train), lambda: train_adapters(parts, base_dir, lora, train)
        )
        _, history, summary = adapters[0]
        _, val, test, _ = parts
        return finetune_trial(
            label,
            trial_seed,
            base_dir,
            [adapter for adapter, _, _ in adapters],
            val,
            test,
            history,
            summary,
            generation,
            sweep.samples,
            id=shared.name(f"trial_{label}_seed_{trial_seed}"),
        )

    return run


def pretrain_trials(sweep: SweepConfig, seed: int, tracking: TrackingConfig) -> AddTrial:
    """Return a function that adds the steps of a pretraining trial. Only the text uses the run's seed."""
    shared = _SharedSteps()

    def fetch(text: Any) -> Any:
        return text_step(text)(text, seed, id=shared.name("fetch_text"))

    def run(label: str, parameters: Parameters, trial_seed: int) -> Any:
        text, model, pretrain = (parameters[name] for name in ("text", "model", "pretrain"))
        documents = shared.get("text", text, lambda: fetch(text))
        name = shared.name(f"trial_{label}_seed_{trial_seed}")
        return pretrain_trial(label, trial_seed, documents, text, model, pretrain, tracking, id=name)

    return run


def attention_trials(sweep: SweepConfig, seed: int, tracking: TrackingConfig) -> AddTrial:
    """Return a function that adds the step of an attention trial. Needs only the trial's seed."""
    shared = _SharedSteps()
    return lambda label, parameters, trial_seed: attention_trial(
        label, trial_seed, parameters["attention"], id=shared.name(f"trial_{label}_seed_{trial_seed}")
    )


class _SharedSteps:
    """The steps that were added so far: their names, and the outputs that several trials use."""

    def __init__(self) -> None:
        self.last = ""  # name of the training step that was added last
        self._names: set[str] = set()
        self._outputs: dict[str, Any] = {}

    def get(self, kind: str, key: Any, make: Callable[[], Any]) -> Any:
        """Return the result of `make`, which is called once for equal keys."""
        text = f"{kind} {key!r}"  # the repr of a dataclass contains all values
        if text not in self._outputs:
            self._outputs[text] = make()
        return self._outputs[text]

    def name(self, text: str) -> str:
        """Return a new step name of letters, digits and underscores."""
        plain = re.sub(r"\W+", "_", text).strip("_")
        name, number = plain, 1
        while name in self._names:
            number += 1
            name = f"{plain}_{number}"
        self._names.add(name)
        return name


TRIALS: Mapping[str, Callable[[SweepConfig, int, TrackingConfig], AddTrial]] = {
    "finetune": finetune_trials,
    "pretrain": pretrain_trials,
    "attention": attention_trials,
}
