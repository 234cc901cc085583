"""The repeated parts of a network, which some speedups treat one by one."""

from __future__ import annotations

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of containers that consist of several modules themselves: residual blocks, transformer
    layers, groups of convolutions. None is inside another."""
    blocks: list[nn.Module] = []

    def walk(module: nn.Module, listed: bool) -> None:
        has_parts = any(True for _ in module.parameters()) and any(True for _ in module.children())
        if listed and has_parts and not (isinstance(module, CONTAINERS) and _holds_blocks(module)):
            blocks.append(module)
            return
        for child in module.children():
            walk(child, isinstance(module, CONTAINERS))

    walk(model, False)
    return blocks


def _holds_blocks(container: nn.Module) -> bool:
    return any(any(True for _ in child.children()) for child in container.children())
