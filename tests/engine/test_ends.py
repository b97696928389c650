"""Engines, and processes with one, that end while the device runs a program."""

import gc
import json
import subprocess
import sys
from pathlib import Path

from jaxinfer.engine.runner import Runner
from tests.engine.fake import fake_engine
from tests.engine.test_paging import CONTEXT, OPTIONS, request
from tests.engine.tiny import ONE_LAYER

CUT = """
import json, sys
import numpy as np
from jaxinfer.decode.sampling import GREEDY
from jaxinfer.engine import Engine, Options
from jaxinfer.model import Model, read_config
from jaxinfer.parallel import make_mesh
from tests.model.random_params import random_params

model = Model(read_config(json.loads(sys.argv[1])), make_mesh(1))
engine = Engine(model, random_params(model, 0), Options(max_num_seqs=1, num_pages=8, steps_per_dispatch=1024))
outputs = [engine.runner.loop(np.zeros(1, np.int32), GREEDY) for _ in range(20)]
print(outputs[-1].emits_nW.is_ready())
"""


def test_a_process_may_end_while_a_program_runs():
    command, root = [sys.executable, "-c", CUT, json.dumps(ONE_LAYER)], Path(__file__).parents[2]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "False\n"), ended.stderr


def test_who_drops_an_engine_waits_for_what_it_runs(monkeypatch):
    waited = []
    monkeypatch.setattr(Runner, "wait", lambda runner: waited.append(runner))
    engine = fake_engine(OPTIONS, CONTEXT)
    runner = engine.runner
    engine.add(request(0, (1, 2, 3), 20))
    engine.step()
    assert runner not in waited
    del engine
    gc.collect()
    assert runner in waited
