"""Random numbers inside a model: a token of a packed tree draws one mask where each of its leaves' chains draws one."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

_WORDS = ("drop", "jitter")


def drawing(model: nn.Module) -> list[str]:
    """What makes training draw, as ``layers.0.mlp.dropout=0.1``: dropout, layer drop, router jitter."""
    found = []
    for path, module in model.named_modules():
        if isinstance(module, _DropoutNd):
            found += [f"{path}={module.p}"] if module.p > 0 else []
        else:
            found += [f"{path}.{name}={value}".lstrip(".") for name, value in _numbers(module)]
    return found


def check_dropout(model: nn.Module) -> None:
    """ValueError where training would draw, with what ``drawing`` finds."""
    if draws := drawing(model):
        raise ValueError(
            f"{type(model).__name__} draws random numbers in training ({', '.join(draws[:3])}"
            f"{', ...' if draws[3:] else ''}): a shared token has one dropout mask but a chain draws one per leaf; set"
            " them to 0 in the config (of the adapter, too), or call treegrpo.dropout.disable_dropout(model), as TRL"
            " does for disable_dropout=True"
        )


def disable_dropout(model: nn.Module) -> nn.Module:
    """Sets all that ``drawing`` finds, and what the configs say of it, to 0; returns the model.

    Raises ``ValueError`` for PhiMoE with ``router_jitter_noise``, before anything is changed: that number also bounds
    which experts count outside training, where samplers use it.
    """
    for path, module in model.named_modules():
        noise = vars(module).get("router_jitter_noise")
        if noise:
            raise ValueError(
                f"{path}.router_jitter_noise={noise} draws in training and weighs experts outside it: set it to 0 in"
                " the config that trainer and samplers load the model with, or take another model"
            )
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        config: Any = getattr(module, "config", None)
        parts = [module, config, config.get_text_config() if hasattr(config, "get_text_config") else None]
        for part in parts:
            for name, _ in _numbers(part):
                setattr(part, name, 0.0)
    return model


def _numbers(part: Any) -> list[tuple[str, float]]:
    """Attributes that are named for dropout or jitter and hold a rate above 0."""
    held = vars(part).items() if part is not None else ()
    return [
        (name, value)
        for name, value in held
        if isinstance(value, float) and value > 0 and any(word in name.lower() for word in _WORDS)
    ]
