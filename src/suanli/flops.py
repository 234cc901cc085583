"""How many operations a piece of work takes, counted while it runs, for any model.

PyTorch's counter sees each operator with the shapes that really occur. Matrix products, convolutions,
attention and recurrent layers count, two operations for each multiply-and-add; elementwise work, norms
and pooling do not. Operators that the counter passes over have their formulas here. What is compiled
runs uncompiled while it is counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable[[], object]) -> int:
    """Operations of one call of `work`, forward and backward alike: see the top of this file for what
    counts. Causal attention counts in full."""
    with counting() as counter:
        work()
    return counter.get_total_flops()


@contextmanager
def counting() -> Iterator[FlopCounterMode]:
    with unfused(), FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        yield counter


@contextmanager
def unfused() -> Iterator[None]:
    """In inference, torch computes a whole encoder layer or attention layer in one call that has no
    formula and hides the layers inside. The other way computes the same."""
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


Shape: TypeAlias = "tuple[int, ...]"


def _formulas() -> dict[Any, Callable[..., int]]:
    """For operators that PyTorch's counter passes over. They are given shapes in place of tensors."""
    written: dict[str, Callable[..., int]] = {
        "mv": lambda matrix, *_, **__: 2 * math.prod(matrix),
        "addmv": lambda _, matrix, *__, **___: 2 * math.prod(matrix),
        "dot": lambda vector, *_, **__: 2 * math.prod(vector),
        "_scaled_dot_product_flash_attention_for_cpu": _attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
        "_scaled_dot_product_attention_math_for_mps": _attention,
        "_scaled_dot_product_fused_attention_overrideable": _attention,
        "mkldnn_rnn_layer": _recurrent,
        "mkldnn_rnn_layer_backward": lambda *args, **_: 2 * _recurrent(*args),
        "_cudnn_rnn": _recurrent,
        "_cudnn_rnn_backward": lambda *args, **_: 2 * _recurrent(*args),
        "_lstm_mps": lambda inputs, _, weights, *__, **___: _recurrent(inputs, weights),
        "miopen_rnn": _recurrent,
        "miopen_rnn_backward": lambda *args, **_: 2 * _recurrent(*args),
    }
    known = FlopCounterMode(display=False).flop_registry
    operators = {getattr(torch.ops.aten, name, None): formula for name, formula in written.items()}
    return {operator: formula for operator, formula in operators.items() if operator and operator not in known}


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Scores (…, Q, K) of query (…, Q, D) and key (…, K, D), times value (…, K, E)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: object, **___: object) -> int:
    """The scores again, and two products for each of the two of the forward pass."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _recurrent(inputs: Shape, *args: Any, **_: object) -> int:
    """Each position (L, B) goes once through each weight matrix; biases have one dimension."""
    weights = args[0] if isinstance(args[0], list) else args[:4]
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)
