"""Where a step's time goes: the classes of kernels, the arithmetic, and the command without a GPU."""

import json
import sys
from pathlib import Path

import jax
import pytest

from benchmarks import step
from benchmarks.bench import MODELS
from benchmarks.step_classes import (
    ATTENTION,
    CLASSES,
    GAPS,
    GLUE,
    HEAD,
    OTHER,
    PARTS,
    PROJECTIONS,
    SAMPLING,
    STEP,
    Event,
    Program,
    classify,
    divide,
    read_program,
)  # fmt: skip
from jaxinfer.model import read_config
from jaxinfer.roofline import decode_step, find_hardware
from tests.benchmarks.test_decode import subject

BODY = "jit(_traced_loop)/while/body/eval_jaxpr"
LOOP, STEPS = "jit__traced_loop", "jit__traced_step"
# Lines of Llama-3-8B's decode loop as XLA compiles it for an H200, shortened; the calls of cuBLAS after its manner.
HLO = f"""\
HloModule {LOOP}, is_scheduled=true, entry_computation_layout={{(bf16[4096]{{0}})->bf16[4096]{{0}}}}

%fused_maximum_select (p.0: s32[64]) -> (s32[4,16], s32[64]) {{
  %p.0 = s32[64]{{0}} parameter(0)
  %mul.4 = s32[64]{{0}} multiply(%p.0, %p.0), metadata={{op_name="{BODY}/attention/jit(make_schedule)/mul"}}
  %max.2 = s32[64]{{0}} maximum(%mul.4, %p.0), metadata={{op_name="{BODY}/attention/jit(make_schedule)/max"}}
  %select.7 = s32[64]{{0}} select(%p.0, %max.2, %p.0), metadata={{op_name="{BODY}/sampling/jit(_where)/select_n"}}
  ROOT %tuple.13 = (s32[4,16]{{1,0}}, s32[64]{{0}}) tuple(%max.2, %select.7)
}}

%nested (parameter_0: bf16[64,4096]) -> f32[64,128256] {{
  ROOT %dot.0 = f32[64,128256]{{1,0}} dot(%parameter_0), metadata={{op_name="{BODY}/head/WD,VD->WV/dot_general"}}
}}

%gemm_fusion_dot_general.2_computation (parameter_0: bf16[64,4096]) -> f32[64,128256] {{
  ROOT %block.0 = f32[64,128256]{{1,0}} fusion(%parameter_0), kind=kCustom, calls=%nested
}}

%region_0.62 (arg: (s32[], s32[64])) -> (s32[], s32[64]) {{
  %copy.540 = pred[64]{{0}} copy(%gte.1)
  %loop_gather_fusion.1 = bf16[64,1,4096]{{2,1,0}} fusion(%a, %b), kind=kLoop, metadata={{op_name="{BODY}/gather"}}
  %mpmd_map.18 = bf16[1,64,6144]{{2,1,0}} custom-call(%a), custom_call_target="mosaic_gpu_v2", \
metadata={{op_name="{BODY}/jit(streaming_matmul)/streaming_matmul/mpmd_map"}}, backend_config={{module="ML\\EFR"}}
  %input_scatter_fusion.2 = bf16[28736,8,128]{{2,1,0}} fusion(%a), metadata={{op_name="{BODY}/attention/scatter"}}
  %loop_maximum_select_fusion = (s32[4,16]{{1,0}}, /*index=1*/s32[64]{{0}}) fusion(%a), kind=kLoop, \
calls=%fused_maximum_select, metadata={{op_name="cumsum"}}
  %loop_pad_fusion.31 = bf16[512,8,128]{{2,1,0}} fusion(%a), \
metadata={{op_name="{BODY}/attention/jit(_launch)/jit(_pad)/pad"}}
  %custom-call.5.0 = (bf16[64,4096]{{1,0}}, s8[4]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={{op_name="{BODY}/TM,MD->TD/dot_general"}}
  %loop_multiply_fusion.31 = bf16[64,14336]{{1,0}} fusion(%a), kind=kLoop, metadata={{op_name="{BODY}/mul"}}
  %fusion.1305 = bf16[64,4096]{{1,0}} fusion(%a), kind=kInput, metadata={{op_name="{BODY}/convert_element_type"}}
  %custom-call.6.0 = (bf16[64,4096]{{1,0}}, s8[4]{{0}}) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
metadata={{op_name="{BODY}/head/WD,VD->WV/dot_general"}}
  %gemm_fusion_dot_general.2 = f32[64,128256]{{1,0}} fusion(%a), kind=kCustom, \
calls=%gemm_fusion_dot_general.2_computation, metadata={{op_name="{BODY}/convert_element_type"}}
  %input_reduce_fusion = (f32[64,501]{{1,0}}, s32[64]{{0}}) fusion(%a), metadata={{op_name="{BODY}/sampling/reduce"}}
  ROOT %tuple.9 = (s32[], s32[64]{{0}}) tuple(%a, %b)
}}
"""
NVJET = "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT"


def test_the_programs_instructions_tell_the_class_of_a_kernel():
    programs = {LOOP: read_program(HLO)}
    by_name = {
        "loop_gather_fusion_1": GLUE,
        "input_scatter_fusion_2": ATTENTION,
        "loop_maximum_select_fusion": ATTENTION,  # the root has no path: as most of what is in it
        "loop_pad_fusion_31": ATTENTION,
        "loop_multiply_fusion_31": GLUE,
        "fusion_1305": GLUE,
        "gemm_fusion_dot_general_2": HEAD,  # the matmul within, whatever is done to its result
        "input_reduce_fusion": SAMPLING,
        "streaming_matmul_mosaic_gpu_kernel": PROJECTIONS,
        "streaming_mlp_mosaic_gpu_kernel": PROJECTIONS,
        "flash_decoding_mosaic_gpu_kernel": ATTENTION,
        "flash_attention_mosaic_gpu_kernel": ATTENTION,
        "Memset 0": OTHER,
        "MemcpyD2D": OTHER,
        "a_new_kernel": OTHER,
        NVJET: None,
    }
    assert {name: classify(Event(name, 0, 1), programs) for name in by_name} == by_name
    by_instruction = {
        (NVJET, "while.28/custom-call.5.0"): PROJECTIONS,
        (NVJET, "custom-call.6.0"): HEAD,
        ("MemcpyD2D", "copy.540"): GLUE,
        ("streaming_matmul_mosaic_gpu_kernel", "mpmd_map.18"): PROJECTIONS,
    }
    found = {key: classify(Event(key[0], 0, 1, key[1], LOOP), programs) for key in by_instruction}
    assert found == by_instruction


def test_the_same_name_in_two_programs():
    programs = {STEPS: Program({"fusion_1": PROJECTIONS}), LOOP: Program({"fusion_1": HEAD})}
    assert classify(Event("fusion_1", 0, 1, "fusion.1", LOOP), programs) == HEAD
    assert classify(Event("fusion_1", 0, 1, "fusion.1", STEPS), programs) == PROJECTIONS
    assert classify(Event("fusion_1", 0, 1, "fusion.1", "jit__traced_sample"), programs) == SAMPLING


def test_a_librarys_matmuls_come_round_in_order():
    programs = {LOOP: read_program(HLO)}
    assert programs[LOOP].library == [PROJECTIONS, HEAD]
    durations = [5, 7, 6, 8]
    events = [Event(NVJET, 10 * i, duration) for i, duration in enumerate(durations)]
    assert divide(reversed(events), programs) == {(PROJECTIONS, NVJET): 11, (HEAD, NVJET): 15}
    assert divide(events[:3], programs) == {(OTHER, NVJET): 18}  # not a whole number of rounds: none is known


def test_time_counts_once_where_kernels_overlap():
    events = [
        Event("fusion_1305", 0, 10),
        Event("input_reduce_fusion", 8, 6),  # launched early
        Event("loop_gather_fusion_1", 9, 2),  # within the one before
        Event("fusion_1305", 20, 5),
    ]
    assert divide(events, {LOOP: read_program(HLO)}) == {
        (GLUE, "fusion_1305"): 15,
        (SAMPLING, "input_reduce_fusion"): 4,
        (GLUE, "loop_gather_fusion_1"): 0,
    }


@pytest.mark.parametrize("model", ["llama-3-8b", "mixtral-8x7b"])
def test_every_part_of_the_cost_has_a_class(model):
    cost = decode_step(read_config(MODELS / model), 4, 100)
    classed = [part for parts in PARTS.values() for part in parts]
    assert set(cost.parts) <= set(classed)
    assert len(set(classed)) == len(classed)


def test_the_records_add_up_to_the_step():
    machine = find_hardware("h200-measured")
    cost = decode_step(read_config(MODELS / "llama-3-8b"), 16, 256)
    busy = {(PROJECTIONS, NVJET): 3e6, (PROJECTIONS, "streaming"): 0.5e6, (SAMPLING, "a"): 1e4, (OTHER, "b"): 2e3}
    records = step.records(step.Case("llama-3-8b B16", 4e-3, busy, cost), machine)
    time = {record.implementation: record for record in records if record.metric == step.METRIC}
    assert tuple(time) == CLASSES
    assert time[PROJECTIONS].value == pytest.approx(3500)
    assert time[GAPS].value == pytest.approx(4000 - 3500 - 10 - 2)
    assert time[STEP].value == pytest.approx(sum(record.value for record in time.values()) / 2)
    least = cost.parts["projections"].limit(machine) + cost.parts["mlp"].limit(machine)
    assert time[PROJECTIONS].roofline_fraction == pytest.approx(least / 3.5e-3)
    assert time[STEP].roofline_fraction == pytest.approx(cost.limit(machine) / 4e-3)
    limits = {record.implementation: record.value for record in records if record.metric == "limit"}
    assert sum(limits.values()) == pytest.approx(2 * limits[STEP])
    shown = step.table(records).splitlines()
    assert shown[0] == "| us of a step | llama-3-8b B16 |"
    assert [line.split(" | ")[0] for line in shown[2:]] == [f"| {kind}" for kind in CLASSES]


def test_gaps_may_be_below_zero():
    cost = decode_step(read_config(MODELS / "llama-3-8b"), 1, 256)
    records = step.records(step.Case("x", 1e-3, {(GLUE, "a"): 1.5e6}, cost), find_hardware("h200"))
    assert [record.value for record in records if record.implementation == GAPS] == [pytest.approx(-500)]


PROFILE = """\
planes { name: "/host:CPU" lines { name: "Stream of the host" events { metadata_id: 1 duration_ps: 1 } }
  event_metadata { key: 1 value { id: 1 name: "host" } } }
planes { name: "/device:GPU:0"
  lines { name: "Stream #13(Compute)" timestamp_ns: 100 events { metadata_id: 1 offset_ps: 5000 duration_ps: 2000000
    stats { metadata_id: 1 str_value: "while.28/fusion.1" } stats { metadata_id: 2 ref_value: 3 } } }
  lines { name: "XLA Ops" events { metadata_id: 1 duration_ps: 1 } }
  event_metadata { key: 1 value { id: 1 name: "fusion_1" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  stat_metadata { key: 3 value { id: 3 name: "jit__traced_loop" } } }
"""


@pytest.mark.filterwarnings("ignore:builtin type event_stats:DeprecationWarning")
def test_events_are_those_of_the_devices_streams(tmp_path):
    path: Path = tmp_path / "host.xplane.pb"
    path.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(PROFILE))
    assert list(step.read_events(path)) == [Event("fusion_1", 105, 2000, "while.28/fusion.1", LOOP)]


def test_a_profile_without_the_gpu_that_is_there_is_an_error(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(RuntimeError, match="shows nothing on the GPU"):
        step.profile(lambda: None)


def test_the_command(monkeypatch, tmp_path, capsys):
    """Without a GPU the step is timed and not divided; the model's named scopes reach the instructions that XLA makes
    of them."""
    programs, read_programs = {}, step.read_programs

    def read(compiled: jax.stages.Compiled) -> dict[str, Program]:
        read = read_programs(compiled)
        programs.update(read)
        return read

    monkeypatch.setattr(step, "read_programs", read)
    monkeypatch.setattr(step, "PROMPT", 5)
    monkeypatch.setattr(step, "NEW", 8)
    monkeypatch.setattr(step, "load", lambda *_: subject("auto"))
    arguments = ["--batches", "2", "--prompts", "7", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["step", *arguments])
    step.main()
    written = json.loads((tmp_path / "step.json").read_text())["records"]
    assert [(record["case"], record["implementation"]) for record in written if record["metric"] == step.METRIC] == [
        ("tiny prompt 7", STEP),
        ("tiny B2", STEP),
    ]
    assert "| us of a step | tiny prompt 7 | tiny B2 |" in capsys.readouterr().out
    assert programs.keys() == {STEPS, LOOP}
    assert set(programs[LOOP].classes.values()) == {PROJECTIONS, ATTENTION, GLUE, HEAD, SAMPLING}
