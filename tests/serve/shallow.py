"""A model for servers in tests, whose programs compile in half of the time that the demo model's take."""

import json
import re
from pathlib import Path

from jaxinfer import checkpoint
from jaxinfer.llm import DEMO
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from jaxinfer.training.demo import TOKENIZER_FILES

KEPT = (0, 5)  # with these it writes something like code


def write_shallow(folder: Path) -> Path:
    """The demo model with two of its six layers."""
    config = json.loads((DEMO / "config.json").read_text()) | {"num_hidden_layers": len(KEPT)}
    files = {name: (DEMO / name).read_text() for name in TOKENIZER_FILES} | {"config.json": json.dumps(config)}
    model = Model(read_config(config), make_mesh(1))
    whole = checkpoint.load(DEMO, Model(read_config(DEMO), make_mesh(1)))
    arrays = {name: whole[re.sub(r"\d+", lambda found: str(KEPT[int(found[0])]), name)] for name in model.parameters}
    checkpoint.export(folder, model, arrays, files, shard_bytes=1 << 24)
    return folder
