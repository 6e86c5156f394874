"""Dtypes and modes of a model while it is trained."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gpt2core.config import PretrainConfig, TrainConfig
from gpt2core.kernels import has_bf16_instructions
from gpt2core.linear import Linear, PrepackedWeight
from gpt2core.lora import lora_layers
from gpt2core.model import GPT2


def base_dtype(config: TrainConfig | PretrainConfig) -> torch.dtype:
    """Return the dtype of frozen weights and activations."""
    return torch.float32 if config.precision == "fp32" else torch.bfloat16


@contextmanager
def training_mode(model: GPT2, config: TrainConfig | PretrainConfig) -> Iterator[None]:
    """Context manager that sets train mode, gradient checkpointing, determinism, and the weights' dtypes by the config.

    At the end, modes and dtypes are restored, and frozen weights have exactly their previous values.
    """
    modes = [(module, module.training) for module in model.modules()]
    frozen = base_dtype(config)
    trained = torch.bfloat16 if config.precision == "bf16-true" else torch.float32
    checkpointing, was_deterministic = model.gradient_checkpointing, torch.are_deterministic_algorithms_enabled()
    before = []  # the weights that are converted, and their data
    for parameter in model.parameters():
        dtype = trained if parameter.requires_grad else frozen
        if parameter.requires_grad or parameter.dtype != dtype:
            before.append((parameter, parameter.data))
        parameter.grad = None
        parameter.data = parameter.data.to(dtype)
    model.train()
    model.gradient_checkpointing = isinstance(config, TrainConfig) and config.gradient_checkpointing
    if isinstance(config, TrainConfig) and config.deterministic:
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # torch then requires it for products on a GPU
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic)
        model.gradient_checkpointing = checkpointing
        for module, training in modes:
            module.training = training
        for parameter, data in before:
            parameter.grad = None
            parameter.data = parameter.data.to(data.dtype) if parameter.requires_grad else data


def trains_only_lora(model: GPT2) -> bool:
    """Return whether an adapter has all the weights that require gradients."""
    return all("lora_" in name for name, weight in model.named_parameters() if weight.requires_grad)


@contextmanager
def prepacked_weights(model: GPT2) -> Iterator[None]:
    """Context manager that prepacks the weights if only an adapter is trained, on a bf16 base on a CPU.

    A prepacked matrix has two copies. Its original parameter is emptied for this time; otherwise, three copies would be
    in memory.
    """
    only_lora = trains_only_lora(model) and not any(layer.config.dora for _, layer in lora_layers(model))
    head = model.wte.weight.data
    is_prepackable = (
        only_lora and head.device.type == "cpu" and head.dtype == torch.bfloat16 and has_bf16_instructions()
    )
    layers = [module for module in model.modules() if isinstance(module, Linear)] if is_prepackable else []
    try:
        for layer in layers:
            layer.prepacked = PrepackedWeight.make(layer.weight.data)
            layer.weight.data = head.new_empty(0)
        model.prepacked_head = PrepackedWeight.make(head) if is_prepackable else None
        yield
    finally:
        for layer in layers:
            if layer.prepacked is not None:
                layer.weight.data, layer.prepacked = layer.prepacked.weight.to_dense(), None
        model.prepacked_head = None
