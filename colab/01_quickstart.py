# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Generate code with the embedded demo model, look inside one step of it, and ask what an 8B model could do on a GPU.
#
# On Colab, and wherever jaxinfer is not installed yet, the next cell installs it. Set `SOURCE` first, to the address
# that your copy of the repository is served from, as pip writes it: `git+https://HOST/OWNER/jaxinfer`, or
# `file:///FOLDER` for a clone on this machine. None stands here, for it depends on whose copy you read. Left empty,
# the cell does nothing where jaxinfer is installed, as it is in a clone after `uv sync`, and stops with a message
# elsewhere. The cells below it need nothing else: no network, no account and no GPU.

# %%
import subprocess
import sys
from importlib.util import find_spec

SOURCE = ""
if find_spec("jaxinfer") is None:
    assert SOURCE, "jaxinfer is not installed: set SOURCE to the address of your copy of the repository"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"jaxinfer[plots] @ {SOURCE}"], check=True)

# %% [markdown]
# ## Text in, text out
#
# `LLM()` loads the model that ships with the package: 11 million parameters, trained on the Python standard library.
# A folder or a Hugging Face id works the same way. Sampling parameters have the names that vLLM gives them. Two
# sequences of 64 tokens are all that this page needs; the defaults make room for eight of the model's whole context.

# %%
from jaxinfer.decode.sampling_params import SamplingParams
from jaxinfer.engine import Options
from jaxinfer.llm import LLM

llm = LLM(max_model_len=64, options=Options(max_num_seqs=2, page_size=8))
prompt = "def fibonacci(n):"
greedy = SamplingParams(temperature=0.0, max_tokens=48)
print(prompt, end="")
for piece in llm.stream(prompt, greedy):
    print(piece.text, end="")
print()

# %% [markdown]
# ## Inside one step
#
# The engine's programs work on a *slot* for each sequence and on *pages* of keys and values, here of 8 tokens each. We
# start from an empty state, as an engine does, and give the prompt slot 0 and eight pages: any do, save page 0, where
# padding is written.

# %%
import jax
import numpy as np

from jaxinfer.decode import sampling
from jaxinfer.decode.batch import StepInput, make_batch

runner = llm.engine.runner
programs, layout = runner.programs, runner.layout
state, cache = programs.new_state()
pages = [5, 2, 7, 4, 12, 1, 9, 3]
state = programs.admit(state, {0: programs.admission(greedy, [pages])})
print("keys of one layer, [page, slot in page, KV head, head size]:", cache[0].k_PSKH.shape)

# %% [markdown]
# A step takes a `Batch`: first one token for each slot that decodes, none yet, then the prompts that are read, one
# after the other without padding between them. Each token knows its position, and where in the pages its key and value
# go: `page x page size + slot in the page`. Programs are compiled for a few sizes only, so 64 rows stand here for one
# prompt, and the chunk of a second one is empty.

# %%
tokens = np.array(llm.tokenizer.encode(prompt), np.int32)
length = len(tokens)
given = StepInput(
    tokens_T=np.pad(tokens, (0, 64 - length)),
    slots_B=np.array([], np.int32),  # none decodes
    starts_R1=np.array([0, length, length], np.int32),
    slots_R=np.array([0, layout.slots], np.int32),  # no slot for the second chunk
    lengths_R=np.array([length, 0], np.int32),
    last_R=np.array([1, 0], np.int32),
)
with jax.set_mesh(llm.model.mesh):
    batch, rows = make_batch(state, given, layout.page_size)
placed = (batch.tokens_T.tolist(), batch.positions_T.tolist(), batch.views[0].write_T.tolist())
for token, position, write in zip(*placed, strict=True):
    page, slot = divmod(write, layout.page_size)
    if page:
        print(f"position {position:2}: {llm.tokenizer.decode([token])!r:16} -> page {page}, slot {slot}")
print("page table of the sequence:", batch.views[0].prefill_tables_RJ[1])

# %% [markdown]
# The model turns the batch into one hidden state a token, and writes keys and values on its way. Logits are computed
# only where a token is to be drawn: behind the last one of the prompt.


# %%
@jax.jit
def look(params, batch, cache):
    hidden_TD, _, _ = llm.model.forward(params, batch, cache)
    return hidden_TD, llm.model.logits(params, hidden_TD[rows.tokens_W])


with jax.set_mesh(llm.model.mesh):
    hidden_TD, logits_WV = look(runner.params, batch, cache)
print("hidden states", hidden_TD.shape, "logits", logits_WV.shape)
probabilities_V = np.asarray(jax.nn.softmax(logits_WV[0]))
for token in np.argsort(-probabilities_V)[:5]:
    print(f"{llm.tokenizer.decode([int(token)])!r:16} {probabilities_V[token]:.3f}")

# %% [markdown]
# The engine's own programs do all that and sample too. A step runs the prompt; then a loop on the device decodes eight
# tokens, each step reading what the one before it drew. The cache is updated in place.

# %%
needs = sampling.needs([greedy])
state, cache, first = programs.step(runner.params, state, cache, given, None, needs)
state, cache, loop = programs.loop(runner.params, state, cache, np.array([0], np.int32), steps=8, needs=needs)
drawn = [int(first.sampled.tokens_W[0, 0]), *np.asarray(loop.sampled.tokens_W[:, 0]).tolist()]
print(repr(prompt + llm.tokenizer.decode(drawn)))
print("tokens in the cache of each slot:", state.length_B)

# %% [markdown]
# ## What could an 8B model do?
#
# The roofline needs no device: the bytes and the operations of a step follow from the model's config. Decoding one
# sequence reads every weight for one token, so memory bounds it; 64 together share that read.

# %%
from rich.console import Console

from jaxinfer.cli.models import find_model
from jaxinfer.cli.plan_tables import plan_tables, verdict
from jaxinfer.roofline import Precision, find_hardware, make_plan

plan = make_plan(find_model("llama-3-8b"), find_hardware("h200"), batch=64, context=4096, precision=Precision())
console = Console(width=110)
for table in plan_tables(plan):
    console.print(table)
console.print(*verdict(plan), sep="\n")

# %%
from io import BytesIO

from IPython.display import Image

from jaxinfer.roofline.plot import plot_roofline

picture = BytesIO()
steps = {"decode": plan.decode.slowest(plan.hardware), "prefill": plan.prefill.slowest(plan.hardware)}
plot_roofline(plan.hardware, steps).savefig(picture, dpi=110)
Image(picture.getvalue())
