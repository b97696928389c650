"""Text that a model writes, for a draft to learn from: what it has to guess is the model's own text, and not the
library's (Zhou et al. 2023, "DistillSpec", arXiv 2310.08461, which compares the sources of such data).
"""

import jax
import numpy as np

from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Engine, Options, Request
from jaxinfer.model import Model, Params
from jaxinfer.training.data import whole_rows
from jaxinfer.training.train import Recipe

BEGUN = 64  # tokens of the library before what is written, or a quarter of a short context
SLOTS, PAGE = 256, 64


def generate_stream(model: Model, params: Params, library_T: np.ndarray, tokens: int, seed: int = 0) -> np.ndarray:
    """Pieces as long as the context, each begun by the library and gone on with by the model, at a temperature of 1.

    Args:
      params: as the model decodes with them.
      library_T: a stream of documents, from which beginnings are taken at random.
      tokens: that the pieces have together, at the least; at least 1.

    Returns:
      uint16 [T], one piece after the other.

    Raises:
      ValueError: `tokens` is below 1, or the library shorter than a beginning.
    """
    begun = min(BEGUN, model.context // 4)
    if tokens < 1:
        raise ValueError(f"tokens = {tokens} must be at least 1")
    if len(library_T) < begun:
        raise ValueError(f"library_T has {len(library_T)} tokens; a piece begins with {begun}")
    random, pieces = np.random.default_rng(seed), -(-tokens // model.context)
    starts = random.integers(len(library_T) - begun + 1, size=pieces).tolist()
    goes_on = SamplingParams(temperature=1.0, max_tokens=model.context - begun, ignore_eos=True)
    texts = [library_T[start : start + begun].tolist() for start in starts]
    engine = _engine(model, params, pieces)
    for piece, text in enumerate(texts):
        engine.add(Request(piece, tuple(text), goes_on, (), seed + piece))
    while engine.busy:
        for update in engine.step():
            texts[update.request.id] += update.tokens
    return np.concatenate(texts).astype(np.uint16)


def check_text(library_T: np.ndarray, generated: int, recipe: Recipe) -> None:
    """A ValueError where so many tokens that a model writes, or for 0 the library, make no batch."""
    if generated < 0:
        raise ValueError(f"generated = {generated} must be at least 0")
    whole_rows(generated or len(library_T), recipe.row, recipe.batch)


def _engine(model: Model, params: Params, pieces: int) -> Engine:
    """With memory for what it runs at once, and no more: the rest is for training."""
    slots, page = min(SLOTS, 1 << (pieces - 1).bit_length()), min(PAGE, 1 << model.context.bit_length() - 2)
    return Engine(
        model,
        jax.block_until_ready(params),
        Options(
            max_num_seqs=slots,
            max_num_batched_tokens=16 * SLOTS,
            page_size=page,
            num_pages=1 + slots * -(-model.context // page),
            enable_prefix_caching=False,
        ),
    )
