"""Low-rank adapters: two small matrices that learn in place of each large one of an attention layer.

The weight W (out, in) of a layer stays, and the layer computes with W + B A, where A is (rank, in) and B (out, rank).
B begins at zero, so training begins at the network that was given. The adapters are parametrizations of torch: whatever
reads the weight, such as the fused attention of `nn.MultiheadAttention`, gets the sum. A saved model has the sums,
under the plain names, and is a network like any other.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn
from torch.nn.utils import parametrize

from suanli.core.errors import UsageError
from suanli.models.layers import Head, in_head

_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention


class LowRank(nn.Module):
    def __init__(self, weight: torch.Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        bound = columns**-0.5  # as torch initialises a linear layer of this many inputs
        a = torch.empty(rank, columns).uniform_(-bound, bound, generator=generator)
        self.lora_a = nn.Parameter(a.to(weight))
        self.lora_b = nn.Parameter(weight.new_zeros(rows, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.lora_b @ self.lora_a


def add_adapters(model: nn.Module, rank: int, *, head: Head, seed: int) -> int:
    """Adds adapters to the attention layers of `model`, in place, and freezes all else but the head. Gives the number
    of matrices that have one: those that are larger than `rank`. Raises UsageError where there are none."""
    found = list(_attention_weights(model, head))
    if not found:
        raise UsageError(
            "lora_rank is for networks with attention layers, such as ViT, and this one has none.",
            fix="Leave it out: layer_lr_decay and unfreeze_epochs suit any network.",
        )
    sizes = [min(module.get_parameter(name).shape) for module, name in found]
    if rank >= max(sizes):
        raise UsageError(
            f"lora_rank can't be {rank}: the matrices of the attention layers are no larger than {max(sizes)}.",
            fix="Usual values are 4 to 32.",
        )
    found = [one for one, size in zip(found, sizes, strict=True) if size > rank]
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not in_head(name, head):
            parameter.requires_grad_(False)
    for module, name in found:
        parametrize.register_parametrization(module, name, LowRank(module.get_parameter(name), rank, generator))
    return len(found)


def _attention_weights(model: nn.Module, head: Head) -> Iterator[tuple[nn.Module, str]]:
    """Matrices of attention layers: a module and the name of its parameter."""
    inside: list[str] = []
    for path, module in model.named_modules():
        if not path or in_head(f"{path}.", head):
            continue
        if _is_attention(path, module):
            inside.append(f"{path}.")
        if not any(path.startswith(outer) or f"{path}." == outer for outer in inside):
            continue
        names = _PACKED if isinstance(module, nn.MultiheadAttention) else ("weight",)
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            own = dict(module.named_parameters(recurse=False))  # a parametrized one has none of its plain name
            yield from ((module, name) for name in names if name in own)


def _is_attention(path: str, module: nn.Module) -> bool:
    name = path.rpartition(".")[2].lower()
    return "attn" in name or "attention" in name or type(module).__name__.endswith("Attention")


def merged(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state of a network with adapters, as the plain network has it: each adapter is added to its weight. Of a
    network without any, the state itself."""
    plain: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        owner, found, rest = name.rpartition("parametrizations.")
        weight, _, part = rest.partition(".")
        a, b = (state.get(f"{owner}parametrizations.{weight}.0.lora_{matrix}") for matrix in "ab")
        if not found or a is None or b is None:
            plain[name] = tensor
        elif part == "original":
            plain[owner + weight] = tensor + b @ a
    return plain
