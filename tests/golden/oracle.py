"""transformers as the oracle: one way to load a folder, used for the families and for the demo model."""

from pathlib import Path
from typing import cast

import numpy as np
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_grad_enabled(False)
torch.set_num_threads(1)  # the models are tiny, and one thread adds in one order


def versions() -> dict[str, str]:
    """The versions that a golden file was made with."""
    return {"numpy": np.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def untrained(folder: Path) -> PreTrainedModel:
    """The model that the folder's `config.json` describes, with transformers' own random weights."""
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def load_model(folder: Path) -> PreTrainedModel:
    """Read a checkpoint in float32. Raises ValueError when it lacks a tensor of the model, or has one too many."""
    loaded = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        dtype=torch.float32,
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    complaints = {kind: names for kind, names in info.items() if names}
    if complaints:
        raise ValueError(f"the tensors of {folder} are not those of its config: {complaints}")
    return model.eval()


def full_logits(model: PreTrainedModel, tokens: list[int]) -> np.ndarray:
    """Float32 logits [len(tokens), vocabulary], all positions at once and without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].numpy()


def margins(logits: np.ndarray) -> np.ndarray:
    """By how much the best logit of each row leads the second best."""
    second, first = np.sort(logits, axis=-1)[:, -2:].T
    return first - second
