"""Image steps in which torch.compile has made what stands between two attentions into few kernels.

    begin     x → norm, queries, keys, values                                  before the first attention
    between   attended → dense + MLP + x → norm, queries, keys, values         a block's end and the next one's start
    end       attended → dense + MLP + x → final norm                          after the last attention

Attention stays what it was, with the kernel and the buffers that it has. Blocks are arguments, so one compilation
serves all layers, and weights are read where they lie: what an optimizer or adapters write is seen, and nothing is
compiled again for it. The number of rows is a symbol, all other sizes are fixed; one row alone, which torch takes for
another case, stays eager, as do steps of more than `MOST_SIZES` sizes.
Products that have a form of their own keep it: queries, keys and values in one, GELU in the epilogue. A step is run
before it is captured, so a CUDA graph holds the compiled kernels and no compilation falls into a capture.
"""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor, nn

from ...utils.errors import UserError
from ...utils.profiling import taken
from ..adjoining import Whole, whole_of
from ..fused_gelu import is_fused
from .attention import Attention
from .layers import Block

if TYPE_CHECKING:
    from .model import Showo

log = logging.getLogger(__name__)

BACKEND = "inductor"
MOST_SIZES = 4
"""Numbers of positions, each in a precision and on a device, that are compiled for; steps of others stay eager."""

WAY_OUT = "use blocks=eager (in training grpo.rollout_blocks=eager)"

States = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""x, the norm of x, queries, keys, values."""
Function = TypeVar("Function", bound=Callable[..., object])


def _begin(block: Block, x: Tensor, cos: Tensor, sin: Tensor, whole: Whole | None) -> States:
    h = block.input_layernorm(x)
    q, k, v = block.self_attn.project(h, cos, sin, whole)
    return x, h, q, k, v


def _between(
    block: Block,
    after: Block,
    x: Tensor,
    h: Tensor,
    attended: Tensor,
    cos: Tensor,
    sin: Tensor,
    fused: bool,
    whole: Whole | None,
) -> States:
    return _begin(after, block.joined(x, h, attended, fused), cos, sin, whole)


def _end(block: Block, norm: nn.Module, x: Tensor, h: Tensor, attended: Tensor, fused: bool) -> Tensor:
    out: Tensor = norm(block.joined(x, h, attended, fused))
    return out


def _compiled(function: Function) -> Function:
    """`function` under torch.compile, with compilations of its own: torch keeps them by the code object."""
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return cast(Function, torch.compile(own, backend=BACKEND, fullgraph=True, dynamic=False))


class _Pieces:
    """The three functions for one number of positions."""

    def __init__(self) -> None:
        self.begin, self.between, self.end = _compiled(_begin), _compiled(_between), _compiled(_end)


class CompiledBlocks:
    """A context in which the image steps of `model` run compiled blocks, where no gradient is formed.

    Prompts, answers and the update stay eager: their lengths differ from call to call.

    Raises:
        UserError: on entering, where torch.compile cannot work here or a block is more than its layers; in a step that
            cannot be compiled.
    """

    def __init__(self, model: Showo):
        self._model = model
        self._pieces: dict[tuple[int, torch.dtype, torch.device], _Pieces] = {}
        self._outer: list[CompiledBlocks | None] = []
        self._said = False

    def __enter__(self) -> None:
        if not self._outer:
            if reason := objection(self._model.device):
                raise UserError(f"blocks=compiled: {reason}; {WAY_OUT}")
            blocks = self._model.showo.model.layers
            if any(block._forward_hooks or block._forward_pre_hooks for block in blocks):
                raise UserError(f"blocks=compiled: layers with hooks (spread over ranks) stay as they are; {WAY_OUT}")
        self._outer.append(self._model.compiled)
        self._model.__dict__["compiled"] = self

    def __exit__(self, *_: object) -> None:
        self._model.__dict__["compiled"] = self._outer.pop()

    def serves(self, x: Tensor) -> bool:
        """Whether a step from embeddings like `x` [B, L, D] runs compiled."""
        key = (x.shape[1], x.dtype, x.device)
        if torch.is_grad_enabled() or len(x) < 2:
            return False
        if key not in self._pieces and len(self._pieces) < MOST_SIZES:
            self._pieces[key] = _Pieces()
        if key not in self._pieces and not self._said:
            log.warning("steps of %d positions stay eager: %d sizes are compiled already", x.shape[1], MOST_SIZES)
            self._said = True
        return key in self._pieces

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attention) -> Tensor:
        """Embeddings [B, L, D] to final hidden states [B, L, D]; cos and sin are [L, R]."""
        taken("blocks of image steps", "compiled")
        pieces, decoder = self._pieces[x.shape[1], x.dtype, x.device], self._model.showo.model
        blocks = [cast(Block, block) for block in decoder.layers]
        whole = [whole_of(block.self_attn.three, x) for block in blocks]
        fused = [is_fused(block.mlp.fc1, x) for block in blocks]
        try:
            states = pieces.begin(blocks[0], _rows_vary(x), cos, sin, whole[0])
            for layer, block in enumerate(blocks):
                x, h, q, k, v = states
                attended = attend(layer, q, k, v)
                x, h, attended = (_rows_vary(tensor) for tensor in (x, h, attended))
                if layer + 1 < len(blocks):
                    after = blocks[layer + 1]
                    states = pieces.between(block, after, x, h, attended, cos, sin, fused[layer], whole[layer + 1])
            return pieces.end(blocks[-1], decoder.final_layernorm, x, h, attended, fused[-1])
        except torch.OutOfMemoryError:
            raise
        except torch._dynamo.exc.TorchDynamoException as error:
            raise UserError(f"blocks=compiled: torch.compile failed ({_brief(error)}); {WAY_OUT}") from error


def objection(device: torch.device) -> str:
    """Why torch.compile cannot work on `device`; empty if nothing speaks against it."""
    if not torch._dynamo.is_dynamo_supported():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return f"torch {torch.__version__} has no torch.compile for Python {version} on {sys.platform}"
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return "" if has_triton() else "torch.compile needs Triton for this GPU: pip install triton"
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        found = get_cpp_compiler()
    except (RuntimeError, OSError) as error:  # none was found, or the one found does not start
        return f"torch.compile needs a C++ compiler here ({_brief(error)})"
    return "" if shutil.which(found) else f"torch.compile needs a C++ compiler here, and {found} is not to be found"


def _rows_vary(x: Tensor) -> Tensor:
    """`x`, whose first size torch.compile is to take as a symbol."""
    torch._dynamo.mark_dynamic(x, 0)
    return x


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]
