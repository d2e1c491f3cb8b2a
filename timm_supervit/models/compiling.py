"""What ``torch.compile`` needs for a network of many subnets: room for their graphs, and drop paths outside them."""
import torch
from timm.layers import DropPath
from torch import Tensor


def allow_recompilation() -> bool:
    """Let ``torch.compile`` keep a graph for every subnet; called when a SuperViT is compiled.

    Why: a call that names another subnet is compiled anew, and after the eighth graph of one function torch runs it
    eagerly, with no more than a line in its log. Only newer releases of torch let who compiles choose the number.
    Hangs on: ``torch._dynamo.config.cache_size_limit``, named ``recompile_limit`` too since torch 2.7.
    Goes when: torch raises the number, or lets a module choose its own.
    """
    import torch._dynamo.config as config

    config.cache_size_limit = max(config.cache_size_limit, 64)
    return True


allow_recompilation_in_graph = torch.compiler.assume_constant_result(allow_recompilation)  # runs while it is traced


class UncompiledDropPath(DropPath):
    """timm's stochastic depth, outside compiled graphs: its rate, a constant in a graph, differs in every block."""

    _drop = torch.compiler.disable(DropPath.forward)

    def forward(self, x: Tensor) -> Tensor:
        """Drop branches in training."""
        return self._drop(x) if self.training else x
