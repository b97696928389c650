"""The transformer: its description, read from a Hugging Face config, and its Flax modules."""

from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig
from jaxinfer.model.eagle import EagleHead, read_eagle_config
from jaxinfer.model.families import read_config
from jaxinfer.model.model import Model, Network, Params
from jaxinfer.model.transformer import Unfinished
from jaxinfer.parallel.pipeline import Round

__all__ = [
    "EagleHead", "LayerConfig", "MoEConfig", "Model", "ModelConfig", "Network", "Params", "Round",
    "Unfinished", "read_config", "read_eagle_config",
]  # fmt: skip
