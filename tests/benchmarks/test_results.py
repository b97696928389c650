"""The files of results say where each figure comes from."""

import json

import pytest

from benchmarks.record import RESULTS, environment, parts

ANCHORS = ("anchors.json", "kernel_anchors.json", "serving_anchors.json")  # other systems' figures, as stated
WRITTEN = {
    f"{path.parent.name}/{path.name} {part['environment'].get('commit')}": part["environment"]
    for path in sorted(RESULTS.glob("*/*.json"))
    if path.name not in ANCHORS
    for part in parts(json.loads(path.read_text()))
}


@pytest.mark.parametrize("name", WRITTEN)
def test_every_measured_file_states_its_environment(name):
    made_in = WRITTEN[name]
    without = {"driver"} if made_in["device"] == "cpu" else set()
    assert [key for key in environment() if key not in without and made_in.get(key) in (None, "", "unknown")] == []
    assert len(made_in["commit"]) == 40


def test_every_card_has_its_decoding_figures_in_the_same_file():
    cards = {path for path in RESULTS.iterdir() if path.is_dir() and path.name != "cpu"}
    assert {path.parent for path in RESULTS.glob("*/decode.json")} == cards
