"""Models: the protocol of a masked model, Show-o behind it, the MAGVIT-v2 tokenizer, concept tokens, checkpoints.

Nothing here imports rollouts, rewards or training.
"""

from .base import (
    AnsweringModel,
    BlockAnsweringModel,
    CapturableModel,
    ConceptModel,
    ImageTokenizer,
    MaskedModel,
    WritingModel,
    answering,
    owning_rows,
    writing,
)
from .bundle import ModelBundle, Sources
from .concept_tokens import ConceptTokens
from .magvit import MagvitConfig, MagvitV2
from .prefix import Prefix
from .registry import load
from .sampling_rule import BlockRule, SamplingRule
from .showo import prompting
from .showo.attention import PromptKV
from .showo.model import Showo
from .showo.sizes import ShowoConfig
from .tokenizer import TextTokenizer

__all__ = [
    "AnsweringModel",
    "BlockAnsweringModel",
    "BlockRule",
    "CapturableModel",
    "ConceptModel",
    "ConceptTokens",
    "ImageTokenizer",
    "MagvitConfig",
    "MagvitV2",
    "MaskedModel",
    "ModelBundle",
    "Prefix",
    "PromptKV",
    "SamplingRule",
    "Showo",
    "ShowoConfig",
    "Sources",
    "TextTokenizer",
    "WritingModel",
    "answering",
    "load",
    "owning_rows",
    "prompting",
    "writing",
]
