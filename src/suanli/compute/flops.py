"""Counts the floating-point operations of any model while it runs.

The counter sees each operator with its actual shapes and applies PyTorch's formulas, and those below for operators
that PyTorch has none for. Matrix products, convolutions, attention and recurrent layers count, with two operations
for each multiply-and-add; elementwise operations, norms and pooling don't. Compiled code runs eagerly while it is
counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def flops(work: Callable[[], object]) -> int:
    """Operations of one call of `work`, in its forward and backward passes: the top of this file says what counts.
    Causal attention counts as full attention."""
    with count_flops() as counter:
        work()
    return counter.total


@contextmanager
def count_flops() -> Iterator[Counter]:
    with disable_fastpath(), Counter() as counter:
        yield counter


class _Counts:
    """A base class for `__torch_dispatch__`: defined in a subclass of TorchDispatchMode itself, torch would wrap it,
    and its first call would import torch._dynamo, which takes as long as torch and which few trainings need."""

    supports_higher_order_operators = True
    total: int
    formulas: Mapping[Any, Callable[..., int]]

    def __torch_dispatch__(self, operator: Any, _: object, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(operator, torch._ops.OpOverload):  # one that takes functions
            return self._cond(*args) if operator.name() == "cond" else operator(*args, **kwargs)
        formula = self.formulas.get(operator.overloadpacket)
        if formula is None:  # in inference, composite operators arrive undivided
            with self:  # type: ignore[attr-defined]
                out = operator.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = operator(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out

    def _cond(self, condition: Any, *branches_and_operands: Any) -> Any:
        """Run torch.cond, counting the longer of its branches."""
        *branches, operands = branches_and_operands
        before, totals, outs = self.total, [], []
        for branch in branches:
            self.total = before
            with self:  # type: ignore[attr-defined]
                outs.append(branch(*operands))
            totals.append(self.total)
        self.total = max(totals)
        return outs[0] if condition else outs[1]


class Counter(_Counts, TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts `total` while it is entered, by torch's formulas and those below."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0
        self.formulas = FlopCounterMode(display=False, custom_mapping=_formulas()).flop_registry


@contextmanager
def disable_fastpath() -> Iterator[None]:
    """Disable the fast path of torch's attention: in inference it computes a whole encoder or attention layer in one
    call, which has no formula and hides the layers inside. The usual path computes the same."""
    was_on = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_on)


Shape: TypeAlias = "tuple[int, ...]"


def _formulas() -> dict[Any, Callable[..., int]]:
    """For operators that PyTorch has no formula for. Their arguments are shapes in place of tensors."""
    by_name: dict[str, Callable[..., int]] = {
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
    built_in = FlopCounterMode(display=False).flop_registry
    operators = {getattr(torch.ops.aten, name, None): formula for name, formula in by_name.items()}
    return {operator: formula for operator, formula in operators.items() if operator and operator not in built_in}


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Scores (…, Q, K) of query (…, Q, D) and key (…, K, D), times value (…, K, E)."""
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(_: Shape, query: Shape, key: Shape, value: Shape, *__: object, **___: object) -> int:
    """The scores again, and two products for each of the two products of the forward pass."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _recurrent(inputs: Shape, *args: Any, **_: object) -> int:
    """Each position (L, B) is multiplied once with each weight matrix; biases have one dimension."""
    weights = args[0] if isinstance(args[0], list) else args[:4]
    return 2 * math.prod(inputs[:-1]) * sum(math.prod(shape) for shape in weights if len(shape) == 2)
