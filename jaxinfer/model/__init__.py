"""The transformer: its description, read from a Hugging Face config, and its Flax modules."""

from jaxinfer.model.config import LayerConfig, ModelConfig, MoEConfig
from jaxinfer.model.families import read_config
from jaxinfer.model.model import Model, Params

__all__ = ["LayerConfig", "MoEConfig", "Model", "ModelConfig", "Params", "read_config"]
