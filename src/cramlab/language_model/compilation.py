"""What of a language model is compiled for training: every block as a whole, and the loss.

A compiled graph serves every layer of one kind. In training there are two graphs of a block with a read gate, one for
the layer that is judged and one for the others, and the passes without its reads above it use the latter. Both exist
once for the encoding phase and once for what follows. There is one graph of any other block, and one of the loss, or
two, with and without a judged layer. Evaluation, whose reads have no bounds and whose sizes therefore depend on the
gates, is not compiled.
"""

from __future__ import annotations

import torch
from torch import nn
from torch._functorch import config as functorch
from transformers import PreTrainedModel

from cramlab.language_model.modeling import CRAMForCausalLM


def compile_for_training(model: PreTrainedModel, backend: str = "inductor") -> None:
    """Compiles the blocks and the loss of a model in place; its parameters keep their names.

    Hooks of a CRAM block, but not those of its mixer, stay outside. The loss converts logits to 32 bits itself, so that
    no copy of them is written.

    Args:
        model: a CRAM model, or another whose blocks are in a `ModuleList`.
        backend: of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = 64
    # Compiled backward passes would else take products in bfloat16 that the forward pass took in 32 bits.
    if hasattr(functorch, "backward_pass_autocast"):  # later versions of PyTorch
        functorch.backward_pass_autocast = "off"
    if isinstance(model, CRAMForCausalLM):
        model.fixed_sizes = True
        for block in model.layers:
            setattr(block, "forward", torch.compile(block.forward, backend=backend))  # noqa: B010 - it is a method
        setattr(model, "_loss", torch.compile(model._loss, backend=backend))  # noqa: B010 - it is a method
        return
    found = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    for block in next(blocks for blocks in found if len(blocks) == model.config.num_hidden_layers):
        block.compile(backend=backend)
    model.loss_function = torch.compile(model.loss_function, backend=backend)
